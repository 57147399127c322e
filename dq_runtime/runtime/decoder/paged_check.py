"""What a pass must fulfil before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

from dq_runtime.errors import SpecError
from dq_runtime.runtime.decoder.paged import BLOCK, MAX_TOKENS, Segment


def check_segments(segments: Sequence[Segment], vocabulary: int, blocks: int) -> None:
    """Raise :class:`SpecError` unless ``segments`` are a pass over a memory of ``blocks`` blocks: 1 to MAX_TOKENS
    tokens, ids of the vocabulary, blocks enough and existing, and none written by two segments."""
    total = sum(len(s.tokens) for s in segments)
    if not 1 <= total <= MAX_TOKENS or not all(s.tokens for s in segments):
        raise SpecError(f"a pass takes segments of at least 1 token and of 1 to {MAX_TOKENS} in all, got {total}")
    written: set[int] = set()
    for s in segments:
        end = s.start + len(s.tokens)
        if not all(0 <= token < vocabulary for token in s.tokens):
            raise SpecError(f"a segment holds a token id outside 0..{vocabulary - 1}")
        if s.start < 0 or len(s.blocks) * BLOCK < end:
            raise SpecError(f"{len(s.blocks)} blocks cannot hold the positions {s.start} to {end - 1}")
        if not all(0 <= block < blocks for block in s.blocks):
            raise SpecError(f"a segment names a block outside 0..{blocks - 1}")
        if s.generated and len(s.tokens) != 1:
            raise SpecError(f"a generated segment is one token, got {len(s.tokens)}")
        own = s.blocks[s.start // BLOCK : -(-end // BLOCK)]
        if len(set(own)) < len(own) or written & set(own):
            raise SpecError("two segments, or two parts of one, write to the same block")
        written |= set(own)
