"""The engine's thread: every request ends exactly once, whatever others do, and nothing it held is lost."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from engine_fakes import END, FakeDecoder, FakeModel, Listener, continued, next_token, request

from dq_runtime.errors import SpecError
from dq_runtime.runtime.decoder.paged import BLOCK, Segment
from dq_runtime.runtime.engine import (
    Engine,
    EngineClosedError,
    EngineSettings,
    Event,
    FinishedEvent,
    QueueFullError,
    Request,
    TextEvent,
    Usage,
)
from dq_runtime.runtime.engine import (
    engine as module,
)
from dq_runtime.runtime.sampling import Sampling


@contextmanager
def running(
    decoder: FakeDecoder | None = None, context: int = 2048, blocks: int = 64, **changes: Any
) -> Iterator[Engine]:
    """An engine on the fake model; when it is left, every block is free and the thread has ended."""
    decoder = decoder or FakeDecoder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "paged_decoder", lambda model: decoder)
        engine = Engine(FakeModel(context), EngineSettings(**({"kv_bytes": blocks * decoder.block_bytes} | changes)))
    try:
        yield engine
    finally:
        engine.close()
        stats = engine.stats()
        assert (stats.blocks_used, stats.running, stats.waiting) == (0, 0, 0)
        engine._scheduler.pool.check()
        assert not engine.healthy


class Gate:
    """Holds passes back until it is opened; ``reached`` says that one waits."""

    def __init__(self) -> None:
        self.open, self.reached = threading.Event(), threading.Event()

    def __call__(self, segments: Sequence[Segment]) -> None:
        self.reached.set()
        assert self.open.wait(20)


def until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def test_a_text_its_events_and_its_usage() -> None:
    with running() as engine:
        listener = Listener()
        handle = engine.submit(request("hello", 8), listener)
        assert listener.wait() == FinishedEvent("length", Usage(5, 0, 8))
        expected = continued(b"hello", 8)
        assert listener.tokens == expected
        assert listener.text == bytes(expected).decode()
        assert [len(piece.tokens) for piece in listener.pieces] == [1] * 8
        assert handle.id == 1
        stats = engine.stats()
        assert stats.requests_finished == {"length": 1}
        assert (stats.prompt_tokens, stats.cached_tokens, stats.completion_tokens) == (5, 0, 8)
        assert (stats.steps, stats.blocks_total, stats.block_bytes) == (8, 64, 1000)
        assert stats.step_seconds > 0


def test_an_end_token_ends_and_is_no_part_of_the_answer() -> None:
    decoder = FakeDecoder(say=lambda tokens: END if len(tokens) == 8 else next_token(tokens))
    with running(decoder) as engine:
        listener, ignoring = Listener(), Listener()
        engine.submit(request("hello", 8), listener)
        engine.submit(request("hello", 6, ignore_end=True), ignoring)
        assert listener.wait() == FinishedEvent("end", Usage(5, 0, 3))
        assert END not in listener.tokens
        assert ignoring.wait().reason == "length"
        assert ignoring.tokens[3] == END


@pytest.mark.parametrize(
    ("said", "stop", "text", "matched"),
    [
        ("one two three", ("two",), "one ", "two"),
        ("one two three", ("three", "e t"), "one two thr"[:0] + "on", "e t"),
        ("one two three", ("nothing", "threex"), "one two three", None),
        ("naïve ☃ 😀!", ("☃",), "naïve ", "☃"),
    ],
)
def test_stop_strings(said: str, stop: tuple[str, ...], text: str, matched: str | None) -> None:
    raw = said.encode()
    decoder = FakeDecoder(say=lambda tokens: [*raw, END][len(tokens) - 1])
    with running(decoder) as engine:
        listener = Listener()
        engine.submit(request("x", 100, stop=stop), listener)
        finished = listener.wait()
        assert listener.text == text
        assert finished.matched_stop == matched
        assert finished.reason == ("end" if matched is None else "stop")
        assert not any("\ufffd" in piece.text for piece in listener.pieces)


def test_what_was_held_back_comes_at_the_end() -> None:
    decoder = FakeDecoder(say=lambda tokens: b"ab\xf0"[len(tokens) - 1])
    with running(decoder) as engine:
        listener = Listener()
        engine.submit(request("x", 3, stop=("bcd",)), listener)
        listener.wait()
        assert [piece.text for piece in listener.pieces] == ["a", "", "b\ufffd"]


def test_an_answer_ends_with_the_context_or_the_memory() -> None:
    for context, blocks in ((100, 64), (2048, 2)):
        with running(context=context, blocks=blocks) as engine:
            assert engine.max_model_len == min(context, blocks * BLOCK)
            listener = Listener()
            engine.submit(request("hello", 10_000), listener)
            assert listener.wait().reason == "length"
            assert len(listener.tokens) == engine.max_model_len - 5


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (lambda: request([], 1), "the prompt is empty"),
        (lambda: request([257], 1), r"token id outside 0\.\.256"),
        (lambda: request([-1], 1), r"token id outside 0\.\.256"),
        (lambda: request("x", 0), "max_tokens must be at least 1, got 0"),
        (lambda: request("x", 1, stop=("",)), "stop string is empty"),
        (lambda: request("x", 1, logprobs=-1), r"logprobs must be in 0\.\.100, got -1"),
        (lambda: request([1] * 128, 1), "128 tokens, but prompt and answer together may have 128"),
        (lambda: request("x", 1, sampling=Sampling(logit_bias=((257, 1.0),))), r"logit_bias holds a token id outside"),
    ],
)
def test_what_cannot_be_met_is_refused_at_once(asked: Callable[[], Request], reason: str) -> None:
    with running(blocks=2) as engine:
        with pytest.raises(SpecError, match=reason):
            engine.submit(asked(), Listener())
        assert engine.stats().waiting == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kv_bytes": 0}, "kv_bytes must be positive"),
        ({"kv_bytes": 999}, "take 1000 bytes, more than kv_bytes = 999"),
        ({"max_running": 0}, "max_running must be at least 1"),
        ({"max_queue": 0}, "max_queue must be at least 1"),
        ({"max_model_len": 1}, "max_model_len must be at least 2"),
        ({"max_model_len": 4096}, "max_model_len is 4096, but the model's context is 2048"),
        ({"step_tokens": 8}, r"step_tokens must be in max_running\.\.512 = 16\.\.512, got 8"),
        ({"step_tokens": 513}, "got 513"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(SpecError, match=reason), running(**changes):
        pass


def test_a_full_queue_says_when_to_come_back() -> None:
    gate = Gate()
    with running(FakeDecoder(fails=gate), max_running=1, max_queue=2) as engine:
        listeners = [Listener() for _ in range(3)]
        engine.submit(request(), listeners[0])
        assert gate.reached.wait(10)
        for listener in listeners[1:]:
            engine.submit(request(), listener)
        assert engine.stats().waiting == 2
        with pytest.raises(QueueFullError, match="2 requests are waiting already") as refused:
            engine.submit(request(), Listener())
        assert 0 < refused.value.retry_after <= 60
        gate.open.set()
        assert all(listener.wait().reason == "length" for listener in listeners)


def test_cancelling_frees_blocks_within_a_pass() -> None:
    with running(blocks=32) as engine:
        handles: list[Any] = []
        ready = threading.Event()
        passes: list[int] = []
        used: list[int] = []

        def cancel(event: Event) -> None:
            assert ready.wait(10)
            if not passes:
                handles[0].cancel()
            passes.append(engine._steps)
            used.append(engine.stats().blocks_used)

        listener, other = Listener(cancel), Listener()
        handles.append(engine.submit(request("hello" * 20, 1000), listener))
        engine.submit(request("other", 200), other)
        ready.set()
        assert listener.wait() == FinishedEvent("cancelled", Usage(100, 0, 1))
        assert passes[1] == passes[0] + 1
        assert used[1] <= used[0] - 2 + 1  # its two blocks; the other may have come in between
        assert other.wait().reason == "length"
        assert other.tokens == continued(b"other", 200)
        handles[0].cancel()  # of no consequence now
        again = Listener()
        engine.submit(request("x", 1), again)
        again.wait()
        assert engine.stats().requests_finished == {"cancelled": 1, "length": 2}


def test_a_waiting_request_can_be_cancelled() -> None:
    gate = Gate()
    with running(FakeDecoder(fails=gate), max_running=1) as engine:
        first, second = Listener(), Listener()
        engine.submit(request(), first)
        assert gate.reached.wait(10)
        engine.submit(request(), second).cancel()
        gate.open.set()
        assert second.wait() == FinishedEvent("cancelled", Usage(5, 0, 0))
        assert first.wait().reason == "length"


def test_a_listener_that_raises_ends_its_own_request_only() -> None:
    def bad(event: Event) -> None:
        raise RuntimeError("the client is gone")

    with running() as engine:
        one, two, other = Listener(bad), Listener(), Listener()

        def exits(event: Event) -> None:
            two.events.append(event)
            if isinstance(event, FinishedEvent):
                two.ended.set()
            raise SystemExit

        engine.submit(request("a", 50), one)
        engine.submit(request("b", 50), exits)
        engine.submit(request("c", 50), other)
        assert one.wait().message == "RuntimeError: the client is gone"
        assert two.wait().message == "SystemExit"
        assert other.wait().reason == "length"
        assert other.tokens == continued(b"c", 50)
        assert engine.healthy
        assert engine.stats().requests_finished == {"error": 2, "length": 1}


def test_a_part_of_a_request_that_raises_ends_that_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as engine:
        decode = engine._model.decode

        def failing(ids: list[int]) -> str:
            if threading.current_thread().name == "dq-engine" and ids[-1] == bad:
                raise ValueError("no such id")
            return decode(ids)

        said = continued(b"a", 4)
        bad = said[-1]
        assert bad not in continued(b"c", 20)
        monkeypatch.setattr(engine._model, "decode", failing)
        one, other = Listener(), Listener()
        engine.submit(request("a", 20), one)
        engine.submit(request("c", 20), other)
        assert one.wait() == FinishedEvent("error", Usage(1, 0, said.index(bad) + 1), "ValueError: no such id")
        assert other.wait().reason == "length"


def test_a_pass_that_fails_ends_only_the_culprit() -> None:
    def fails(segments: Sequence[Segment]) -> None:
        if any(s.tokens[0] == ord("!") for s in segments):
            raise MemoryError("too large")

    with running(FakeDecoder(fails=fails)) as engine:
        listeners = {name: Listener() for name in ("a", "!", "c")}
        for name, listener in listeners.items():
            engine.submit(request(name, 20), listener)
        assert listeners["!"].wait().message == "the model could not be run: MemoryError: too large"
        for name in ("a", "c"):
            assert listeners[name].wait().reason == "length"
            assert listeners[name].tokens == continued(name.encode(), 20)
        assert engine.healthy


def test_logits_that_are_not_finite_are_an_error() -> None:
    class Damaged(FakeDecoder):
        def run(self, segments: Sequence[Segment], memory: Any) -> Any:
            rows = super().run(segments, memory)
            rows[:, 99] = float("nan")
            return rows

    with running(Damaged()) as engine:
        for sampling in (Sampling(), Sampling(temperature=1.0, seed=1), Sampling(temperature=1.0, top_p=0.9, seed=1)):
            listener = Listener()
            engine.submit(request(sampling=sampling), listener)
            assert "logits are not finite" in str(listener.wait().message)


def test_draining_finishes_what_runs_and_takes_nothing_new() -> None:
    gate = Gate()
    with running(FakeDecoder(fails=gate)) as engine:
        listener = Listener()
        engine.submit(request(), listener)
        assert not engine.drain(0.01)
        with pytest.raises(EngineClosedError, match="shutting down"):
            engine.submit(request(), Listener())
        gate.open.set()
        assert engine.drain(10)
        assert listener.wait().reason == "length"
        assert engine.healthy


def test_closing_cancels_what_runs_and_waits() -> None:
    with running(max_running=1) as engine:
        listeners = [Listener() for _ in range(4)]
        for listener in listeners:
            engine.submit(request("hello", 2000), listener)
        until(lambda: bool(listeners[0].events))
        engine.close()
        assert [listener.wait(0).reason for listener in listeners] == ["cancelled"] * 4
        with pytest.raises(EngineClosedError, match="closed"):
            engine.submit(request(), Listener())
        engine.close()


def test_an_engine_may_be_closed_from_its_own_thread() -> None:
    with running() as engine:
        listener = Listener(lambda event: engine.close())
        engine.submit(request("hello", 100), listener)
        assert listener.wait().reason == "cancelled"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_tells_everyone(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    with running(FakeDecoder(fails=gate)) as engine:
        listeners = [Listener(), Listener()]
        engine.submit(request(), listeners[0])
        assert gate.reached.wait(10)
        engine.submit(request(), listeners[1])
        monkeypatch.setattr(engine._scheduler, "done", lambda *_: 1 / 0)
        gate.open.set()
        for listener in listeners:
            assert listener.wait().message == "the engine has failed: ZeroDivisionError: division by zero"
        until(lambda: not engine.healthy)
        with pytest.raises(EngineClosedError, match="the engine has failed: ZeroDivisionError"):
            engine.submit(request(), Listener())
        assert engine.drain(1)


def test_an_idle_engine_does_nothing() -> None:
    with running() as engine:
        listener = Listener()
        engine.submit(request(), listener)
        listener.wait()
        usage, steps = time.clock_gettime(time.CLOCK_PROCESS_CPUTIME_ID), engine.stats().steps
        time.sleep(0.2)
        assert engine.stats().steps == steps
        assert time.clock_gettime(time.CLOCK_PROCESS_CPUTIME_ID) - usage < 0.1  # a thread that spins takes all of 0.2 s


def test_fifty_threads_submit_cancel_and_fail_at_random() -> None:
    """Little memory, a decoder that fails now and then, listeners that raise: each request ends exactly once, and a
    text that was not disturbed is the model's."""
    choose = random.Random(0)
    lock = threading.Lock()

    def fails(segments: Sequence[Segment]) -> None:
        if len(segments) == 1 and choose.random() < 0.02:
            raise RuntimeError("at random")
        if len(segments) > 1 and choose.random() < 0.1:
            raise MemoryError

    def raises(event: Event) -> None:
        if isinstance(event, TextEvent) and len(event.text) % 2:
            raise RuntimeError("a bad listener")

    with running(FakeDecoder(fails=fails), blocks=10, max_running=8, step_tokens=48, max_queue=300) as engine:
        submitted: list[tuple[Listener, bytes, int]] = []

        def client(seed: int) -> None:
            mine = random.Random(seed)
            for _ in range(6):
                shared = b"You are a helpful assistant. " * 5
                ids = (shared if mine.random() < 0.5 else b"") + bytes(
                    mine.choices(range(32, 127), k=mine.randint(1, 90))
                )
                listener = Listener(raises if mine.random() < 0.1 else lambda event: None)
                count = mine.randint(1, 150)
                handle = engine.submit(request(list(ids), count), listener)
                with lock:
                    submitted.append((listener, ids, count))
                if mine.random() < 0.3:
                    time.sleep(mine.random() * 0.02)
                    handle.cancel()

        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(submitted) == 300
        reasons = []
        for listener, ids, count in submitted:
            finished = listener.wait(60)
            reasons.append(finished.reason)
            assert sum(isinstance(event, FinishedEvent) for event in listener.events) == 1
            assert listener.tokens == continued(ids, len(listener.tokens))
            assert finished.reason != "length" or len(listener.tokens) == count
        stats = engine.stats()
        assert sum(stats.requests_finished.values()) == len(submitted)
        assert (stats.blocks_used, stats.running, stats.waiting) == (0, 0, 0)
        assert {"length", "error", "cancelled"} <= set(reasons)
        assert stats.preemptions > 0
        assert stats.cached_tokens > 0
        assert engine.healthy
