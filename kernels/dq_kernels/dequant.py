"""Canonical bitstream -> numbers: the tile function every kernel decodes with, and the kernel that writes a dense tile.

Shapes: M tokens, N out_features, K in_features, G = K / group_size scales a row, W = ceil(K * bits / 32) words a row.
    packed_NW  int32, code k of a row occupies bits k*bits .. k*bits+bits-1 of the row (little-endian, dense)
    scale_NG   bf16 / fp16
    zero_NG    uint8; absent: the middle code 2^(bits-1)
    value = scale * (code - zero)
A K tile never spans two groups (BK divides the group size, or one group is the whole row), so a tile needs one scale
and one zero point a row. ``GROUP`` = 0 means the whole row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dq_kernels.case import Case
from dq_kernels.levels import TABLE_OF, level

# Tile of the dequantise kernel: 32 x 128 outputs are 256 contiguous bytes a row in 16 bits, 32 a thread at 4 warps.
DENSE_TILE = {"BN": 32, "BK": 128, "num_warps": 4, "num_stages": 1}

TL_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def codes_tile(
    packed_ptr, row, k0, K: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Codes [BN, BK] int32 of rows ``row`` (int64 [BN]) and columns k0 .. k0+BK-1; k0 is a multiple of 16.

    C neighbouring codes share one 32-bit window, cut out of at most two words: 16 codes at 2 bits, 8 at 3 and 4, 4 at
    5 to 8. So a word is loaded about once and not once a code (3-bit: 5 loads for 32 codes, not 34). Columns past K
    read the row's zero padding or nothing: their codes are 0, and no load touches a word past the row's own W.
    """
    C: tl.constexpr = 16 if BITS == 2 else (8 if BITS <= 4 else 4)
    W: tl.constexpr = (K * BITS + 31) // 32
    bit = (k0 // C + tl.arange(0, BK // C)) * (C * BITS)
    word = bit >> 5
    shift = bit & 31
    at = packed_ptr + row[:, None] * W + word[None, :]
    window = tl.load(at) if K % BK == 0 else tl.load(at, mask=(word < W)[None, :], other=0)
    window = window.to(tl.uint32, bitcast=True)
    if 32 % (C * BITS) != 0:
        # 3, 5, 6, 7 bits: the window may straddle two words. `<< 1 << (31 - s)` is `<< (32 - s)` without the shift by
        # 32 (undefined in LLVM) at s = 0.
        straddles = (shift + C * BITS > 32) & (word + 1 < W)
        upper = tl.load(at + 1, mask=straddles[None, :], other=0).to(tl.uint32, bitcast=True)
        s = shift.to(tl.uint32)[None, :]
        window = (window >> s) | ((upper << 1) << (31 - s))
    within = (tl.arange(0, C) * BITS).to(tl.uint32)
    codes = (window[:, :, None] >> within[None, None, :]) & (2**BITS - 1)
    return codes.reshape(BN, BK).to(tl.int32)


@triton.jit
def dequant_tile(
    packed_ptr, scale_ptr, zero_ptr, row, k0,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr,
    COMPUTE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TABLE: tl.constexpr = "int",
):  # fmt: skip
    """(code - zero) [BN, BK] in COMPUTE, or the code's level in a table, and scale [BN] float32, of one K tile inside
    one group.

    Every integer from -255 to 255 is exact in bf16 and fp16, so nothing has been rounded yet: the caller applies the
    scale in float32, after the dot product or before its one rounding. fp16 never sees a bf16 scale it cannot hold.
    """
    codes = codes_tile(packed_ptr, row, k0, K, BITS, BN, BK)
    G: tl.constexpr = 1 if GROUP == 0 else K // GROUP
    at = row * G + (0 if GROUP == 0 else k0 // GROUP)
    scale = tl.load(scale_ptr + at).to(tl.float32)
    if TABLE != "int":
        return level(codes, TABLE).to(COMPUTE), scale
    zero = tl.load(zero_ptr + at).to(tl.int32)[:, None] if HAS_ZERO else 2 ** (BITS - 1)
    return (codes - zero).to(COMPUTE), scale


@triton.jit
def dequant_kernel(
    packed_ptr, scale_ptr, zero_ptr, out_ptr, N,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, TABLE: tl.constexpr = "int",
):  # fmt: skip
    """out_NK[tile] = scale * (code - zero), one rounding from float32. Grid: (ceil(N / BN), ceil(K / BK))."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k0 = tl.program_id(1) * BK
    # Rows past N re-read the last row: loads stay in bounds without a mask, and the store drops them.
    row = tl.minimum(n, N - 1).to(tl.int64)
    centred, scale = dequant_tile(
        packed_ptr, scale_ptr, zero_ptr, row, k0, K, BITS, GROUP, HAS_ZERO, tl.float32, BN, BK, TABLE
    )  # fmt: skip
    value = centred * scale[:, None]
    k = k0 + tl.arange(0, BK)
    keep = (n < N)[:, None] & (k < K)[None, :]
    tl.store(out_ptr + row[:, None] * K + k[None, :], value.to(out_ptr.dtype.element_ty), mask=keep)


def group_arg(k: int, groups: int) -> int:
    """The kernels' GROUP for K = ``k`` columns and ``groups`` scales a row (0: the whole row); raises ValueError."""
    if groups == 1:
        return 0
    if groups < 1 or k % groups:
        raise ValueError(f"{groups} scales a row do not divide K = {k}")
    group = k // groups
    if group < 16 or group & (group - 1):
        raise ValueError(f"group size must be a power of two from 16, or the whole row; got {group}")
    return group


def stage(out: Tensor) -> Tensor:
    """The tensor a kernel writes for ``out``: itself, or float32 where the interpreter must not cast to bf16.

    The interpreter truncates float32 -> bf16 (1.9999 becomes 1.9922; triton 3.6), so there torch does the rounding.
    """
    if out.dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return torch.empty_like(out, dtype=torch.float32)
    return out


def compute_dtype(dtype: torch.dtype) -> tl.dtype:
    """Operand dtype of tl.dot for activations of ``dtype``: float32 for bf16 in the interpreter, whose bf16 dot
    multiplies bit patterns."""
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return tl.float32
    return TL_DTYPES[dtype]


def check_weight(packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, k: int) -> None:
    """Raises ValueError unless the tensors are contiguous [N, W], [N, G], [N, G]: a kernel reads past a wrong one."""
    n, words = packed.shape
    if packed.dtype != torch.int32 or words != (k * bits + 31) // 32:
        raise ValueError(f"packed must be int32 [N, {(k * bits + 31) // 32}], got {packed.dtype} {list(packed.shape)}")
    if scale.shape[0] != n or (zero is not None and (zero.shape != scale.shape or zero.dtype != torch.uint8)):
        got = [list(scale.shape), None if zero is None else f"{zero.dtype} {list(zero.shape)}"]
        raise ValueError(f"scale and uint8 zero must be [{n}, G], got {got[0]} and {got[1]}")
    if not (packed.is_contiguous() and scale.is_contiguous() and (zero is None or zero.is_contiguous())):
        raise ValueError("packed, scale and zero must be contiguous")


def dequantize(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    *,
    bits: int,
    k: int,
    dtype: torch.dtype,
    out: Tensor | None = None,
    form: str = "int",
) -> Tensor:
    """int32 [N, W], bf16/fp16 [N, G], uint8 [N, G] or None -> dense [N, K] in ``dtype``, each value rounded once.

    ``out``: a contiguous [N, K] tensor of that dtype to write into.
    """
    check_weight(packed, scale, zero, bits, k)
    n = packed.shape[0]
    if out is None:
        out = torch.empty(n, k, dtype=dtype, device=packed.device)
    group = group_arg(k, scale.shape[1])
    tile = DENSE_TILE
    bk = min(tile["BK"], group) if group else tile["BK"]
    grid = (triton.cdiv(n, tile["BN"]), triton.cdiv(k, bk))
    written = stage(out)
    dequant_kernel[grid](
        packed, scale, scale if zero is None else zero, written, n,
        K=k, BITS=bits, GROUP=group, HAS_ZERO=zero is not None, BN=tile["BN"], BK=bk, TABLE=TABLE_OF[form],
        num_warps=tile["num_warps"], num_stages=tile["num_stages"],
    )  # fmt: skip
    return out if written is out else out.copy_(written)


def offline_cases() -> list[Case]:
    """The dequantise kernel: every width once, zero points and tails at 3 bits."""
    kinds = [(bits, False, 64, "bf16", 4096) for bits in (2, 3, 4, 5, 8)]
    kinds += [(3, True, 0, "bf16", 576), (3, True, 16, "fp16", 4096), (4, True, 128, "fp32", 4096)]
    return [
        Case(
            label=f"dequant {bits}-bit {'asym' if zero else 'sym'} {f'g{group}' if group else 'row'} {dtype} K={k}",
            kernel=dequant_kernel,
            types={"packed_ptr": "*i32", "scale_ptr": "*bf16", "zero_ptr": "*u8", "out_ptr": f"*{dtype}", "N": "i32"},
            constants={
                "K": k, "BITS": bits, "GROUP": group, "HAS_ZERO": zero, "BN": DENSE_TILE["BN"],
                "BK": min(DENSE_TILE["BK"], group) if group else DENSE_TILE["BK"], "TABLE": "int",
            },
            options={"num_warps": DENSE_TILE["num_warps"], "num_stages": DENSE_TILE["num_stages"]},
            aligned=("N",),
        )
        for bits, zero, group, dtype, k in kinds
    ]  # fmt: skip
