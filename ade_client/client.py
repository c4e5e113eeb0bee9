"""A client of the HTTP API, with NumPy arrays and typed results.

The page and the tests use it too. Its arguments and results are the models of
:mod:`ade_client.contract`.
"""

from __future__ import annotations

import base64
import functools
import inspect
import io
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, cast
from zipfile import BadZipFile

import httpx
import numpy as np
from PIL import Image, ImageOps

from ade_base.files import read_file
from ade_base.messages import words_of
from ade_base.pictures.convert import check_tiff, scaled_key
from ade_base.ports import LOOPBACK, Ports
from ade_client.contract import (
    DEFAULT,
    MODEL_HEADER,
    NOT_SCORED,
    PROBE_HEADER,
    SEED_HEADER,
    Choice,
    EncodeParameters,
    Error,
    GivenLatents,
    GivenLevel,
    ImageParameters,
    Kind,
    Latents,
    Problem,
    ReconstructAnswer,
    Reconstruction,
    ReconstructParameters,
    SampleParameters,
    ScoreAnswer,
    ScoreParameters,
    ScoreResult,
)
from ade_client.model import from_json, to_json

__all__ = [
    "AdeClient",
    "AdeError",
    "GivenLatents",
    "GivenLevel",
    "GroupScore",
    "Latents",
    "Reconstruction",
    "Samples",
    "ScoreResult",
    "image_file",
]

PROBE_VARIABLE = "ADE_PROBE_SECRET"  # of the service to its page
MAX_WAIT_S = 30.0  # between two tries, however long a gateway advises
_POWERS_OF_TEN = 10.0 ** np.arange(23)  # all that float64 holds exactly
# Codes for the statuses of answers that a proxy or gateway gives in a shape of its own.
FOREIGN_ERRORS = {
    401: ("bad_token", "the server requires a valid token"),
    404: ("unknown_model", "the server has no model of this name"),
    413: ("request_too_large", "the request is larger than the server reads"),
}
# Of errors of single images, by code, as if the image had been alone; of all others 422.
STATUSES = {"malformed_request": 400, "too_large": 413, "not_an_image": 415}
RETRIED = (429, 503, 507)  # statuses after which the same request may succeed a little later
# As may a request without an answer. Not timeouts of this client or of a gateway: the caller has
# waited long enough by then.
CONNECTION_ERRORS = (httpx.NetworkError, httpx.RemoteProtocolError)
# For answers of servers too old to report a decision: nothing is accepted.
UNDECIDED = {
    "decision": "no_verdict",
    "decision_reason": "not_reported: the server is of a version that makes no decisions",
}
ImageLike = np.ndarray | Image.Image | str | os.PathLike[str] | bytes | bytearray
IMAGE_TYPES = (np.ndarray, Image.Image, str, os.PathLike, bytes, bytearray)
Images = ImageLike | Sequence[ImageLike]  # an array has one image or several
SERVER_ERROR = "server_error"  # code of an answer that is not of the service
PNG_MODES = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")
WITH_ALPHA = {"PA": "RGBA", "RGBa": "RGBA", "La": "LA"}  # modes whose alpha RGB would drop
# What reading an answer may raise that another program made.
PARSE_ERRORS = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    EOFError,
    BadZipFile,
    ArithmeticError,
    MemoryError,
    RuntimeError,
    zlib.error,
)
CONNECT_S = 20.0  # for a machine that does not answer at all
P = ParamSpec("P")
Model = TypeVar("Model")
ResultT = TypeVar("ResultT")


class AdeError(Exception):
    """An error answer: ``status``, ``code``, ``message``, and ``index`` for one of several images.

    In place of a :class:`ScoreResult` it also has ``accepted`` (always false), ``decision`` and
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

    def __reduce__(self) -> tuple[Any, ...]:  # it may come from another process
        return type(self), (self.status, self.code, self.message, self.index)

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
class GroupScore:
    """Several images judged together.

    Attributes:
        results: one per image.
        p_value: of all images (Simes); ``None`` if fewer than two have a verdict.
        discoveries: how many images are reported at the false discovery rate.
        rejected: how many images have a p-value of at most alpha, whether reported or not.
        notes: what limits the group's figures.
    """

    results: list[ScoreResult | AdeError]
    p_value: float | None
    discoveries: int
    rejected: int = 0
    notes: list[str] = field(default_factory=list)


def _takes(
    model: Callable[P, Model],
) -> Callable[
    [Callable[[AdeClient, Model], ResultT]], Callable[Concatenate[AdeClient, P], ResultT]
]:
    """Let callers give the fields of a method's last argument: ``sample(n=4)``."""

    def decorate(
        method: Callable[[AdeClient, Model], ResultT],
    ) -> Callable[Concatenate[AdeClient, P], ResultT]:
        @functools.wraps(method)
        def call(client: AdeClient, *args: P.args, **fields: P.kwargs) -> ResultT:
            return method(client, model(*args, **fields))

        _show_fields(call, method, model)
        return call  # type: ignore[return-value]  # wraps() has the type of the method

    return decorate


def _takes_images(
    model: Callable[P, Model],
) -> Callable[
    [Callable[[AdeClient, Images, Model], ResultT]],
    Callable[Concatenate[AdeClient, Images, P], ResultT],
]:
    """As :func:`_takes`, for a method of images: ``score(images, alpha=0.05)``."""

    def decorate(
        method: Callable[[AdeClient, Images, Model], ResultT],
    ) -> Callable[Concatenate[AdeClient, Images, P], ResultT]:
        @functools.wraps(method)
        def call(client: AdeClient, images: Images, *args: P.args, **fields: P.kwargs) -> ResultT:
            return method(client, images, model(*args, **fields))

        _show_fields(call, method, model)
        return call  # type: ignore[return-value]  # wraps() has the type of the method

    return decorate


def _show_fields(
    call: Callable[..., Any], method: Callable[..., Any], model: Callable[..., Any]
) -> None:
    """Give a decorated method the signature that ``help`` shows."""
    signature = inspect.signature(method)
    *own, _ = signature.parameters.values()
    fields = inspect.signature(model).parameters.values()
    call.__signature__ = signature.replace(parameters=[*own, *fields])  # type: ignore[attr-defined]


class AdeClient:
    """Talks to one model of a service.

    Args:
        url: the inference address. The default follows the ports in the environment.
        model: name of a further bundle; the first bundle needs none.
        token: if the service requires one.
        retries: how often a request is repeated after a dropped or refused connection, the status
            429, 503 or 507, or another status of 500 or more that is not in the API's error shape,
            such as a proxy's 502. The client waits as advised, or twice as long each time, from
            0.1 s on. It does not repeat a request after a timeout, of its own or of a gateway
            (504), or after ``internal_error``, which would occur again.
        timeout: seconds for one answer. The default is longer than the service itself keeps a
            small request: 120 s until its turn, and 125 s after that.
        identity: the only model that may answer, such as the ``model`` of :class:`Latents`, which
            no other model can decode. Another one refuses, with the code ``other_model``.

    Raises:
        AdeError: by every method: the service answered an error.
        httpx.TransportError: there was no answer, at the last try either.
        OSError: one of the image files cannot be read; ``filename`` is its path. All files are read
            first, so that nothing has been sent then.

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
        timeout: float = 250.0,
        identity: str | None = None,
    ) -> None:
        if retries < 0:
            raise ValueError(f"retries must be at least 0, got {retries}")
        if token is not None and not re.fullmatch(r"[\x21-\x7e]+", token):
            raise ValueError(  # without the token, which a log may keep
                "token must be printable ASCII without spaces and line breaks, "
                f"got {len(token)} characters"
            )
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        if identity is not None:
            if not identity:
                raise ValueError(
                    "identity must name a model, got '': latents that were read from a file name "
                    "none"
                )
            headers[MODEL_HEADER] = identity
        self.url = url or f"http://127.0.0.1:{Ports.from_environment().inference}"
        self._http = httpx.Client(
            base_url=self.url,
            timeout=httpx.Timeout(timeout, connect=min(timeout, CONNECT_S)),
            headers=headers,
            transport=_own_transport(self.url),
        )
        self._prefix = "" if model is None else f"{model}-"
        self._retries = retries

    def __enter__(self) -> AdeClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    @_takes(SampleParameters)
    def sample(self, parameters: SampleParameters) -> Samples:
        """Draw new images; the result has the seed that was used."""
        answer = self._post("sample", parameters, format="npy")
        with _reading():
            seed, model = int(answer.headers[SEED_HEADER]), answer.headers[MODEL_HEADER]
            count = parameters.n if parameters.latents is None else len(parameters.latents)
            return Samples(_npy(answer, count), seed, model)

    @_takes(SampleParameters)
    def sample_png(self, parameters: SampleParameters) -> tuple[bytes, int]:
        """Draw samples as one PNG file whose text reproduces them; also returns the seed."""
        answer = self._post("sample", parameters, format="png")
        with _reading():
            return answer.content, int(answer.headers[SEED_HEADER])

    def is_ready(self, timeout: float = 20.0) -> bool:
        """Whether all four operations answer within ``timeout`` seconds together.

        The errors ``overloaded`` and, for an operation that the model lacks, ``not_available`` are
        such answers, and so are those of any model, whatever ``identity`` is. No request is
        repeated. Outside the service, these requests count as traffic, also for the drift of the
        gate, which rejects their picture: ask ``/readyz`` of the page instead (port 7860).
        """
        headers = {MODEL_HEADER: ""}  # any model may answer
        if (secret := os.environ.get(PROBE_VARIABLE)) is not None:
            headers[PROBE_HEADER] = secret  # otherwise these requests count as traffic
        blank, any_size = np.zeros((8, 8, 3), np.uint8), ImageParameters(resize=True)
        requests = {
            "sample": _values(SampleParameters(seed=0)),
            **dict.fromkeys(("encode", "reconstruct", "score"), _values(any_size, blank)),
        }
        deadline = time.monotonic() + timeout
        for operation, values in requests.items():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            try:
                answer = self._send(operation, values, headers=headers, timeout=left)
            except httpx.TransportError:
                return False
            if time.monotonic() > deadline:  # httpx bounds each wait, not their sum
                return False
            if answer.status_code == 200 and MODEL_HEADER in answer.headers:
                continue
            error = _problem(answer)  # none in the answer of another program
            if error is None or error.code not in ("overloaded", "not_available"):
                return False
        return True

    def decode(self, z: Sequence[np.ndarray], seed: int = 0, kind: Kind = "mean") -> np.ndarray:
        """Decode latents, one array ``(N, c, h, w)`` per level; returns uint8 ``(N, H, W, C)``."""
        rows, z = range(_count_rows(z)), list(map(_shortest, z))
        return self._decode([[GivenLevel(z=level[i]) for level in z] for i in rows], seed, kind)

    def sample_with(
        self, eps: Sequence[np.ndarray], seed: int = 0, kind: Kind = "mean"
    ) -> np.ndarray:
        """Make images of standard normal noise, one array ``(N, c, h, w)`` per level.

        Zeros in a level give the mean that the coarser levels predict. Returns uint8 ``(N, H, W,
        C)``.
        """
        rows, eps = range(_count_rows(eps)), list(map(_shortest, eps))
        return self._decode([[GivenLevel(eps=level[i]) for level in eps] for i in rows], seed, kind)

    def _decode(self, images: list[list[GivenLevel]], seed: int, kind: Kind) -> np.ndarray:
        latents = [GivenLatents(levels=levels) for levels in images]
        parameters = SampleParameters(latents=latents, seed=seed, kind=kind)
        answer = self._post("sample", parameters, format="npy")
        with _reading():
            return _npy(answer, len(latents))

    @_takes_images(EncodeParameters)
    def encode(self, images: Images, parameters: EncodeParameters) -> Latents:
        """Encode images to latents, and with ``eps`` to the noise that samples them.

        Raises the error of the first image that cannot be used.
        """
        images = several(images)
        answer = self._post("encode", parameters, images, format="npz")
        with _reading():
            latents = Latents.load(answer.content, answer.headers.get(MODEL_HEADER, ""))
            if not latents.z:
                raise ValueError("it has no latents")
            for level in latents.z:
                _check_count(len(level), len(images))
            return latents

    @_takes_images(ReconstructParameters)
    def reconstruct(
        self, images: Images, parameters: ReconstructParameters
    ) -> list[Reconstruction | AdeError]:
        """Reconstruct images: one reconstruction per image, or the error if it cannot be used.

        Raises the error of the first image if none can be used.
        """
        images = several(images)
        answer = self._post("reconstruct", parameters, images, format="json")
        with _reading():
            results = from_json(ReconstructAnswer, answer.json()).results
            _check_count(len(results), len(images))
            return [_entry(r) for r in results]

    @_takes_images(ScoreParameters)
    def score(self, images: Images, parameters: ScoreParameters) -> list[ScoreResult | AdeError]:
        """Score images: one result per image, or the error if it cannot be used.

        Raises the error of the first image if none can be used.
        """
        answer = self._score(images, parameters)
        with _reading():
            return [_entry(r) for r in answer.results]

    def score_group(
        self,
        images: Images,
        fdr: float = 0.1,
        resize: bool = False,
        calibration: str = DEFAULT,
        alpha: float = 0.01,
    ) -> GroupScore:
        """Judge several images together.

        A fraction of at most ``fdr`` of the discoveries is expected to be false.
        """
        answer = self._score(
            images,
            ScoreParameters(
                alpha=alpha, fdr=fdr, resize=resize, explain=False, calibration=calibration
            ),
        )
        with _reading():
            results = [_entry(r) for r in answer.results]
            return GroupScore(
                results,
                None if answer.group is None else answer.group.p_value,
                sum(isinstance(r, ScoreResult) and bool(r.discovery) for r in results),
                sum(r.decision == "reject" for r in results),
                [] if answer.group is None else answer.group.notes,
            )

    def _score(self, images: Images, parameters: ScoreParameters) -> ScoreAnswer:
        images = several(images)
        answer = self._post("score", parameters, images)
        with _reading():
            found = answer.json()
            found["results"] = [
                {"error": r["error"]} if "error" in r else {**UNDECIDED, **r}
                for r in found["results"]
            ]
            _check_count(len(found["results"]), len(images))
            return from_json(ScoreAnswer, found)

    def _post(
        self,
        operation: str,
        parameters: SampleParameters | ImageParameters,
        images: Images | None = None,
        format: str | None = None,
    ) -> httpx.Response:
        """Send a request, and repeat it while it may succeed later; returns the answer.

        Every operation can be repeated safely.

        Raises:
            AdeError: the answer is an error.
        """
        values = _values(parameters, images)
        if format is not None:
            values["format"] = format
        for attempt in range(self._retries):
            wait = 0.1 * 2**attempt
            try:
                answer = self._send(operation, values)
            except CONNECTION_ERRORS:
                pass
            else:
                if not _may_succeed_later(answer):
                    break
                wait = asked_to_wait(answer) or wait
            time.sleep(wait)
        else:
            answer = self._send(operation, values)
        if answer.status_code != 200:
            raise _error(answer)
        return answer

    def _send(self, operation: str, values: dict[str, Any], **options: Any) -> httpx.Response:
        try:
            return self._http.post(
                f"/predictions/{self._prefix}{operation}", json=values, **options
            )
        except httpx.DecodingError as error:  # of another program
            raise httpx.TransportError(f"the answer cannot be decoded: {error}") from error


def asked_to_wait(answer: httpx.Response) -> float | None:
    """Seconds until the next try; ``None`` if the answer does not say, or says a date."""
    asked = answer.headers.get("Retry-After", "")
    return min(float(asked), MAX_WAIT_S) if asked.isdecimal() else None


def _may_succeed_later(answer: httpx.Response) -> bool:
    """Whether the same request may get another answer a little later."""
    status = answer.status_code
    is_of_a_proxy = status >= 500 and _problem(answer) is None
    return status in RETRIED or (is_of_a_proxy and status != 504)  # a gateway's timeout


def _values(
    parameters: SampleParameters | ImageParameters, images: Images | None = None
) -> dict[str, Any]:
    """The JSON of a request."""
    values: dict[str, Any] = to_json(parameters)
    if images is None:
        return values
    files = [base64.b64encode(image_file(image)).decode() for image in several(images)]
    return {"images": files, **values}


def _count_rows(levels: Sequence[np.ndarray]) -> int:
    """The number of images of latents.

    Raises:
        ValueError: there is no level, or the levels are of different numbers of images.
    """
    counts = {len(level) for level in levels}
    if len(counts) != 1:
        found = ", ".join(str(len(level)) for level in levels)
        raise ValueError(f"every level must have as many images, got {found or 'no level'}")
    return counts.pop()


def _shortest(values: np.ndarray) -> np.ndarray:
    """The same float32 values, as float64 with few decimal digits: in JSON they are half as long.

    Nine significant digits name every float32. Without this, the latents of 256 images do not fit
    into a request.
    """
    single = np.asarray(values, np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        exact = single.astype(np.float64)
        num_decimals = 8 - np.floor(np.log10(np.abs(exact)))
        scale = _POWERS_OF_TEN[np.clip(np.nan_to_num(num_decimals), 0, 22).astype(int)]
        short = np.round(exact * scale) / scale
    return np.where(short.astype(np.float32) == single, short, exact)


def several(images: Images) -> Sequence[ImageLike] | np.ndarray:
    """A sequence of images, also if a single one is given.

    Raises:
        TypeError: it is neither an image nor a sequence or array of images.
        ValueError: an array is not of three or four dimensions.
    """
    if isinstance(images, np.ndarray):
        if images.ndim not in (3, 4):
            raise ValueError(
                f"images must be uint8 (H, W, C) or (N, H, W, C), got {images.dtype} {images.shape}"
            )
        return images[None] if images.ndim == 3 else images
    are_several = isinstance(images, Sequence) and not isinstance(images, IMAGE_TYPES)
    found = cast("Sequence[ImageLike]", images if are_several else [images])
    for image in found:
        if not isinstance(image, IMAGE_TYPES):
            raise TypeError(
                "an image must be a path, the bytes of a file, a PIL image or an array; got "
                f"{type(image).__name__}"
            )
    return found


def image_file(image: ImageLike) -> bytes:
    """The bytes of an image file: as they are for paths and bytes, lossless for pixels.

    Pixels of a mode that PNG lacks, such as CMYK, become RGB.

    Raises:
        OSError: a file cannot be read, is not a regular one, or is larger than the service takes.
        ValueError: an array is not an image, or an image is damaged, or has no pixels, or values of
            other than 8 or 16 bits.
    """
    if isinstance(image, (bytes, bytearray)):
        return bytes(image)
    if isinstance(image, (str, os.PathLike)):
        return read_file(Path(image))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3:
            raise ValueError(f"an image must be uint8 (H, W, C), got {image.dtype} {image.shape}")
        if image.shape[2] not in (1, 3):
            raise ValueError(f"an image must have 1 or 3 channels, got {image.shape[2]}")
        image = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    if not all(image.size):
        raise ValueError(f"an image must have pixels, got {image.width} x {image.height}")
    if image.mode in ("F", "I"):
        raise ValueError(
            f"an image must have 8 or 16 bits per value, got a PIL image of mode {image.mode}"
        )
    try:
        return _png(image)
    except (MemoryError, ValueError):
        raise
    except Exception as error:  # Pillow's parsers raise SyntaxError, OSError without a number, …
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk
        raise ValueError(f"the image is damaged: {words_of(error)}") from error


def _png(image: Image.Image) -> bytes:
    check_tiff(image)
    image = scaled_key(image)
    if image.mode in ("I;16B", "I;16L", "I;16N"):
        image = image.convert("I").convert("I;16")
    image = ImageOps.exif_transpose(image)  # as the service turns the image's file
    if image.mode not in PNG_MODES:
        image = image.convert(WITH_ALPHA.get(image.mode, "RGB"))
    out = io.BytesIO()
    image.save(out, "PNG", icc_profile=None)  # nothing reads it, and Pillow's limit on it is low
    return out.getvalue()


def _own_transport(url: str) -> httpx.HTTPTransport | None:
    """For this machine's own services, which a proxy that the environment names cannot reach."""
    return httpx.HTTPTransport() if httpx.URL(url).host in LOOPBACK else None


@contextmanager
def _reading() -> Iterator[None]:
    """Turn what an answer that is not the service's raises into the client's error."""
    try:
        yield
    except PARSE_ERRORS as error:
        about = f"{type(error).__name__}: {error}"
        raise AdeError(200, SERVER_ERROR, f"the answer is not this API's: {about}") from error


def _npy(answer: httpx.Response, count: int) -> np.ndarray:
    array = np.load(io.BytesIO(answer.content), allow_pickle=False)
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.ndim != 4:
        raise ValueError("it is not an array of images, uint8 (N, H, W, C)")
    _check_count(len(array), count)
    return array


def _check_count(found: int, wanted: int) -> None:
    """Check that there is a result for each image, because callers pair them."""
    if found != wanted:
        raise ValueError(f"it has {found} results of {wanted} images")


def _entry(result: ResultT | Problem) -> ResultT | AdeError:
    """One image's result, or its error."""
    if isinstance(result, Problem):
        error = result.error
        status = STATUSES.get(error.code, 422)
        return AdeError(status, error.code, error.message, error.index)
    return result


def _error(answer: httpx.Response) -> AdeError:
    """The error of an answer, in the API's shape or in that of a proxy or gateway."""
    status, error = answer.status_code, _problem(answer)
    if error is not None:
        return AdeError(status, error.code, error.message, error.index)
    code, message = FOREIGN_ERRORS.get(status, (SERVER_ERROR, f"the server answered {status}"))
    if status in RETRIED:
        code, message = "overloaded", "the server cannot take the request now: try again later"
    return AdeError(status, code, message)


def _problem(answer: httpx.Response) -> Error | None:
    """The error in the API's shape, if the answer is one."""
    try:
        return None if answer.status_code == 200 else from_json(Problem, answer.json()).error
    except PARSE_ERRORS:
        return None
