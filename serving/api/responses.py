"""The answer's side of the wire contract: what the engine gave to what goes over HTTP.

No server in it.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson

from serving.api.errors import PHRASES, ApiError, unusable
from serving.api.heat_map import heat_map
from serving.api.requests import (
    ARRAYS_A_LEVEL,
    JSON_BYTES_A_NUMBER,
    MAX_JSON_ENCODINGS,
    ImagesRequest,
    InputImage,
    SampleRequest,
)
from serving.engine.engine import EncodedLevel, NotFinite, Score
from serving.images import psnr, tile, write_png
from serving.verdict.calibration import Calibrations, benjamini_hochberg, simes
from serving.verdict.decision import decide, fdr_note

MAX_ANSWER_BYTES = 64 * 2**20
DIGITS = 6  # after the point, of a statistic
MAP_BYTES_A_PIXEL = 32  # a number in JSON, and its share of the picture
EXPLAIN_BYTES = 8192  # of one image's statistics
HEAD_BYTES = 1024  # of a file beside its pixels or numbers, or of an entry in JSON


@dataclass(frozen=True)
class Response:
    """One answer: ``headers`` beside the content type; ``error`` where it is nothing else."""

    status: int
    content_type: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    error: ApiError | None = None

    @property
    def phrase(self) -> str:
        return PHRASES.get(self.status, "OK")


def json_response(value: Any, status: int = 200) -> Response:
    """JSON."""
    try:
        body = orjson.dumps(value)
    except TypeError:  # a message that quotes half a surrogate pair, which is no UTF-8
        body = json.dumps(value).encode()
    return Response(status, "application/json", body)


def error_response(error: ApiError) -> Response:
    """The error shape, with advice on when to come again where that helps."""
    response = dataclasses.replace(json_response(error.body(), error.status), error=error)
    if error.status == 503:
        response.headers["Retry-After"] = "1"
    return response


def _npy(array: np.ndarray) -> Response:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return Response(200, "application/x-npy", out.getvalue())


def _check_size(num_bytes: int, advice: str) -> None:
    if num_bytes > MAX_ANSWER_BYTES:
        raise unusable(
            "answer_too_large",
            f"the answer would have {num_bytes} bytes, at most {MAX_ANSWER_BYTES} are "
            f"sent: {advice}",
        )


def expected_bytes(
    operation: str,
    request: SampleRequest | ImagesRequest,
    image_shape: tuple[int, int, int],
    latent_shapes: Sequence[tuple[int, int, int]],
) -> int:
    """At most how long an answer will be but for its notes, before anything of it is computed.

    Args:
        operation: of the request.
        request: with its images decoded.
        image_shape: ``(H, W, C)`` of the model.
        latent_shapes: of the model, level by level.
    """
    picture = 2 * math.prod(image_shape) + HEAD_BYTES
    if isinstance(request, SampleRequest):
        return min(request.n * picture, MAX_ANSWER_BYTES)
    parameters = request.parameters
    if operation == "encode":
        arrays = ARRAYS_A_LEVEL if parameters["eps"] else ARRAYS_A_LEVEL - 1
        number = (
            JSON_BYTES_A_NUMBER if parameters["format"] == "json" else np.dtype(np.float32).itemsize
        )
        each = arrays * number * sum(map(math.prod, latent_shapes)) + HEAD_BYTES
    elif operation == "reconstruct":
        each = picture
    else:
        map_bytes = MAP_BYTES_A_PIXEL * math.prod(image_shape[:2])
        each = HEAD_BYTES + parameters["explain"] * EXPLAIN_BYTES + parameters["map"] * map_bytes
    return min(len(request.images) * each, MAX_ANSWER_BYTES)


def sample_response(
    images: np.ndarray, request: SampleRequest, seed: int, model_id: str
) -> Response:
    """Samples in the format that was asked for.

    Args:
        images: uint8 ``(N, H, W, C)``.
        request: as parsed.
        seed: the one used, drawn or given.
        model_id: for the PNG's text.
    """
    headers = {"X-Ade-Seed": str(seed)}
    _check_size(2 * images.nbytes, "ask for fewer images")
    if request.format == "npy":
        response = _npy(images)
    elif request.format == "png":
        columns = max(1, math.ceil(math.sqrt(len(images))))
        text = _sample_text(request, seed, request.index, len(images), model_id)
        response = Response(200, "image/png", write_png(tile(images, columns), text))
    else:
        response = json_response(
            {
                "model": model_id,
                "kind": request.kind,
                "seed": seed,
                "temperature": request.temperature,
                "results": [
                    {
                        "image": _base64_png(
                            image, _sample_text(request, seed, request.index + i, 1, model_id)
                        ),
                        "seed": seed,
                        "index": request.index + i,
                    }
                    for i, image in enumerate(images)
                ],
            }
        )
    response.headers.update(headers)
    return response


def _sample_text(
    request: SampleRequest, seed: int, index: int, n: int, model_id: str
) -> dict[str, str]:
    if request.latents is not None:
        return {"ade:kind": request.kind, "ade:model": model_id, "ade:from": "latents"}
    return {
        "ade:seed": str(seed),
        "ade:index": str(index),
        "ade:n": str(n),
        "ade:kind": request.kind,
        "ade:temperature": repr(request.temperature),
        "ade:model": model_id,
    }


def _base64_png(image: np.ndarray, text: dict[str, str] | None = None) -> str:
    return base64.b64encode(write_png(image, text)).decode()


def encode_response(
    images: Sequence[InputImage | ApiError],
    levels: list[EncodedLevel],
    format: str,
    eps: bool,
    model_id: str,
) -> Response:
    """Latents as JSON, or as an ``.npz`` with ``mean_i``, ``log_scale_i``, ``z_i`` and, if wanted,
    ``eps_i`` of each level.

    Args:
        images: of the request.
        levels: of those among them that are usable, in order.
        format: ``json`` or ``npz``.
        eps: whether it is wanted.
        model_id: goes into the JSON.
    """
    names = ("mean", "log_scale", "z", *(["eps"] if eps else []))
    names = tuple(
        name for name in names if all(getattr(level, name) is not None for level in levels)
    )
    finite = (
        np.all(
            [
                np.isfinite(getattr(level, name)).all(axis=(1, 2, 3))
                for level in levels
                for name in names
            ],
            axis=0,
        )
        if levels
        else np.empty(0, bool)
    )
    if format == "npz":
        _fail_on_error(images)
        if not finite.all():
            raise _not_finite().at(int(np.argmin(finite)))
        _check_size(sum(len(names) * level.z.nbytes for level in levels), "send fewer images")
        out = io.BytesIO()
        np.savez(
            out,
            **{
                f"{name}_{i}": getattr(level, name)
                for i, level in enumerate(levels)
                for name in names
            },
        )
        return Response(200, "application/x-npz", out.getvalue())
    if len(images) > MAX_JSON_ENCODINGS:
        raise unusable(
            "too_many_images",
            f"JSON carries the latents of at most {MAX_JSON_ENCODINGS} images, got "
            f'{len(images)}: ask for "format": "npz"',
        )

    _check_size(
        sum(len(names) * JSON_BYTES_A_NUMBER * level.z.size for level in levels),
        'ask for "format": "npz"',
    )

    def entry(row: int) -> dict[str, Any] | ApiError:
        if not finite[row]:
            return _not_finite()
        return {
            "levels": [
                {
                    "shape": list(level.z.shape[1:]),
                    **{name: getattr(level, name)[row].tolist() for name in names},
                }
                for level in levels
            ]
        }

    return _results(images, entry, {"model": model_id})


def _not_finite() -> ApiError:
    return unusable("not_finite", "the model's latents of this image are not finite numbers")


def reconstruct_response(
    images: Sequence[InputImage | ApiError],
    made: np.ndarray,
    format: str | None,
    kind: str,
    model_id: str,
) -> Response:
    """Reconstructions with their PSNR; one image is a PNG unless told, several are JSON.

    Args:
        images: of the request.
        made: uint8 ``(M, H, W, C)``, of those among them that are usable, in order.
        format: ``png`` (one image), ``npy``, ``json`` or ``None``.
        kind: ``mean`` or ``density``.
        model_id: goes into JSON and into the PNG's text.
    """
    _check_size(2 * sum(image.nbytes for image in made), "send fewer images")
    decibels = [
        psnr(image.pixels, other)
        for image, other in zip((i for i in images if isinstance(i, InputImage)), made, strict=True)
    ]
    format = format or ("png" if len(images) == 1 else "json")
    if format == "json":

        def entry(row: int) -> dict[str, Any]:
            return {
                "image": _base64_png(made[row], {"ade:kind": kind, "ade:model": model_id}),
                "psnr": decibels[row],
            }

        return _results(images, entry, {"model": model_id, "kind": kind})
    _fail_on_error(images)
    if format == "npy":
        response = _npy(made)
    elif len(images) > 1:
        raise unusable(
            "too_many_images",
            f"a PNG carries one reconstruction, got {len(images)} images: ask for "
            '"format": "npy" or "json"',
        )
    else:
        response = Response(
            200, "image/png", write_png(made[0], {"ade:kind": kind, "ade:model": model_id})
        )
    response.headers["X-Ade-Psnr"] = ",".join("inf" if p is None else f"{p:.4f}" for p in decibels)
    return response


def score_response(
    images: Sequence[InputImage | ApiError],
    scores: list[Score | NotFinite],
    parameters: dict[str, Any],
    calibrations: Calibrations,
    model_id: str,
) -> Response:
    """Bits per dimension, verdicts and decisions, in the order of the request.

    Args:
        images: of the request.
        scores: of those among them that are usable, in order.
        parameters: of the request: ``alpha``, ``fdr``, ``samples`` and ``explain``.
        calibrations: of the bundle, which the verdicts came from.
        model_id: goes into the answer.
    """
    usable = [image for image in images if isinstance(image, InputImage)]
    alpha, fdr, samples = parameters["alpha"], parameters["fdr"], parameters["samples"]
    _check_size(
        sum(
            MAP_BYTES_A_PIXEL * score.bits.size
            for score in scores
            if isinstance(score, Score) and score.bits is not None
        ),
        "send fewer images",
    )
    verdicts = [None if isinstance(score, NotFinite) else score.verdict for score in scores]
    judged = [row for row, verdict in enumerate(verdicts) if verdict is not None]
    p_values = [verdict.p_value for verdict in verdicts if verdict is not None]
    discoveries = (
        {} if fdr is None else dict(zip(judged, benjamini_hochberg(p_values, fdr), strict=True))
    )

    def entry(row: int) -> dict[str, Any] | ApiError:
        score, verdict = scores[row], verdicts[row]
        if isinstance(score, NotFinite):
            return unusable("not_finite", str(score))
        value = {
            "bpd": score.bpd,
            "bpd_parts": score.parts,
            "standard_error": score.standard_error,
            "ood_score": None if verdict is None else verdict.ood_score,
            "p_value": None if verdict is None else verdict.p_value,
            "ood": None if verdict is None else verdict.p_value <= alpha,
        }
        if fdr is not None:
            value["discovery"] = discoveries.get(row)
        if parameters["explain"] and verdict is not None:
            value["explain"] = [
                {
                    "statistic": u.statistic,
                    "value": round(u.value, DIGITS),
                    "p_value": round(u.p_value, DIGITS),
                }
                for u in verdict.explain
            ]
        if score.bits is not None:
            value["map"] = {"bits": score.bits.tolist(), "png": _base64_png(heat_map(score.bits))}
        notes = list(usable[row].notes)
        calibration = calibrations.of(usable[row].resized)
        if calibration is None and calibrations.exact is not None:
            notes.append("no verdict: the images that the model was calibrated on were not resized")
        if calibration is not None and (too_small := calibration.too_small(alpha)) is not None:
            notes.append(too_small)
        p_value = None if verdict is None else verdict.p_value
        decision = decide(p_value, calibrations, usable[row].resized, alpha)
        return {
            **value,
            **({"notes": notes} if notes else {}),
            "decision": decision.choice,
            "decision_reason": decision.reason,
        }

    head = {
        "model": model_id,
        "estimator": "elbo" if samples == 1 else f"iwae-{samples}",
        "samples": samples,
        "alpha": alpha,
    }
    if len(judged) > 1:
        head["group"] = {"images": len(judged), "p_value": simes(p_values)}
        if fdr is not None:
            judges = [calibrations.of(usable[row].resized) for row in judged]
            note = fdr_note(
                min(len(judge.scores) for judge in judges if judge is not None), len(judged), fdr
            )
            head["group"] |= {
                "fdr": fdr,
                "discoveries": sum(discoveries.values()),
                "rejected": sum(p <= alpha for p in p_values),
                **({"notes": [note]} if note else {}),
            }
    return _results(images, entry, head)


def _fail_on_error(images: Sequence[InputImage | ApiError]) -> None:
    """Binary formats have no place for an error beside results: the request fails with the first
    one.
    """
    for image in images:
        if isinstance(image, ApiError):
            raise image


def _results(images: Sequence[InputImage | ApiError], entry: Any, head: dict[str, Any]) -> Response:
    """One entry an image, errors in their places; 200 as long as one image was answered."""
    results: list[dict[str, Any]] = []
    first_error: ApiError | None = None
    answered = False
    row = 0
    for index, image in enumerate(images):
        value: dict[str, Any] | ApiError
        if isinstance(image, ApiError):
            value = image
        else:
            value = entry(row)
            row += 1
        if isinstance(value, ApiError):
            error = value.at(index)
            first_error = first_error or error
            results.append(error.body())
            continue
        answered = True
        if isinstance(image, InputImage) and image.notes:
            value.setdefault("notes", image.notes)
        results.append(value)
    if not answered:
        assert first_error is not None
        raise first_error
    return json_response({**head, "results": results})
