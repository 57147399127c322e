"""The application: routes, errors and limits around one engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from dq_runtime._version import __version__
from dq_runtime.runtime.engine import Engine
from dq_runtime.server import chat, completions, errors, information, responses
from dq_runtime.server.gate import Gate
from dq_runtime.server.inbox import Mailroom
from dq_runtime.server.metrics import Metrics
from dq_runtime.server.served import Served
from dq_runtime.server.service import Service
from dq_runtime.server.settings import ServerSettings


class Application:
    """An ASGI application that answers from ``engine``, and closes it when it is shut down itself.

    ``api`` is the FastAPI inside it: routes and the OpenAPI document."""

    def __init__(self, engine: Engine, served: Served, settings: ServerSettings) -> None:
        self.engine = engine
        metrics = Metrics(engine)

        @asynccontextmanager
        async def lifespan(api: FastAPI) -> AsyncIterator[None]:
            service = Service(served, engine, settings, metrics, Mailroom(asyncio.get_running_loop()))
            api.state.service = service
            try:
                yield
            finally:
                await asyncio.to_thread(engine.close)
                service.close()

        self.api = FastAPI(
            title="dq serve",
            version=__version__,
            description="OpenAI's HTTP API from a packed checkpoint.",
            lifespan=lifespan,
            docs_url=None,  # their pages load scripts from elsewhere
            redoc_url=None,
        )
        self.api.state.draining = False
        errors.install(self.api)
        for module in (information, chat, completions, responses):
            self.api.include_router(module.router)
        document = self.api.openapi

        def openapi() -> dict[str, Any]:
            """Without the 422 that FastAPI promises everywhere: ours is 400, as OpenAI's."""
            found = document()
            for operations in found["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
            return found

        self.api.openapi = openapi  # type: ignore[method-assign]
        self._gate = Gate(self.api, settings, metrics)
        self._outer: Any = self._gate
        if settings.cors_origins:
            # Outside of the gate: a browser asks for permission without a key.
            self._outer = CORSMiddleware(
                self._gate, settings.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._outer(scope, receive, send)

    def stop_accepting(self) -> None:
        """From now on new requests are answered 503; running ones go on."""
        self._gate.draining = self.api.state.draining = True
