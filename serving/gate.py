"""The gate in the caller's own process: decisions on images, without a server or PyTorch.

Example::

    from serving.gate import Gate

    gate = Gate("fits/images/bundle", alpha=0.01)
    if gate.check("some.png")[0].accepted:
        ...
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ade_base.pictures.read import MAX_FILE_BYTES, MAX_PIXELS
from ade_client.client import ImageLike, image_file, several
from ade_client.contract import DEFAULT, NOT_SCORED, Choice
from serving.engine.bundle import open_bundle
from serving.engine.engine import InferenceEngine, NotFinite, Score
from serving.ingest.errors import ApiError, unusable
from serving.ingest.picture import Picture, prepare_source
from serving.verdict.calibration_file import CalibrationPair
from serving.verdict.decision import decide

logger = logging.getLogger(__name__)


class TookTooLong(RuntimeError):
    """The images were not decoded within the given time."""


@dataclass(frozen=True)
class GateResult:
    """What to do with one image.

    Attributes:
        decision: ``accept``, ``reject`` or ``no_verdict``.
        p_value: ``None`` if no calibration judged the image. With the reason ``alpha_too_small``
            there is one, but it cannot decide.
        bpd: bits per dimension; ``None`` where the image could not be scored, which is an error.
        reason: why there is no verdict: a code, a colon and a sentence. ``None`` with a verdict.
        calibration: ``name`` and ``version`` of the calibration that decided; ``None`` without one.
        notes: what was done to the image before: resized, a first frame taken, alpha composited …
    """

    decision: Choice
    p_value: float | None = None
    bpd: float | None = None
    reason: str | None = None
    calibration: dict[str, str] | None = None
    notes: tuple[str, ...] = ()

    @property
    def accepted(self) -> bool:
        return self.decision == "accept"

    @property
    def is_error(self) -> bool:
        """Whether the image could not be scored at all."""
        return self.bpd is None


class Gate:
    """Decides on images by a bundle; may be used by several threads at once.

    Images whose size differs from the model's are resized, and judged by the calibration for that.

    Args:
        bundle: the bundle's folder.
        alpha: false-alarm rate.

    Raises:
        BundleError: the bundle is not whole, or cannot score.
        CalibrationError: its calibration cannot be read.
        ValueError: alpha is not above 0 and at most 1.
    """

    def __init__(self, bundle: Path | str, alpha: float = 0.01) -> None:
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha must be above 0 and at most 1, got {alpha}")
        opened = open_bundle(Path(bundle))
        opened.check_has("score")
        self.alpha = alpha
        self._engine = InferenceEngine(opened, device="cpu", operations=["score"])
        judges = self._engine.calibrations
        for images, judge in (
            ("images of the model's size", judges.exact),
            ("resized images", judges.resized),
        ):
            if judge is not None and (note := judge.too_small(alpha)) is not None:
                logger.warning("%s will not be accepted: %s", images, note)

    def check(
        self,
        images: ImageLike | Sequence[ImageLike],
        calibration: str = DEFAULT,
        seconds: float | None = None,
    ) -> list[GateResult]:
        """Decide on each image; one that cannot be used gets ``no_verdict`` and is an error.

        Args:
            images: a path, the bytes of a file, a PIL image or uint8 ``(H, W, C)``, RGB (OpenCV's
                are BGR: ``image[:, :, ::-1]``); or a list or tuple of these, or uint8 ``(N, H, W,
                C)``.
            calibration: name of the calibration that decides. Default: the one named
                ``default``, or else the bundle's own.
            seconds: that decoding may take, for images from others: small files can be slow.

        Raises:
            TookTooLong: it took longer.
            UnknownCalibration: the bundle has none of this name.
            TypeError: an image is of another type.
            ValueError: an array is not of uint8 or not of that shape.
            DecoderError: the machine has no room for the process that decodes an image.
        """
        judge = self._engine.calibrations_of(calibration)
        latest = None if seconds is None else time.monotonic() + seconds
        prepared = []
        for image in several(images):
            if latest is not None and time.monotonic() > latest:
                raise TookTooLong(f"the images take more than {seconds:g} s to decode")
            prepared.append(self._prepare(image, judge))
        usable = [image for image in prepared if isinstance(image, Picture)]
        scores = iter(
            self._engine.score(
                np.stack([image.pixels for image in usable]),
                resized=[image.resized for image in usable],
                calibrations=[judge] * len(usable),
                views=[image.view for image in usable],
            )
            if usable
            else []
        )
        return [
            self._decide(image, next(scores) if isinstance(image, Picture) else None, judge)
            for image in prepared
        ]

    def _prepare(self, image: ImageLike, judge: CalibrationPair) -> Picture | ApiError:
        shape = self._engine.image_shape

        def read() -> bytes | np.ndarray:
            if (
                isinstance(image, np.ndarray)
                and image.dtype == np.uint8
                and image.shape[2:] == shape[2:]
            ):
                return image
            file = image_file(image)
            if (
                isinstance(image, Image.Image)
                and image.width * image.height <= MAX_PIXELS
                and len(file) > MAX_FILE_BYTES
            ):
                with Image.open(io.BytesIO(file)) as own:  # a photograph's own file is smaller
                    if own.mode == "RGB" and shape[2] == 3 and "transparency" not in own.info:
                        return np.asarray(own)
            return file

        try:
            return prepare_source(read, shape, True, judge.look_of)
        except ValueError as error:
            if isinstance(image, np.ndarray):
                raise
            return unusable("not_an_image", str(error))  # an image of Pillow without pixels

    def _decide(
        self,
        image: Picture | ApiError,
        score: Score | NotFinite | None,
        calibrations: CalibrationPair,
    ) -> GateResult:
        if isinstance(image, ApiError):
            return GateResult("no_verdict", reason=f"{NOT_SCORED}: {image.message}")
        if not isinstance(score, Score):
            return GateResult("no_verdict", reason=f"{NOT_SCORED}: {score}")
        p_value = None if score.verdict is None else score.verdict.p_value
        found = decide(p_value, calibrations, image.resized, self.alpha)
        label = calibrations.label if calibrations.of(image.resized) else None
        notes = tuple(image.notes)
        return GateResult(found.choice, p_value, score.bpd, found.reason, label, notes)
