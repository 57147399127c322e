"""The projected AdamW step of DiscQuant in one pass: reads x, grad, m, v, y and free once, writes x, m, v once.

All tensors are the flattened [N, K] of one layer. Per weight, where free (elsewhere g = 0 and x stays 0):
    g = clamp(kl_weight * grad, -clamp, clamp) + (1 - 2y)
    m += (1 - beta1) (g - m),  v = beta2 v + (1 - beta2) g^2
    x = clamp(x (1 - decay) - rate * m / (sqrt(v) / root + epsilon), 0, 1)
in float32, in the order of the plain definition, with exact division and square root. Held in 16 bits (x float16, m
and v bfloat16), the state is rounded stochastically: an update smaller than the spacing would else be lost, that of v
always (0.1% of it a step). Then 10.1 bytes a weight are read and 6 written: memory-bound on any chip.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dq_kernels.case import Case

# Weights a program. 8 warps: 4 a thread; timed on an H100, 512 / 4 took the same, 8 a thread 17% more, 16 a thread 52%.
BLOCK = 1024
NUM_WARPS = 8


@triton.jit
def load_moment(at, keep, HALF: tl.constexpr):
    """A moment as float32; bfloat16 (HALF) comes as int16 bits, which are the upper half of a float32's."""
    if HALF:
        bits = tl.load(at, mask=keep, other=0).to(tl.uint16, bitcast=True)
        return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return tl.load(at, mask=keep, other=0.0)


@triton.jit
def store_moment(at, value, noise, keep, HALF: tl.constexpr):
    """Store float32, or bfloat16 bits, rounded up by the chance that the 16 dropped bits carry when added to noise."""
    if HALF:
        bits = (value.to(tl.uint32, bitcast=True) + noise) >> 16
        tl.store(at, bits.to(tl.uint16).to(tl.int16, bitcast=True), mask=keep)
    else:
        tl.store(at, value, mask=keep)


@triton.jit(do_not_specialize=["total", "step"])
def adam_kernel(
    x_ptr, grad_ptr, m_ptr, v_ptr, y_ptr, free_ptr, count_ptr, total, step,
    kl_weight, clamp, one_minus_beta1, beta2, one_minus_beta2, keep_share, rate, root, epsilon,
    HALF: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One step; count_ptr int32 [programs] receives the undecided weights of each. Grid: (ceil(total / BLOCK),).

    BITS: free is one bit a weight, 8 to a byte; else one byte a weight.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = at < total
    x = tl.load(x_ptr + at, mask=keep, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=keep, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + at, mask=keep, other=0.0).to(tl.float32)
    m = load_moment(m_ptr + at, keep, HALF)
    v = load_moment(v_ptr + at, keep, HALF)
    if BITS:
        free = (tl.load(free_ptr + at // 8, mask=keep, other=0).to(tl.int32) >> (at % 8).to(tl.int32)) & 1
    else:
        free = tl.load(free_ptr + at, mask=keep, other=0).to(tl.int32)
    g = tl.minimum(tl.maximum(grad * kl_weight, -clamp), clamp) + 1.0 - 2.0 * y
    g = tl.where(free != 0, g, 0.0)
    m = m + one_minus_beta1 * (g - m)
    v = v * beta2 + one_minus_beta2 * (g * g)
    # The finaliser of MurmurHash3 over element and step: the low 16 bits round m, the high 16 v, the middle 13 x.
    h = at.to(tl.uint32) + step.to(tl.uint32) * 0x9E3779B9
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    h = h ^ (h >> 16)
    store_moment(m_ptr + at, m, h & 0xFFFF, keep, HALF)
    store_moment(v_ptr + at, v, h >> 16, keep, HALF)
    x = x * keep_share - tl.div_rn(rate * m, tl.div_rn(tl.sqrt_rn(v), root) + epsilon)
    x = tl.minimum(tl.maximum(x, 0.0), 1.0)
    if HALF:
        # float16 keeps 10 of 23 bits: with the 13 others cleared the conversion is exact (below 2^-14 it rounds).
        bits = (x.to(tl.uint32, bitcast=True) + ((h >> 10) & 0x1FFF)) & 0xFFFFE000
        x = bits.to(tl.float32, bitcast=True)
    tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=keep)
    undecided = keep & (x > 0.01) & (x < 0.99)
    tl.store(count_ptr + tl.program_id(0), tl.sum(undecided.to(tl.int32), 0))


def projected_adam(
    x: Tensor, grad: Tensor, m: Tensor, v: Tensor, y: Tensor, free: Tensor, *,
    step: int, lr: float, kl_weight: float, clamp: float, beta1: float, beta2: float, weight_decay: float,
    epsilon: float,
) -> Tensor:  # fmt: skip
    """One step on x, m and v of one layer, in place: all float32, or float16, bfloat16, bfloat16.

    grad and y: any float dtype of x's shape. free: bool of x's shape, or uint8 [ceil(numel / 8)] with flag i in bit
    i % 8 of byte i // 8. ``step`` counts from 1. Returns how many x lie in (0.01, 0.99), an int64 scalar on the device.
    """
    total = x.numel()
    same = (x, grad, m, v, y)
    if any(t.shape != x.shape or not t.is_contiguous() for t in same):
        raise ValueError(f"x, grad, m, v, y must be contiguous and of one shape, got {[list(t.shape) for t in same]}")
    half = m.dtype == torch.bfloat16
    if [x.dtype, m.dtype, v.dtype] != ([torch.float16, m.dtype, m.dtype] if half else [torch.float32] * 3):
        raise ValueError(f"x, m, v are float32, or float16 and bfloat16 twice; got {x.dtype}, {m.dtype}, {v.dtype}")
    if not free.is_contiguous() or free.numel() != (total if free.dtype == torch.bool else (total + 7) // 8):
        raise ValueError(f"free must be bool {list(x.shape)} or its bits, got {free.dtype} {list(free.shape)}")
    programs = triton.cdiv(total, BLOCK)
    counts = torch.empty(programs, dtype=torch.int32, device=x.device)
    adam_kernel[(programs,)](
        x, grad, m.view(torch.int16) if half else m, v.view(torch.int16) if half else v, y,
        free.view(torch.uint8), counts, total, step,
        float(kl_weight), float(clamp), 1.0 - beta1, float(beta2), 1.0 - beta2, 1.0 - lr * weight_decay,
        lr / (1.0 - beta1**step), (1.0 - beta2**step) ** 0.5, float(epsilon),
        HALF=half, BITS=free.dtype != torch.bool, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return counts.sum()


def offline_cases() -> list[Case]:
    """The compact form a GPU run holds, and the plain one."""
    scalars = (
        "kl_weight", "clamp", "one_minus_beta1", "beta2", "one_minus_beta2", "keep_share", "rate", "root", "epsilon"
    )  # fmt: skip
    cases = []
    for half in (True, False):
        narrow, moment, wide = ("*fp16", "*i16", "*bf16") if half else ("*fp32", "*fp32", "*fp32")
        types = {
            "x_ptr": narrow, "y_ptr": narrow, "grad_ptr": wide, "m_ptr": moment, "v_ptr": moment, "free_ptr": "*u8",
            "count_ptr": "*i32", "total": "i32", "step": "i32",
        }  # fmt: skip
        cases.append(
            Case(
                label=f"adam {'compact' if half else 'plain'}",
                kernel=adam_kernel,
                types=types | dict.fromkeys(scalars, "fp32"),
                constants={"HALF": half, "BITS": half, "BLOCK": BLOCK},
                options={"num_warps": NUM_WARPS, "num_stages": 1},
            )
        )
    return cases
