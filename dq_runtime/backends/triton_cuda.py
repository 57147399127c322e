"""NVIDIA GPUs through Triton: the adaptor between PackedWeight and the kernels of dq_kernels.

Importing this module imports neither triton nor dq_kernels, and starts no CUDA. With TRITON_INTERPRET=1 in the
environment the same kernels run on CPU tensors, slowly, on triton's interpreter: so they are tested without a GPU.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import Tensor

from dq_runtime.backends.base import Call, PreparedWeight
from dq_runtime.errors import BackendError
from dq_runtime.packing import PackedWeight

MIN_CAPABILITY = (8, 0)  # bf16 matrix instructions and asynchronous copies begin with sm_80 (A100)
X_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
STREAM_DTYPES = (torch.bfloat16, torch.float16)
SCALE_DTYPES = (torch.bfloat16, torch.float16)


def interpreting() -> bool:
    """Whether triton was told to interpret kernels on the CPU; the words are those triton itself takes for true."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")


class TritonCuda:
    """Fused dequantise + matmul for few tokens; a dense scratch and torch.mm for many."""

    name = "triton"
    ops = frozenset({"qmm"})

    def available(self) -> str | None:
        for package in ("triton", "dq_kernels"):
            if find_spec(package) is None:
                return f"{package} is not installed"
        if interpreting():
            return None
        if torch.version.cuda is None:
            return "this torch is built without CUDA"
        if not torch.cuda.is_available():
            return "no CUDA device"
        for index in range(torch.cuda.device_count()):
            capability = torch.cuda.get_device_capability(index)
            if capability < MIN_CAPABILITY:
                name = torch.cuda.get_device_name(index)
                return f"cuda:{index} ({name}) is sm_{capability[0]}{capability[1]}, older than sm_80"
        # triton builds its launcher with the system's compiler at the first call; slim containers have none.
        if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            return "triton needs a C compiler (gcc, clang, or CC in the environment) to launch kernels"
        return None

    def can_run(self, call: Call) -> str | None:
        if call.op not in self.ops:
            return f"triton has no {call.op}"
        if call.device != "cuda" and not (call.device == "cpu" and interpreting()):
            return f"tensors must be on cuda, got {call.device}"
        if call.x_dtype not in X_DTYPES:
            return f"activations must be bfloat16, float16 or float32, got {call.x_dtype}"
        if call.scale_dtype not in SCALE_DTYPES:
            return f"scales must be bfloat16 or float16, got {call.scale_dtype}"
        if not 2 <= call.bits <= 8:
            return f"bits must be 2 to 8, got {call.bits}"
        group = call.group_size
        if group != call.k and (group < 16 or group & (group - 1) or call.k % group):
            return f"group size must be the whole row or a power of two from 16 dividing K; got {group}, K {call.k}"
        if call.k * call.bits >= 2**31:
            return f"a row of {call.k} x {call.bits} bits does not fit 32-bit bit offsets"
        return None

    def qmm(self, x: Tensor, w: PackedWeight) -> Tensor:
        from dq_kernels.qmm import qmm

        with _on(x):
            y: Tensor = qmm(x, w.packed, w.scale, w.zero, bits=w.bits, form=w.form)
        return y

    def prepare(self, w: PackedWeight, x_dtype: torch.dtype) -> PreparedWeight | None:
        """The streaming order of dq_kernels.stream_layout, or None for what only the dense path multiplies: float32
        activations, groups of 16, K not a multiple of 32."""
        if x_dtype not in STREAM_DTYPES or w.k % 32 or w.group_size < 32:
            return None
        from dq_kernels.stream_layout import stream_weight

        with _on(w.packed):
            s = stream_weight(w.packed, w.scale.to(x_dtype), w.zero, bits=w.bits, k=w.k, form=w.form)
        tensors = (s.words, s.scale) if s.zero is None else (s.words, s.scale, s.zero)
        return PreparedWeight(self.name, tensors, w.n, w.k, w.bits, w.group_size, w.zero is None, x_dtype, w.form)

    def qmm_prepared(self, x: Tensor, w: PreparedWeight) -> Tensor:
        if x.dtype != w.x_dtype:  # the scales' bits are in that dtype
            raise BackendError(f"this weight was prepared for {w.x_dtype} activations, got {x.dtype}")
        from dq_kernels.qmm import qmm_prepared
        from dq_kernels.stream_layout import StreamWeight

        zero = None if w.symmetric else w.tensors[2]
        group = 0 if w.group_size == w.k else w.group_size
        with _on(x):
            y: Tensor = qmm_prepared(x, StreamWeight(*w.tensors[:2], zero, w.bits, w.k, group, w.x_dtype, w.form))
        return y

    def prepare_experts(self, experts: Sequence[PackedWeight], x_dtype: torch.dtype) -> PreparedWeight | None:
        """The experts' weights of :meth:`prepare`, stacked; None where it has none."""
        ready = [one for w in experts if (one := self.prepare(w, x_dtype)) is not None]
        if len(ready) < len(experts):
            return None
        tensors = tuple(torch.stack(part) for part in zip(*(one.tensors for one in ready), strict=True))
        return replace(ready[0], tensors=tensors)

    def qmm_grouped(self, x: Tensor, w: PreparedWeight, expert_of: Tensor) -> Tensor:
        from dq_kernels.grouped import ExpertWeight, qmm_grouped

        zero = None if w.symmetric else w.tensors[2]
        group = 0 if w.group_size == w.k else w.group_size
        with _on(x):
            y: Tensor = qmm_grouped(
                x, ExpertWeight(*w.tensors[:2], zero, w.bits, w.k, group, w.x_dtype, w.form), expert_of
            )
        return y


def _on(x: Tensor) -> AbstractContextManager[object]:
    """triton launches on the current device, which need not be the one that holds x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
