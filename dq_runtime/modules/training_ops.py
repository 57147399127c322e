"""lerp_mm with its gradients: an autograd function for the eager loop, the op ``dq_runtime::lerp_mm`` for tracing.

Nothing dense is kept for backward: w_hat is built again from x and lo. The loop of DiscQuant runs eagerly and calls
this hundreds of times a step: there the op's Python wrappers cost 0.1 to 0.2 ms a call (on a machine with an H100),
more than most of its matmuls. torch.compile and torch.export see the op, which has a schema and fakes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dq_runtime.backends import training
from dq_runtime.backends.training import Lerp


class LerpMM(torch.autograd.Function):
    """inputs [M, K] @ w_hat.T -> [M, N]; see :func:`lerp_mm`."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, x: Tensor, w: Lerp, grad_dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(inputs, x)
        ctx.w, ctx.grad_dtype = w, grad_dtype
        return training.lerp_mm(inputs, x, w)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        inputs, x = ctx.saved_tensors
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        grad = outputs[0].contiguous()
        return *training.lerp_mm_backward(grad, inputs, x, ctx.w, needs, ctx.grad_dtype), None, None


@torch.library.custom_op("dq_runtime::lerp_mm", mutates_args=())
def _lerp_mm(
    inputs: Tensor,
    x: Tensor,
    lo: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    grad_dtype: torch.dtype,
    form: str = "int",
) -> Tensor:
    return training.lerp_mm(inputs, x, Lerp(lo, scale, zero, bits, x.shape[1], form))


@_lerp_mm.register_fake
def _(
    inputs: Tensor,
    x: Tensor,
    lo: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    grad_dtype: torch.dtype,
    form: str = "int",
) -> Tensor:
    return inputs.new_empty(inputs.shape[0], x.shape[0])


@torch.library.custom_op("dq_runtime::lerp_mm_backward", mutates_args=())
def _lerp_mm_backward(
    grad: Tensor,
    inputs: Tensor,
    x: Tensor,
    lo: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    grad_dtype: torch.dtype,
    form: str = "int",
) -> tuple[Tensor, Tensor]:
    w = Lerp(lo, scale, zero, bits, x.shape[1], form)
    grad_inputs, grad_x = training.lerp_mm_backward(grad.contiguous(), inputs, x, w, (True, True), grad_dtype)
    assert grad_inputs is not None
    assert grad_x is not None
    return grad_inputs, grad_x


@_lerp_mm_backward.register_fake
def _(
    grad: Tensor,
    inputs: Tensor,
    x: Tensor,
    lo: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    grad_dtype: torch.dtype,
    form: str = "int",
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(inputs), torch.empty_like(x, dtype=grad_dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    flat, x, lo, scale, zero, bits, grad_dtype, form = inputs
    ctx.save_for_backward(flat, x, lo, scale, zero)
    ctx.bits, ctx.grad_dtype, ctx.form = bits, grad_dtype, form


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None, None]:
    flat, x, lo, scale, zero = ctx.saved_tensors
    grad_inputs, grad_x = _lerp_mm_backward(grad, flat, x, lo, scale, zero, ctx.bits, ctx.grad_dtype, ctx.form)
    needs = ctx.needs_input_grad
    return grad_inputs if needs[0] else None, grad_x if needs[1] else None, None, None, None, None, None, None


_lerp_mm.register_autograd(_backward, setup_context=_setup)


def lerp_mm(inputs: Tensor, x: Tensor, w: Lerp, grad_dtype: torch.dtype) -> Tensor:
    """inputs [M, K] @ (scale * (lo - zero + x)).T -> [M, N] in the inputs' dtype; differentiable in inputs and in x.

    ``grad_dtype``: that of the gradient to x (a leaf x needs the same ``grad_dtype``, or autograd casts it).
    """
    y: Tensor
    if torch.compiler.is_compiling():
        y = _lerp_mm(inputs, x, w.lo, w.scale, w.zero, w.bits, grad_dtype, w.form)
    else:
        y = LerpMM.apply(inputs, x, w, grad_dtype)  # type: ignore[no-untyped-call]
    return y
