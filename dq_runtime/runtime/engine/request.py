"""What a caller asks of the engine: the settings of the whole, and one request."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dq_runtime.errors import DQError, SpecError
from dq_runtime.runtime.decoder.paged import MAX_TOKENS
from dq_runtime.runtime.sampling import Sampling

MOST_LOGPROBS = 100  # alternatives of a token; each becomes an object of the event


@dataclass(frozen=True)
class EngineSettings:
    """``kv_bytes``: memory of keys and values, allocated when the engine starts (None: what ``max_running`` sequences
    of full length need, at most half of the memory that is free then). ``max_running``: most sequences in one pass.
    ``max_queue``: most requests that wait for a place. ``max_model_len``: most tokens of prompt and answer together
    (None: the model's context). ``step_tokens``: most tokens of a pass, 1..512 and no fewer than ``max_running``: more
    makes prompts faster, and the pauses longer that they cause in other texts. ``prefix_reuse``: whether prompts that
    begin alike share the blocks of their beginning. Raises :class:`SpecError` for numbers out of range."""

    kv_bytes: int | None = None
    max_running: int = 16
    max_queue: int = 256
    max_model_len: int | None = None
    step_tokens: int = 256
    prefix_reuse: bool = True

    def __post_init__(self) -> None:
        rules = (
            (self.kv_bytes is None or self.kv_bytes > 0, f"kv_bytes must be positive, got {self.kv_bytes}"),
            (self.max_running >= 1, f"max_running must be at least 1, got {self.max_running}"),
            (self.max_queue >= 1, f"max_queue must be at least 1, got {self.max_queue}"),
            (
                self.max_model_len is None or self.max_model_len >= 2,
                f"max_model_len must be at least 2 (a token of prompt and one of answer), got {self.max_model_len}",
            ),
            (
                self.max_running <= self.step_tokens <= MAX_TOKENS,
                f"step_tokens must be in max_running..{MAX_TOKENS} = {self.max_running}..{MAX_TOKENS}, "
                f"got {self.step_tokens}",
            ),
        )
        _check(rules)


@dataclass(frozen=True)
class Constraint:
    """What the text must be: any JSON object (``json_object``; ``value`` is ignored), JSON of a schema
    (``json_schema``; ``value`` is the schema as JSON), or a match of a regular expression (``regex``; Rust's syntax).
    Enforced token by token by llguidance (the extra ``serve``)."""

    kind: Literal["json_object", "json_schema", "regex"]
    value: str = ""


@dataclass(frozen=True)
class Request:
    """One text to be generated. ``tokens``: ids of the prompt. ``max_tokens``: most tokens of the answer; fewer where
    the context ends before. ``stop`` strings end the text and are not part of it. ``logprobs``: None, or how many of
    the most likely tokens are reported with each chosen one. ``ignore_end``: an end token is a token like others (it
    is part of the answer and ends nothing). Raises :class:`SpecError` for values out of range."""

    tokens: Sequence[int]
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    constraint: Constraint | None = None
    ignore_end: bool = False

    def __post_init__(self) -> None:
        rules = (
            (len(self.tokens) > 0, "the prompt is empty; give at least one token"),
            (self.max_tokens >= 1, f"max_tokens must be at least 1, got {self.max_tokens}"),
            (all(self.stop), "a stop string is empty; leave it out instead"),
            (
                self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS,
                f"logprobs must be in 0..{MOST_LOGPROBS}, got {self.logprobs}",
            ),
        )
        _check(rules)


class QueueFullError(DQError):
    """As many requests wait as may; ``retry_after`` is an estimate of the seconds until one of them is admitted."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} requests are waiting already; try again in {math.ceil(retry_after)} s")
        self.retry_after = retry_after


class EngineClosedError(DQError):
    """The engine takes no more requests: it drains, was closed, or its thread died."""


def _check(rules: Sequence[tuple[bool, str]]) -> None:
    for holds, message in rules:
        if not holds:
            raise SpecError(message)
