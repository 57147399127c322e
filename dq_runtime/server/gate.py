"""What every HTTP request passes first: an id, the key, the limits; and what is written of it afterwards.

A plain ASGI wrapper: starlette's BaseHTTPMiddleware would put a queue and a task between every token and its socket.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dq_runtime.server.errors import APIError
from dq_runtime.server.job import Job
from dq_runtime.server.logs import log
from dq_runtime.server.metrics import Metrics
from dq_runtime.server.settings import ServerSettings

OPEN_PATHS = ("/", "/health")  # without a key: the page asks for it, load balancers have none
BODY_SECONDS = 30.0  # until a request's body has arrived


@dataclass
class Record:
    """One request, for its line in the log."""

    id: str
    method: str
    path: str
    started: float = field(default_factory=time.perf_counter)
    status: int = 0
    job: Job | None = None
    prompt: str | None = None  # only with --log-prompts
    ignored: list[str] = field(default_factory=list)  # fields of the body that nobody here knows


class Gate:
    """Wraps the application. ``draining``: set when the server stops; from then on nothing new is generated."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._in_flight = 0
        self.draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = Record(uuid.uuid4().hex, scope["method"], scope["path"])
        scope.setdefault("state", {})["record"] = record

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.id
            await send(message)

        generates = scope["method"] == "POST"
        refusal = self._refusal(scope, generates)
        self._in_flight += generates
        self._metrics.in_flight.set(self._in_flight)
        try:
            if refusal is not None:
                await refusal.response()(scope, receive, sending)
            else:
                await self._app(scope, _limited(receive, self._settings.max_body), sending)
        except Exception as error:
            if not record.status:
                raise
            # The client has its answer, or the beginning of one; the application has logged what happened.
            log.warning("request ended early", extra={"id": record.id, "error": f"{type(error).__name__}: {error}"})
        finally:
            self._in_flight -= generates
            self._metrics.in_flight.set(self._in_flight)
            self._write(record, generates)

    def _refusal(self, scope: Scope, generates: bool) -> APIError | None:
        """Why this request is not even read, or None."""
        key = self._settings.api_key
        if key is not None and scope["path"] not in OPEN_PATHS:
            scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            same = hmac.compare_digest(given.strip().encode("latin-1"), key.encode())
            if scheme.lower() != "bearer" or not same:
                message = "a valid API key is needed: send the header Authorization: Bearer KEY"
                return APIError(401, message, code="invalid_api_key")
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length) > self._settings.max_body:
            message = f"the body has {length} bytes, {self._settings.max_body} are taken (--max-body)"
            return APIError(413, message, code="body_too_large")
        if generates and self.draining:
            return APIError(503, "the server is stopping", code="stopping", retry_after=5)
        if generates and self._in_flight >= self._settings.in_flight:
            message = f"{self._in_flight} requests are being served already; try again later"
            return APIError(429, message, code="queue_full", retry_after=1)
        return None

    def _write(self, record: Record, generates: bool) -> None:
        job = record.job
        line: dict[str, Any] = {
            "id": record.id,
            "method": record.method,
            "path": record.path,
            "status": record.status,
            "seconds": round(time.perf_counter() - record.started, 4),
        }
        if record.prompt is not None:
            line["prompt"] = record.prompt
        if record.ignored:
            line["ignored"] = record.ignored
        if job is not None:
            usage = job.usage()
            line["outcome"] = job.outcome
            line |= {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}
            line["first_token_seconds"] = None if job.first_token is None else round(job.first_token, 4)
        if generates:
            outcome = job.outcome if job is not None else str(record.status)
            # Other paths are whatever somebody tried: as labels they would grow without end.
            path = record.path if job is not None or record.path in KNOWN_PATHS else "other"
            self._metrics.requests.labels(path, outcome).inc()
        log.log(logging.WARNING if record.ignored else logging.INFO, "request", extra=line)


KNOWN_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


def _limited(receive: Receive, most: int) -> Receive:
    """``receive`` that gives up when the body is longer than ``most`` bytes (413), counted as they come, or has not
    arrived after BODY_SECONDS (408). Later it may wait for ever: for the client to leave."""
    deadline = asyncio.get_running_loop().time() + BODY_SECONDS
    whole, size = False, 0

    async def receiving() -> Message:
        nonlocal whole, size
        if whole:
            return await receive()
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise APIError(408, f"the body did not arrive within {BODY_SECONDS:g} s", code="timeout") from None
        size += len(message.get("body", b""))
        if size > most:
            raise APIError(413, f"the body is longer than {most} bytes (--max-body)", code="body_too_large")
        whole = not message.get("more_body", False)
        return message

    return receiving
