"""Many sequences in one pass, their keys and values in blocks of one shared memory: what continuous batching needs.

A block holds BLOCK consecutive positions of one sequence, of every layer. Which block of the memory holds which
positions is the caller's table (PagedAttention, 2309.06180): sequences grow block by block, a finished one's blocks are
free at once, and two sequences with the same beginning may share the blocks of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

BLOCK = 64  # positions of a block: the tile of the C++ attention (csrc/cpu/attention.h), a page that CUDA gathers
MAX_TOKENS = 512  # most tokens of one pass, all segments together


@dataclass(frozen=True)
class Segment:
    """The next tokens of one sequence.

    ``tokens``: ids, one or more. ``start``: positions of the sequence that its blocks hold already. ``blocks``: the
    numbers of its blocks in order, at least ``ceil((start + len(tokens)) / BLOCK)`` of them; those of the positions
    written now belong to this segment alone. ``wants_logits``: whether the last token's logits are asked for.
    ``generated``: the one token was produced by the decode loop and is no part of a prompt. Prompt tokens and generated
    tokens are summed in two different fixed orders, so that a token's result depends neither on where a prompt was
    cut nor on what else is in the pass (bit for bit with an exact decoder).
    """

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    wants_logits: bool = True
    generated: bool = False


class PagedDecoder(Protocol):
    """Runs one model on segments. The memory of keys and values is the decoder's own kind of object."""

    @property
    def block_bytes(self) -> int:
        """Bytes of keys and values of one block, all layers."""
        ...

    def memory(self, blocks: int, positions: int | None = None) -> Any:
        """Memory for ``blocks`` blocks, allocated at once, and sequences of at most ``positions`` (None: the model's
        context, or all blocks if those are fewer); raises :class:`SpecError` when either is below 1. Longrope's angles
        are those of ``positions`` for all sequences: keys that are shared cannot follow the length of each."""
        ...

    def run(self, segments: Sequence[Segment], memory: Any) -> Any:
        """Feed at most MAX_TOKENS tokens; float32 logits [n, V], a row for each segment that wants them, in order.
        Raises :class:`SpecError` for token ids, block numbers or counts out of range, and writes nothing then."""
        ...
