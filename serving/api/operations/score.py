"""``score``: bits per dimension of images, and a calibrated verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ade_base.pictures.show import write_png
from ade_base.pictures.view import STRIDE
from ade_client.contract import (
    CalibrationLabel,
    Group,
    Map,
    Regions,
    ScoreAnswer,
    ScoreParameters,
    ScoreResult,
    Unusual,
)
from ade_client.model import to_json
from serving.api.heat_map import heat_map
from serving.api.operations.base import Format, ImageOperation
from serving.api.regions import CELL_BYTES, outlined_view, regions_of
from serving.api.responses import (
    HEAD_BYTES,
    PNG_TYPE,
    Response,
    check_size,
    fail_on_error,
    json_response,
    picture_bytes,
    results_of,
)
from serving.ingest.errors import ApiError, unusable
from serving.ingest.picture import LookOf, Picture, no_look
from serving.ingest.requests import JSON_TYPE, ImagesRequest
from serving.verdict.calibration_file import CalibrationPair, UnknownCalibration
from serving.verdict.conformal import benjamini_hochberg, simes
from serving.verdict.decision import TWO_CALIBRATIONS, decide, fdr_note

if TYPE_CHECKING:
    from serving.api.telemetry import Telemetry
    from serving.engine.bundle import Bundle
    from serving.engine.engine import InferenceEngine, NotFinite
    from serving.engine.engine import Score as EngineScore
    from serving.verdict.calibration import Verdict

    Computed = EngineScore | NotFinite | UnknownCalibration

MAX_DRAWS = 1024
DIGITS = 6  # after the point, of a statistic
MAP_BYTES_PER_PIXEL = 32  # a number in JSON, and its share of the picture
EXPLAIN_BYTES = 8192  # of the statistics of one image


class Score(ImageOperation[ScoreParameters, "list[Computed]"]):
    """Bits per dimension of images, with a verdict and a decision on each."""

    name = "score"
    summary = "Bits per dimension of images, and a calibrated verdict on whether they are unusual"
    parameters = ScoreParameters
    formats = {"json": Format(JSON_TYPE, ScoreAnswer), "png": Format(PNG_TYPE)}
    about_formats = "of the answer: png is one image, with outlines around its unusual regions"

    def read(self, given: Mapping[str, Any]) -> tuple[ScoreParameters, str | None]:
        # Elsewhere null means "not given". A name that was looked up and not found must not have
        # another calibration decide.
        if "calibration" in given and given["calibration"] is None:
            raise unusable("bad_parameter", "calibration must be a string, got null")
        return super().read(given)

    def check_work(self, count: int, parameters: ScoreParameters) -> None:
        if count * parameters.samples > MAX_DRAWS:
            raise ApiError(
                413,
                "too_many_draws",
                f"images x samples may be at most {MAX_DRAWS}, got {count} x {parameters.samples}",
            )

    def look_of(self, parameters: ScoreParameters, engine: InferenceEngine) -> LookOf:
        judge = _judge(engine, parameters.calibration)
        return no_look if isinstance(judge, UnknownCalibration) else judge.look_of

    def rows(self, request: ImagesRequest[ScoreParameters]) -> int:
        return len(request.images) * request.parameters.samples

    def bytes_of_one(self, request: ImagesRequest[ScoreParameters], bundle: Bundle) -> int:
        height, width, _ = bundle.image_shape
        parameters = request.parameters
        side = max((len(i.view.pixels) for i in request.usable if i.view is not None), default=0)
        if request.format == "png":
            return picture_bytes((side, side, 3))
        map_bytes = MAP_BYTES_PER_PIXEL * height * width + CELL_BYTES * (side // STRIDE) ** 2
        return HEAD_BYTES + parameters.explain * EXPLAIN_BYTES + parameters.map * map_bytes

    def run(
        self,
        images: Sequence[Picture],
        parameters: Sequence[ScoreParameters],
        engine: InferenceEngine,
    ) -> list[Computed]:
        # Taken once for the whole batch, so that each answer is of one version.
        judges = {name: _judge(engine, name) for name in {p.calibration for p in parameters}}
        found: list[Any] = [judges[p.calibration] for p in parameters]
        rows = [i for i, judge in enumerate(found) if not isinstance(judge, Exception)]
        if rows:
            scores = engine.score(
                np.stack([images[i].pixels for i in rows]),
                [parameters[i].seed for i in rows],
                [parameters[i].samples for i in rows],
                [parameters[i].map for i in rows],
                [images[i].resized for i in rows],
                [found[i] for i in rows],
                [images[i].view for i in rows],
            )
            for i, score in zip(rows, scores, strict=True):
                found[i] = score
        return found

    def observe(
        self,
        requests: Sequence[ImagesRequest[ScoreParameters]],
        computed: Sequence[list[Computed]],
        telemetry: Telemetry,
    ) -> None:
        telemetry.observe_scores(
            (score, request.parameters.alpha)
            for request, scores in zip(requests, computed, strict=True)
            if not request.probe
            for score in scores
            if not isinstance(score, Exception)
        )

    def respond(
        self,
        request: ImagesRequest[ScoreParameters],
        computed: list[Computed],
        engine: InferenceEngine,
    ) -> Response:
        parameters = request.parameters
        # An unknown calibration is no error of an image. If none can be read, nothing was computed.
        outcomes: Sequence[object] = computed or [_judge(engine, parameters.calibration)]
        for one in outcomes:
            if isinstance(one, UnknownCalibration):
                raise unusable("unknown_calibration", str(one))
        verdicts = [None if isinstance(s, Exception) else s.verdict for s in computed]
        regions = [
            _regions(image, verdict)
            for image, verdict in zip(request.usable, verdicts, strict=True)
        ]
        if request.format == "png":
            return self._png(request, computed, regions)
        _check_maps(computed, regions)
        judged = [row for row, verdict in enumerate(verdicts) if verdict is not None]
        p_values = [verdict.p_value for verdict in verdicts if verdict is not None]
        found = [] if parameters.fdr is None else benjamini_hochberg(p_values, parameters.fdr)
        discoveries = dict(zip(judged, found, strict=False))

        def result(row: int, image: Picture) -> ScoreResult | ApiError:
            score = computed[row]
            if isinstance(score, Exception):
                return unusable("not_finite", str(score))
            return dataclasses.replace(
                _result(image, score, regions[row], parameters), discovery=discoveries.get(row)
            )

        answer = ScoreAnswer(
            model=engine.bundle.model_id,
            estimator="elbo" if parameters.samples == 1 else f"iwae-{parameters.samples}",
            samples=parameters.samples,
            alpha=parameters.alpha,
            group=_group(request, computed, found),
            results=results_of(request.images, result),
        )
        # With fdr every result has ``discovery``, which is null for an image without a verdict.
        always = () if parameters.fdr is None else ("discovery",)
        return json_response(to_json(answer, always=always))

    def _png(
        self,
        request: ImagesRequest[ScoreParameters],
        computed: list[Computed],
        regions: list[Regions | None],
    ) -> Response:
        """The image as the encoder saw it, with outlines around its unusual regions."""
        if len(request.images) > 1:
            raise unusable(
                "too_many_images",
                f"a PNG carries one image, got {len(request.images)}: ask for "
                '"format": "json" with "map": true',
            )
        fail_on_error(request.images)
        (image,), (score,), (its,) = request.usable, computed, regions
        if isinstance(score, Exception):
            raise unusable("not_finite", str(score))
        if its is None or image.view is None:
            raise unusable(
                "no_regions",
                "the calibration judges only the whole of this image, not its regions: ade "
                "calibrate with images larger than the model's makes one for such images",
            )
        png = write_png(outlined_view(image.view, its, request.parameters.alpha))
        return Response(200, PNG_TYPE, png)


def _regions(image: Picture, verdict: Verdict | None) -> Regions | None:
    """The regions of an image, if its calibration judges its parts."""
    if verdict is None or verdict.patches is None or image.view is None:
        return None
    return regions_of(verdict.patches, image.view)


def _check_maps(computed: list[Computed], regions: list[Regions | None]) -> None:
    """Refuse an answer whose maps would be too long.

    Raises:
        ApiError: 422 ``answer_too_large``.
    """
    check_size(
        sum(
            MAP_BYTES_PER_PIXEL * score.bits.size
            + CELL_BYTES * (0 if its is None else its.p_values.size)
            for score, its in zip(computed, regions, strict=True)
            if not isinstance(score, Exception) and score.bits is not None
        ),
        "send fewer images",
    )


def _result(
    image: Picture, score: EngineScore, regions: Regions | None, parameters: ScoreParameters
) -> ScoreResult:
    """The entry of one image, as far as it does not depend on the other images."""
    calibrations, alpha = score.calibrations, parameters.alpha
    notes = list(image.notes)
    calibration = calibrations.of(image.resized)
    if calibration is None and calibrations.exact is not None:
        notes.append("no verdict: the images that the model was calibrated on were not resized")
    if calibration is not None and (too_small := calibration.too_small(alpha)) is not None:
        notes.append(too_small)
    explain = score.verdict.explain if score.verdict is not None and parameters.explain else ()
    return dataclasses.replace(
        score_result(score, calibrations, image.resized, alpha, notes),
        explain=[
            Unusual(u.statistic, round(u.value, DIGITS), round(u.p_value, DIGITS)) for u in explain
        ],
        map=None
        if score.bits is None
        else Map(bits=score.bits, png=write_png(heat_map(score.bits))),
        regions=regions if parameters.map else None,
    )


def _group(
    request: ImagesRequest[ScoreParameters], computed: list[Computed], found: Sequence[bool]
) -> Group | None:
    """The verdict on all judged images together; ``None`` for fewer than two.

    Args:
        request: of the images.
        computed: one per usable image.
        found: the discoveries among the judged images; empty unless ``fdr`` is given.
    """
    alpha, fdr = request.parameters.alpha, request.parameters.fdr
    judged = [
        (score.verdict, score.calibrations.of(image.resized))
        for image, score in zip(request.usable, computed, strict=True)
        if not isinstance(score, Exception) and score.verdict is not None
    ]
    if len(judged) < 2:
        return None
    p_values = [verdict.p_value for verdict, _ in judged]
    notes = [TWO_CALIBRATIONS] if len({id(judge) for _, judge in judged}) > 1 else []
    together = Group(images=len(judged), p_value=simes(p_values), notes=notes)
    if fdr is None:
        return together
    calibrated = min(verdict.calibrated for verdict, _ in judged)
    note = fdr_note(calibrated, len(judged), fdr)
    return dataclasses.replace(
        together,
        fdr=fdr,
        discoveries=sum(found),
        rejected=sum(p <= alpha for p in p_values),
        notes=[*notes, *([] if note is None else [note])],
    )


def _judge(engine: InferenceEngine, name: str) -> CalibrationPair | UnknownCalibration:
    """The calibrations of a name, or the error of the request."""
    try:
        return engine.calibrations_of(name)
    except UnknownCalibration as error:
        return error


def score_result(
    score: EngineScore,
    calibrations: CalibrationPair,
    resized: bool,
    alpha: float,
    notes: Sequence[str],
) -> ScoreResult:
    """The score of an image, and the decision on it.

    Args:
        score: of the engine, with the verdict of these calibrations.
        calibrations: that decide.
        resized: whether the image was resized to the model's size.
        alpha: false-alarm rate, above 0 and at most 1.
        notes: on the image.

    Raises:
        ValueError: alpha is out of range.
    """
    verdict = score.verdict
    decision = decide(None if verdict is None else verdict.p_value, calibrations, resized, alpha)
    label = CalibrationLabel(name=calibrations.name, version=calibrations.version)
    return ScoreResult(
        bpd=score.bpd,
        bpd_parts=score.parts,
        standard_error=score.standard_error,
        ood_score=None if verdict is None else verdict.ood_score,
        p_value=None if verdict is None else verdict.p_value,
        ood=decision.ood,
        notes=list(notes),
        decision=decision.choice,
        decision_reason=decision.reason,
        calibration=None if calibrations.of(resized) is None else label,
    )
