"""The rounding loop's memory-bound passes in C++ (csrc/cpu/training.h): weights rebuilt, and Adam's step, in one pass
over memory each where torch takes three and twelve. Matrix products stay with torch's BLAS."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dq_runtime.backends.training import Lerp, TrainingCall, unpack_flags
from dq_runtime.backends.training_reference import ReferenceTraining
from dq_runtime.rounding.base import AdamStep

_native: Any
try:
    _native = import_module("dq_runtime._native")
except ImportError as error:
    _native = None
    _import_error = str(error)


class NativeTraining:
    """float32 on the CPU. Weights are bit-equal to the reference's, Adam's step equal to float32 rounding."""

    name = "native"
    compact = False

    def __init__(self) -> None:
        self._reference = ReferenceTraining()

    def available(self) -> str | None:
        return f"the C++ extension dq_runtime._native is not built ({_import_error})" if _native is None else None

    def can_run(self, call: TrainingCall) -> str | None:
        if call.op == "mean_kl_with_grad":
            return "native has no mean_kl_with_grad"
        if call.device != "cpu":
            return f"native runs on cpu tensors only, got {call.device}"
        if call.dtype != torch.float32:
            return f"{call.op} on native takes float32, got {call.dtype}"
        return "lo must be unpacked on the CPU" if call.packed else None

    def lerp_mm(self, inputs: Tensor, x: Tensor, w: Lerp) -> Tensor:
        return inputs @ _weight(w, x).t()

    def lerp_mm_backward(
        self, grad: Tensor, inputs: Tensor, x: Tensor, w: Lerp, needs: tuple[bool, bool], grad_dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        grad_inputs = grad @ _weight(w, x) if needs[0] else None
        return grad_inputs, self._reference.lerp_mm_backward(grad, inputs, x, w, (False, needs[1]), grad_dtype)[1]

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

    def mean_kl_with_grad(self, student: Tensor, teacher: Tensor, out: Tensor) -> Tensor:
        return self._reference.mean_kl_with_grad(student, teacher, out)


def _weight(w: Lerp, x: Tensor) -> Tensor:
    """scale * (lo - zero + x), float32 [N, K]."""
    lo, values, scale = w.lo.contiguous(), x.detach().float().contiguous(), w.scale.contiguous()
    zero = None if w.zero is None else w.zero.contiguous()
    out = torch.empty_like(values)
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
        torch.get_num_threads(),
    )
    return out
