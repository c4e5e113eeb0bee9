"""A client of the HTTP API, in NumPy arrays and typed results.

The page and the tests use it too.
"""

from __future__ import annotations

import base64
import io
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import httpx
import numpy as np
from PIL import Image

from serving.api.requests import PROBE_HEADER
from serving.ports import Ports
from serving.verdict.calibration import Unusual
from serving.verdict.decision import NOT_SCORED, Choice

PROBE_VARIABLE = "ADE_PROBE_SECRET"  # the service's to its page
MAX_WAIT_S = 30.0  # between two tries, however long a gateway advises
# What a proxy or gateway answers by itself, in another shape than the API's: status to code.
FOREIGN_ERRORS = {
    401: ("bad_token", "the server requires a valid token"),
    404: ("unknown_model", "the server has no model of this name"),
    413: ("request_too_large", "the request is larger than the server reads"),
}
RETRIED = (429, 503, 507)  # statuses after which the same request may succeed a little later
ImageLike = np.ndarray | Image.Image | str | os.PathLike[str] | bytes
Kind = Literal["mean", "density"]


class AdeError(Exception):
    """An answer that is an error: ``status``, ``code``, ``message`` and, for one of several images,
    ``index``.

    In the place of a :class:`ScoreResult` it has that one's ``accepted`` (never), ``decision`` and
    ``decision_reason``.
    """

    accepted = False
    decision: Choice = "no_verdict"

    def __init__(self, status: int, code: str, message: str, index: int | None = None) -> None:
        super().__init__(f"{message} ({status} {code})")
        self.status = status
        self.code = code
        self.message = message
        self.index = index

    @property
    def decision_reason(self) -> str:
        return f"{NOT_SCORED}: {self.message}"


@dataclass(frozen=True)
class Samples:
    """``images`` uint8 ``(N, H, W, C)``, made from ``seed``."""

    images: np.ndarray
    seed: int
    model: str


@dataclass(frozen=True)
class Latents:
    """One list entry a level, coarsest first; each float32 ``(N, c, h, w)``.

    ``eps``, the noise that samples ``z``, is empty unless asked for.
    """

    mean: list[np.ndarray]
    log_scale: list[np.ndarray]
    z: list[np.ndarray]
    eps: list[np.ndarray]


@dataclass(frozen=True)
class Reconstruction:
    """One image's reconstruction, uint8 ``(H, W, C)``, and its PSNR in decibels (infinite where
    equal).
    """

    image: np.ndarray
    psnr: float
    notes: list[str]


@dataclass(frozen=True)
class ScoreResult:
    """One image's bits per dimension, its parts, the verdict (``None`` where it is withheld) and
    the decision.

    Let an image through if it is ``accepted``: without a verdict, ``ood`` is ``None``, and it is
        not.
    """

    bpd: float
    bpd_parts: dict[str, float]
    standard_error: float | None
    ood_score: float | None
    p_value: float | None
    ood: bool | None
    notes: list[str]
    explain: list[Unusual]  # the most unusual first
    discovery: bool | None = (
        None  # whether it is reported at the false discovery rate that was asked for
    )
    bits: np.ndarray | None = (
        None  # of each pixel, float64 (H, W); they sum to bpd times the image's values
    )
    heat_map: bytes | None = None  # the same as a PNG
    decision: Choice = "no_verdict"
    decision_reason: str | None = "not_reported: the server is of a version that decides nothing"

    @property
    def accepted(self) -> bool:
        """Whether a calibrated verdict at this alpha found nothing unusual."""
        return self.decision == "accept"


@dataclass(frozen=True)
class GroupScore:
    """Several images judged together: ``p_value`` is of all (Simes), ``None`` where fewer than two
    got a verdict.

    ``notes`` say what too few calibration images make impossible; ``rejected`` are those that each
    by itself has a p-value of at most 0.01, whether discovered or not.
    """

    results: list[ScoreResult | AdeError]
    p_value: float | None
    discoveries: int
    rejected: int = 0
    notes: list[str] = field(default_factory=list)


class AdeClient:
    """Talks to one model of a service.

    Args:
        url: of the inference address; unless given, of a service that this environment's ports say.
        model: name of a further bundle; the first bundle needs none.
        token: where the service asks for one.
        retries: how often a request is repeated after 429, 503 or 507. The client waits as
            advised, or twice as long each time.
        timeout: seconds for one answer.

    Raises (every method):
        AdeError: the service answered an error.
        httpx.TransportError: there was no answer.

    Example::

        with AdeClient() as client:
            print(client.score(["cat.png"])[0].bpd)
    """

    def __init__(
        self,
        url: str | None = None,
        model: str | None = None,
        token: str | None = None,
        retries: int = 5,
        timeout: float = 120.0,
    ) -> None:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self.url = url or f"http://127.0.0.1:{Ports.from_environment().inference}"
        self._http = httpx.Client(base_url=self.url, timeout=timeout, headers=headers)
        self._prefix = "" if model is None else f"{model}-"
        self._retries = retries

    def __enter__(self) -> AdeClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def sample(
        self,
        n: int = 1,
        seed: int | None = None,
        index: int = 0,
        temperature: float = 1.0,
        kind: Kind = "mean",
    ) -> Samples:
        """New images; the seed that was used is in the result."""
        answer = self._post(
            "sample",
            {
                "n": n,
                "seed": seed,
                "index": index,
                "temperature": temperature,
                "kind": kind,
                "format": "npy",
            },
        )
        return Samples(
            _npy(answer), int(answer.headers["X-Ade-Seed"]), answer.headers["X-Ade-Model"]
        )

    def sample_png(
        self,
        n: int = 1,
        seed: int | None = None,
        index: int = 0,
        temperature: float = 1.0,
        kind: Kind = "mean",
    ) -> tuple[bytes, int]:
        """One picture of a grid of samples, a PNG file whose text reproduces it, and the seed that
        was used.
        """
        answer = self._post(
            "sample",
            {
                "n": n,
                "seed": seed,
                "index": index,
                "temperature": temperature,
                "kind": kind,
                "format": "png",
            },
        )
        return answer.content, int(answer.headers["X-Ade-Seed"])

    def is_ready(self) -> bool:
        """Whether all four operations answer; one that the model does not have answers by saying
        so.
        """
        try:
            secret = os.environ.get(PROBE_VARIABLE)  # without it these requests count as traffic
            probe = None if secret is None else {PROBE_HEADER: secret}
            images = _images(
                _npy(self._post("sample", {"seed": 0, "format": "npy"}, probe)), resize=False
            )
            for operation in ("encode", "reconstruct", "score"):
                try:
                    self._post(operation, images, probe)
                except AdeError as error:
                    if error.code != "not_available":
                        raise
            return True
        except (AdeError, httpx.TransportError):
            return False

    def decode(self, z: Sequence[np.ndarray], seed: int = 0, kind: Kind = "mean") -> np.ndarray:
        """The images of latents: one array a level, ``(N, c, h, w)``; uint8 ``(N, H, W, C)``."""
        return self._decode("z", z, seed, kind)

    def sample_with(
        self, eps: Sequence[np.ndarray], seed: int = 0, kind: Kind = "mean"
    ) -> np.ndarray:
        """The images of standard normal noise: one array a level, ``(N, c, h, w)``; uint8 ``(N, H,
        W, C)``.

        Noise of zeros is the mean that the coarser levels lead to expect.
        """
        return self._decode("eps", eps, seed, kind)

    def _decode(
        self, name: str, latents: Sequence[np.ndarray], seed: int, kind: Kind
    ) -> np.ndarray:
        entries = [
            {"levels": [{name: np.asarray(level[i]).tolist()} for level in latents]}
            for i in range(len(latents[0]))
        ]
        return _npy(
            self._post("sample", {"latents": entries, "seed": seed, "kind": kind, "format": "npy"})
        )

    def encode(
        self,
        images: Sequence[ImageLike] | np.ndarray,
        seed: int = 0,
        resize: bool = False,
        eps: bool = False,
    ) -> Latents:
        """Latents of images, and the noise that samples them if ``eps``; the first that cannot be
        used raises.
        """
        answer = self._post(
            "encode", {**_images(images, resize), "seed": seed, "eps": eps, "format": "npz"}
        )
        with np.load(io.BytesIO(answer.content), allow_pickle=False) as arrays:
            levels = range(sum(name.startswith("z_") for name in arrays.files))
            return Latents(
                *(
                    [arrays[f"{name}_{i}"] for i in levels if f"{name}_{i}" in arrays]
                    for name in ("mean", "log_scale", "z", "eps")
                )
            )

    def reconstruct(
        self,
        images: Sequence[ImageLike] | np.ndarray,
        seed: int = 0,
        kind: Kind = "mean",
        resize: bool = False,
    ) -> list[Reconstruction | AdeError]:
        """Reconstructions, one an image; an image that cannot be used has its error in its place."""
        answer = self._post(
            "reconstruct", {**_images(images, resize), "seed": seed, "kind": kind, "format": "json"}
        )
        return [
            _entry(r)
            or Reconstruction(
                _pixels(r["image"]),
                float("inf") if r["psnr"] is None else r["psnr"],
                r.get("notes", []),
            )
            for r in answer.json()["results"]
        ]

    def score(
        self,
        images: Sequence[ImageLike] | np.ndarray,
        samples: int = 1,
        seed: int = 0,
        alpha: float = 0.01,
        resize: bool = False,
        map: bool = False,
        explain: bool = True,
    ) -> list[ScoreResult | AdeError]:
        """Bits per dimension and verdicts, one an image; an image that cannot be used has its error
        in its place.
        """
        answer = self._post(
            "score",
            {
                **_images(images, resize),
                "samples": samples,
                "seed": seed,
                "alpha": alpha,
                "map": map,
                "explain": explain,
            },
        )
        return [_entry(r) or _score(r) for r in answer.json()["results"]]

    def score_group(
        self, images: Sequence[ImageLike] | np.ndarray, fdr: float = 0.1, resize: bool = False
    ) -> GroupScore:
        """Verdicts of several images together; of the discoveries a share of at most ``fdr`` is
        expected to be false.
        """
        answer = self._post(
            "score", {**_images(images, resize), "fdr": fdr, "explain": False}
        ).json()
        results = [_entry(r) or _score(r) for r in answer["results"]]
        group = answer.get("group", {})
        return GroupScore(
            results,
            group.get("p_value"),
            sum(isinstance(r, ScoreResult) and bool(r.discovery) for r in results),
            sum(r.decision == "reject" for r in results),
            group.get("notes", []),
        )

    def _post(
        self, operation: str, values: dict[str, Any], headers: dict[str, str] | None = None
    ) -> httpx.Response:
        values = {name: value for name, value in values.items() if value is not None}
        wait = 0.1
        for attempt in range(self._retries + 1):
            answer = self._http.post(
                f"/predictions/{self._prefix}{operation}", json=values, headers=headers
            )
            if answer.status_code not in RETRIED or attempt == self._retries:
                break
            time.sleep(asked_to_wait(answer) or wait)
            wait *= 2
        if answer.status_code != 200:
            raise _error(answer)
        return answer


def asked_to_wait(answer: httpx.Response) -> float | None:
    """Seconds until the next try; ``None`` where the answer does not say, or says a date."""
    asked = answer.headers.get("Retry-After", "")
    return min(float(asked), MAX_WAIT_S) if asked.isdecimal() else None


def _images(images: Sequence[ImageLike] | np.ndarray, resize: bool) -> dict[str, Any]:
    files = [base64.b64encode(image_file(image)).decode() for image in images]
    return {"images": files, **({"resize": "fit"} if resize else {})}


def image_file(image: ImageLike) -> bytes:
    """The bytes of an image file: as they are for paths and bytes, lossless for pixels."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, (str, os.PathLike)):
        return Path(image).read_bytes()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3:
            raise ValueError(f"an image must be uint8 (H, W, C), got {image.dtype} {image.shape}")
        out = io.BytesIO()
        if image.shape[2] not in (1, 3):
            raise ValueError(f"an image must have 1 or 3 channels, got {image.shape[2]}")
        Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(out, "PNG")
        return out.getvalue()
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def _npy(answer: httpx.Response) -> np.ndarray:
    array: np.ndarray = np.load(io.BytesIO(answer.content), allow_pickle=False)
    return array


def _pixels(text: str) -> np.ndarray:
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _score(result: dict[str, Any]) -> ScoreResult:
    notes, found = result.pop("notes", []), result.pop("map", None)
    bits = None if found is None else np.array(found["bits"])
    explain = [Unusual(**entry) for entry in result.pop("explain", [])]
    return ScoreResult(
        notes=notes,
        explain=explain,
        bits=bits,
        heat_map=found and base64.b64decode(found["png"]),
        **result,
    )


def _entry(result: dict[str, Any]) -> AdeError | None:
    error = result.get("error")
    return (
        None
        if error is None
        else AdeError(422, error["code"], error["message"], error.get("index"))
    )


def _error(answer: httpx.Response) -> AdeError:
    """The error of an answer, also if a proxy or gateway gave it in another shape."""
    status = answer.status_code
    try:
        body = answer.json()
    except ValueError:
        body = None
    if isinstance(body, dict) and isinstance(body.get("error"), dict):
        error = body["error"]
        return AdeError(status, error["code"], error["message"], error.get("index"))
    code, message = FOREIGN_ERRORS.get(status, ("server_error", f"the server answered {status}"))
    if status in RETRIED:
        code, message = "overloaded", "the server cannot take the request now: try again later"
    return AdeError(status, code, message)
