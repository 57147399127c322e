"""The engine in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class EngineStats:
    """A snapshot. Of this moment: ``running`` sequences with blocks and ``waiting`` ones without; blocks in all, those
    that live requests hold, and those that are free but hold a beginning that may be used again. Since the start:
    prompt tokens of requests admitted and how many of them were found in the memory, tokens generated, requests by how
    they ended, passes of the decoder, sequences that lost their blocks to older ones (``preemptions``), and seconds
    spent in passes, sampling included. ``block_bytes``: bytes of a block."""

    running: int = 0
    waiting: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    block_bytes: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    requests_finished: Mapping[str, int] = field(default_factory=dict)
    steps: int = 0
    preemptions: int = 0
    step_seconds: float = 0.0
