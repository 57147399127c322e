"""Sends a job's result: whole as JSON, or as server-sent events while it comes. Whatever happens, the job ends with the
connection: a client that leaves, or reads nothing, frees its memory in the engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any, Protocol

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from dq_runtime.server.errors import APIError, in_json
from dq_runtime.server.job import Job, Piece
from dq_runtime.server.logs import log

KEEP_ALIVE = 10.0  # seconds without a token until a comment is sent; proxies commonly give up after 60
STALL = 30.0  # seconds that a client may leave its socket full
DONE = b"data: [DONE]\n\n"


class Form(Protocol):
    """How one endpoint words a job. Streams are bytes ready to be sent: there is no object a token."""

    def begin(self) -> bytes:
        """What comes before the first piece."""
        ...

    def pieces(self, pieces: Sequence[Piece]) -> bytes:
        """The events that tell of ``pieces``."""
        ...

    def end(self, job: Job) -> bytes:
        """What comes after the last piece."""
        ...

    def whole(self, job: Job) -> dict[str, Any]:
        """The finished job as one JSON object."""
        ...


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event (HTML Living Standard, 9.2) with JSON as its data."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


class Answer(Response):
    """The response of a generating endpoint. Nothing is sent before there is something to say (or KEEP_ALIVE is over),
    so that what fails early has a status of its own."""

    def __init__(self, job: Job, form: Form, stream: bool) -> None:
        super().__init__(media_type="text/event-stream" if stream else "application/json")
        self._job, self._form, self._stream = job, form, stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._streamed(send) if self._stream else self._whole(scope, receive, send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            self._job.cancel()
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._job.finish()
        await in_json(self._form.whole(self._job))(scope, receive, send)

    async def _streamed(self, send: Send) -> None:
        begun = False
        try:
            async for pieces in self._job.pieces(KEEP_ALIVE):
                chunk = b""
                if not begun:
                    begun = True
                    await self._begin(send)
                    chunk = self._form.begin()
                chunk += self._form.pieces(pieces) if pieces else b": still working\n\n"
                if chunk:
                    await self._send(send, chunk)
            await self._send(send, self._form.end(self._job))
        except APIError as error:
            if not begun:
                raise
            log.warning("stream ended by an error", extra={"status": error.status, "error": error.message})
            await self._send(send, event(error.body(), "error"))
        await send({"type": "http.response.body", "body": b""})

    async def _begin(self, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # nginx would collect a page of tokens before it sends any
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _send(self, send: Send, chunk: bytes) -> None:
        """Returns when the socket took it: uvicorn waits while 64 KB are unsent, beside what the kernel holds."""
        try:
            async with asyncio.timeout(STALL):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except TimeoutError:
            self._job.outcome = "slow_reader"
            raise


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
