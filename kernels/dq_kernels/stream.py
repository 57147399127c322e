"""x @ W.T with W streamed through registers: decoded there, never stored, the left operand of the matrix instruction.

The product is computed transposed, y_NM = W_NK @ x_MK.T, because on Hopper only the left operand of wgmma may come from
registers, and because M may then be as small as 16 at full speed. Where there are too few output tiles for the chip, K
is split: each piece leaves its float32 sums in a workspace, and the program that arrives last adds them in the order of
K. The same input gives the same bits, and there is no second launch and nothing to zero.

Tried on an H100 and dropped: dividing the K-steps of all tiles evenly over persistent programs (Stream-K, arXiv
2301.03598: 5 to 15% slower, its loop bounds are not constant), asking L2 for all words ahead (3 to 11% slower),
programmatic dependent launch (no gain). One tile of each of the first two gave wrong results that changed from run to
run, which straight-line code never has: keep loops with unknown bounds and divergent branches away from tl.dot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dq_kernels.case import Case
from dq_kernels.decode import step_tile
from dq_kernels.dequant import TL_DTYPES, compute_dtype, stage
from dq_kernels.levels import TABLE_OF
from dq_kernels.stream_layout import StreamWeight, stream_bits

# Tiles of a table's weights with more tokens than this spill on sm_80, whose left operand is held in registers too.
TABLE_TOKENS = 64


@dataclass(frozen=True)
class Tile:
    """How one launch is cut. ``split``: programs an output tile."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int
    split: int = 1


@triton.jit
def dot_step(
    acc, x_row, keep_m, w_ptr, s_ptr, z_ptr, rn, N, step, K: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr,
    SPLIT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, MIDDLE: tl.constexpr, HAS_ZERO: tl.constexpr,
    COMPUTE: tl.constexpr, SCALE: tl.constexpr, PLAIN: tl.constexpr, TABLE: tl.constexpr = "int",
):  # fmt: skip
    """acc [BN, BM] + W[rows, step] @ x[tokens, step].T."""
    # Where SPLIT does not divide the steps, the last piece repeats the last one, with x masked to 0.
    inside = tl.minimum(step, STEPS - 1) if STEPS % SPLIT != 0 else step
    a = step_tile(
        w_ptr, s_ptr, z_ptr, rn, N, inside, BITS, GROUP, MIDDLE, HAS_ZERO, COMPUTE, SCALE, PLAIN, TABLE
    )  # fmt: skip
    k = step * STEP + tl.arange(0, STEP)
    keep = keep_m[None, :]
    if K % STEP != 0 or STEPS % SPLIT != 0:
        keep = keep & (k < K)[:, None]
    x = tl.load(x_row[None, :] + k[:, None], mask=keep, other=0.0)
    return tl.dot(a, x.to(COMPUTE), acc, input_precision="ieee")


@triton.jit(do_not_specialize=["M"])
def stream_kernel(
    x_ptr, w_ptr, s_ptr, z_ptr, y_ptr, partial_ptr, arrived_ptr, M, N,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, MIDDLE: tl.constexpr, HAS_ZERO: tl.constexpr,
    COMPUTE: tl.constexpr, SCALE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr, PLAIN: tl.constexpr, TABLE: tl.constexpr = "int",
):  # fmt: skip
    """y_MN = x_MK @ W_NK.T. Grid: (ceil(M / BM), ceil(N / BN), SPLIT).

    ``partial_ptr``: float32 [tiles, SPLIT, BM, BN], unset; ``arrived_ptr``: int32 [tiles], zero, and zero again
    afterwards. M is not specialised: M == 1 and M % 16 == 0 would each recompile in the middle of serving.
    """
    STEP: tl.constexpr = 64 if BITS == 8 else 128
    STEPS: tl.constexpr = (K + STEP - 1) // STEP
    EACH: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    piece = tl.program_id(2)
    # Rows past N read the last row again: loads stay in bounds without a mask, and the stores drop them.
    rn = tl.minimum(n, N - 1)
    keep_m = m < M
    x_row = x_ptr + m.to(tl.int64) * K
    first = piece * EACH
    acc = tl.zeros((BN, BM), tl.float32)
    for i in tl.range(0, EACH, num_stages=STAGES):
        acc = dot_step(
            acc, x_row, keep_m, w_ptr, s_ptr, z_ptr, rn, N, first + i, K, STEP, STEPS, SPLIT, BITS, GROUP,
            MIDDLE, HAS_ZERO, COMPUTE, SCALE, PLAIN, TABLE,
        )  # fmt: skip
    if SPLIT > 1:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        inside = tl.arange(0, BN)[:, None] + tl.arange(0, BM)[None, :] * BN
        pieces = partial_ptr + tile.to(tl.int64) * (SPLIT * BM * BN) + inside
        tl.store(pieces + piece * (BM * BN), acc, mask=keep_m[None, :])
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == SPLIT - 1:
            acc = tl.zeros((BN, BM), tl.float32)
            for other in tl.static_range(SPLIT):
                acc += tl.load(
                    pieces + other * (BM * BN), mask=keep_m[None, :], other=0.0, cache_modifier=".cg"
                )  # fmt: skip
            tl.store(arrived_ptr + tile, 0)
            finish(acc, s_ptr, y_ptr, rn, n, m, M, N, GROUP, SCALE)
    else:
        finish(acc, s_ptr, y_ptr, rn, n, m, M, N, GROUP, SCALE)


@triton.jit
def finish(acc, s_ptr, y_ptr, rn, n, m, M, N, GROUP: tl.constexpr, SCALE: tl.constexpr):
    """Write a finished tile [BN, BM] to y_MN, in y's dtype; one scale a row is applied here."""
    if GROUP == 0:
        acc = acc * tl.load(s_ptr + rn).to(tl.int16).to(SCALE, bitcast=True).to(tl.float32)[:, None]
    at = y_ptr + m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(at, acc.to(y_ptr.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


# Pieces are only made where tiles are fewer than programs, and no table asks for this many programs.
MAX_SPLIT_TILES = 4096
# Arrival counters by (device, stream): launches on one stream follow each other, and each leaves the counters at zero.
# All CUDA graphs of a device share one set (stream None), so graphs must not be replayed on two streams at once.
_counters: dict[tuple[torch.device, int | None], Tensor] = {}


def counters(device: torch.device) -> Tensor:
    """int32 zeros [MAX_SPLIT_TILES] that no concurrent launch uses; never freed, since captured graphs point to them.

    Raises RuntimeError in the capture of a CUDA graph if nothing ran before it: a fill would be captured, not done.
    """
    stream: int | None = None
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device).cuda_stream
        if torch.cuda.is_current_stream_capturing():
            if (device, None) not in _counters:
                raise RuntimeError("run the layer once before capturing it in a CUDA graph")
            return _counters[device, None]
    for key in ((device, None), (device, stream)):
        if key not in _counters:
            _counters[key] = torch.zeros(MAX_SPLIT_TILES, dtype=torch.int32, device=device)
    return _counters[device, stream]


def constants(w: StreamWeight, dtype: torch.dtype) -> dict[str, Any]:
    """The constexpr arguments of every kernel that decodes ``w`` for activations of ``dtype``."""
    return {
        "K": w.k, "BITS": stream_bits(w.bits), "GROUP": w.group, "MIDDLE": float(2 ** (w.bits - 1)),
        "HAS_ZERO": w.zero is not None, "COMPUTE": compute_dtype(dtype), "SCALE": TL_DTYPES[w.dtype],
        "PLAIN": triton.knobs.runtime.interpret, "TABLE": TABLE_OF[w.form],
    }  # fmt: skip


def qmm_stream(x: Tensor, w: StreamWeight, tile: Tile, out: Tensor | None = None) -> Tensor:
    """x [M, K] bf16/fp16 -> y [M, N] = x @ W.T in x's dtype; weights rounded to x's dtype, sums in float32, one launch.

    ``out``: a contiguous [M, N] tensor of x's dtype to write into.
    """
    m, k = x.shape
    if k != w.k:
        raise ValueError(f"x has {k} columns, the weight {w.k}")
    x = x.contiguous()
    if out is None:
        out = torch.empty(m, w.n, dtype=x.dtype, device=x.device)
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"the streaming kernel multiplies bfloat16 or float16, got {x.dtype}")
    if m == 0 or w.n == 0:
        return out
    grid = (triton.cdiv(m, tile.BM), triton.cdiv(w.n, tile.BN), tile.split)
    tiles = grid[0] * grid[1]
    if tile.split > 1 and tiles > MAX_SPLIT_TILES:
        raise ValueError(f"{tiles} output tiles need no split of K; at most {MAX_SPLIT_TILES} may have one")
    alone = tile.split == 1
    partial = x if alone else torch.empty(tiles * tile.split, tile.BM, tile.BN, dtype=torch.float32, device=x.device)
    written = stage(out)
    stream_kernel[grid](
        x, w.words, w.scale, w.scale if w.zero is None else w.zero, written, partial,
        partial if alone else counters(x.device), m, w.n, BM=tile.BM, BN=tile.BN, SPLIT=tile.split,
        STAGES=tile.num_stages, num_warps=tile.num_warps, **constants(w, x.dtype),
    )  # fmt: skip
    return out if written is out else out.copy_(written)


@triton.jit(do_not_specialize=["start", "stop"])
def decode_kernel(
    w_ptr, s_ptr, z_ptr, out_ptr, N, start, stop,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, MIDDLE: tl.constexpr, HAS_ZERO: tl.constexpr,
    COMPUTE: tl.constexpr, SCALE: tl.constexpr, BN: tl.constexpr, PLAIN: tl.constexpr, TABLE: tl.constexpr = "int",
):  # fmt: skip
    """out_NK = the weights of rows start .. stop-1. Grid: (ceil((stop - start) / BN), K-blocks)."""
    STEP: tl.constexpr = 64 if BITS == 8 else 128
    n = start + tl.program_id(0) * BN + tl.arange(0, BN)
    rn = tl.minimum(n, N - 1)
    step = tl.program_id(1)
    values = step_tile(w_ptr, s_ptr, z_ptr, rn, N, step, BITS, GROUP, MIDDLE, HAS_ZERO, COMPUTE, SCALE, PLAIN, TABLE)
    if GROUP == 0:
        values = values * tl.load(s_ptr + rn).to(tl.int16).to(SCALE, bitcast=True).to(COMPUTE)[:, None]
    k = step * STEP + tl.arange(0, STEP)
    at = out_ptr + (n - start).to(tl.int64)[:, None] * K + k[None, :]
    tl.store(at, values.to(out_ptr.dtype.element_ty), mask=(n < stop)[:, None] & (k < K)[None, :])


DECODE_ROWS = 32


def decode_stream(w: StreamWeight, out: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows ``start:stop`` of the weights, dense and contiguous [rows, K] in out's dtype (bf16 or fp16)."""
    stop = w.n if stop is None else stop
    written = stage(out)
    decode_kernel[(triton.cdiv(stop - start, DECODE_ROWS), w.words.shape[0])](
        w.words, w.scale, w.scale if w.zero is None else w.zero, written, w.n, start, stop, BN=DECODE_ROWS, num_warps=4,
        **constants(w, out.dtype),
    )  # fmt: skip
    return out if written is out else out.copy_(written)


def offline_cases() -> list[Case]:
    """Every tile of every shipped table at the group and dtype it is used for most, and each other kind once."""
    from dq_kernels.table import table_for

    cases = []
    for arch in (80, 90):
        for bits, rows in table_for(arch).items():
            tiles = sorted({(r.BM, r.BN, r.num_warps, r.num_stages, split) for r in rows for split in r.splits()})
            kinds = [(tile[:4], 64, False, "bf16", 4096, tile[4]) for tile in tiles]
            first = tiles[0][:4]
            # Zero points, other groups, fp16, one scale a row, and a K whose last step is masked.
            kinds += [(first, group, True, "bf16", 4096, 2) for group in (32, 128)]
            kinds += [
                (first, 64, True, "fp16", 4096, 1),
                (first, 0, False, "fp16", 4096, 2),
                (first, 64, True, "bf16", 576, 1),
            ]
            cases += [_case(arch, bits, *kind) for kind in kinds]
        # Tables, in every tile they are served with.
        narrow = sorted({(r.BM, r.BN, r.num_warps, r.num_stages) for r in table_for(arch)[4] if r.BM <= TABLE_TOKENS})
        cases += [_case(arch, 4, tile, 64, False, "bf16", 4096, 1, "nf4") for tile in narrow]
        cases += [_case(arch, 4, tile, 32, False, "bf16", 4096, 1, "e2m1") for tile in narrow]
        cases += [_case(arch, 4, narrow[0], 0, False, "fp16", 4096, 1, "nf4")]
        cases += [_case(arch, 4, narrow[0], 32, False, "fp16", 4096, 2, "e2m1")]
    # Chips that none of us has had: each table's largest tile, at the two widths that matter most.
    for arch in (86, 100, 120):
        for bits in (3, 4):
            row = table_for(arch)[bits][-1]
            tile = (row.BM, row.BN, row.num_warps, row.num_stages)
            cases += [_case(arch, bits, tile, 64, False, "bf16", 4096, split) for split in row.splits()]
    return cases


# LOP3 + SHF + PRMT + I2F a weight in the loop: the design needs 0.9 to 1.4 (gates below leave room for addresses);
# unpacking by Triton's own shifts and conversions takes 2.6 to 4.2.
MAX_INT_OPS = {2: 1.0, 3: 1.3, 4: 1.3, 8: 2.6}
MAX_TABLE_INT_OPS = 4.0  # 3.4 for the lookup


def _case(
    arch: int, bits: int, tile: tuple[int, int, int, int], group: int, zero: bool, dtype: str, k: int, split: int,
    table: str = "int",
) -> Case:  # fmt: skip
    BM, BN, num_warps, num_stages = tile
    compute = {"bf16": tl.bfloat16, "fp16": tl.float16}[dtype]
    pointers = {"x_ptr": f"*{dtype}", "w_ptr": "*i16", "s_ptr": "*i32", "z_ptr": "*i32", "y_ptr": f"*{dtype}"}
    constants = {
        "K": k, "BITS": bits, "GROUP": group, "MIDDLE": float(2 ** (bits - 1)), "HAS_ZERO": zero, "COMPUTE": compute,
        "SCALE": compute, "BM": BM, "BN": BN, "SPLIT": split, "STAGES": num_stages, "PLAIN": False,
        "TABLE": table,
    }  # fmt: skip
    name = f"{bits}-bit" if table == "int" else table
    kind = f"{name} {'asym' if zero else 'sym'} {f'g{group}' if group else 'row'} {dtype} K={k}"
    plain = not zero and group == 64 and dtype == "bf16" and k == 4096
    return Case(
        label=f"stream {kind} {BM}x{BN}/{split} w{num_warps} s{num_stages}",
        kernel=stream_kernel,
        types={**pointers, "partial_ptr": "*fp32", "arrived_ptr": "*i32", "M": "i32", "N": "i32"},
        constants=constants,
        options={"num_warps": num_warps},
        archs=(arch,),
        aligned=("N",),
        mma={80: "HMMA", 90: "HGMMA"},
        async_copies=True,
        no_i2f=not zero,
        weights_per_thread=BN * (64 if bits == 8 else 128) // (32 * num_warps),
        max_int_ops={90: MAX_INT_OPS[bits] if table == "int" else MAX_TABLE_INT_OPS} if plain and BM <= 64 else {},
    )
