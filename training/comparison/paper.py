"""The paper's figures for CIFAR-10 (Tables 1 to 3) and its claims."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PaperRow:
    """Bits per dimension, Inception score and FID; ``None`` for what the paper does not report.

    ``bracketed`` bits per dimension are those of an inference network trained for a GAN.
    """

    bpd: float | None
    inception_score: float | None
    fid: float | None
    bracketed: bool = False


PAPER = {
    "gan": PaperRow(7.0, 6.8, 31.4, bracketed=True),
    "gan-rd": PaperRow(6.9, 7.4, 24.0, bracketed=True),
    "vae": PaperRow(4.4, 2.0, 171.0),
    "v-ade": PaperRow(3.5, 3.0, 112.0),
    "av-gde": PaperRow(4.4, None, None),
    "av-ade": PaperRow(3.9, 7.1, 28.0),
    "av-ade-rd": PaperRow(3.8, 7.5, 26.0),
    "av-ade-pd": PaperRow(None, None, None),  # a later discriminator
    "av-ade-wg-rd": PaperRow(3.8, 8.2, 17.2),
    "av-ade-iaf-rd": PaperRow(3.7, 8.1, 18.6),
    "av-ade-s2": PaperRow(3.5, 6.9, 28.9),
    "real-nvp": PaperRow(3.5, 4.5, 56.8),
    "flow-gan-a": PaperRow(8.5, 5.8, None),
    "flow-gan-h": PaperRow(4.2, 3.9, None),
}

# Of one system: bits per dimension as "bpd", and Fréchet distances by their feature space.
Figures = Mapping[str, float | None]


@dataclass(frozen=True)
class Claim:
    """A claim of the paper about two systems.

    Attributes:
        text: the claim in words.
        systems: the two systems, both of which must have been measured.
        figures: names of the figures that must agree with the claim.
        holds: whether a figure of the first and of the second system agree with it.
    """

    text: str
    systems: tuple[str, str]
    figures: tuple[str, ...]
    holds: Callable[[float, float], bool]


def claims(spaces: tuple[str, ...]) -> list[Claim]:
    """The claims of Tables 1 to 3, with samples compared by Fréchet distances in some spaces."""
    better = operator.lt
    return [
        Claim(
            "V-ADE beats VAE on bits per dimension by at least 0.4",
            ("v-ade", "vae"),
            ("bpd",),
            lambda a, b: a < b - 0.4,
        ),
        Claim("AV-ADE beats VAE on samples", ("av-ade", "vae"), spaces, better),
        Claim("AV-ADE beats V-ADE on samples", ("av-ade", "v-ade"), spaces, better),
        Claim("AV-ADE beats AV-GDE on bits per dimension", ("av-ade", "av-gde"), ("bpd",), better),
        Claim("AV-ADE beats AV-GDE on samples", ("av-ade", "av-gde"), spaces, better),
        Claim(
            "two scales beat one on bits per dimension", ("av-ade-s2", "av-ade"), ("bpd",), better
        ),
        Claim(
            "a GAN's bracketed bits per dimension are worse than AV-ADE's by at least 1",
            ("av-ade", "gan"),
            ("bpd",),
            lambda a, b: a < b - 1,
        ),
        Claim(
            "a residual discriminator improves a GAN's samples", ("gan-rd", "gan"), spaces, better
        ),
        Claim(
            "a residual discriminator improves AV-ADE's samples",
            ("av-ade-rd", "av-ade"),
            spaces,
            better,
        ),
        Claim(
            "a generator of twice the width improves them further",
            ("av-ade-wg-rd", "av-ade-rd"),
            spaces,
            better,
        ),
        Claim(
            "an inverse autoregressive posterior improves bits per dimension",
            ("av-ade-iaf-rd", "av-ade-rd"),
            ("bpd",),
            better,
        ),
        Claim(
            "AV-ADE beats Flow-GAN with both losses on bits per dimension",
            ("av-ade-rd", "flow-gan-h"),
            ("bpd",),
            better,
        ),
        Claim(
            "AV-ADE beats Flow-GAN with both losses on samples",
            ("av-ade-rd", "flow-gan-h"),
            spaces,
            better,
        ),
        Claim(
            "without the likelihood, Flow-GAN's bits per dimension are worse by at least 1",
            ("flow-gan-h", "flow-gan-a"),
            ("bpd",),
            lambda a, b: a < b - 1,
        ),
    ]
