"""A linear whose weight is built when it is needed, in both passes, and never kept between them.

With autograd's own linear the dense weights of all layers would wait for the backward pass together, 4 bytes a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _RebuiltMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, build: Callable[[], Tensor]) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.build = build
        return torch.nn.functional.linear(inputs, weight.to(inputs.dtype))

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (inputs,) = ctx.saved_tensors
        grad = outputs[0]
        into_inputs = into_weight = None
        if ctx.needs_input_grad[0]:
            with torch.no_grad():
                into_inputs = grad @ ctx.build().to(grad.dtype)
        if ctx.needs_input_grad[1]:
            into_weight = grad.reshape(-1, grad.shape[-1]).T @ inputs.reshape(-1, inputs.shape[-1])
        return into_inputs, into_weight, None


def rebuilt_mm(inputs: Tensor, build: Callable[[], Tensor]) -> Tensor:
    """inputs [..., K] @ build().T -> [..., N] in the inputs' dtype. ``build`` gives a weight [N, K], the same whenever
    it is called before the gradient has reached what it depends on; that comes in the inputs' dtype."""
    y: Tensor = _RebuiltMM.apply(inputs, build(), build)  # type: ignore[no-untyped-call]
    return y
