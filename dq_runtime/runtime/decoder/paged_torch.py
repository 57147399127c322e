"""Segments on the torch decoder's weights: the definition of the others, and what serves on a GPU.

The tokens of all segments go through norms and linears as one row of tokens. Only attention knows sequences: segments
of one token are attended to together, padded to the longest, the others one by one, each over its gathered blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dq_runtime.errors import SpecError
from dq_runtime.runtime.decoder.attention import attend, attend_causally, for_groups
from dq_runtime.runtime.decoder.kv_cache import visible
from dq_runtime.runtime.decoder.paged import BLOCK, Segment
from dq_runtime.runtime.decoder.paged_check import check_segments
from dq_runtime.runtime.decoder.rope import Rope
from dq_runtime.runtime.decoder.rotation import rotation
from dq_runtime.runtime.decoder.torch_decoder import TorchDecoder


@dataclass
class PagedMemory:
    """``keys`` and ``values``: per layer [blocks, kv_heads, BLOCK, head_dim] of the decoder's dtype. ``frequencies``:
    float32 [dim / 2] of every rope."""

    keys: list[Tensor]
    values: list[Tensor]
    frequencies: dict[Rope, Tensor]

    @property
    def blocks(self) -> int:
        """How many there are."""
        return self.keys[0].shape[0]


@dataclass(frozen=True)
class _Group:
    """Segments that attend as one batch of B sequences with T new tokens each. ``rows``: int64 [B * T], which tokens of
    the pass are theirs. ``tables``: int64 [B, n], their blocks, filled up with a row's first. ``positions``: [B, T].
    ``fresh``: beginnings, whose keys and values are all in this pass."""

    rows: Tensor
    tables: Tensor
    positions: Tensor
    fresh: bool


@dataclass(frozen=True)
class _Pass:
    """``ids``, ``positions``, and where each token's key goes, ``block`` and ``slot``: int64 [T]. ``begun``: the blocks
    whose first position is written now."""

    ids: Tensor
    positions: Tensor
    block: Tensor
    slot: Tensor
    begun: Tensor
    groups: list[_Group]


class PagedTorch:
    """A :class:`PagedDecoder` on the weights of ``decoder``. A layer with a sliding window keeps all positions, and
    hides those before the window."""

    def __init__(self, decoder: TorchDecoder) -> None:
        self._decoder = decoder
        c = decoder.config
        self.block_bytes = 2 * len(c.layers) * c.kv_heads * BLOCK * c.head_dim * decoder.dtype.itemsize

    @torch.inference_mode()
    def memory(self, blocks: int, positions: int | None = None) -> PagedMemory:
        c, device = self._decoder.config, self._decoder.device
        if positions is None:
            positions = min(c.context_length, blocks * BLOCK)
        if blocks < 1 or positions < 1:
            raise SpecError(f"a memory needs at least 1 block and 1 position, got {blocks} and {positions}")
        shape = (blocks, c.kv_heads, BLOCK, c.head_dim)

        def allocated() -> list[Tensor]:
            return [torch.zeros(shape, dtype=self._decoder.dtype, device=device) for _ in c.layers]

        ropes = {layer.rope for layer in c.layers}
        frequencies = {rope: torch.from_numpy(rope.frequencies(positions)).to(device) for rope in ropes}
        return PagedMemory(allocated(), allocated(), frequencies)

    @torch.inference_mode()
    def run(self, segments: Sequence[Segment], memory: PagedMemory) -> Tensor:
        decoder, c = self._decoder, self._decoder.config
        check_segments(segments, c.vocab, memory.blocks)
        now = _pass(segments, decoder.device)
        turns = {
            rope: rotation(frequencies, now.positions[None], rope.attention_factor, decoder.dtype)
            for rope, frequencies in memory.frequencies.items()
        }
        masks = {window: self._masks(now.groups, window) for window in {layer.window for layer in c.layers}}
        x = F.embedding(now.ids[None], decoder.embedding) * decoder.scale
        for i, layer in enumerate(decoder.layers):
            choice = c.layers[i]
            mix = partial(self._mixed, memory.keys[i], memory.values[i], now, masks[choice.window])
            x = layer(x, turns[choice.rope], mix)
        ends = torch.tensor([len(s.tokens) for s in segments]).cumsum(0) - 1
        wanted = ends[torch.tensor([s.wants_logits for s in segments])].to(decoder.device)
        return decoder.head_of(x[0, wanted])

    def _masks(self, groups: list[_Group], window: int | None) -> list[Tensor | None]:
        """Of each group, bool [B, 1, G * T, n * BLOCK]; None where plainly causal."""
        c = self._decoder.config
        masks: list[Tensor | None] = []
        for group in groups:
            slots = group.tables.shape[1] * BLOCK
            if group.fresh and c.attention_softcap is None and (window or slots) >= group.positions.shape[1]:
                masks.append(None)
                continue
            held = torch.arange(slots, device=group.tables.device)[None]
            masks.append(for_groups(visible(held, group.positions, window), c.heads // c.kv_heads))
        return masks

    def _mixed(
        self, keys: Tensor, values: Tensor, now: _Pass, masks: list[Tensor | None], q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """A layer's attention: store k and v [1, kv_heads, T, D], then each group's of q [1, heads, T, D]."""
        c = self._decoder.config
        for memory, new in ((keys, k), (values, v)):
            # What an earlier owner left behind a sequence's end is masked, but attention multiplies it by 0, and
            # 0 * NaN would be NaN.
            memory[now.begun] = 0
            memory[now.block, :, now.slot] = new[0].transpose(0, 1)
        mixed = torch.empty(1, q.shape[2], c.heads * c.head_dim, dtype=q.dtype, device=q.device)
        for group, mask in zip(now.groups, masks, strict=True):
            batch, count = group.positions.shape

            def of(x: Tensor, rows: Tensor = group.rows, batch: int = batch, count: int = count) -> Tensor:
                """[1, heads, T, D] -> [B, heads, T of the group, D]."""
                return x[0][:, rows].view(x.shape[1], batch, count, x.shape[3]).transpose(0, 1)

            if mask is None:
                out = attend_causally(of(q), of(k), of(v), c.attention_scale)
            else:
                held = [memory[group.tables].transpose(1, 2).flatten(2, 3) for memory in (keys, values)]
                out = attend(of(q), held[0], held[1], mask, c.attention_scale, c.attention_softcap)
            mixed[0, group.rows] = out.flatten(0, 1)
        return mixed


def _pass(segments: Sequence[Segment], device: torch.device) -> _Pass:
    starts, at = [], 0
    for s in segments:
        starts.append(at)
        at += len(s.tokens)
    positions = [p for s in segments for p in range(s.start, s.start + len(s.tokens))]
    block = [s.blocks[p // BLOCK] for s in segments for p in range(s.start, s.start + len(s.tokens))]

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    def group(indices: list[int]) -> _Group:
        chosen = [segments[i] for i in indices]
        lengths = [-(-(s.start + len(s.tokens)) // BLOCK) for s in chosen]
        tables = [[*s.blocks[:n], *[s.blocks[0]] * (max(lengths) - n)] for s, n in zip(chosen, lengths, strict=True)]
        count = len(chosen[0].tokens)
        return _Group(
            rows=tensor([starts[i] + t for i in indices for t in range(count)]),
            tables=tensor([b for table in tables for b in table]).view(len(chosen), -1),
            positions=tensor([s.start + t for s in chosen for t in range(count)]).view(-1, count),
            fresh=all(s.start == 0 for s in chosen),
        )

    single = [i for i, s in enumerate(segments) if len(s.tokens) == 1]
    groups = [group(single)] if single else []
    groups += [group([i]) for i, s in enumerate(segments) if len(s.tokens) > 1]
    return _Pass(
        ids=tensor([token for s in segments for token in s.tokens]),
        positions=tensor(positions),
        block=tensor(block),
        slot=tensor([p % BLOCK for p in positions]),
        begun=tensor([b for b, p in zip(block, positions, strict=True) if p % BLOCK == 0]),
        groups=groups,
    )
