"""The one shape of every error that a client sees."""

from __future__ import annotations

from typing import Any

from ade_base.errors import UserError
from ade_client.contract import Error, Problem


class ApiError(UserError):
    """An answer other than 200.

    Attributes:
        status: HTTP status.
        code: a short name that programs can compare.
        message: what is wrong, what was expected and what was received, for people.
        index: number of the image that the error is about, if it is about a single one.
        is_transient: whether the image may be usable another time.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        index: int | None = None,
        is_transient: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.index = index
        self.is_transient = is_transient

    def __reduce__(self) -> tuple[Any, ...]:  # it may come from another process
        return type(self), (self.status, self.code, self.message, self.index, self.is_transient)

    def at(self, index: int) -> ApiError:
        """The same error about image ``index``."""
        return ApiError(self.status, self.code, self.message, index, self.is_transient)

    def body(self) -> dict[str, Any]:
        """``{"error": {"code", "message", "index"?}}``, as in :class:`Problem`."""
        error: dict[str, Any] = {"code": self.code, "message": self.message}
        if self.index is not None:
            error["index"] = self.index
        return {"error": error}


class ProtocolError(ApiError):
    """An error in the shape of the Open Inference Protocol, ``{"error": MESSAGE}``."""

    def body(self) -> dict[str, Any]:
        return {"error": self.message}

    @classmethod
    def of(cls, error: ApiError) -> ProtocolError:
        return cls(error.status, error.code, error.message)


def shaped(error: ApiError, path: str) -> ApiError:
    """The error in the shape that clients of a path expect: ``/v2`` has its own protocol."""
    return ProtocolError.of(error) if path == "/v2" or path.startswith("/v2/") else error


def internal_error() -> ApiError:
    """The answer to a request on which the server failed; nothing of the failure is in it."""
    return ApiError(500, "internal_error", "the server failed on this request; its log says why")


def stopping() -> ApiError:
    """The answer to a request that is not computed any more, because the service stops."""
    return ApiError(503, "stopping", "the service is being stopped")


def worker_died() -> ApiError:
    """The answer to a request whose worker ended before it answered."""
    return ApiError(503, "unavailable", "the worker that had the request died: try again later")


def no_answer() -> ApiError:
    """The answer to a request that took too long, the queue included."""
    return ApiError(503, "unavailable", "no worker answered in time")


def overloaded(message: str) -> ApiError:
    """The answer to a request that there is no room or no memory for at the moment."""
    return ApiError(503, "overloaded", f"{message}: try again later")


def problem_of(error: ApiError) -> Problem:
    """An error as it is written in JSON."""
    return Problem(error=Error(code=error.code, message=error.message, index=error.index))


def malformed(message: str) -> ApiError:
    """400: the request cannot be parsed."""
    return ApiError(400, "malformed_request", message)


def unusable(code: str, message: str) -> ApiError:
    """422: the request is well formed, but cannot be fulfilled."""
    return ApiError(422, code, message)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a computation ran out of memory.

    ONNX Runtime and PyTorch have no error type or code for that, so their messages are read.
    """
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(
        words in text
        for words in (
            "out of memory",
            "failed to allocate memory",
            "bad_alloc",
            "can't allocate memory",
        )
    )
