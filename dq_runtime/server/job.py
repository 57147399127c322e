"""The engine requests behind one answer: submitted together, read together, cancelled together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from dq_runtime.errors import DQError
from dq_runtime.runtime.engine import Engine, FinishedEvent, FinishReason, Handle, Request, TextEvent, TokenLogprob
from dq_runtime.server.errors import APIError, of_engine
from dq_runtime.server.fields import seed_of
from dq_runtime.server.inbox import Inbox, Mailroom
from dq_runtime.server.metrics import Metrics


@dataclass
class Choice:
    """One text as far as it has come. ``reason`` is None until it has ended."""

    number: int
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: FinishReason | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Piece:
    """News of one choice: the text and tokens that came since the last piece, and whether it has ended by them."""

    choice: Choice
    text: str
    logprobs: Sequence[TokenLogprob]
    ended: bool


def copies(request: Request, n: int) -> list[Request]:
    """``request`` ``n`` times, with different seeds where it has one."""
    sampling = request.sampling
    return [replace(request, sampling=replace(sampling, seed=seed_of(sampling, i))) for i in range(n)]


class Job:
    """:meth:`submit` gives requests to ``engine``; :meth:`pieces` tells what becomes of them, until ``seconds`` after
    the job was made. ``group`` requests in a row share a prompt, which usage counts once."""

    def __init__(
        self,
        engine: Engine,
        mailroom: Mailroom,
        metrics: Metrics,
        group: int,
        seconds: float,
    ) -> None:
        self._engine, self._mailroom, self._metrics = engine, mailroom, metrics
        self._inbox = Inbox()
        self._started = time.perf_counter()
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._seconds = seconds
        self._group = group
        self.first_token: float | None = None
        self.outcome = "disconnected"  # unless something else ends it
        self.choices: list[Choice] = []
        self._last: list[float] = []
        self._handles: list[Handle] = []

    def submit(self, requests: Sequence[Request]) -> None:
        """Once, and not in the event loop: a schema takes the engine up to a second. When a request is refused, those
        before it are cancelled, and :class:`APIError` says why."""
        self._started = time.perf_counter()
        self.choices = [Choice(i) for i in range(len(requests))]
        self._last = [self._started] * len(requests)
        try:
            for i, request in enumerate(requests):
                self._handles.append(self._engine.submit(request, partial(self._mailroom.post, self._inbox, i)))
        except DQError as error:
            self.cancel()
            raise of_engine(error) from None

    @property
    def unfinished(self) -> bool:
        return any(choice.reason is None for choice in self.choices)

    def usage(self) -> dict[str, object]:
        """OpenAI's count of tokens: a prompt of several choices counts once."""
        prompt = sum(c.prompt_tokens for c in self.choices[:: self._group])
        cached = sum(c.cached_tokens for c in self.choices[:: self._group])
        completion = sum(c.completion_tokens for c in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def cancel(self) -> None:
        """End whatever has not ended; from any state, as often as one likes."""
        for handle in self._handles:
            handle.cancel()

    async def pieces(self, pause: float) -> AsyncIterator[list[Piece]]:
        """News as it comes, an empty list after ``pause`` seconds without any. Several pieces of a choice that wait
        already come as one. Raises :class:`APIError` when the engine failed (500), time is up (504), or the reader fell
        behind (408)."""
        clock = asyncio.get_running_loop().time
        while self.unfinished:
            try:
                async with asyncio.timeout_at(min(self._deadline, clock() + pause)):
                    await self._inbox.ready.wait()
            except TimeoutError:
                if clock() >= self._deadline:
                    self.outcome = "timeout"
                    message = f"the answer was not finished within {self._seconds:g} s (--timeout)"
                    raise APIError(504, message, code="timeout") from None
                yield []
                continue
            news = self._read()
            if self._inbox.overflowed:
                self.outcome = "slow_reader"
                raise APIError(408, "the client reads too slowly", code="slow_reader")
            yield news
        self.outcome = "ok"

    async def finish(self) -> None:
        """Read to the end, for answers that are sent whole."""
        async for _ in self.pieces(self._seconds):
            pass

    def _read(self) -> list[Piece]:
        now = time.perf_counter()
        texts: dict[int, list[str]] = {}
        tokens: dict[int, list[TokenLogprob]] = {}
        ended: set[int] = set()
        counts: dict[int, int] = {}  # of tokens
        for number, event in self._inbox.take():
            choice = self.choices[number]
            if isinstance(event, TextEvent):
                counts[number] = counts.get(number, 0) + len(event.tokens)
                texts.setdefault(number, []).append(event.text)
                tokens.setdefault(number, []).extend(event.logprobs)
            elif isinstance(event, FinishedEvent):
                texts.setdefault(number, [])
                ended.add(number)
                self._end(choice, event)
        for number, count in counts.items():
            self._time(number, now, count)
        found = []
        for number, parts in texts.items():
            choice, text, new = self.choices[number], "".join(parts), tokens.get(number, [])
            choice.text.append(text)
            choice.logprobs.extend(new)
            found.append(Piece(choice, text, new, number in ended))
        return found

    def _time(self, number: int, now: float, tokens: int) -> None:
        if self.first_token is None:
            self.first_token = now - self._started
            self._metrics.first_token.observe(self.first_token)
        elif tokens and self.choices[number].text:
            for _ in range(tokens):  # those of one piece share the time since the last
                self._metrics.between_tokens.observe((now - self._last[number]) / tokens)
        self._last[number] = now

    def _end(self, choice: Choice, event: FinishedEvent) -> None:
        if event.reason == "error":
            self.outcome = "error"
            raise APIError(500, f"the engine failed on this request: {event.message}", code="engine_error")
        choice.reason = event.reason
        choice.prompt_tokens = event.usage.prompt_tokens
        choice.cached_tokens = event.usage.cached_tokens
        choice.completion_tokens = event.usage.completion_tokens
        if event.reason == "cancelled":  # not by us: we stop reading when we cancel
            self.outcome = "stopping"
            raise APIError(503, "the server is stopping", code="stopping", retry_after=5)
