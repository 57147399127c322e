"""The engine: one thread that runs passes, and the calls that other threads make to it."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from dq_runtime.errors import SpecError
from dq_runtime.runtime.decoder.paged import BLOCK, Segment
from dq_runtime.runtime.engine.answer import Answer
from dq_runtime.runtime.engine.blocks import BlockPool
from dq_runtime.runtime.engine.budget import block_count, longest
from dq_runtime.runtime.engine.constraint import Grammars
from dq_runtime.runtime.engine.events import Event, FinishedEvent, FinishReason, Usage
from dq_runtime.runtime.engine.one_cache_each import OneCacheEach
from dq_runtime.runtime.engine.paged_model import paged_decoder
from dq_runtime.runtime.engine.request import EngineClosedError, EngineSettings, QueueFullError, Request
from dq_runtime.runtime.engine.scheduler import Scheduler
from dq_runtime.runtime.engine.sequence import Sequence
from dq_runtime.runtime.engine.stats import EngineStats
from dq_runtime.runtime.language_model import LanguageModel
from dq_runtime.runtime.token_bytes import TokenBytes

REMEMBERED = 16  # ends of requests from which the wait of the next is estimated
LONGEST_WAIT = 60.0  # seconds: more is never advised


class Handle:
    """A request under way. ``id``: its number, counted from 1 in the order of submission."""

    def __init__(self, sequence: Sequence, cancelled: deque[Sequence]) -> None:
        self.id = sequence.number
        self._sequence, self._cancelled = sequence, cancelled

    def cancel(self) -> None:
        """End it, from any thread: its blocks are free within one pass, and its last event says "cancelled" (unless it
        ended by itself before). Does nothing for a request that has ended."""
        if not self._sequence.ended:
            self._cancelled.append(self._sequence)


class Engine:
    """Runs any number of requests on ``model``, which is the engine's alone from now on; starts one daemon thread.

    Raises :class:`SpecError` for settings that the model or the memory cannot meet. ``max_model_len`` is the most
    tokens that prompt and answer together may have: of the settings, the context and the memory, the least.
    """

    def __init__(self, model: LanguageModel, settings: EngineSettings) -> None:
        self._model = model
        self._settings = settings
        self._decoder = paged_decoder(model)
        limit = longest(settings, model.context_length)
        pool = BlockPool(block_count(settings, self._decoder.block_bytes, limit, model.device))
        self.max_model_len = min(limit, pool.total * BLOCK)
        self._memory = self._decoder.memory(pool.total, self.max_model_len)
        # A sequence's own cache, of whatever kind, can neither be shared nor be found by its blocks once they are free.
        forget = self._decoder.forget(self._memory) if isinstance(self._decoder, OneCacheEach) else None
        self._scheduler = Scheduler(
            pool,
            settings.max_running,
            settings.step_tokens,
            settings.prefix_reuse and forget is None,
            forget or (lambda blocks: None),
        )
        self._ends = model.end_tokens()
        self._spelled = TokenBytes(model.tokenizer)
        self._grammars = Grammars(model, self._ends)

        # Shared between threads, under this lock; all else belongs to the engine's thread.
        self._changed = threading.Condition()
        self._inbox: deque[Sequence] = deque()
        self._cancelled: deque[Sequence] = deque()
        self._live = 0  # requests submitted that have not ended
        self._submitted = 0
        self._refusal: str | None = None  # why nothing more is taken
        self._closing = False
        self._stats = EngineStats()

        self._finished: Counter[str] = Counter()
        self._finish_times: deque[float] = deque(maxlen=REMEMBERED)
        self._steps, self._step_seconds = 0, 0.0
        self._prompt_tokens = self._cached_tokens = self._completion_tokens = 0
        self._publish()
        self._thread = threading.Thread(target=self._loop, name="dq-engine", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether the thread lives: False after :meth:`close`."""
        return self._thread.is_alive()

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> Handle:
        """Queue ``request``; from any thread. ``on_event`` is called from the engine's thread, in order, must not block
        and gets exactly one :class:`FinishedEvent`, the last. If it raises, the request ends with "error".

        Raises :class:`SpecError` for a request that cannot be met (token ids outside the vocabulary, a prompt that
        leaves no place for an answer, a constraint that is not valid), :class:`QueueFullError`, and
        :class:`EngineClosedError`. A constraint is compiled here, in the caller's thread: up to a second."""
        prompt = self._checked(request)
        guide = None if request.constraint is None else self._grammars.compile(request.constraint)
        most = min(request.max_tokens, self.max_model_len - prompt)
        answer = Answer(request, self._model, most, self._ends, self._spelled, guide)
        with self._changed:
            if self._refusal is not None:
                raise EngineClosedError(self._refusal)
            waiting = len(self._inbox) + len(self._scheduler.waiting)
            if waiting >= self._settings.max_queue:
                raise QueueFullError(waiting, self._wait())
            self._submitted += 1
            self._live += 1
            sequence = Sequence(self._submitted, prompt, answer, on_event)
            self._inbox.append(sequence)
            self._changed.notify_all()
        return Handle(sequence, self._cancelled)

    def stats(self) -> EngineStats:
        """The state as the engine's thread last changed it; from any thread."""
        with self._changed:
            return replace(self._stats, waiting=self._stats.waiting + len(self._inbox))

    def drain(self, timeout: float | None) -> bool:
        """Take no more requests, and wait until those there are have ended, at most ``timeout`` seconds (None: for
        ever); whether they have."""
        with self._changed:
            self._refusal = self._refusal or "the engine is shutting down and takes no more requests"
            return self._changed.wait_for(lambda: self._live == 0, timeout)

    def close(self) -> None:
        """Cancel everything and end the thread. May be called again, and from ``on_event``."""
        with self._changed:
            self._refusal = self._refusal or "the engine is closed"
            self._closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _checked(self, request: Request) -> int:
        """Tokens of the prompt; raises for what only the model can tell is wrong."""
        vocabulary, prompt = self._model.vocabulary, len(request.tokens)
        if not all(0 <= token < vocabulary for token in request.tokens):
            raise SpecError(f"the prompt holds a token id outside 0..{vocabulary - 1}")
        if not all(0 <= token < vocabulary for token, _ in request.sampling.logit_bias):
            raise SpecError(f"logit_bias holds a token id outside 0..{vocabulary - 1}")
        if prompt >= self.max_model_len:
            raise SpecError(
                f"the prompt has {prompt} tokens, but prompt and answer together may have {self.max_model_len}"
            )
        return prompt

    def _wait(self) -> float:
        """Seconds until the next request probably ends and another is admitted."""
        times = self._finish_times
        if len(times) < 2:
            return 1.0
        return min(LONGEST_WAIT, (time.monotonic() - times[0]) / len(times))

    # What follows runs in the engine's thread.

    def _loop(self) -> None:
        died: str | None = None
        try:
            while (cancelled := self._receive()) is not None:
                for sequence in cancelled:
                    if not sequence.ended:
                        self._finish(sequence, "cancelled")
                if self._scheduler.running or self._scheduler.waiting:
                    self._step()
        except BaseException as error:  # nobody else would hear of it
            died = f"the engine has failed: {_described(error)}"
            raise
        finally:
            with self._changed:
                self._refusal = died or self._refusal
                left = [*self._scheduler.running, *self._scheduler.waiting, *self._inbox]
                self._scheduler.waiting.extend(self._inbox)
                self._inbox.clear()
            for sequence in left:
                self._finish(sequence, "cancelled" if died is None else "error", died)

    def _receive(self) -> list[Sequence] | None:
        """Take in what was submitted, waiting for it if there is nothing else to do; what was cancelled, of that and of
        the rest, or None when the engine closes."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._live > 0)
            if self._inbox:
                for sequence in self._inbox:
                    self._scheduler.add(sequence)
                self._inbox.clear()
                self._publish()
            # Under the lock, after the inbox was emptied: a request can be cancelled as soon as it is in there.
            cancelled = [self._cancelled.popleft() for _ in range(len(self._cancelled))]
            return None if self._closing else cancelled

    def _step(self) -> None:
        started = time.perf_counter()
        plan = self._scheduler.plan()
        self._publish()  # a pass may take a second
        for sequence, segment, result in self._run(plan):
            if isinstance(result, Exception):
                self._finish(sequence, "error", f"the model could not be run: {_described(result)}")
                continue
            self._scheduler.done(sequence, segment)
            if segment.wants_logits:
                self._advance(sequence, result)
        self._steps += 1
        self._step_seconds += time.perf_counter() - started
        self._publish()

    def _run(self, plan: list[tuple[Sequence, Segment]]) -> list[tuple[Sequence, Segment, Any]]:
        """With each segment its row of logits (None if it wants none), or the exception that it, alone, met with.

        A pass that fails is repeated segment by segment: what a segment writes is its own and the same every time, so
        that only those end that cannot be computed."""
        try:
            rows = iter(self._decoder.run([segment for _, segment in plan], self._memory))
        except Exception as error:
            if len(plan) == 1:
                return [(*plan[0], error)]
            return [outcome for part in plan for outcome in self._run([part])]
        return [(*part, next(rows) if part[1].wants_logits else None) for part in plan]

    def _advance(self, sequence: Sequence, logits: Any) -> None:
        """The sequence's own part of the pass. Whatever it raises is its own end and nobody else's."""
        answer = sequence.answer
        before = answer.generated
        try:
            event = answer.advance(logits)
            self._completion_tokens += answer.generated - before
            if event.text or event.tokens:
                sequence.on_event(event)
        except BaseException as error:
            self._finish(sequence, "error", _described(error))
            return
        if answer.finish is not None:
            self._finish(sequence, answer.finish)

    def _finish(self, sequence: Sequence, reason: FinishReason, message: str | None = None) -> None:
        """Free the blocks, count, and then tell: whoever hears of the end finds it in the stats."""
        sequence.ended = True
        self._scheduler.retire(sequence)
        answer = sequence.answer
        if sequence.admitted:
            self._prompt_tokens += sequence.prompt
            self._cached_tokens += sequence.cached
        self._finished[reason] += 1
        self._finish_times.append(time.monotonic())
        self._publish()
        usage = Usage(sequence.prompt, sequence.cached, answer.generated)
        with suppress(BaseException):  # the request is over, and its caller cannot be told anything
            sequence.on_event(FinishedEvent(reason, usage, message, answer.matched_stop))
        with self._changed:
            self._live -= 1
            self._changed.notify_all()

    def _publish(self) -> None:
        scheduler, pool = self._scheduler, self._scheduler.pool
        self._stats = EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            blocks_total=pool.total,
            blocks_used=pool.used,
            blocks_cached=pool.cached,
            block_bytes=self._decoder.block_bytes,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            completion_tokens=self._completion_tokens,
            requests_finished=dict(self._finished),
            steps=self._steps,
            preemptions=scheduler.preemptions,
            step_seconds=self._step_seconds,
        )


def _described(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
