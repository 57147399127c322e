"""Fixtures of the server's tests, which are not collected where the extra ``serve`` or the clients are missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from server.live_server import Live

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "httpx", "openai", "hypothesis")
collect_ignore_glob = ["test_*.py"] if any(find_spec(name) is None for name in NEEDED) else []


@pytest.fixture(scope="session")
def live(packed_model: Path) -> Iterator[Live]:
    """The tiny model, served with its real engine in exact mode."""
    from dq_runtime.runtime.engine import EngineSettings
    from dq_runtime.server.run import open_served
    from server.live_server import serving

    engine, served = open_served(str(packed_model), "tiny", "cpu", True, EngineSettings(max_running=4, max_queue=16))
    with serving(engine, served) as found:
        yield found


@pytest.fixture(autouse=True)
def _no_memory_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test on the real engine: zero blocks in use."""
    yield
    if "live" in request.fixturenames:
        from server.live_server import nothing_held

        nothing_held(request.getfixturevalue("live").engine)


@pytest.fixture
def fake(tiny_model: Path) -> Callable[..., Any]:
    """``with fake(script, **settings) as live``: a server whose engine does what ``script`` says."""
    from dq_runtime.server.served import Served, Size
    from server.fake_engine import FakeEngine, FakeModel
    from server.live_server import serving

    @contextmanager
    def start(script: Any = None, **settings: Any) -> Iterator[Live]:
        engine = FakeEngine(script, settings.pop("max_live", 1000))
        model = FakeModel(tiny_model, settings.pop("template", None))
        with serving(engine, Served("fake", model, Size((3,), 3.25, 99_903_808), 0, 256), **settings) as found:
            yield found

    return start
