"""activation(gate) * up, gate and up side by side, one launch (GLU variants, arXiv 2002.05202).

Shapes: gate_up [B, 2 * I] -> [B, I], in one dtype. By definition ``(f(gate) * up)`` with f computed in float32 and
rounded, as PyTorch's ``F.silu`` or ``F.gelu(approximate="tanh")`` do, and the product rounded. The tanh approximation
0.5 g (1 + tanh(u)) is g * sigmoid(2u): no difference of near-equal numbers, and no tanh.
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

# 8 elements a thread, one 16-byte load of gate and of up; 28 programs for one row of Llama 3 8B (I = 14336).
BLOCK, NUM_WARPS = 512, 2
ACTIVATIONS = ("silu", "gelu_tanh")


@triton.jit
def gated_kernel(x_ptr, out_ptr, WIDTH: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr, BY_HAND: tl.constexpr):
    """out = f(gate) * up. Grid: (B, ceil(I / BLOCK))."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = i < WIDTH
    at = x_ptr + row * (2 * WIDTH) + i
    gate = tl.load(at, mask=keep, other=0.0).to(tl.float32)
    up = tl.load(at + WIDTH, mask=keep, other=0.0).to(tl.float32)
    # 1.5957691 = 2 sqrt(2 / pi)
    inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate) if GELU else gate
    active = round_to(gate * tl.sigmoid(inner), DTYPE, BY_HAND).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + i, round_to(active * up, DTYPE, BY_HAND), mask=keep)


def gated(gate_up: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """gate_up [B, 2 * I] bf16/fp16/float32, gate first -> [B, I] in its dtype; ``activation``: "silu" or "gelu_tanh".

    ``out``: a contiguous [B, I] tensor to write into. Raises ValueError for an odd width or another activation.
    """
    batch, both = gate_up.shape
    if both % 2 or activation not in ACTIVATIONS or gate_up.dtype not in TL_DTYPES:
        raise ValueError(
            f"gated takes bf16, fp16 or float32 [B, 2 * I] and one of {', '.join(ACTIVATIONS)}; got {gate_up.dtype} "
            f"[{batch}, {both}] and {activation}"
        )
    check_tensor("gate_up", gate_up, (batch, both), gate_up.dtype)
    width = both // 2
    if out is None:
        out = torch.empty(batch, width, dtype=gate_up.dtype, device=gate_up.device)
    if batch and width:
        gated_kernel[(batch, triton.cdiv(width, BLOCK))](
            gate_up, out, WIDTH=width, GELU=activation == "gelu_tanh", BLOCK=BLOCK, BY_HAND=by_hand(gate_up.dtype),
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return out


def offline_cases() -> list[Case]:
    """Llama 3 8B, SmolLM2, Gemma 2 9B."""
    return [
        Case(
            label=f"gated {'gelu' if gelu else 'silu'} {dtype} I={width}",
            kernel=gated_kernel,
            types={"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"},
            constants={"WIDTH": width, "GELU": gelu, "BLOCK": BLOCK, "BY_HAND": False},
            options={"num_warps": NUM_WARPS},
        )
        for width, gelu, dtype in [(14336, False, "bf16"), (1536, False, "fp16"), (14336, True, "bf16")]
    ]
