"""The matmuls of DiscQuant's relaxed weight, w_hat = scale * (lo - zero + X), which is never kept.

Shapes: inputs_MK, lo_NW (canonical bitstream), X_NK fp32/bf16/fp16, scale_NG, zero_NG (see dequant.py), y_MN.
    lerp_mm        y = inputs @ w_hat.T
    grad_inputs    dY_MN @ w_hat
    grad_x         (dY.T @ inputs) * scale
w_hat is float32 until its one rounding to the operands' dtype, in the order of operations of the plain definition, so
its bits are the same. Accumulation is float32, in a fixed order and without atomics: the same input, the same bits.

Up to FUSED_TOKENS tokens, w_hat goes from registers straight into the dot. Beyond, SCRATCH_WEIGHTS of w_hat at a time
are written to a scratch that stays in L2, and cuBLAS multiplies: a fused program would build its tiles again for every
BM tokens, between two waits for the tensor cores. On an H100, N = 8192, K = 2048, 3 bits, in us, fused against dense:
M = 128  49 / 50,  M = 256  55 / 70,  M = 512  101 / 75,  M = 2048  380 / 130 (cuBLAS alone 95). A fused grad_inputs,
which has K / BK programs instead of N / BN, took 195 us where the dense one takes 50 to 68, and is not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dq_kernels.case import Case
from dq_kernels.dequant import check_weight, codes_tile, compute_dtype, group_arg, stage


@dataclass(frozen=True)
class Tile:
    """Blocks of one kernel: BM tokens, BN out_features, BK in_features; which of them is summed over differs."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int


# Weights built at once for many tokens: 2^24 are 32 MiB in 16 bits, inside the L2 of an A100 (40 MB), an H100 (50 MB).
SCRATCH_WEIGHTS = 2**24
# Timed on an H100 on 16.8 M weights with X in fp16: 33.8 us (2.2 TB/s); 32x128 37.7, 32x64 35.6, 16x256 34.9.
WEIGHT = Tile(BM=0, BN=16, BK=128, num_warps=4, num_stages=1)
# By the number of tokens, so that w_hat is built once; the last one's BM is the most that run fused.
FORWARD = (Tile(BM=128, BN=64, BK=64, num_warps=8, num_stages=3), Tile(BM=256, BN=64, BK=64, num_warps=8, num_stages=3))
FUSED_TOKENS = FORWARD[-1].BM
# Timed on an H100, M = 2048, N = 8192, K = 2048: 105 us (651 TFLOP/s); 128x128 118 us, cuBLAS without the scale 94 us.
GRAD_X = Tile(BM=64, BN=128, BK=256, num_warps=8, num_stages=3)
# Programs with neighbouring numbers share this many tiles of one operand, which then stay in the L2 cache.
SHARED_TILES = tl.constexpr(8)


@triton.jit
def scale_tile(scale_ptr, row, k0, K: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """What each weight of a tile is to be multiplied with, of any integer or float type: [BN, 1] or [BN, BK].

    Loads each group's entry once: the tile is a multiple of the group (both are powers of two) or lies inside one.
    """
    if GROUP == 0 or GROUP >= BK:
        G: tl.constexpr = 1 if GROUP == 0 else K // GROUP
        return tl.load(scale_ptr + row * G + (0 if GROUP == 0 else k0 // GROUP))[:, None]
    else:
        COUNT: tl.constexpr = BK // GROUP
        # Columns past K belong to no group: they read the row's last one, and their product is masked or 0.
        g = tl.minimum(k0 // GROUP + tl.arange(0, COUNT), K // GROUP - 1)
        values = tl.load(scale_ptr + row[:, None] * (K // GROUP) + g[None, :])
        return tl.broadcast_to(values[:, :, None], (BN, COUNT, GROUP)).reshape(BN, BK)


@triton.jit
def weight_tile(
    lo_ptr, x_ptr, scale_ptr, zero_ptr, row, k0,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """w_hat [BN, BK] float32 of rows ``row`` (int64 [BN], all inside N) and columns k0 .. k0+BK-1; finite past K."""
    codes = codes_tile(lo_ptr, row, k0, K, BITS, BN, BK)
    k = k0 + tl.arange(0, BK)
    at = x_ptr + row[:, None] * K + k[None, :]
    x = tl.load(at) if K % BK == 0 else tl.load(at, mask=(k < K)[None, :], other=0.0)
    position = x.to(tl.float32) + codes.to(tl.float32)
    if HAS_ZERO:
        position = position - scale_tile(zero_ptr, row, k0, K, GROUP, BN, BK).to(tl.float32)
    else:
        position = position - 2 ** (BITS - 1)
    return position * scale_tile(scale_ptr, row, k0, K, GROUP, BN, BK).to(tl.float32)


@triton.jit
def shared_order(program, ROWS, COLUMNS):
    """Tile (row, column) of a program: down SHARED_TILES rows, then one column on, so that neighbours share tiles."""
    band = SHARED_TILES * COLUMNS
    first = (program // band) * SHARED_TILES
    height = tl.minimum(ROWS - first, SHARED_TILES)
    return first + (program % band) % height, (program % band) // height


@triton.jit
def lerp_weight_kernel(
    lo_ptr, x_ptr, scale_ptr, zero_ptr, out_ptr, N, first, stop,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[tile] = w_hat of columns first .. stop-1, one rounding from float32; out is [N, stop - first], ``first`` a
    multiple of BK. Grid: (ceil(N / BN), ceil((stop - first) / BK))."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k0 = first + tl.program_id(1) * BK
    row = tl.minimum(n, N - 1).to(tl.int64)
    value = weight_tile(lo_ptr, x_ptr, scale_ptr, zero_ptr, row, k0, K, BITS, GROUP, HAS_ZERO, BN, BK)
    k = k0 + tl.arange(0, BK)
    at = out_ptr + row[:, None] * (stop - first) + (k - first)[None, :]
    tl.store(at, value.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & (k < stop)[None, :])


@triton.jit(do_not_specialize=["M"])
def lerp_mm_kernel(
    inputs_ptr, lo_ptr, x_ptr, scale_ptr, zero_ptr, y_ptr, M, N,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr,
    COMPUTE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y_MN[tile] = inputs_MK @ w_hat_NK.T. Grid: ceil(M / BM) * ceil(N / BN) programs in shared_order."""
    tile_m, tile_n = shared_order(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN))
    m = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    # Rows past N re-read the last row, so w_hat stays finite; the store drops them.
    row = tl.minimum(n, N - 1).to(tl.int64)
    inputs_row = inputs_ptr + m.to(tl.int64)[:, None] * K
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        w = weight_tile(lo_ptr, x_ptr, scale_ptr, zero_ptr, row, k0, K, BITS, GROUP, HAS_ZERO, BN, BK)
        k = k0 + tl.arange(0, BK)
        keep = (m < M)[:, None]
        if K % BK != 0:
            keep = keep & (k < K)[None, :]
        inputs = tl.load(inputs_row + k[None, :], mask=keep, other=0.0).to(COMPUTE)
        acc = tl.dot(inputs, tl.trans(w.to(COMPUTE)), acc, input_precision="ieee")
    at = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, acc.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def grad_x_kernel(
    grad_ptr, inputs_ptr, scale_ptr, out_ptr, N, M: tl.constexpr,
    K: tl.constexpr, GROUP: tl.constexpr,
    COMPUTE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out_NK[tile] = (grad_MN.T @ inputs_MK) * scale, rounded once. Grid: ceil(N / BN) * ceil(K / BK) programs.

    M, the sum's length, is a constexpr: a run has one window length, and the interpreter cannot `range` over it else.
    """
    tile_n, tile_k = shared_order(tl.program_id(0), tl.cdiv(N, BN), tl.cdiv(K, BK))
    n = tile_n * BN + tl.arange(0, BN)
    k0 = tile_k * BK
    k = k0 + tl.arange(0, BK)
    acc = tl.zeros((BN, BK), tl.float32)
    for m0 in range(0, M, BM):
        m = (m0 + tl.arange(0, BM)).to(tl.int64)
        keep_n, keep_k = (n < N)[None, :], (k < K)[None, :]
        if M % BM != 0:
            keep_n, keep_k = keep_n & (m < M)[:, None], keep_k & (m < M)[:, None]
        grad = tl.load(grad_ptr + m[:, None] * N + n[None, :], mask=keep_n, other=0.0).to(COMPUTE)
        inputs = tl.load(inputs_ptr + m[:, None] * K + k[None, :], mask=keep_k, other=0.0).to(COMPUTE)
        acc = tl.dot(tl.trans(grad), inputs, acc, input_precision="ieee")
    row = tl.minimum(n, N - 1).to(tl.int64)
    value = acc * scale_tile(scale_ptr, row, k0, K, GROUP, BN, BK).to(tl.float32)
    keep = (n < N)[:, None] & (k < K)[None, :]
    tl.store(out_ptr + row[:, None] * K + k[None, :], value.to(out_ptr.dtype.element_ty), mask=keep)


def _weight_arguments(lo: Tensor, x: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> dict[str, Any]:
    """The constants a kernel needs to build w_hat; raises ValueError for tensors that do not belong together."""
    n, k = x.shape
    check_weight(lo, scale, zero, bits, k)
    if lo.shape[0] != n or not x.is_contiguous():
        raise ValueError(f"x must be contiguous [{lo.shape[0]}, {k}], got {list(x.shape)}, strides {x.stride()}")
    return {"K": k, "BITS": bits, "GROUP": group_arg(k, scale.shape[1]), "HAS_ZERO": zero is not None}


def _tokens(name: str, tensor: Tensor, width: int) -> Tensor:
    """A contiguous [M, width] of activations; raises ValueError for another shape."""
    if tensor.ndim != 2 or tensor.shape[1] != width:
        raise ValueError(f"{name} must be [M, {width}], got {list(tensor.shape)}")
    return tensor.contiguous()


def lerp_weight(
    lo: Tensor, x: Tensor, scale: Tensor, zero: Tensor | None, *,
    bits: int, out: Tensor, first: int = 0, stop: int | None = None,
) -> Tensor:  # fmt: skip
    """int32 [N, W], fp32/bf16/fp16 [N, K], scales, zeros -> columns first .. stop-1 of w_hat in ``out``, contiguous
    [N, stop - first] of any float dtype. ``first`` is a multiple of 128."""
    constants = _weight_arguments(lo, x, scale, zero, bits)
    n, k = x.shape
    stop = k if stop is None else stop
    if first % WEIGHT.BK or not out.is_contiguous() or out.shape != (n, stop - first):
        raise ValueError(f"columns {first} to {stop} of w_hat do not fit out {list(out.shape)}, strides {out.stride()}")
    grid = (triton.cdiv(n, WEIGHT.BN), triton.cdiv(stop - first, WEIGHT.BK))
    written = stage(out)
    lerp_weight_kernel[grid](
        lo, x, scale, scale if zero is None else zero, written, n, first, stop, **constants,
        BN=WEIGHT.BN, BK=WEIGHT.BK, num_warps=WEIGHT.num_warps, num_stages=WEIGHT.num_stages,
    )  # fmt: skip
    return out if written is out else out.copy_(written)


def lerp_mm_fused(
    inputs: Tensor, lo: Tensor, x: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int, out: Tensor | None = None
) -> Tensor:
    """:func:`lerp_mm` in one launch, any M."""
    constants = _weight_arguments(lo, x, scale, zero, bits)
    n, k = x.shape
    inputs = _tokens("inputs", inputs, k)
    m = inputs.shape[0]
    if out is None:
        out = torch.empty(m, n, dtype=inputs.dtype, device=inputs.device)
    tile = next((tile for tile in FORWARD if m <= tile.BM), FORWARD[-1])
    written = stage(out)
    lerp_mm_kernel[(triton.cdiv(m, tile.BM) * triton.cdiv(n, tile.BN),)](
        inputs, lo, x, scale, scale if zero is None else zero, written, m, n, **constants,
        COMPUTE=compute_dtype(inputs.dtype), BM=tile.BM, BN=tile.BN, BK=tile.BK,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out if written is out else out.copy_(written)


def lerp_mm_dense(
    inputs: Tensor, lo: Tensor, x: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int, out: Tensor | None = None
) -> Tensor:
    """:func:`lerp_mm` by SCRATCH_WEIGHTS of w_hat at a time, some rows, and torch.mm."""
    n, k = x.shape
    inputs = _tokens("inputs", inputs, k)
    if out is None:
        out = torch.empty(inputs.shape[0], n, dtype=inputs.dtype, device=inputs.device)
    rows = min(n, max(1, SCRATCH_WEIGHTS // k))
    scratch = torch.empty(rows, k, dtype=inputs.dtype, device=inputs.device)
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        w = lerp_weight(
            lo[part], x[part], scale[part], None if zero is None else zero[part],
            bits=bits, out=scratch[: part.stop - start],
        )  # fmt: skip
        torch.mm(inputs, w.t(), out=out[:, part])
    return out


def lerp_mm(
    inputs: Tensor, lo: Tensor, x: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int, out: Tensor | None = None
) -> Tensor:
    """inputs [M, K] bf16/fp16/fp32, lo int32 [N, W], X fp32/bf16/fp16 [N, K], scales, zeros -> y [M, N] in the inputs'
    dtype, or in ``out``. By the number of tokens fused or dense; float32, which has no matrix instruction, dense."""
    run = lerp_mm_fused if inputs.shape[0] <= FUSED_TOKENS and inputs.dtype != torch.float32 else lerp_mm_dense
    return run(inputs, lo, x, scale, zero, bits=bits, out=out)


def lerp_mm_grad_inputs(
    grad: Tensor, lo: Tensor, x: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int, out: Tensor | None = None
) -> Tensor:
    """grad [M, N] bf16/fp16/fp32, the weight as in :func:`lerp_mm` -> grad @ w_hat [M, K] in the grad's dtype.

    By SCRATCH_WEIGHTS of w_hat at a time: some columns, so that the sum over N stays whole, in float32."""
    n, k = x.shape
    grad = _tokens("grad", grad, n)
    if out is None:
        out = torch.empty(grad.shape[0], k, dtype=grad.dtype, device=grad.device)
    columns = min(k, max(1, SCRATCH_WEIGHTS // n // WEIGHT.BK) * WEIGHT.BK)
    scratch = torch.empty(n * columns, dtype=grad.dtype, device=grad.device)
    for first in range(0, k, columns):
        stop = min(first + columns, k)
        w = scratch[: n * (stop - first)].view(n, stop - first)
        lerp_weight(lo, x, scale, zero, bits=bits, out=w, first=first, stop=stop)
        torch.mm(grad, w, out=out[:, first:stop])
    return out


def lerp_mm_grad_x(grad: Tensor, inputs: Tensor, scale: Tensor, *, out: Tensor) -> Tensor:
    """grad [M, N], inputs [M, K] of one dtype, scale [N, G] -> (grad.T @ inputs) * scale in ``out``, contiguous [N, K]
    of any float dtype. float32, which has no matrix instruction, goes through torch.mm."""
    n, k = out.shape
    grad, inputs = _tokens("grad", grad, n), _tokens("inputs", inputs, k)
    if grad.dtype == torch.float32:
        product = (grad.t() @ inputs).view(n, scale.shape[1], -1)
        return out.copy_(product.mul_(scale.float().unsqueeze(-1)).view(n, k))
    if not (out.is_contiguous() and scale.is_contiguous() and scale.shape[0] == n):
        raise ValueError(f"out [N, K] and scale [{n}, G] must be contiguous, got scale {list(scale.shape)}")
    tile = GRAD_X
    written = stage(out)
    grad_x_kernel[(triton.cdiv(n, tile.BN) * triton.cdiv(k, tile.BK),)](
        grad, inputs, scale, written, n, M=grad.shape[0], K=k, GROUP=group_arg(k, scale.shape[1]),
        COMPUTE=compute_dtype(grad.dtype), BM=tile.BM, BN=tile.BN, BK=tile.BK,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out if written is out else out.copy_(written)


def offline_cases() -> list[Case]:
    """bf16 at 3 bits, groups of 64, K = 2048, symmetric, X as a run holds it (fp16); then what strains the compiler:
    X in fp32, zero points, small groups, whole rows, a ragged K, 2, 4, 5 and 8 bits, fp16."""
    variants = [(bits, 64, False, "fp16", "bf16", 2048) for bits in (3, 2, 4, 8)]
    variants += [(3, 64, False, "fp32", "bf16", 2048), (3, 64, False, "fp16", "fp16", 2048)]
    variants += [(3, group, True, "fp32", "bf16", 2048) for group in (16, 64, 128, 0)]
    variants += [(3, 64, True, "fp16", "bf16", 576), (5, 0, True, "fp32", "bf16", 576)]
    cases = []
    for bits, group, zeros, x, dtype, k in variants:
        label = f"{bits}-bit {'asym' if zeros else 'sym'} g{group or 'row'} X {x} {dtype} K={k}"
        scale = "*fp16" if dtype == "fp16" else "*bf16"
        weight = {"lo_ptr": "*i32", "x_ptr": f"*{x}", "scale_ptr": scale, "zero_ptr": "*u8" if zeros else scale}
        acts = dict.fromkeys(("inputs_ptr", "grad_ptr", "y_ptr", "out_ptr"), f"*{dtype}")
        constants = {
            "K": k, "BITS": bits, "GROUP": group, "HAS_ZERO": zeros,
            "COMPUTE": tl.bfloat16 if dtype == "bf16" else tl.float16,
        }  # fmt: skip
        cases += [
            _case(f"lerp_weight {label}", lerp_weight_kernel, WEIGHT, weight | acts, constants),
            *(_case(f"lerp_mm M<={t.BM} {label}", lerp_mm_kernel, t, weight | acts, constants) for t in FORWARD),
        ]
        if bits == 3:
            wide = acts | {"scale_ptr": scale, "out_ptr": "*fp32" if x == "fp32" else "*bf16"}
            cases.append(_case(f"grad_x {label}", grad_x_kernel, GRAD_X, wide, constants | {"M": 2048}))
    return cases


def _case(label: str, kernel: Any, tile: Tile, types: dict[str, str], constants: dict[str, Any]) -> Case:
    integers = {name: "i32" for name in ("M", "N", "first", "stop") if name not in constants}
    constants = constants | {"BM": tile.BM, "BN": tile.BN, "BK": tile.BK}
    matmul = kernel is not lerp_weight_kernel
    return Case(
        label=label,
        kernel=kernel,
        types={name: kind for name, kind in (types | integers).items() if name in kernel.arg_names},
        constants={name: value for name, value in constants.items() if name in kernel.arg_names},
        options={"num_warps": tile.num_warps, "num_stages": tile.num_stages},
        aligned=tuple(name for name in integers if name != "M"),
        mma={80: "HMMA", 90: "HGMMA"} if matmul else {},
        async_copies=matmul,
    )
