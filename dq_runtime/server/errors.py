"""Errors as OpenAI's API words them: ``{"error": {"message", "type", "param", "code"}}`` and a status."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from dq_runtime.errors import DQError
from dq_runtime.runtime.engine import EngineClosedError, QueueFullError
from dq_runtime.server.logs import log

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class APIError(HTTPException):
    """An answer that is an error. ``param`` names the field that is wrong, ``code`` what programs may branch on,
    ``retry_after`` the seconds that a client should wait. (An HTTPException, because FastAPI makes "bad body" of
    whatever else is raised while a body is being read.)"""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(status, message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """The JSON that says it."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """Status and body; ``Retry-After`` in whole seconds, ``WWW-Authenticate`` where a key is missing, and the end
        of the connection where the body was not read to its end."""
        headers = {} if self.retry_after is None else {"retry-after": str(max(1, math.ceil(self.retry_after)))}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.status in (408, 413):
            headers["connection"] = "close"
        return in_json(self.body(), self.status, headers)


def in_json(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """``data`` as a JSON response, in ASCII: half a UTF-16 pair that a client sent in a name goes back to it escaped,
    where FastAPI's own would fail to encode it."""
    return Response(json.dumps(data, separators=(",", ":")), status, headers, "application/json")


def of_engine(error: DQError) -> APIError:
    """What refused a request: a full queue is 429, a closed engine 503, everything else the client's mistake."""
    if isinstance(error, QueueFullError):
        return APIError(429, str(error), code="queue_full", retry_after=error.retry_after)
    if isinstance(error, EngineClosedError):
        return APIError(503, f"the server is stopping: {error}", code="stopping", retry_after=5)
    return APIError(400, str(error))


def of_validation(errors: Sequence[Any]) -> APIError:
    """The first thing that pydantic found wrong, in one sentence."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return APIError(400, f"the body is not valid JSON: {first['ctx']['error']} at byte {place[0]}", code="bad_json")
    param = ".".join(place) or None
    return APIError(400, f"{param or 'body'}: {first['msg']}", param, "invalid_value")


def install(app: FastAPI) -> None:
    """Make every error of ``app`` one of these, its framework's own ones included."""

    @app.exception_handler(APIError)
    async def api_error(request: Request, error: APIError) -> Response:
        return error.response()

    @app.exception_handler(DQError)
    async def refused(request: Request, error: DQError) -> Response:
        return of_engine(error).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return of_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        messages = {404: f"there is nothing at {request.url.path}", 405: f"{request.method} is not for this address"}
        answer = APIError(error.status_code, messages.get(error.status_code, str(error.detail))).response()
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        log.error("request failed", exc_info=error, extra={"path": request.url.path})
        return APIError(500, f"the server failed on this request ({type(error).__name__}); see its log").response()
