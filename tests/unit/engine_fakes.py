"""A model that is a function: the next token is a hash of all tokens before it, read back from the memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dq_runtime.runtime.decoder.paged import BLOCK, MAX_TOKENS, Segment
from dq_runtime.runtime.decoder.paged_check import check_segments
from dq_runtime.runtime.engine import Event, FinishedEvent, Request, TextEvent
from dq_runtime.runtime.language_model import LanguageModel
from dq_runtime.runtime.sampling import Sampling

VOCABULARY, END = 257, 256  # bytes, and an end token


def next_token(tokens: Sequence[int]) -> int:
    """A printable byte that every token before it has a say in."""
    state = 7
    for token in tokens:
        state = (state * 31 + token + 1) % 1_000_003
    return 32 + state % 95


def continued(prompt: Sequence[int], count: int) -> list[int]:
    """What the model says after ``prompt``, greedily."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeTokenizer:
    """Ids are bytes."""

    chat_template = None
    eos_token_id = END

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class FakeModel(LanguageModel):
    """For the engine only what describes it: ``FakeDecoder`` computes."""

    device = "cpu"
    vocabulary = VOCABULARY

    def __init__(self, context: int = 2048) -> None:
        super().__init__(FakeTokenizer(), "fake")
        self.context_length = context

    def start(self, batch: int, capacity: int) -> Any:
        raise NotImplementedError

    def step(self, tokens: Any, cache: Any) -> Any:
        raise NotImplementedError

    def logits(self, tokens: Any) -> Any:
        raise NotImplementedError

    def end_tokens(self) -> set[int]:
        return {END}


@dataclass
class FakeDecoder:
    """Keeps ids where keys would be, and computes from what its blocks hold: a block given to two, freed too soon or
    filled twice changes the text. ``say`` maps the tokens read to the next one; ``fails`` is asked before each pass and
    raises what it likes; ``passes`` are all that were run."""

    say: Callable[[Sequence[int]], int] = next_token
    fails: Callable[[Sequence[Segment]], None] = lambda segments: None
    block_bytes: int = 1000
    passes: list[list[Segment]] = field(default_factory=list)

    def memory(self, blocks: int, positions: int | None = None) -> NDArray[np.int64]:
        return np.full((blocks, BLOCK), -1)

    def run(self, segments: Sequence[Segment], memory: NDArray[np.int64]) -> NDArray[np.float32]:
        check_segments(segments, VOCABULARY, len(memory))
        assert sum(len(s.tokens) for s in segments) <= MAX_TOKENS
        self.passes.append(list(segments))
        for s in segments:  # written first, as a pass that fails half-way would have
            for position, token in enumerate(s.tokens, s.start):
                memory[s.blocks[position // BLOCK], position % BLOCK] = token
        self.fails(segments)
        rows = []
        for s in segments:
            held = memory[list(s.blocks)].reshape(-1)[: s.start + len(s.tokens)].tolist()
            assert -1 not in held
            if s.wants_logits:
                row = np.zeros(VOCABULARY, np.float32)
                row[self.say(held)] = 10.0
                rows.append(row)
        return np.array(rows, np.float32).reshape(len(rows), VOCABULARY)


class Listener:
    """Takes a request's events; ``ended`` is set by the last one."""

    def __init__(self, also: Callable[[Event], None] = lambda event: None) -> None:
        self.events: list[Event] = []
        self.ended = threading.Event()
        self._also = also

    def __call__(self, event: Event) -> None:
        assert not self.ended.is_set(), "an event after the last one"
        self.events.append(event)
        if isinstance(event, FinishedEvent):
            self.ended.set()
        self._also(event)

    def wait(self, seconds: float = 30.0) -> FinishedEvent:
        assert self.ended.wait(seconds), "the request never ended"
        last = self.events[-1]
        assert isinstance(last, FinishedEvent)
        return last

    @property
    def pieces(self) -> list[TextEvent]:
        return [event for event in self.events if isinstance(event, TextEvent)]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def tokens(self) -> list[int]:
        return [token for piece in self.pieces for token in piece.tokens]


def request(prompt: str | Sequence[int] = "hello", max_tokens: int = 8, **changes: Any) -> Request:
    tokens = list(prompt.encode()) if isinstance(prompt, str) else list(prompt)
    return Request(tokens, max_tokens, **({"sampling": Sampling()} | changes))
