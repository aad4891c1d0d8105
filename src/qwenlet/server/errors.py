"""What clients are told when something is refused or fails: OpenAI's shape, with the status their libraries expect."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import msgspec
from starlette.responses import Response

from qwenlet.errors import (
    ContextLengthError,
    DeadlineError,
    EngineError,
    MissingExtraError,
    NotStoredError,
    QwenletError,
    RequestError,
    StoreError,
    TokenizerError,
)

logger = logging.getLogger("qwenlet.server")

RETRY_SECONDS = 2  # what a client that is turned away is told to wait


class ApiError(Exception):
    """An answer that is no result.

    Args:
        status: of HTTP.
        kind: OpenAI's `type`.
        param: the field that is wrong.
        code: for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        # a message may quote half a surrogate pair, which no answer can hold
        message = message.encode("utf-8", "backslashreplace").decode()
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code = param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, object]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def refused(param: str, why: str) -> ApiError:
    """A field that can't be served."""
    return ApiError(400, f"{param} {why}", param=param, code="unsupported_parameter")


def busy(message: str) -> ApiError:
    """The server has no room now."""
    return ApiError(503, message, "server_error", code="overloaded", headers={"retry-after": str(RETRY_SECONDS)})


def explained(problem: Exception) -> ApiError | None:
    """The answer to an error that has a reason for clients; None where it is the server's own fault."""
    if isinstance(problem, ApiError):
        return problem
    if not isinstance(problem, QwenletError):
        return None
    words = problem.message if problem.hint is None else f"{problem.message} ({problem.hint})"
    if isinstance(problem, ContextLengthError):
        return ApiError(400, words, code="context_length_exceeded")
    if isinstance(problem, (RequestError, TokenizerError)):
        return ApiError(400, words)
    if isinstance(problem, DeadlineError):
        return ApiError(504, words, "server_error", code="timeout")
    if isinstance(problem, EngineError):
        return ApiError(503, words, "server_error", code="engine", headers={"retry-after": str(RETRY_SECONDS)})
    if isinstance(problem, NotStoredError):
        return ApiError(404, words, "not_found_error", code="not_found")
    if isinstance(problem, StoreError):
        logger.error("the store failed: %s", words)  # clients need not learn where files lie
        words = "what is kept between calls can't be read or written; the server's log says why"
        return ApiError(500, words, "server_error", code="store")
    if isinstance(problem, MissingExtraError):
        return ApiError(501, words, "server_error", code="missing_extra")
    return None


def told(problem: Exception, request_id: str) -> ApiError:
    """The answer to any error. Of the server's own faults nothing leaves; the log has them under the same id."""
    error = explained(problem)
    if error is None:
        # its words could hold a prompt, its place does not
        logger.error("%s failed: %s", request_id, _place(problem))
        error = internal(request_id)
    return error


def internal(request_id: str) -> ApiError:
    return ApiError(500, f"the server failed; its log says why under {request_id}", "server_error")


def _place(problem: Exception) -> str:
    """What kind of error, and where it was raised."""
    trace = problem.__traceback__
    places = []
    while trace is not None:
        places.append(f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return f"{type(problem).__name__} at {' > '.join(places[-6:])}"


_ANTHROPIC = {
    "invalid_request_error": "invalid_request_error",
    "authentication_error": "authentication_error",
    "permission_error": "permission_error",
    "not_found_error": "not_found_error",
    "rate_limit_error": "rate_limit_error",
}


def anthropic(error: ApiError) -> dict[str, object]:
    """The body as Anthropic's clients expect it."""
    kind = _ANTHROPIC.get(error.kind, "overloaded_error" if error.status == 503 else "api_error")
    told = {"type": kind, "message": error.message, "param": error.param, "code": error.code}
    return {"type": "error", "error": told}


def response(error: ApiError, path: str = "") -> Response:
    """`path`: of the call, whose protocol decides the shape."""
    body = error.body
    if path.startswith("/v1/messages"):
        body = anthropic(error)
    elif path.startswith("/api/"):  # Ollama's
        body = {"error": error.message}
    return Response(msgspec.json.encode(body), error.status, error.headers, "application/json")
