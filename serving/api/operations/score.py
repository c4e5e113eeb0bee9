"""``score``: bits per dimension of images, and a calibrated verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from ade_base.pictures.show import write_png
from serving.api.heat_map import heat_map
from serving.api.operations.base import Format, ImageOperation, ImageParameters, Notes
from serving.api.responses import HEAD_BYTES, Response, check_size, json_response, results_of
from serving.ingest.errors import ApiError, Problem, unusable
from serving.ingest.parameters import Above, Axes, Between, JsonSchema, OfBundle, to_json
from serving.ingest.requests import JSON_TYPE, ImagesRequest, InputImage
from serving.verdict.calibration import Unusual
from serving.verdict.calibration_file import DEFAULT, Calibrations
from serving.verdict.conformal import benjamini_hochberg, simes
from serving.verdict.decision import TWO_CALIBRATIONS, Choice, decide, fdr_note
from serving.verdict.statistics import part_names
from serving.verdict.store import UnknownCalibration

if TYPE_CHECKING:
    from serving.api.telemetry import Telemetry
    from serving.engine.bundle import Bundle
    from serving.engine.engine import InferenceEngine, NotFinite
    from serving.engine.engine import Score as EngineScore

    Computed = EngineScore | NotFinite | UnknownCalibration

MAX_SAMPLES = 64
MAX_DRAWS = 1024
DIGITS = 6  # after the point, of a statistic
MAP_BYTES_PER_PIXEL = 32  # a number in JSON, and its share of the picture
EXPLAIN_BYTES = 8192  # of the statistics of one image


def _parts(bundle: Bundle) -> dict[str, Any]:
    names = ["dequantization", *part_names(len(bundle.latent_shapes))]
    number = {"type": "number"}
    return {
        "properties": dict.fromkeys([*names, "iwae_gap"], number),
        "required": names,
        "additionalProperties": False,
    }


@dataclass(frozen=True, kw_only=True)
class ScoreParameters(ImageParameters):
    """The parameters of ``score``."""

    samples: Annotated[
        int,
        Between(1, MAX_SAMPLES),
        "draws K: 1 gives the ELBO, more the importance-weighted bound; the decision stays the "
        "same",
    ] = 1
    alpha: Annotated[
        float, Above(0, 1), "false-alarm rate: an image is rejected if its p_value is at most alpha"
    ] = 0.01
    fdr: Annotated[
        float | None,
        Above(0, 1),
        "largest expected share of false alarms among the images of the request that are reported",
    ] = None
    explain: Annotated[bool, "include the most unusual statistics, with their p-values"] = True
    map: Annotated[bool, "include the bits of each pixel"] = False
    calibration: Annotated[str, "name of the calibration that decides"] = DEFAULT


@dataclass(frozen=True, kw_only=True)
class CalibrationLabel:
    """Which calibration decided."""

    name: str
    version: Annotated[str, "the first digits of its file's SHA-256"]


@dataclass(frozen=True, kw_only=True)
class Map:
    """The bits of each pixel, float64 ``(H, W)``, and the same as a picture."""

    bits: Annotated[np.ndarray, Axes(2), "they sum to bpd times the number of the image's values"]
    png: Annotated[bytes, "a heat map, in which darker pixels cost less"]


@dataclass(frozen=True, kw_only=True)
class ScoreResult:
    """One image's bits per dimension, the verdict (``None`` if there is none) and the decision.

    Let an image through if it is :attr:`accepted`. If the decision is ``no_verdict``, ``ood`` is
    ``None``, and the image is not accepted.
    """

    bpd: Annotated[float, "bits per dimension, an upper bound; lower is likelier"]
    bpd_parts: Annotated[dict[str, float], OfBundle(_parts), "they sum to bpd"]
    standard_error: Annotated[float | None, "of bpd over its draws; null for one draw"]
    ood_score: Annotated[
        float | None,
        "higher is more unusual: minus the log-density of the statistics in nats, and what the "
        "bundle's encoder adds if there is one",
    ]
    p_value: Annotated[float | None, Above(0, 1)]
    ood: Annotated[
        bool | None, "whether p_value is at most alpha; null if the decision is no_verdict"
    ]
    discovery: Annotated[
        bool | None,
        JsonSchema({"type": ["boolean", "null"]}),
        "with fdr: whether the image is reported at this rate; null without a verdict",
    ] = None
    explain: Annotated[list[Unusual], "the most unusual statistic first"] = dataclasses.field(
        default_factory=list
    )
    map: Annotated[Map | None, "with the parameter map"] = None
    notes: Notes = dataclasses.field(default_factory=list)
    decision: Annotated[
        Choice, "accept, reject, or no_verdict if no decision is possible: let only accept through"
    ]
    decision_reason: Annotated[str | None, "why there is no verdict: a code and an explanation"]
    calibration: Annotated[
        CalibrationLabel | None, "that decided; left out if there is none for this image"
    ] = None

    @property
    def accepted(self) -> bool:
        """Whether a calibrated verdict at this alpha found nothing unusual.

        Also false if the answer contradicts itself, as only another program's can.
        """
        has_verdict = self.p_value is not None and self.p_value > 0  # NaN is not
        return self.decision == "accept" and self.ood is False and has_verdict

    @property
    def bits(self) -> np.ndarray | None:
        """The bits of each pixel, if they were requested."""
        return None if self.map is None else self.map.bits

    @property
    def heat_map(self) -> bytes | None:
        """The bits of each pixel as a PNG file, if they were requested."""
        return None if self.map is None else self.map.png


@dataclass(frozen=True, kw_only=True)
class Group:
    """The images of a request that have a verdict, judged together."""

    images: int
    p_value: Annotated[float, Above(0, 1), "of all images (Simes)"]
    fdr: float | None = None
    discoveries: int | None = None
    rejected: Annotated[int | None, "how many images are rejected individually, at alpha"] = None
    notes: Annotated[list[str], "what limits the group's figures"] = dataclasses.field(
        default_factory=list
    )


@dataclass(frozen=True, kw_only=True)
class ScoreAnswer:
    """Scores in JSON."""

    model: Annotated[str, "name and weights' hash"]
    estimator: Annotated[str, JsonSchema({"pattern": "^(elbo|iwae-[0-9]+)$"})]
    samples: int
    alpha: float
    group: Annotated[Group | None, "if at least two images have a verdict"] = None
    results: Annotated[list[ScoreResult | Problem], JsonSchema({"minItems": 1})]


class Score(ImageOperation[ScoreParameters, "list[Computed]"]):
    """Bits per dimension of images, with a verdict and a decision on each."""

    name = "score"
    summary = "Bits per dimension of images, and a calibrated verdict on whether they are unusual"
    parameters = ScoreParameters
    formats = {"json": Format(JSON_TYPE, ScoreAnswer)}

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

    def rows(self, request: ImagesRequest[ScoreParameters]) -> int:
        return len(request.images) * request.parameters.samples

    def bytes_of_one(self, request: ImagesRequest[ScoreParameters], bundle: Bundle) -> int:
        height, width, _ = bundle.image_shape
        parameters = request.parameters
        map_bytes = MAP_BYTES_PER_PIXEL * height * width
        return HEAD_BYTES + parameters.explain * EXPLAIN_BYTES + parameters.map * map_bytes

    def run(
        self,
        images: Sequence[InputImage],
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
        alpha, fdr = parameters.alpha, parameters.fdr
        verdicts = [None if isinstance(s, Exception) else s.verdict for s in computed]
        check_size(
            sum(
                MAP_BYTES_PER_PIXEL * score.bits.size
                for score in computed
                if not isinstance(score, Exception) and score.bits is not None
            ),
            "send fewer images",
        )
        judged = [row for row, verdict in enumerate(verdicts) if verdict is not None]
        p_values = [verdict.p_value for verdict in verdicts if verdict is not None]
        found = [] if fdr is None else benjamini_hochberg(p_values, fdr)
        discoveries = dict(zip(judged, found, strict=False))

        def result(row: int, image: InputImage) -> ScoreResult | ApiError:
            score, verdict = computed[row], verdicts[row]
            if isinstance(score, Exception):
                return unusable("not_finite", str(score))
            calibrations = score.calibrations
            notes = list(image.notes)
            calibration = calibrations.of(image.resized)
            if calibration is None and calibrations.exact is not None:
                notes.append(
                    "no verdict: the images that the model was calibrated on were not resized"
                )
            if calibration is not None and (too_small := calibration.too_small(alpha)) is not None:
                notes.append(too_small)
            return dataclasses.replace(
                score_result(score, calibrations, image.resized, alpha, notes),
                discovery=discoveries.get(row),
                explain=[
                    Unusual(u.statistic, round(u.value, DIGITS), round(u.p_value, DIGITS))
                    for u in (verdict.explain if verdict is not None and parameters.explain else ())
                ],
                map=None
                if score.bits is None
                else Map(bits=score.bits, png=write_png(heat_map(score.bits))),
            )

        def group() -> Group | None:
            if len(judged) < 2:
                return None
            notes = []
            judges = {
                id(score.calibrations.of(image.resized))
                for image, score in zip(request.usable, computed, strict=True)
                if not isinstance(score, Exception) and score.verdict is not None
            }
            if len(judges) > 1:
                notes.append(TWO_CALIBRATIONS)
            together = Group(images=len(judged), p_value=simes(p_values), notes=notes)
            if fdr is None:
                return together
            calibrated = min(verdict.calibrated for verdict in verdicts if verdict is not None)
            note = fdr_note(calibrated, len(judged), fdr)
            return dataclasses.replace(
                together,
                fdr=fdr,
                discoveries=sum(found),
                rejected=sum(p <= alpha for p in p_values),
                notes=[*notes, *([] if note is None else [note])],
            )

        answer = ScoreAnswer(
            model=engine.bundle.model_id,
            estimator="elbo" if parameters.samples == 1 else f"iwae-{parameters.samples}",
            samples=parameters.samples,
            alpha=alpha,
            group=group(),
            results=results_of(request.images, result),
        )
        # With fdr every result has ``discovery``, which is null for an image without a verdict.
        return json_response(to_json(answer, always=() if fdr is None else ("discovery",)))


def _judge(engine: InferenceEngine, name: str) -> Calibrations | UnknownCalibration:
    """The calibrations of a name, or the error of the request."""
    try:
        return engine.store.get(name)
    except UnknownCalibration as error:
        return error


def score_result(
    score: EngineScore,
    calibrations: Calibrations,
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
