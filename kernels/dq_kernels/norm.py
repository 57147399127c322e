"""The residual sum and the RMSNorm (arXiv 1910.07467) after it, one launch, one program a row.

Shapes: x, delta, sum, normed [B, H] in one dtype (bf16, fp16 or float32); weights [H] in any of them. By definition,

    norm(y, w) = (y * rsqrt(mean(y^2) + eps) * w)      in float32, rounded once to y's dtype
    total      = x + delta                             or x + norm(delta, after), Gemma's norm behind a block; rounded
    normed     = norm(total, weight)

Weights that are stored minus one are passed as float32 1 + w.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dq_kernels.case import Case
from dq_kernels.cast import by_hand, round_to
from dq_kernels.check import check_tensor
from dq_kernels.dequant import TL_DTYPES

# A row is held in registers: 32 elements a thread at 16 warps, x and delta both.
MAX_WIDTH = 16384


@triton.jit
def rms(y, w_ptr, i, keep, eps, H: tl.constexpr, DTYPE: tl.constexpr, BY_HAND: tl.constexpr):
    """norm(y, w) of a row y (float32, 0 where not ``keep``), in DTYPE."""
    scale = tl.rsqrt(tl.sum(y * y, 0) / H + eps)
    return round_to(y * scale * tl.load(w_ptr + i, mask=keep, other=0.0).to(tl.float32), DTYPE, BY_HAND)


@triton.jit
def add_rmsnorm_kernel(
    x_ptr, delta_ptr, after_ptr, weight_ptr, total_ptr, normed_ptr, eps,
    H: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, AFTER: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """total, normed of one row; without ADD there is no delta, and total is x and not written. Grid: (B,)."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * H
    i = tl.arange(0, BLOCK)
    keep = i < H
    total = tl.load(x_ptr + row + i, mask=keep, other=0.0).to(tl.float32)
    if ADD:
        delta = tl.load(delta_ptr + row + i, mask=keep, other=0.0).to(tl.float32)
        if AFTER:
            delta = rms(delta, after_ptr, i, keep, eps, H, DTYPE, BY_HAND).to(tl.float32)
        rounded = round_to(total + delta, DTYPE, BY_HAND)
        tl.store(total_ptr + row + i, rounded, mask=keep)
        total = rounded.to(tl.float32)
    tl.store(normed_ptr + row + i, rms(total, weight_ptr, i, keep, eps, H, DTYPE, BY_HAND), mask=keep)


def num_warps(block: int) -> int:
    """8 elements a thread, one 16-byte load of a 16-bit row, where 16 warps suffice for that."""
    return min(16, max(1, block // 256))


def add_rmsnorm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float,
    after: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(total, normed) [B, H] of the module's formulas, in x's dtype; ``total`` is x itself where ``delta`` is None.

    ``after`` [H]: norm delta first. ``out``: contiguous tensors to write both into (the first only with a delta).
    Raises ValueError for shapes or dtypes that do not fit, or rows beyond MAX_WIDTH.
    """
    batch, width = x.shape
    if width > MAX_WIDTH or x.dtype not in TL_DTYPES:
        raise ValueError(f"add_rmsnorm takes bf16, fp16 or float32 rows of at most {MAX_WIDTH}, got {x.dtype} {width}")
    check_tensor("x", x, (batch, width), x.dtype)
    check_tensor("weight", weight, (width,), weight.dtype)
    if delta is not None:
        check_tensor("delta", delta, (batch, width), x.dtype)
    if after is not None:
        check_tensor("after", after, (width,), after.dtype)
    total, normed = out or (x if delta is None else torch.empty_like(x), torch.empty_like(x))
    block = triton.next_power_of_2(width)
    if batch:
        add_rmsnorm_kernel[(batch,)](
            x, x if delta is None else delta, weight if after is None else after, weight, total, normed, eps,
            H=width, BLOCK=block, ADD=delta is not None, AFTER=after is not None, BY_HAND=by_hand(x.dtype),
            num_warps=num_warps(block),
        )  # fmt: skip
    return (x if delta is None else total), normed


def offline_cases() -> list[Case]:
    """Llama 3 8B and SmolLM2 in both 16-bit dtypes, Gemma's after-norms with float32 weights, the widest row."""
    cases = []
    kinds = [(4096, "bf16", "bf16", False), (576, "fp16", "fp16", False), (3584, "bf16", "fp32", True)]
    for width, dtype, weight, after in [*kinds, (MAX_WIDTH, "bf16", "fp32", True), (4096, "fp32", "fp32", False)]:
        block = triton.next_power_of_2(width)
        rows = dict.fromkeys(("x_ptr", "delta_ptr", "total_ptr", "normed_ptr"), f"*{dtype}")
        cases.append(
            Case(
                label=f"add_rmsnorm {dtype} H={width}{' after' if after else ''}",
                kernel=add_rmsnorm_kernel,
                types={**rows, "after_ptr": f"*{weight}", "weight_ptr": f"*{weight}", "eps": "fp32"},
                constants={"H": width, "BLOCK": block, "ADD": True, "AFTER": after, "BY_HAND": False},
                options={"num_warps": num_warps(block)},
            )
        )
    return cases
