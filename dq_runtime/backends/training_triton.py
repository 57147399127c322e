"""The training ops on NVIDIA GPUs through Triton: the adaptor between :class:`Lerp` and the kernels of dq_kernels.

Importing this module imports neither triton nor dq_kernels, and starts no CUDA. With TRITON_INTERPRET=1 in the
environment the same kernels run on CPU tensors, slowly, on triton's interpreter.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict

import torch
from torch import Tensor

from dq_runtime.backends.training import Lerp, TrainingCall
from dq_runtime.backends.triton_cuda import X_DTYPES, TritonCuda, interpreting
from dq_runtime.levels import INT
from dq_runtime.rounding.base import AdamStep


class TritonTraining:
    """Fused kernels; of the weight itself no more than a scratch of 2^24 values ever exists."""

    name = "triton"
    compact = True
    layers = None

    def available(self) -> str | None:
        return TritonCuda().available()

    def can_run(self, call: TrainingCall) -> str | None:
        if call.device != "cuda" and not (call.device == "cpu" and interpreting()):
            return f"tensors must be on cuda, got {call.device}"
        if call.form != INT:
            return f"triton moves between evenly spaced codes only, got a grid of {call.form} levels"
        if call.dtype not in X_DTYPES:
            return f"tensors must be bfloat16, float16 or float32, got {call.dtype}"
        if not call.op.startswith("lerp_mm"):
            return None
        if not call.packed:
            return "lo must be packed"
        if not 2 <= call.bits <= 8:
            return f"bits must be 2 to 8, got {call.bits}"
        group = call.group_size
        if group != call.k and (group < 16 or group & (group - 1)):
            return f"group size must be the whole row or a power of two from 16, got {group}"
        if call.k * call.bits >= 2**31:
            return f"a row of {call.k} x {call.bits} bits does not fit 32-bit bit offsets"
        return None

    def lerp_mm(self, inputs: Tensor, x: Tensor, w: Lerp) -> Tensor:
        from dq_kernels.lerp import lerp_mm

        with _on(inputs):
            y: Tensor = lerp_mm(inputs, w.lo, x, w.scale, w.zero, bits=w.bits)
        return y

    def lerp_mm_backward(
        self, grad: Tensor, inputs: Tensor, x: Tensor, w: Lerp, needs: tuple[bool, bool], grad_dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        from dq_kernels.lerp import lerp_mm_grad_inputs, lerp_mm_grad_x

        grad_inputs = grad_x = None
        with _on(grad):
            if needs[0]:
                grad_inputs = lerp_mm_grad_inputs(grad, w.lo, x, w.scale, w.zero, bits=w.bits)
            if needs[1]:
                out = torch.empty(x.shape, dtype=grad_dtype, device=x.device)
                grad_x = lerp_mm_grad_x(grad, inputs, w.scale, out=out)
        return grad_inputs, grad_x

    def projected_adam(
        self, x: Tensor, grad: Tensor, m: Tensor, v: Tensor, y: Tensor, free: Tensor, hyper: AdamStep
    ) -> Tensor:
        from dq_kernels.adam import projected_adam

        with _on(x):
            undecided: Tensor = projected_adam(x, grad, m, v, y, free, **asdict(hyper))
        return undecided

    def mean_kl_with_grad(self, student: Tensor, teacher: Tensor, out: Tensor) -> Tensor:
        from dq_kernels.kl import mean_kl_with_grad

        with _on(student):
            loss: Tensor = mean_kl_with_grad(student.contiguous(), teacher.contiguous(), out=out)
        return loss


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    """triton launches on the current device, which need not be the one that holds the tensors."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
