"""The torch operators ``dq_runtime::qmm`` and ``dq_runtime::qmm_prepared``: schemas, fakes, gradient to the input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dq_runtime.backends import dispatch
from dq_runtime.backends.base import PreparedWeight
from dq_runtime.packing import PackedWeight


@torch.library.custom_op("dq_runtime::qmm", mutates_args=())
def _qmm(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, k: int, form: str = "int") -> Tensor:
    return dispatch.qmm(x, PackedWeight(packed, scale, zero, bits, k, form))


@_qmm.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, k: int, form: str = "int") -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scale, zero, bits, k, form = inputs
    ctx.save_for_backward(packed, scale, zero)
    ctx.bits, ctx.k, ctx.form, ctx.x_dtype = bits, k, form, x.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None, None, None]:
    """grad_x = grad @ W, one tile of rows at a time: the packed weight is never dense."""
    packed, scale, zero = ctx.saved_tensors
    w = PackedWeight(packed, scale, zero, ctx.bits, ctx.k, ctx.form)
    flat = grad.reshape(-1, w.n).float()
    out = torch.zeros(flat.shape[0], w.k, device=grad.device)
    rows = max(1, 2**21 // w.k)
    for start in range(0, w.n, rows):
        stop = min(start + rows, w.n)
        out.addmm_(flat[:, start:stop], w.decode(start, stop))
    return out.view(*grad.shape[:-1], w.k).to(ctx.x_dtype), None, None, None, None, None, None


_qmm.register_autograd(_backward, setup_context=_setup)


def qmm(x: Tensor, w: PackedWeight) -> Tensor:
    """x [..., K] @ decode(w).T -> [..., N]; differentiable in x; traceable by torch.compile."""
    if _eager():
        return dispatch.qmm(x, w)
    y: Tensor = _qmm(x, w.packed, w.scale, w.zero, w.bits, w.k, w.form)
    return y


def _eager() -> bool:
    """Whether nobody but us needs the operator: the first call of a custom op imports torch._dynamo, 1.5 s."""
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


@torch.library.custom_op("dq_runtime::qmm_prepared", mutates_args=())
def _qmm_prepared(
    x: Tensor,
    weight: Sequence[Tensor],
    backend: str,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    symmetric: bool,
    x_dtype: torch.dtype,
    form: str = "int",
) -> Tensor:
    w = PreparedWeight(backend, tuple(weight), n, k, bits, group_size, symmetric, x_dtype, form)
    return dispatch.qmm_prepared(x, w)


@_qmm_prepared.register_fake
def _(
    x: Tensor,
    weight: Sequence[Tensor],
    backend: str,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    symmetric: bool,
    x_dtype: torch.dtype,
    form: str = "int",
) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)


def qmm_prepared(x: Tensor, w: PreparedWeight) -> Tensor:
    """x [..., K] @ W.T -> [..., N] of a prepared weight; for inference: it has no gradient."""
    if _eager():
        return dispatch.qmm_prepared(x, w)
    y: Tensor = _qmm_prepared(
        x, list(w.tensors), w.backend, w.n, w.k, w.bits, w.group_size, w.symmetric, w.x_dtype, w.form
    )
    return y
