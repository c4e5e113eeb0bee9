"""The paper's figures for CIFAR-10 (Tables 1 to 3), to stand beside ours; and its claims, to be
checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PaperRow:
    """Bits per dimension (``bracketed``: approximated around a GAN), Inception score and FID;
    ``None`` where not given.
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

Figures = Mapping[str, float | None]  # of one system: bpd, and Frechet distances by their space


@dataclass(frozen=True)
class Claim:
    """What the paper says of two systems, as a question to the figures of ours.

    Attributes:
        text: in words.
        systems: that must have been measured.
        figures: which of their figures decide; all must.
        holds: of one figure of the first and the second system.
    """

    text: str
    systems: tuple[str, str]
    figures: tuple[str, ...]
    holds: Callable[[float, float], bool]


def claims(spaces: tuple[str, ...]) -> list[Claim]:
    """The claims of Tables 1 to 3; samples are judged by the Frechet distances in the spaces that
    were used.
    """
    better = lambda a, b: a < b
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
            "a residual discriminator betters a GAN's samples", ("gan-rd", "gan"), spaces, better
        ),
        Claim(
            "a residual discriminator betters AV-ADE's samples",
            ("av-ade-rd", "av-ade"),
            spaces,
            better,
        ),
        Claim(
            "a generator of twice the width betters them further",
            ("av-ade-wg-rd", "av-ade-rd"),
            spaces,
            better,
        ),
        Claim(
            "an inverse autoregressive posterior betters bits per dimension",
            ("av-ade-iaf-rd", "av-ade-rd"),
            ("bpd",),
            better,
        ),
        Claim(
            "AV-ADE beats Flow-GAN by both losses on bits per dimension",
            ("av-ade-rd", "flow-gan-h"),
            ("bpd",),
            better,
        ),
        Claim(
            "AV-ADE beats Flow-GAN by both losses on samples",
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
