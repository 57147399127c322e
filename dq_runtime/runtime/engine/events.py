"""What a request's caller is told, in order: pieces of text, and how it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "end", "cancelled", "error"]


class Alternative(NamedTuple):
    """A token that could have been chosen: its id, its text alone, its bytes, and its natural log probability."""

    token: int
    text: str
    bytes: bytes
    logprob: float


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token. ``logprob``: natural log of its softmax probability by the model's own logits, before
    temperature, penalty, filters and constraint. ``text`` holds U+FFFD where ``bytes`` is part of a character.
    ``top``: the most likely tokens, best first."""

    token: int
    text: str
    bytes: bytes
    logprob: float
    top: Sequence[Alternative] = ()


@dataclass(frozen=True)
class TextEvent:
    """The next piece of the text. ``text`` is "" while it is held back: the middle of a UTF-8 character, or what may
    begin a stop string. ``tokens``: the ids chosen since the last event (their text is in this piece or a later one);
    ``logprobs``: one for each of them where the request asked for them, else empty."""

    text: str
    tokens: Sequence[int] = ()
    logprobs: Sequence[TokenLogprob] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens of the prompt, of those the ones whose keys and values were found in the memory, and of the answer
    (without the end token)."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class FinishedEvent:
    """The last event of every request, delivered exactly once.

    ``reason``: "stop" (a stop string: ``matched_stop``), "length" (max_tokens, the context or the memory is full),
    "end" (an end token, or the constraint admits nothing more), "cancelled", or "error" (``message`` says what went
    wrong)."""

    reason: FinishReason
    usage: Usage = field(default_factory=Usage)
    message: str | None = None
    matched_stop: str | None = None


Event = TextEvent | FinishedEvent
