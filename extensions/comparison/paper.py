"""The paper's figures, for comparison with ours, and its claims as questions to our figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class PaperRow:
    """Bits per dimension and FID; ``None`` for what the paper does not report.

    ``bracketed`` bits per dimension are those of an inference network trained for a GAN.
    """

    bpd: float | None
    fid: float | None
    bracketed: bool = False
    mark: str = ""  # of the FID


PAPER = {
    "gan": PaperRow(7.0, 31.4, bracketed=True),
    "gan-rd": PaperRow(6.9, 24.0, bracketed=True),
    "vae": PaperRow(4.4, 171.0),
    "v-ade": PaperRow(3.5, 112.0),
    "av-gde": PaperRow(4.4, None),
    "av-ade": PaperRow(3.9, 28.0),
    "av-ade-rd": PaperRow(3.8, 26.0),
    "av-ade-pd": PaperRow(None, None),  # a later discriminator
    "av-ade-wg-rd": PaperRow(3.8, 17.2),
    "av-ade-iaf-rd": PaperRow(3.7, 18.6),
    "av-ade-s2": PaperRow(3.5, 28.9),
    "real-nvp": PaperRow(3.5, 56.8, mark="†"),
    "flow-gan-a": PaperRow(8.5, None),
    "flow-gan-h": PaperRow(4.2, None),
}


@dataclass(frozen=True)
class CitedRow:
    """A row of Tables 3 and 4 on a model that is not trained here, as the paper prints it."""

    data: str
    group: str
    model: str
    bpd: float | None = None
    fid: float | None = None
    mark: str = ""  # of the FID
    bpd_mark: str = ""


CITED = [
    CitedRow("CIFAR-10", "adversarial", "mmd-GAN", fid=25.0),
    CitedRow("CIFAR-10", "adversarial", "SNGAN", fid=29.3),
    CitedRow("CIFAR-10", "adversarial", "BatchGAN", fid=23.7),
    CitedRow("CIFAR-10", "adversarial", "SNGAN (residual, hinge)", fid=21.7),
    CitedRow("CIFAR-10", "likelihood", "VAE-IAF", 3.1, 73.5, "†"),
    CitedRow("CIFAR-10", "likelihood", "Flow++", 3.1),
    CitedRow("CIFAR-10", "likelihood", "Glow", 3.4, 46.8, "‡"),
    CitedRow("STL-10, 48×48", "hybrid", "AV-ADE (wg)", 4.4, 44.3),
    CitedRow("STL-10, 48×48", "hybrid", "AV-ADE (iaf)", 4.0, 52.7),
    CitedRow("STL-10, 48×48", "hybrid", "AV-ADE (s2)", 3.8, 52.1),
    CitedRow("STL-10, 48×48", "likelihood", "Real-NVP", 3.7, 103.2, "‡", "‡"),
    CitedRow("STL-10, 48×48", "adversarial", "BatchGAN", fid=51.0),
    CitedRow("STL-10, 48×48", "adversarial", "SNGAN (residual, hinge)", fid=40.1),
    CitedRow("ImageNet, 64×64", "hybrid", "AV-ADE (wg)", fid=45.5),
    CitedRow("ImageNet, 64×64", "likelihood", "Real-NVP", 3.98),
    CitedRow("ImageNet, 64×64", "likelihood", "Glow", 3.81),
    CitedRow("ImageNet, 64×64", "likelihood", "Flow++", 3.69),
    CitedRow("ImageNet, 64×64", "adversarial", "MMD-GAN", fid=36.6),
]

BPD, BPD_ERROR = "bpd", "bpd_error"
# Within these lie 95 % of the differences between two runs that differ only in their seed: 1.96
# times the square root of 2 times the deviation of three runs of av-ade, size tiny, after 80,000
# images. Their Fréchet distances in ResNet-20's features are 16 on average. The figures are in
# docs/comparison.md; rows.json lacks those of seed 0, which was trained on 400,000 images
# afterwards.
SEED_SPREAD_BPD = 0.026
SEED_SPREAD_DISTANCE = 0.10  # of the larger distance

# What the paper measures and no run here does.
NOT_RUN = (
    "STL-10, ImageNet at 64×64 pixels and LSUN (Tables 3 and 4): no system was trained on them",
    "the paper's networks (`--size paper`), on any data set",
    "FID: the distances here are in other features",
)

# Of one system: bpd and its standard error, and Fréchet distances by their space.
Figures = Mapping[str, float | None]


class Finding(Enum):
    """What our figures say about a claim."""

    HOLDS = "**holds**"
    FAILS = "**does not hold here**"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Claim:
    """A claim of the paper about several systems, as a question to our figures.

    Attributes:
        text: in words.
        systems: from the best to the worst, as the paper has them.
        figures: which of their figures decide; all must agree.
        lead: by how much each system must be better than the next.
        is_equality: whether it suffices that each system is no worse than the next.
    """

    text: str
    systems: tuple[str, ...]
    figures: tuple[str, ...]
    lead: float = 0.0
    is_equality: bool = False

    def judge(self, figures: Sequence[Figures]) -> Finding:
        """Judge the claim by the figures of its systems, in order; smaller figures are better.

        A difference within the spread of seeds decides nothing, nor does one of bits per dimension
        within two of its standard errors. Figures must agree on a pair. Of several pairs, one that
        fails refutes the claim.
        """
        pairs = set()
        for better, worse in zip(figures, figures[1:], strict=False):
            found = {
                _judge_pair(name, better, worse, self.lead)
                for name in self.figures
                if better[name] is not None and worse[name] is not None
            }
            pair = found.pop() if len(found) == 1 else Finding.UNDECIDED
            pairs.add(Finding.HOLDS if self.is_equality and pair is not Finding.FAILS else pair)
        if Finding.FAILS in pairs:
            return Finding.FAILS
        return Finding.HOLDS if pairs == {Finding.HOLDS} else Finding.UNDECIDED


def _judge_pair(name: str, better: Figures, worse: Figures, lead: float) -> Finding:
    a, b = better[name], worse[name]
    assert a is not None and b is not None
    if name == BPD:
        error = math.hypot(better.get(BPD_ERROR) or 0.0, worse.get(BPD_ERROR) or 0.0)
        spread = max(SEED_SPREAD_BPD, 2 * error)
    else:
        spread = SEED_SPREAD_DISTANCE * max(a, b)
    difference = b - a - lead
    if abs(difference) <= spread:
        return Finding.UNDECIDED
    return Finding.HOLDS if difference > 0 else Finding.FAILS


def claims(spaces: tuple[str, ...]) -> list[Claim]:
    """The claims of Tables 1 to 3.

    Args:
        spaces: feature spaces whose Fréchet distances judge the samples.
    """
    bpd = (BPD,)
    return [
        Claim("V-ADE beats VAE on bits per dimension by at least 0.4", ("v-ade", "vae"), bpd, 0.4),
        Claim("V-ADE beats VAE on samples", ("v-ade", "vae"), spaces),
        Claim("AV-GDE lies between GAN and VAE on samples", ("gan", "av-gde", "vae"), spaces),
        Claim("AV-ADE beats GAN on samples", ("av-ade", "gan"), spaces),
        Claim("AV-ADE beats VAE on samples", ("av-ade", "vae"), spaces),
        Claim("AV-ADE beats V-ADE on samples", ("av-ade", "v-ade"), spaces),
        Claim("AV-ADE beats AV-GDE on bits per dimension", ("av-ade", "av-gde"), bpd),
        Claim("AV-ADE beats AV-GDE on samples", ("av-ade", "av-gde"), spaces),
        Claim("AV-ADE (rd) beats Real-NVP on samples", ("av-ade-rd", "real-nvp"), spaces),
        Claim("two scales beat one on bits per dimension", ("av-ade-s2", "av-ade"), bpd),
        Claim(
            "AV-ADE (two scales) has bits per dimension comparable to Real-NVP's",
            ("av-ade-s2", "real-nvp"),
            bpd,
            is_equality=True,
        ),
        Claim(
            "a GAN's bracketed bits per dimension are worse than AV-ADE's by at least 1",
            ("av-ade", "gan"),
            bpd,
            1.0,
        ),
        Claim("a residual discriminator improves a GAN's samples", ("gan-rd", "gan"), spaces),
        Claim(
            "a residual discriminator improves AV-ADE's samples", ("av-ade-rd", "av-ade"), spaces
        ),
        Claim(
            "a generator of twice the width improves them further",
            ("av-ade-wg-rd", "av-ade-rd"),
            spaces,
        ),
        Claim(
            "an inverse autoregressive posterior improves bits per dimension",
            ("av-ade-iaf-rd", "av-ade-rd"),
            bpd,
        ),
        Claim(
            "an inverse autoregressive posterior improves samples",
            ("av-ade-iaf-rd", "av-ade-rd"),
            spaces,
        ),
        Claim(
            "AV-ADE (rd) beats Flow-GAN (both losses) on bits per dimension",
            ("av-ade-rd", "flow-gan-h"),
            bpd,
        ),
        Claim(
            "AV-ADE (rd) beats Flow-GAN (both losses) on samples",
            ("av-ade-rd", "flow-gan-h"),
            spaces,
        ),
        Claim(
            "without the likelihood, Flow-GAN's bits per dimension are worse by at least 1",
            ("flow-gan-h", "flow-gan-a"),
            bpd,
            1.0,
        ),
    ]
