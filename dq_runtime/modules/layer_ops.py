"""Autograd functions over the native passes between a layer's matrix products (backends/layers_native.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dq_runtime.backends.layers_native import Heads, NativeLayers


class AddNorm(torch.autograd.Function):
    """(x + delta, its RMS norm); see :func:`add_norm`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype, ops: NativeLayers
    ) -> tuple[Tensor, Tensor]:
        total, out, rate = ops.norm(x, delta, weight, eps, dtype)
        ctx.save_for_backward(total, weight, rate)
        ctx.ops = ops
        ctx.set_materialize_grads(False)
        return total, out

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        grad_sum, grad = outputs
        total, weight, rate = ctx.saved_tensors
        wants_delta = ctx.needs_input_grad[1]
        if grad is None:  # nobody used the norm
            grad = torch.zeros_like(total)
        return *ctx.ops.norm_backward(grad, grad_sum, total, weight, rate, wants_delta), None, None, None, None


class Gated(torch.autograd.Function):
    """silu(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, ops: NativeLayers) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.ops = ops
        return ops.gated(gate, up)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        return *ctx.ops.gated_backward(outputs[0], gate, up), None


class Attention(torch.autograd.Function):
    """Causal attention of one sequence; the scores are computed again in backward."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cosine: Tensor, sine: Tensor, heads: Heads, ops: NativeLayers
    ) -> Tensor:
        out, log_sum = ops.attention(q, k, v, cosine, sine, heads)
        ctx.save_for_backward(q, k, v, cosine, sine, out, log_sum)
        ctx.heads, ctx.ops = heads, ops
        return out

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None, None]:
        q, k, v, cosine, sine, out, log_sum = ctx.saved_tensors
        grads = ctx.ops.attention_backward(outputs[0], q, k, v, cosine, sine, ctx.heads, out, log_sum)
        return *grads, None, None, None, None


def add_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype, ops: NativeLayers
) -> tuple[Tensor, Tensor]:
    """(x + delta float32 [M, K], weight * rms_norm(x + delta) in ``dtype``); x float32, delta in ``dtype`` or None.
    Differentiable in x and delta, not in the weight."""
    total, out = AddNorm.apply(x, delta, weight, eps, dtype, ops)  # type: ignore[no-untyped-call]
    return total, out


def gated(gate: Tensor, up: Tensor, ops: NativeLayers) -> Tensor:
    """silu(gate) * up; differentiable in both."""
    out: Tensor = Gated.apply(gate, up, ops)  # type: ignore[no-untyped-call]
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, cosine: Tensor, sine: Tensor, heads: Heads, ops: NativeLayers) -> Tensor:
    """See :meth:`NativeLayers.attention`; differentiable in q, k and v."""
    out: Tensor = Attention.apply(q, k, v, cosine, sine, heads, ops)  # type: ignore[no-untyped-call]
    return out
