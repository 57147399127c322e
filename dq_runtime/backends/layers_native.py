"""What stands between the matrix products of a Llama-like layer in training, in C++ (csrc/cpu/training_rows.h and
training_attention.h): residual add with RMS norm, silu(gate) * up, causal attention with its rotary embedding. Forward
and backward are one pass over memory each, where torch takes three to ten. Arithmetic is float32.

Shapes: M tokens of one sequence, K hidden size, D of a head; "the dtype" is that of the matrix products, float32 or
bfloat16. All tensors are made contiguous here; weights, cosines and sines are float32.
"""

from __future__ import annotations

import threading
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor


class Heads(NamedTuple):
    """Query head h reads key head h // (heads // key_heads); ``scale`` multiplies the scores."""

    heads: int
    key_heads: int
    dim: int
    scale: float


class NativeLayers:
    """The passes; nothing is recorded for autograd (dq_runtime/modules/layer_ops.py does that)."""

    def __init__(self) -> None:
        self._native = import_module("dq_runtime._native")
        self._local = threading.local()  # a workspace for each thread

    def refuses(self, heads: Heads) -> str | None:
        """Why attention of this shape cannot run here; None if it can."""
        if heads.dim % 32 or heads.dim > 256:
            return f"heads must have a multiple of 32 columns, up to 256; got {heads.dim}"
        if heads.heads % heads.key_heads:
            return f"{heads.key_heads} key heads do not divide {heads.heads} heads"
        return None

    def norm(
        self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(sum, out, rate): sum = x + delta float32 [M, K] (x itself where delta is None), rate = 1 / sqrt(mean(sum^2)
        + eps) float32 [M], out = weight * (sum * rate) in ``dtype``. x float32, delta in ``dtype``."""
        x, delta, weight = x.contiguous(), None if delta is None else delta.contiguous(), weight.contiguous()
        assert x.dtype == weight.dtype == torch.float32
        assert delta is None or (delta.dtype == dtype and delta.shape == x.shape)
        rows, width = x.shape
        total = x if delta is None else torch.empty_like(x)
        out, rate = torch.empty(rows, width, dtype=dtype), torch.empty(rows)
        self._native.norm_forward(
            *(rows, width, dtype == torch.bfloat16, eps),
            *(_at(x), _at(delta), _at(weight), _at(total), _at(out), _at(rate)),
            torch.get_num_threads(),
        )
        return total, out, rate

    def norm_backward(
        self, grad: Tensor, grad_sum: Tensor | None, total: Tensor, weight: Tensor, rate: Tensor, delta: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients to x, float32 [M, K], and where ``delta`` to it, in the dtype of ``grad``, for gradients to out
        and to sum."""
        grad, total, weight = grad.contiguous(), total.contiguous(), weight.contiguous()
        grad_sum = None if grad_sum is None else grad_sum.contiguous()
        rows, width = total.shape
        grad_x = torch.empty(rows, width)
        # In float32 they are one tensor: nobody writes into a gradient that was handed on.
        grad_delta = torch.empty_like(grad) if delta and grad.dtype != torch.float32 else None
        self._native.norm_backward(
            *(rows, width, grad.dtype == torch.bfloat16),
            *(_at(grad), _at(grad_sum), _at(total), _at(weight), _at(rate), _at(grad_x), _at(grad_delta)),
            torch.get_num_threads(),
        )
        return grad_x, grad_x if delta and grad_delta is None else grad_delta

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up, all in the dtype."""
        gate, up = gate.contiguous(), up.contiguous()
        assert gate.dtype == up.dtype
        assert gate.shape == up.shape
        out = torch.empty_like(gate)
        is_bf16 = gate.dtype == torch.bfloat16
        self._native.gated_forward(gate.numel(), is_bf16, _at(gate), _at(up), _at(out), torch.get_num_threads())
        return out

    def gated_backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients to gate and to up."""
        grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        self._native.gated_backward(
            *(gate.numel(), gate.dtype == torch.bfloat16),
            *(_at(grad), _at(gate), _at(up), _at(grad_gate), _at(grad_up)),
            torch.get_num_threads(),
        )
        return grad_gate, grad_up

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cosine: Tensor, sine: Tensor, heads: Heads
    ) -> tuple[Tensor, Tensor]:
        """(out [M, heads * D], what :meth:`attention_backward` wants of it, float32) of q [M, heads * D] and k, v
        [M, key_heads * D] in the dtype; cosine, sine [M, D] turn q and k as transformers' apply_rotary_pos_emb does."""
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        assert q.dtype == k.dtype == v.dtype
        assert cosine.dtype == sine.dtype == torch.float32
        assert cosine.shape == sine.shape == (len(q), heads.dim)
        shape = (len(q), heads.heads, heads.key_heads, heads.dim)
        floats, _, sums = self._native.attention_floats(*shape)
        out, log_sum = torch.empty_like(q), torch.empty(sums)
        self._native.attention_forward(
            *(_at(q), _at(k), _at(v), q.dtype == torch.bfloat16, _at(cosine), _at(sine), heads.scale, *shape),
            *(_at(out), _at(log_sum), _at(self._workspace(floats)), torch.get_num_threads()),
        )
        return out, log_sum

    def attention_backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cosine: Tensor,
        sine: Tensor,
        heads: Heads,
        out: Tensor,
        log_sum: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients to q, k and v, in their dtype, for ``grad`` [M, heads * D]."""
        grad, q, k, v = grad.contiguous(), q.contiguous(), k.contiguous(), v.contiguous()
        assert grad.dtype == q.dtype
        shape = (len(q), heads.heads, heads.key_heads, heads.dim)
        floats = self._native.attention_floats(*shape)[1]
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        self._native.attention_backward(
            *(_at(q), _at(k), _at(v), q.dtype == torch.bfloat16, _at(cosine), _at(sine), heads.scale, *shape),
            *(_at(out), _at(log_sum), _at(self._workspace(floats)), _at(grad)),
            *(_at(each) for each in grads),
            torch.get_num_threads(),
        )
        return grads

    def _workspace(self, floats: int) -> Tensor:
        """float32 that the next call in this thread overwrites: kept, because fresh pages cost as much as the work."""
        kept: Tensor | None = getattr(self._local, "workspace", None)
        if kept is None or kept.numel() < floats:
            with torch.inference_mode(False):  # it outlives the caller's mode
                kept = torch.empty(floats)
            self._local.workspace = kept
        return kept


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
