"""An engine without a model: it says what a script says, as fast or slowly as the script likes, and keeps the contract
of :class:`dq_runtime.runtime.engine.Engine`: one thread, events in order, one FinishedEvent a request."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from dq_runtime.runtime.engine import (
    EngineClosedError,
    EngineStats,
    Event,
    FinishedEvent,
    QueueFullError,
    Request,
    TextEvent,
    Usage,
)
from dq_runtime.runtime.language_model import LanguageModel
from dq_runtime.runtime.tokenizer import load_tokenizer

# Pieces of text, pauses in seconds, and how it ends (a FinishedEvent) if not by itself.
Script = Callable[[Request], Iterable[Any]]


class FakeModel(LanguageModel):
    """Only a tokenizer."""

    device, context_length = "cpu", 256

    def __init__(self, directory: Path, template: str | None) -> None:
        super().__init__(load_tokenizer(directory), str(directory))
        self.vocabulary = len(self.tokenizer)
        if template is not None:
            self.tokenizer.chat_template = template

    def start(self, batch: int, capacity: int) -> Any:
        raise NotImplementedError

    def step(self, tokens: Any, cache: Any) -> Any:
        raise NotImplementedError

    def logits(self, tokens: Any) -> Any:
        raise NotImplementedError

    def end_tokens(self) -> set[int]:
        return self._ends(None)


def words(request: Request) -> Iterator[Any]:
    """``max_tokens`` words, at most ten."""
    for number in range(min(10, request.max_tokens)):
        yield f"word{number} "


class _Live:
    def __init__(self, request: Request, on_event: Callable[[Event], None], steps: Iterator[Any], number: int) -> None:
        self.request, self.on_event, self.steps, self.id = request, on_event, steps, number
        self.due, self.told, self.cancelled = 0.0, 0, False

    def cancel(self) -> None:
        self.cancelled = True


class FakeEngine:
    """``max_live``: requests it takes before its queue is full. ``requests`` holds whatever was submitted."""

    max_model_len = 256

    def __init__(self, script: Script | None, max_live: int) -> None:
        self._script, self._max_live = script or words, max_live
        self._live: list[_Live] = []
        self._lock = threading.Lock()
        self._closed = False
        self._finished: Counter[str] = Counter()
        self.requests: list[Request] = []
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        return self._thread.is_alive()

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> Any:
        with self._lock:
            if self._closed:
                raise EngineClosedError("the engine is closed")
            if len(self._live) >= self._max_live:
                raise QueueFullError(len(self._live), 1.5)
            self.requests.append(request)
            live = _Live(request, on_event, iter(self._script(request)), len(self.requests))
            self._live.append(live)
        return live

    def stats(self) -> EngineStats:
        with self._lock:
            running = len(self._live)
        return EngineStats(
            running=running, blocks_total=1000, blocks_used=running, requests_finished=dict(self._finished)
        )

    def drain(self, timeout: float | None) -> bool:
        with self._lock:
            self._closed = True
        return True

    def close(self) -> None:
        self.drain(None)
        self._thread.join(10)

    def _loop(self) -> None:
        while True:
            with self._lock:
                live, closed = list(self._live), self._closed
            if closed and not live:
                return
            for one in live:
                self._step(one, closed)
            time.sleep(0.001)

    def _step(self, one: _Live, closed: bool) -> None:
        if one.cancelled or closed:
            self._finish(one, FinishedEvent("cancelled"))
            return
        if time.monotonic() < one.due:
            return
        step = next(one.steps, FinishedEvent("length", Usage(len(one.request.tokens), 0, one.told)))
        if isinstance(step, float):
            one.due = time.monotonic() + step
        elif isinstance(step, FinishedEvent):
            self._finish(one, step)
        else:
            one.told += 1
            one.on_event(step if isinstance(step, TextEvent) else TextEvent(step, [0]))

    def _finish(self, one: _Live, event: FinishedEvent) -> None:
        with self._lock:
            self._live.remove(one)
            self._finished[event.reason] += 1
        one.on_event(event)
