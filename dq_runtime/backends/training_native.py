"""The rounding loop's memory-bound passes in C++ (csrc/cpu/training.h): weights rebuilt, gradients scaled, Adam's step
and the KL, in one pass over memory each where torch takes three to twelve. Matrix products stay with torch's BLAS."""

from __future__ import annotations

import math
import threading
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dq_runtime.backends.layers_native import NativeLayers
from dq_runtime.backends.training import Lerp, TrainingCall, unpack_flags
from dq_runtime.backends.training_reference import ReferenceTraining
from dq_runtime.levels import INT
from dq_runtime.rounding.base import AdamStep

_native: Any
try:
    _native = import_module("dq_runtime._native")
except ImportError as error:
    _native = None
    _import_error = str(error)

# Of activations and logits; x and the moments are float32.
DTYPES = (torch.float32, torch.bfloat16)


class NativeTraining:
    """CPU tensors. Weights and gradients are bit-equal to the reference's, Adam's step and the KL equal to float32
    rounding. The weight of one layer at a time lies in a buffer that all layers share: 1.8 MB in SmolLM2 instead of
    fresh pages for every product."""

    name = "native"
    compact = False

    def __init__(self) -> None:
        self._reference = ReferenceTraining()
        self._local = threading.local()  # a buffer for each thread and dtype
        self.layers = None if _native is None else NativeLayers()

    def available(self) -> str | None:
        return f"the C++ extension dq_runtime._native is not built ({_import_error})" if _native is None else None

    def can_run(self, call: TrainingCall) -> str | None:
        if call.device != "cpu":
            return f"native runs on cpu tensors only, got {call.device}"
        if call.op == "projected_adam" and call.dtype != torch.float32:
            return f"projected_adam on native takes float32, got {call.dtype}"
        if call.form != INT:
            return f"native moves between evenly spaced codes only, got a grid of {call.form} levels"
        if call.dtype not in DTYPES:
            return f"{call.op} on native takes float32 or bfloat16, got {call.dtype}"
        return "lo must be unpacked on the CPU" if call.packed else None

    def lerp_mm(self, inputs: Tensor, x: Tensor, w: Lerp) -> Tensor:
        return inputs @ self._weight(w, x, inputs.dtype).t()

    def lerp_mm_backward(
        self, grad: Tensor, inputs: Tensor, x: Tensor, w: Lerp, needs: tuple[bool, bool], grad_dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        grad_inputs = grad @ self._weight(w, x, grad.dtype) if needs[0] else None
        return grad_inputs, self._grad_x(grad, inputs, w).to(grad_dtype) if needs[1] else None

    @torch.no_grad()
    def projected_adam(
        self, x: Tensor, grad: Tensor, m: Tensor, v: Tensor, y: Tensor, free: Tensor, hyper: AdamStep
    ) -> Tensor:
        state = (x, m, v)
        if not all(t.dtype == torch.float32 and t.is_contiguous() for t in state):
            return self._reference.projected_adam(x, grad, m, v, y, free, hyper)  # the definition of compact state
        flags = (free if free.dtype == torch.bool else unpack_flags(free, x.shape)).contiguous()
        gradient, target = grad.float().contiguous(), y.float().contiguous()
        undecided = _native.projected_adam(
            x.data_ptr(),
            gradient.data_ptr(),
            m.data_ptr(),
            v.data_ptr(),
            target.data_ptr(),
            flags.data_ptr(),
            x.numel(),
            hyper.kl_weight,
            hyper.clamp,
            hyper.beta1,
            hyper.beta2,
            hyper.epsilon,
            1 - hyper.lr * hyper.weight_decay,
            hyper.lr / (1 - hyper.beta1**hyper.step),
            math.sqrt(1 - hyper.beta2**hyper.step),
            torch.get_num_threads(),
        )
        return torch.tensor(undecided)

    @torch.no_grad()
    def mean_kl_with_grad(self, student: Tensor, teacher: Tensor, out: Tensor) -> Tensor:
        student, teacher = student.contiguous(), teacher.contiguous()
        assert student.shape == teacher.shape == out.shape
        assert student.dtype == teacher.dtype == out.dtype
        assert out.is_contiguous()
        tokens, vocabulary = student.shape
        addresses = (student.data_ptr(), teacher.data_ptr(), out.data_ptr())
        bf16 = student.dtype == torch.bfloat16
        kl = _native.mean_kl(*addresses, bf16, tokens, vocabulary, torch.get_num_threads())
        return torch.tensor(kl, dtype=torch.float32)

    def _weight(self, w: Lerp, x: Tensor, dtype: torch.dtype) -> Tensor:
        """scale * (lo - zero + x) as ``dtype`` [N, K], valid until the next call in this thread."""
        lo, values = w.lo.contiguous(), x.detach().float().contiguous()
        zero = None if w.zero is None else w.zero.contiguous()
        out = self._buffer(values.shape, dtype)
        scale = w.scale.contiguous()
        n, k = values.shape
        _native.lerp_weight(
            lo.data_ptr(),
            values.data_ptr(),
            scale.data_ptr(),
            scale.dtype == torch.bfloat16,
            0 if zero is None else zero.data_ptr(),
            2 ** (w.bits - 1),
            n,
            k,
            k // scale.shape[1],
            out.data_ptr(),
            dtype == torch.bfloat16,
            torch.get_num_threads(),
        )
        return out

    def _grad_x(self, grad: Tensor, inputs: Tensor, w: Lerp) -> Tensor:
        """(grad.T @ inputs) * scale, float32 [N, K]."""
        scale, bf16 = w.scale.contiguous(), grad.dtype == torch.bfloat16
        n, k = grad.shape[1], inputs.shape[1]
        if bf16:
            product = torch.mm(grad.t(), inputs, out=self._buffer((n, k), grad.dtype))
            out = torch.empty(n, k)
        else:
            out = product = grad.t() @ inputs
        is_bf16, group = scale.dtype == torch.bfloat16, k // scale.shape[1]
        _native.scale_grad(
            product.data_ptr(), bf16, scale.data_ptr(), is_bf16, n, k, group, out.data_ptr(), torch.get_num_threads()
        )
        return out

    def _buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        name, size = str(dtype), math.prod(shape)
        buffer: Tensor | None = getattr(self._local, name, None)
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):  # the buffer outlives the caller's mode
                buffer = torch.empty(size, dtype=dtype)
            setattr(self._local, name, buffer)
        return buffer[:size].view(shape)
