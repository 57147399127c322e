"""A server that listens, in a thread of the test process, and what tests ask of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from dq_runtime.server.app import Application
from dq_runtime.server.run import bind, server_for
from dq_runtime.server.served import Served
from dq_runtime.server.settings import ServerSettings


@dataclass
class Live:
    """A running server: its address, and what it runs on."""

    url: str
    engine: Any
    application: Application
    server: Any = field(repr=False)


@contextmanager
def serving(engine: Any, served: Served, **settings: Any) -> Iterator[Live]:
    """Serve ``engine`` on a free port until the block is left."""
    sock = bind("127.0.0.1", 0)
    ready = threading.Event()
    application = Application(engine, served, ServerSettings(**settings))
    server = server_for(application, 5.0, ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield Live(f"http://127.0.0.1:{sock.getsockname()[1]}", engine, application, server)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for a condition that another thread brings about."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def nothing_held(engine: Any) -> None:
    """No request holds memory, after at most a moment."""
    until(lambda: (engine.stats().blocks_used, engine.stats().running, engine.stats().waiting) == (0, 0, 0))
