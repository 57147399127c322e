"""Attention of one new token a sequence over its cache (flash-decoding): the slots are split over programs.

Shapes: B sequences, heads = G * kv query heads of D, caches of S slots. Position p lies in slot ``p % S``; the query is
at position p = lengths[b], which has been written. By definition, for a query head of key-value head h,

    held   = the newest position <= p that lies in a slot, where it is >= 0     seen: p - held < window, if there is one
    scores = softcap(scale * q . keys[b, h, slot]) over the slots seen          softcap(s) = c * tanh(s / c), or s
    out    = softmax(scores) @ values[b, h, slots seen]

The G query heads of a key-value head are the rows of one tl.dot, padded to 16, so keys and values are read once. Each
piece leaves (max, sum, weighted values) in float32; the program of a sequence and head that arrives last combines the
pieces in their order (as stream.py does for K): one launch, and the same input gives the same bits. Slots that are not
seen are not read: what is in them, NaN included, cannot matter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dq_kernels.case import Case
from dq_kernels.cast import by_hand, round_to
from dq_kernels.check import check_tensor
from dq_kernels.dequant import TL_DTYPES, compute_dtype
from dq_kernels.stream import counters

# Programs to aim for: two on each of an H100's 132 SMs. Combining more pieces than MAX_SPLITS costs what they save.
PROGRAMS, MAX_SPLITS = 256, 32
MAX_HEAD_DIM = 256
NUM_WARPS, STAGES = 4, 2  # with 3, heads of 96 with a window spill on sm_90
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def attention_kernel(
    q_ptr, keys_ptr, values_ptr, lengths_ptr, out_ptr, acc_ptr, stats_ptr, arrived_ptr, slots, scale, softcap,
    KV: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, WINDOW: tl.constexpr,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, EACH: tl.constexpr, COMPUTE: tl.constexpr,
    STAGES: tl.constexpr, BY_HAND: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """One piece of the slots of one key-value head. Grid: (B * KV, SPLITS).

    ROWS, DP: G and D rounded up to powers of two, ROWS to at least 16. WINDOW 0: none. ``acc_ptr`` float32
    [B * KV, SPLITS, G, D] and ``stats_ptr`` float32 [B * KV, SPLITS, 2, G] are unset, ``arrived_ptr`` int32 [B * KV] is
    zero, and zero again afterwards. EACH: blocks a piece at most; PLAIN (the interpreter, which cannot loop to a number
    it has loaded) goes through all of them, a chip only through those that hold something.
    """
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    tile = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    position = tl.load(lengths_ptr + tile // KV).to(tl.int32)
    turn = position % slots
    limit = tl.minimum(position + 1, slots)
    span = tl.cdiv(tl.cdiv(limit, BLOCK), SPLITS) * BLOCK
    start = tl.minimum(piece * span, limit)
    stop = tl.minimum(start + span, limit)
    g = tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    keep_g = g < G
    keep_d = d < D
    inside = g[:, None] * D + d[None, :]
    keep = keep_g[:, None] & keep_d[None, :]
    q = tl.load(q_ptr + tile * (G * D) + inside, mask=keep, other=0.0).to(COMPUTE)
    cache = tile * slots * D
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DP), tl.float32)
    for i in tl.range(0, EACH if PLAIN else tl.cdiv(stop - start, BLOCK), num_stages=STAGES):
        slot = start + i * BLOCK + tl.arange(0, BLOCK)
        held = position - turn + slot - tl.where(slot > turn, slots, 0)
        seen = slot < stop  # and held >= 0: no slot before ``limit`` is empty
        if WINDOW > 0:
            seen = seen & (position - held < WINDOW)
        at = cache + slot[:, None] * D + d[None, :]
        read = seen[:, None] & keep_d[None, :]
        k = tl.load(keys_ptr + at, mask=read, other=0.0).to(COMPUTE)
        v = tl.load(values_ptr + at, mask=read, other=0.0).to(COMPUTE)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if CAPPED:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)  # tanh
        scores = tl.where(seen[None, :], scores * LOG2E, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(higher > -float("inf"), higher, 0.0)  # nothing seen yet: -inf - -inf would be NaN
        fade = tl.exp2(top - shift)
        p = tl.exp2(scores - shift[:, None])
        total = total * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(COMPUTE), v, acc * fade[:, None], input_precision="ieee")
        top = higher
    if SPLITS == 1:
        tl.store(out_ptr + tile * (G * D) + inside, round_to(acc / total[:, None], DTYPE, BY_HAND), mask=keep)
    else:
        pieces = acc_ptr + tile * (SPLITS * G * D)
        stats = stats_ptr + tile * (SPLITS * 2 * G)
        tl.store(pieces + piece * (G * D) + inside, acc, mask=keep)
        tl.store(stats + piece * (2 * G) + g, top, mask=keep_g)
        tl.store(stats + piece * (2 * G) + G + g, total, mask=keep_g)
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == SPLITS - 1:
            n = tl.arange(0, SPLITS)
            for row in tl.static_range(G):
                tops = tl.load(stats + n * (2 * G) + row, cache_modifier=".cg")
                totals = tl.load(stats + n * (2 * G) + G + row, cache_modifier=".cg")
                weight = tl.exp2(tops - tl.max(tops, 0))
                part = tl.load(
                    pieces + (n * (G * D))[:, None] + row * D + d[None, :], mask=keep_d[None, :], other=0.0,
                    cache_modifier=".cg",
                )  # fmt: skip
                mean = tl.sum(part * weight[:, None], 0) / tl.sum(weight * totals, 0)
                tl.store(out_ptr + (tile * G + row) * D + d, round_to(mean, DTYPE, BY_HAND), mask=keep_d)
            tl.store(arrived_ptr + tile, 0)


def block_of(dim: int, itemsize: int) -> int:
    """Slots a step of the loop: 64, or what keeps its tiles of keys and of values at 16 KB each (heads of 128 in
    float32 spill with 64 on sm_90)."""
    return min(64, 16384 // (triton.next_power_of_2(dim) * itemsize))


def splits_of(tiles: int, blocks: int) -> int:
    """Pieces of the slots, a power of two: enough programs for the chip, at least a block of slots each."""
    wanted = max(1, min(PROGRAMS // tiles, MAX_SPLITS, blocks))
    return 1 << (wanted.bit_length() - 1)


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    used: int,
    window: int | None,
    scale: float,
    softcap: float | None,
    out: Tensor | None = None,
) -> Tensor:
    """q [B, heads, D], keys and values [B, kv heads, S, D], in one dtype -> [B, heads * D], by the module's formulas.

    ``lengths`` int64 [B], the query's position. ``used``: how many of the first slots are in use at most, for a host
    that cannot ask; what is launched depends on it, the result only where it is too small. ``out``: a contiguous
    tensor to write into. Raises ValueError for what does not fit together.
    """
    batch, heads, dim = q.shape
    kv, slots = keys.shape[1], keys.shape[2]
    if q.dtype not in TL_DTYPES or dim > MAX_HEAD_DIM or heads % kv or not 0 < used <= slots:
        raise ValueError(
            f"decode_attention takes bf16, fp16 or float32 heads of at most {MAX_HEAD_DIM}, a multiple of the key-value"
            f" heads, and 1 to S used slots; got {q.dtype}, {heads} heads of {dim} on {kv}, {used} of {slots} slots"
        )
    check_tensor("q", q, (batch, heads, dim), q.dtype)
    check_tensor("keys", keys, (batch, kv, slots, dim), q.dtype)
    check_tensor("values", values, (batch, kv, slots, dim), q.dtype)
    check_tensor("lengths", lengths, (batch,), torch.int64)
    if out is None:
        out = torch.empty(batch, heads * dim, dtype=q.dtype, device=q.device)
    tiles = batch * kv
    blocks = triton.cdiv(used, block_of(dim, q.itemsize))
    splits = splits_of(tiles, blocks)
    acc = stats = arrived = lengths
    if splits > 1:
        acc = torch.empty(tiles, splits, heads // kv, dim, dtype=torch.float32, device=q.device)
        stats = torch.empty(tiles, splits, 2, heads // kv, dtype=torch.float32, device=q.device)
        arrived = counters(q.device)
    plain = bool(triton.knobs.runtime.interpret)
    attention_kernel[(tiles, splits)](
        q, keys, values, lengths, out, acc, stats, arrived, slots, scale, softcap or 1.0,
        SPLITS=splits, EACH=triton.cdiv(blocks, splits) if plain else 0, WINDOW=window or 0, CAPPED=softcap is not None,
        COMPUTE=compute_dtype(q.dtype), BY_HAND=by_hand(q.dtype), PLAIN=plain,
        num_warps=NUM_WARPS, **shape_constants(kv, heads, dim, q.itemsize),
    )  # fmt: skip
    return out


def shape_constants(kv: int, heads: int, dim: int, itemsize: int) -> dict[str, int]:
    """The constexpr arguments that follow from the model and the bytes of its dtype."""
    rows = max(16, triton.next_power_of_2(heads // kv))
    return {
        "KV": kv, "G": heads // kv, "ROWS": rows, "D": dim, "DP": triton.next_power_of_2(dim),
        "BLOCK": block_of(dim, itemsize), "STAGES": STAGES,
    }  # fmt: skip


def offline_cases() -> list[Case]:
    """Llama 3 8B unsplit and split, SmolLM2, Phi-3 mini, Gemma 2 (window, softcap), heads of 80, float32."""
    kinds = [
        (8, 32, 128, "bf16", 1, 0, False), (8, 32, 128, "bf16", 32, 0, False), (3, 9, 64, "fp16", 16, 0, False),
        (32, 32, 96, "bf16", 8, 2047, False), (8, 16, 256, "bf16", 32, 4096, True), (32, 32, 80, "fp16", 8, 0, False),
        (8, 32, 128, "fp32", 8, 0, False),
    ]  # fmt: skip
    cases = []
    for kv, heads, dim, dtype, splits, window, capped in kinds:
        compute = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[dtype]
        types = dict.fromkeys(("q_ptr", "keys_ptr", "values_ptr", "out_ptr"), f"*{dtype}")
        types |= {"lengths_ptr": "*i64", "acc_ptr": "*fp32", "stats_ptr": "*fp32", "arrived_ptr": "*i32"}
        cases.append(
            Case(
                label=f"attention {dtype} {heads}/{kv} heads of {dim}/{splits}{' window' if window else ''}",
                kernel=attention_kernel,
                types={**types, "slots": "i32", "scale": "fp32", "softcap": "fp32"},
                constants={
                    "SPLITS": splits, "EACH": 0, "WINDOW": window, "CAPPED": capped, "COMPUTE": compute,
                    "BY_HAND": False, "PLAIN": False,
                    **shape_constants(kv, heads, dim, compute.primitive_bitwidth // 8),
                },
                options={"num_warps": NUM_WARPS},
                mma={} if dtype == "fp32" else {80: "HMMA", 90: "HMMA"},
                async_copies=True,
            )
        )  # fmt: skip
    return cases
