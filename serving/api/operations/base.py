"""What the four verbs have in common.

Data flows through an operation in four steps, which :class:`serving.api.service.Service` calls::

    RawRequest --parse--> request --compute, with other requests--> result --respond--> Response

The operation's models (its parameters and its answers) also make its part of the OpenAPI document,
and :mod:`ade_client.client` takes its arguments and results from them.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from ade_client.contract import MAX_IMAGES, ImageParameters
from ade_client.model import Field, fields_of
from serving.api.responses import MAX_ANSWER_BYTES, NPY_TYPE, Response
from serving.ingest.errors import malformed, unusable
from serving.ingest.parameters import read
from serving.ingest.picture import LookOf, Picture, no_look
from serving.ingest.requests import (
    FilesRequest,
    ImagesRequest,
    RawRequest,
    check_count,
    image_sources,
    pixels_to_resize,
)

if TYPE_CHECKING:
    from serving.api.telemetry import Telemetry
    from serving.engine.bundle import Bundle
    from serving.engine.engine import InferenceEngine

IMAGE_TYPES = tuple(
    f"image/{name}"
    for name in ("png", "jpeg", "webp", "bmp", "gif", "tiff", "avif", "heic", "heif")
)
ParametersT = TypeVar("ParametersT")
RequestT = TypeVar("RequestT")
ComputedT = TypeVar("ComputedT")
_FILE = {"type": "string", "format": "binary"}


@dataclass(frozen=True)
class Format:
    """One format of an answer.

    Attributes:
        media_type: of the answer.
        model: of an answer in JSON; ``None`` if it is binary.
    """

    media_type: str
    model: type | None = None


class Operation(ABC, Generic[ParametersT, RequestT, ComputedT]):
    """One verb: how its requests are read, computed and answered.

    Attributes:
        name: the verb.
        summary: what it does.
        parameters: the model of its parameters.
        formats: of its answers; the first is the default.
        about_formats: the description of the parameter ``format``.
        headers: of its answers, as OpenAPI header objects.
        json_body, form_body: schemas of what requests have beside the parameters, all required.
        form_patterns: schemas of further fields of a form, by patterns of their names.
        binary_bodies: media types of requests that are one file.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    parameters: type[ParametersT]
    formats: ClassVar[Mapping[str, Format]]
    about_formats: ClassVar[str] = "of the answer"
    headers: ClassVar[Mapping[str, Any]] = {}
    json_body: ClassVar[Mapping[str, Any]] = {}
    form_body: ClassVar[Mapping[str, Any]] = {}
    form_patterns: ClassVar[Mapping[str, Any]] = {}
    binary_bodies: ClassVar[Sequence[str]] = ()

    @functools.cached_property
    def fields(self) -> dict[str, Field]:
        """The parameters, and ``format``."""
        options = tuple(self.formats)
        choice = Field(
            "format",
            "format",
            Literal[options],
            default=self.default_format,
            about=self.about_formats,
        )
        return {**fields_of(self.parameters), "format": choice}

    @property
    def default_format(self) -> str | None:
        """``None`` if it depends on the request."""
        return next(iter(self.formats))

    def read(self, given: Mapping[str, Any]) -> tuple[ParametersT, str | None]:
        """The checked parameters of a request, and the format of its answer.

        Raises:
            ApiError: a parameter is unknown, or its value is not allowed.
        """
        values = read(self.name, self.fields, given)
        answer_format = values.pop("format")
        return self.parameters(**values), answer_format

    @abstractmethod
    def parse(self, request: RawRequest, bundle: Bundle) -> Any:
        """Read a request without decoding its images.

        Raises:
            ApiError: with the status to answer.
        """

    def rows(self, request: RequestT) -> int:
        """Number of rows that a request takes in a graph's batch."""
        return self.images_of(request)

    @abstractmethod
    def bytes_of_one(self, request: RequestT, bundle: Bundle) -> int:
        """Upper bound of the bytes that one image adds to the answer, except for its notes."""

    def answer_bytes(self, request: Any, bundle: Bundle) -> int:
        """Upper bound of the length of an answer, before it is computed."""
        return min(self.images_of(request) * self.bytes_of_one(request, bundle), MAX_ANSWER_BYTES)

    @abstractmethod
    def images_of(self, request: RequestT) -> int:
        """Number of images of the answer, errors included."""

    @abstractmethod
    def compute(self, requests: Sequence[RequestT], engine: InferenceEngine) -> list[ComputedT]:
        """Compute requests together: one result per request."""

    @abstractmethod
    def respond(self, request: RequestT, computed: ComputedT, engine: InferenceEngine) -> Response:
        """Write the answer to one request.

        Raises:
            ApiError: the answer is an error.
        """

    def look_of(self, parameters: ParametersT, engine: InferenceEngine) -> LookOf:
        """How an encoder sees the images of a request with these parameters."""
        return no_look

    def observe(
        self, requests: Sequence[RequestT], computed: Sequence[ComputedT], telemetry: Telemetry
    ) -> None:
        """Report computed requests to the metrics, once all of a batch have been answered."""


ImageParametersT = TypeVar("ImageParametersT", bound=ImageParameters)


class ImageOperation(Operation[ImageParametersT, ImagesRequest[ImageParametersT], ComputedT]):
    """A verb that takes images."""

    json_body = {
        "images": {
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_IMAGES,
            "items": {
                "type": "string",
                "contentEncoding": "base64",
                "description": "an image file",
            },
        }
    }
    form_body = {"image": {**_FILE, "description": "a file; further ones are image1, image2, …"}}
    form_patterns = {"^image[0-9]{1,4}$": _FILE}
    binary_bodies = (NPY_TYPE, *IMAGE_TYPES)

    def parse(self, request: RawRequest, bundle: Bundle) -> FilesRequest[ImageParametersT]:
        sources, given = image_sources(request)
        parameters, answer_format = self.read(given)
        if not sources:
            raise malformed("the request holds no image")
        check_count(len(sources))
        self.check_work(len(sources), parameters)
        # Without resizing, images of other sizes are refused by their headers.
        pixels = pixels_to_resize(sources) if parameters.resize else 0
        return FilesRequest(
            sources, parameters, answer_format, parameters.resize, request.probe, pixels
        )

    def check_work(self, count: int, parameters: ImageParametersT) -> None:
        """Refuse too many images for these parameters.

        Raises:
            ApiError: 413.
        """

    def images_of(self, request: ImagesRequest[ImageParametersT]) -> int:
        return len(request.images)

    def compute(
        self, requests: Sequence[ImagesRequest[ImageParametersT]], engine: InferenceEngine
    ) -> list[ComputedT]:
        images = [image for request in requests for image in request.usable]
        counts = [request.count for request in requests]
        if not images:
            return self.split([], counts)
        parameters = [request.parameters for request in requests for _ in range(request.count)]
        return self.split(self.run(images, parameters, engine), counts)

    @abstractmethod
    def run(
        self,
        images: Sequence[Picture],
        parameters: Sequence[ImageParametersT],
        engine: InferenceEngine,
    ) -> Any:
        """Compute images of several requests; ``parameters`` has one entry per image."""

    def split(self, computed: Any, counts: Sequence[int]) -> list[ComputedT]:
        """Divide what was computed among requests with these numbers of images."""
        return split(computed, counts)


def split(values: Any, counts: Sequence[int]) -> list[Any]:
    """Consecutive slices of these lengths."""
    out = []
    first = 0
    for n in counts:
        out.append(values[first : first + n])
        first += n
    return out


def model_name(bundle: Bundle) -> str:
    """A model's name for error messages."""
    return f"{bundle.name} ({bundle.manifest['recipe']})"


def check_available(operation: str, bundle: Bundle) -> None:
    """Check that a model has an operation.

    Raises:
        ApiError: 422 ``not_available``.
    """
    if operation not in bundle.operations:
        raise unusable(
            "not_available",
            f"{model_name(bundle)} has no {operation}: it was trained without an "
            "inference network and can only sample",
        )
