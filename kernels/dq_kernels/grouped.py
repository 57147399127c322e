"""x @ W_e.T for a mixture of experts, each (token, expert) pair with its own expert's weight, in one launch.

Shapes: T tokens, P = T * top_k pairs (pair p is token p // top_k), E experts, expert_of_P, x_TK or x_PK, y_PN.
Pairs are sorted by expert and each expert's share is padded to whole tiles of BM rows, so that a tile needs one weight
only. What a tile is (its expert, its BM pairs) is computed on the device by one small kernel: the host never waits to
learn who was routed where, and launches the most tiles that P pairs can need; those past the end leave at once.
Weights are rounded to x's dtype, sums are float32 in a fixed order: the same input gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dq_kernels.case import Case
from dq_kernels.dequant import stage
from dq_kernels.stream import TABLE_TOKENS, Tile, constants, dot_step, finish
from dq_kernels.stream_layout import StreamWeight, stream_bits
from dq_kernels.table import capability_of, table_for

# Tiles are chosen for at most this many tokens an expert: the last tile of each expert is half padding on average, and
# of 256 rows that would be as much as all tokens of an expert with 128.
MOST_TOKENS = 128
ALIGN_BLOCK = 1024  # pairs an alignment program reads at once


@dataclass(frozen=True)
class ExpertWeight:
    """The weights [N, K] of E experts in streaming order (stream_layout.py), one behind the other.

    ``words`` int16 [E, blocks, planes, N, P]; ``scale`` int32 [E, ceil(G/2), N]; ``zero`` int32 [E, ceil(G/4), N] or
    None; the rest as in :class:`StreamWeight`.
    """

    words: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    k: int
    group: int
    dtype: torch.dtype
    form: str = "int"

    @property
    def experts(self) -> int:
        return self.words.shape[0]

    @property
    def n(self) -> int:
        return self.words.shape[3]

    def expert(self, e: int) -> StreamWeight:
        """The weight of expert ``e``, a view."""
        zero = None if self.zero is None else self.zero[e]
        return StreamWeight(self.words[e], self.scale[e], zero, self.bits, self.k, self.group, self.dtype, self.form)


@triton.jit
def expert_block(expert_ptr, pair, PAIRS, E: tl.constexpr):
    """Experts of the pairs ``pair``, int32; E for those past the last, and for numbers that are no expert's."""
    expert = tl.load(expert_ptr + pair, mask=pair < PAIRS, other=E).to(tl.int32)
    return tl.where((expert >= 0) & (expert < E), expert, E)


@triton.jit(do_not_specialize=["PAIRS", "TILES"])
def align_kernel(
    expert_ptr, rows_ptr, tile_ptr, PAIRS, TILES,
    E: tl.constexpr, BINS: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    """A program an expert writes the tiles of its pairs, in the order of the pairs; one more marks those past the end.

    Each counts all pairs itself rather than wait for the others: 16384 pairs are 16 passes. BINS is more than E,
    PASSES * BLOCK at least PAIRS.
    """
    own = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    for i in range(PASSES):
        counts += tl.histogram(expert_block(expert_ptr, i * BLOCK + lane, PAIRS, E), BINS)
    tiles = tl.where(bins < E, (counts + BM - 1) // BM, 0)
    first = tl.sum(tl.where(bins < own, tiles, 0))
    if own == E:
        for i in range(PASSES):
            tile = first + i * BLOCK + lane
            tl.store(tile_ptr + tile, tl.zeros((BLOCK,), tl.int32) - 1, mask=tile < TILES)
    else:
        seen = 0
        for i in range(PASSES):
            pair = i * BLOCK + lane
            hit = expert_block(expert_ptr, pair, PAIRS, E) == own
            at = seen + tl.cumsum(hit.to(tl.int32), 0) - 1
            tl.store(rows_ptr + first * BM + at, pair, mask=hit)
            tl.store(tile_ptr + first + at // BM, tl.zeros((BLOCK,), tl.int32) + own, mask=hit & (at % BM == 0))
            seen += tl.sum(hit.to(tl.int32))
        pad = seen + tl.arange(0, BM)
        short = pad < (seen + BM - 1) // BM * BM
        tl.store(rows_ptr + first * BM + pad, tl.zeros((BM,), tl.int32) + PAIRS, mask=short)


def tiles_bound(pairs: int, experts: int, bm: int) -> int:
    """The most tiles of ``bm`` rows that ``pairs`` pairs can need: each expert in use wastes at most bm - 1 rows."""
    used = min(experts, pairs)
    return used + (pairs - used) // bm


def _align_constants(pairs: int, experts: int, bm: int) -> dict[str, int]:
    passes = triton.next_power_of_2(triton.cdiv(pairs, ALIGN_BLOCK))  # a power of two: one compilation serves many P
    return {"E": experts, "BINS": triton.next_power_of_2(experts + 1), "BM": bm, "BLOCK": ALIGN_BLOCK, "PASSES": passes}


def align(expert_of: Tensor, experts: int, bm: int) -> tuple[Tensor, Tensor]:
    """Integer [P], each 0 .. experts-1 -> rows int32 [tiles * bm], expert of each tile int32 [tiles].

    ``rows`` are the pairs in order of their expert, P in the padding; tiles past the last pair have expert -1 and unset
    rows. Pairs of any other number are in no tile. Nothing waits for the device.
    """
    pairs = expert_of.numel()
    tiles = tiles_bound(pairs, experts, bm)
    rows = torch.empty(tiles * bm, dtype=torch.int32, device=expert_of.device)
    expert_of_tile = torch.empty(tiles, dtype=torch.int32, device=expert_of.device)
    if pairs:
        align_kernel[(experts + 1,)](
            expert_of.contiguous(), rows, expert_of_tile, pairs, tiles, num_warps=4,
            **_align_constants(pairs, experts, bm),
        )  # fmt: skip
    return rows, expert_of_tile


@triton.jit(do_not_specialize=["PAIRS"])
def grouped_kernel(
    x_ptr, w_ptr, s_ptr, z_ptr, y_ptr, rows_ptr, tile_ptr, PAIRS, N,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, MIDDLE: tl.constexpr, HAS_ZERO: tl.constexpr,
    COMPUTE: tl.constexpr, SCALE: tl.constexpr, TOP_K: tl.constexpr, SCALE_ROWS: tl.constexpr,
    ZERO_ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, PLAIN: tl.constexpr,
    TABLE: tl.constexpr = "int",
):  # fmt: skip
    """y[pair] = x[pair // TOP_K] @ W[expert of its tile].T. Grid: (tiles, ceil(N / BN)): an expert's tiles follow each
    other, so they find its weights in L2. ``SCALE_ROWS``, ``ZERO_ROWS``: words a column of N has of each."""
    STEP: tl.constexpr = 64 if BITS == 8 else 128
    STEPS: tl.constexpr = (K + STEP - 1) // STEP
    WORDS: tl.constexpr = STEPS * (STEP * BITS // 16)  # of one row of one expert
    tile = tl.program_id(0)
    expert = tl.load(tile_ptr + tile)
    if expert < 0:
        return
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    rn = tl.minimum(n, N - 1)  # rows past N read the last row again, and the stores drop them
    pair = tl.load(rows_ptr + tile * BM + tl.arange(0, BM))
    keep_m = pair < PAIRS
    x_row = x_ptr + (pair // TOP_K).to(tl.int64) * K
    rows_before = expert.to(tl.int64) * N
    w_ptr += rows_before * WORDS
    s_ptr += rows_before * SCALE_ROWS
    z_ptr += rows_before * ZERO_ROWS
    acc = tl.zeros((BN, BM), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        acc = dot_step(
            acc, x_row, keep_m, w_ptr, s_ptr, z_ptr, rn, N, step, K, STEP, STEPS, 1, BITS, GROUP, MIDDLE, HAS_ZERO,
            COMPUTE, SCALE, PLAIN, TABLE,
        )  # fmt: skip
    finish(acc, s_ptr, y_ptr, rn, n, pair, PAIRS, N, GROUP, SCALE)


def choose(pairs: int, used: int, n: int, bits: int, capability: int, most: int = MOST_TOKENS) -> Tile:
    """The tile for ``pairs`` pairs of ``used`` experts [n, K]: the table's for an average expert's tokens, given that
    the tiles of all of them fill the chip together. K is not split."""
    m = min(triton.cdiv(pairs, used), most)
    rows = table_for(capability)[stream_bits(bits)]
    row = next((r for r in rows if m <= r.max_m and used * r.tiles(m, n) >= r.min_tiles), rows[-1])
    return Tile(row.BM, row.BN, row.num_warps, row.num_stages)


def qmm_grouped(x: Tensor, w: ExpertWeight, expert_of: Tensor, out: Tensor | None = None) -> Tensor:
    """x [T, K] or [P, K] bf16/fp16, expert_of integer [P] with P = T * top_k -> y [P, N] in x's dtype.

    Row p of y is x[p // top_k] (x[p] where x has P rows) times the weight of expert ``expert_of[p]``, which must be
    0 .. E-1: a row whose number is not stays unset, since checking it would wait for the device. ``out``: a contiguous
    [P, N] tensor to write into. Raises ValueError for shapes and dtypes that do not fit.
    """
    pairs = expert_of.numel()
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"the grouped kernel multiplies bfloat16 or float16, got {x.dtype}")
    if x.ndim != 2 or x.shape[1] != w.k or (x.shape[0] == 0) != (pairs == 0) or (pairs and pairs % x.shape[0]):
        raise ValueError(f"x must be [T, {w.k}] with T dividing the {pairs} pairs, got {list(x.shape)}")
    if out is None:
        out = torch.empty(pairs, w.n, dtype=x.dtype, device=x.device)
    if pairs == 0 or w.n == 0:
        return out
    most = MOST_TOKENS if w.form == "int" else TABLE_TOKENS
    tile = choose(pairs, min(w.experts, pairs), w.n, w.bits, capability_of(x.device), most)
    rows, expert_of_tile = align(expert_of, w.experts, tile.BM)
    written = stage(out)
    grouped_kernel[(expert_of_tile.numel(), triton.cdiv(w.n, tile.BN))](
        x.contiguous(), w.words, w.scale, w.scale if w.zero is None else w.zero, written, rows, expert_of_tile, pairs,
        w.n, TOP_K=pairs // x.shape[0], SCALE_ROWS=w.scale.shape[1],
        ZERO_ROWS=0 if w.zero is None else w.zero.shape[1], BM=tile.BM, BN=tile.BN, STAGES=tile.num_stages,
        num_warps=tile.num_warps, **constants(w.expert(0), x.dtype),
    )  # fmt: skip
    return out if written is out else out.copy_(written)


def offline_cases() -> list[Case]:
    """The alignment; then bf16 at 3 and 4 bits, groups of 64, K = 2048, symmetric and not, in every tile that the
    shipped tables give 8 narrow or wide experts of 1, 64 and 512 tokens."""
    align_types = {"expert_ptr": "*i64", "rows_ptr": "*i32", "tile_ptr": "*i32", "PAIRS": "i32", "TILES": "i32"}
    cases = [
        Case(
            label=f"align P={pairs} E={experts} BM={bm}",
            kernel=align_kernel,
            types=align_types,
            constants=_align_constants(pairs, experts, bm),
            options={"num_warps": 4},
        )
        for pairs, experts, bm in ((8, 128, 16), (16384, 8, 64))
    ]
    for arch in (80, 90):
        for bits in (3, 4):
            chosen = {choose(tokens * 8, 8, n, bits, arch) for tokens in (1, 64, 512) for n in (256, 8192)}
            cases += [_case(arch, bits, tile, zero) for tile in sorted(chosen, key=repr) for zero in (False, True)]
    return cases


def _case(arch: int, bits: int, tile: Tile, zero: bool) -> Case:
    pointers: dict[str, Any] = dict.fromkeys(("x_ptr", "y_ptr"), "*bf16")
    pointers |= {"w_ptr": "*i16", "s_ptr": "*i32", "z_ptr": "*i32", "rows_ptr": "*i32", "tile_ptr": "*i32"}
    kind = "asym" if zero else "sym"
    return Case(
        label=f"grouped {bits}-bit {kind} {tile.BM}x{tile.BN} w{tile.num_warps} s{tile.num_stages}",
        kernel=grouped_kernel,
        types={**pointers, "PAIRS": "i32", "N": "i32"},
        constants={
            "K": 2048, "BITS": bits, "GROUP": 64, "MIDDLE": float(2 ** (bits - 1)), "HAS_ZERO": zero,
            "COMPUTE": tl.bfloat16, "SCALE": tl.bfloat16, "TOP_K": 8, "SCALE_ROWS": 16, "ZERO_ROWS": 8 if zero else 0,
            "BM": tile.BM, "BN": tile.BN, "STAGES": tile.num_stages, "PLAIN": False, "TABLE": "int",
        },
        options={"num_warps": tile.num_warps},
        archs=(arch,),
        aligned=("N",),
        mma={80: "HMMA", 90: "HGMMA"},
        async_copies=True,
        no_i2f=not zero,
    )  # fmt: skip
