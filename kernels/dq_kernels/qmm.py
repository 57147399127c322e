"""x @ decode(w).T without a dense copy of w: fused for few tokens, tile by tile through a scratch for many.

Shapes: x_MK, packed_NW, scale_NG, zero_NG, y_MN (see dequant.py). float32 accumulation, no atomics: the same input
gives the same bits. Forward only: no autograd is recorded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dq_kernels.dequant import TL_DTYPES, check_weight, dequant_tile, dequantize, group_arg, stage

# Weights decoded at once for many tokens: 2^24 are 32 MiB in 16 bits, inside the L2 of an A100 (40 MB) and an H100
# (50 MB), and 4096 rows at K = 4096, enough for a full-speed torch.mm.
SCRATCH_WEIGHTS = 2**24


@dataclass(frozen=True)
class Tile:
    """Blocks of the fused kernel for up to ``max_m`` tokens; BK shrinks to the group size where that is smaller."""

    max_m: int
    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int


# Chosen by offline compile (no spills; BN = 64 took up to 252 registers at 5 bits), NOT by timing: no GPU has run
# these. BN = 32 gives N = 4096 128 blocks, for the 132 multiprocessors of an H100.
TILES = (
    Tile(max_m=16, BM=16, BN=32, BK=128, num_warps=4, num_stages=4),
    Tile(max_m=32, BM=32, BN=32, BK=64, num_warps=4, num_stages=4),
    Tile(max_m=64, BM=64, BN=32, BK=64, num_warps=4, num_stages=3),
)


def tiles_for(dtype: torch.dtype) -> tuple[Tile, ...]:
    """Tiles for activations of ``dtype``: float32 has no matrix instruction, and spills in all but the smallest."""
    return TILES[:1] if dtype == torch.float32 else TILES


def fused_max_m(dtype: torch.dtype) -> int:
    """Most tokens for which :func:`qmm` takes the fused kernel."""
    return tiles_for(dtype)[-1].max_m


@triton.jit(do_not_specialize=["M"])
def qmm_kernel(
    x_ptr, packed_ptr, scale_ptr, zero_ptr, y_ptr, M, N,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr,
    COMPUTE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y_MN[tile] = x_MK @ decode(w_NK).T. Grid: (ceil(N / BN), ceil(M / BM)).

    M is not specialised (M == 1 and M % 16 == 0 would each recompile in the middle of serving). K is a constexpr: the
    row length W and every alignment follow from it, and with numpy >= 2.4 the interpreter cannot `range` over a runtime
    argument. COMPUTE is the dtype of the dot's operands: that of x, but float32 for bf16 under the interpreter, whose
    bf16 dot multiplies bit patterns.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    # Rows past N re-read the last row, so scales stay finite (0 * NaN = NaN); the store drops them.
    row = tl.minimum(n, N - 1).to(tl.int64)
    x_row = x_ptr + m.to(tl.int64)[:, None] * K
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        centred, scale = dequant_tile(
            packed_ptr, scale_ptr, zero_ptr, row, k0, K, BITS, GROUP, HAS_ZERO, COMPUTE, BN, BK
        )  # fmt: skip
        k = k0 + tl.arange(0, BK)
        keep = (m < M)[:, None]
        if K % BK != 0:
            keep = keep & (k < K)[None, :]
        x = tl.load(x_row + k[None, :], mask=keep, other=0.0).to(COMPUTE)
        # "ieee": float32 activations would otherwise be multiplied in tf32 (10-bit mantissa).
        acc += tl.dot(x, tl.trans(centred), input_precision="ieee") * scale[None, :]
    at = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, acc.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def compute_dtype(dtype: torch.dtype) -> tl.dtype:
    """Operand dtype of tl.dot for activations of ``dtype``."""
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return tl.float32
    return TL_DTYPES[dtype]


def qmm_fused(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int, out: Tensor | None = None
) -> Tensor:
    """x [M, K] bf16/fp16/fp32, int32 [N, W], bf16/fp16 [N, G], uint8 [N, G] or None -> y [M, N] in x's dtype.

    One launch, any M (a program per BM x BN outputs). ``out``: a contiguous [M, N] tensor of x's dtype to write into.
    """
    m, k = x.shape
    check_weight(packed, scale, zero, bits, k)
    n = packed.shape[0]
    x = x.contiguous()
    if out is None:
        out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if m == 0 or n == 0:
        return out
    tiles = tiles_for(x.dtype)
    tile = next((tile for tile in tiles if m <= tile.max_m), tiles[-1])
    group = group_arg(k, scale.shape[1])
    grid = (triton.cdiv(n, tile.BN), triton.cdiv(m, tile.BM))
    written = stage(out)
    qmm_kernel[grid](
        x, packed, scale, scale if zero is None else zero, written, m, n,
        K=k, BITS=bits, GROUP=group, HAS_ZERO=zero is not None, COMPUTE=compute_dtype(x.dtype),
        BM=tile.BM, BN=tile.BN, BK=min(tile.BK, group) if group else tile.BK,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out if written is out else out.copy_(written)


def qmm_dense(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int, out: Tensor | None = None
) -> Tensor:
    """As :func:`qmm_fused`, by decoding SCRATCH_WEIGHTS at a time in x's dtype and torch.mm: wins for many tokens."""
    m, k = x.shape
    n = packed.shape[0]
    if out is None:
        out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    rows = min(n, max(1, SCRATCH_WEIGHTS // k))
    scratch = torch.empty(rows, k, dtype=x.dtype, device=x.device)
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        dense = dequantize(
            packed[start:stop], scale[start:stop], None if zero is None else zero[start:stop],
            bits=bits, k=k, dtype=x.dtype, out=scratch[: stop - start],
        )  # fmt: skip
        torch.mm(x, dense.t(), out=out[:, start:stop])
    return out


def qmm(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int, out: Tensor | None = None
) -> Tensor:
    """x [M, K] -> y [M, N], by the number of tokens: fused up to :func:`fused_max_m`, dense beyond."""
    run = qmm_fused if x.shape[0] <= fused_max_m(x.dtype) else qmm_dense
    return run(x, packed, scale, zero, bits=bits, out=out)
