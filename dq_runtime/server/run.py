"""Starts the server and stops it: a socket, signals, and the running answers in between."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import FrameType

import uvicorn

from dq_runtime.errors import DQError
from dq_runtime.packing.checkpoint import open_checkpoint
from dq_runtime.runtime.engine import Engine, EngineSettings
from dq_runtime.runtime.load import load_for_text
from dq_runtime.server.app import Application
from dq_runtime.server.logs import configure, log
from dq_runtime.server.served import Served, measure, sampling_defaults

BACKLOG = 2048  # connections that the kernel holds for us: 500 clients may come at once
# Kernel: drop a connection whose peer takes nothing for this long, or its descriptor would stay with us (tcp(7)).
UNREAD_MILLISECONDS = 60_000


def open_served(
    checkpoint: str, name: str | None, device: str, exact: bool, engine_settings: EngineSettings
) -> tuple[Engine, Served]:
    """Load a checkpoint and start its engine. ``name`` is by default the directory's."""
    path = Path(checkpoint)
    opened = open_checkpoint(path)  # once: its files are hashed by it
    size = measure(opened)
    model = load_for_text(opened, device, exact)
    if model.tokenizer is None:
        raise DQError(f"{path} has no tokenizer files; add tokenizer.json to serve it")
    engine = Engine(model, engine_settings)
    created = int(path.stat().st_mtime)
    name = name or path.resolve().name
    return engine, Served(name, model, size, created, engine.max_model_len, sampling_defaults(path))


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to that address, which refuses connections until it is served; :class:`DQError` says why there can
    be none."""
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    if os.name == "posix":
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not wait for the last server's old connections
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        reason = error.strerror or error
        raise DQError(f"cannot listen on {host} port {port}: {reason}; choose another --port") from None
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; accepted sockets inherit it
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_MILLISECONDS)
    return found


class Server(uvicorn.Server):
    """uvicorn's, which also tells the application when it stops, and somebody when it is ready."""

    def __init__(self, config: uvicorn.Config, application: Application, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._application, self._ready = application, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Then says that it is ready."""
        await super().startup(sockets)
        if self.started:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets running answers finish, a second SIGINT does not."""
        self._application.stop_accepting()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Closes the socket, waits for running answers, then ends the application."""
        log.warning("stopping", extra=asdict(self._application.engine.stats()))
        await super().shutdown(sockets)


def server_for(application: Application, drain: float, ready: Callable[[], None]) -> Server:
    """The server of ``application``: ``ready`` is called once requests are answered, and when it is told to stop,
    running answers have ``drain`` seconds."""
    config = uvicorn.Config(
        application,
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=max(1, round(drain)),
        lifespan="on",
        ws="none",
    )
    return Server(config, application, ready)


def serve_on(sock: socket.socket, server: Server) -> None:
    """Serve on the bound ``sock`` until SIGTERM or SIGINT, from the main thread of the process."""
    configure()
    # uvicorn raises the signal again when it is done, for whoever started it: to us it has done its work.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server.run(sockets=[sock])
    log.warning("stopped")
