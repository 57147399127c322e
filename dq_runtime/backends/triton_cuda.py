"""NVIDIA GPUs through Triton: the adaptor between PackedWeight and the kernels of dq_kernels.

Importing this module imports neither triton nor dq_kernels, and starts no CUDA. With TRITON_INTERPRET=1 in the
environment the same kernels run on CPU tensors, slowly, on triton's interpreter: so they are tested without a GPU.
"""

from __future__ import annotations

import os
import shutil
from contextlib import nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor

from dq_runtime.backends.base import Call
from dq_runtime.packing import PackedWeight

MIN_CAPABILITY = (8, 0)  # bf16 matrix instructions and asynchronous copies begin with sm_80 (A100)
X_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
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

        # triton launches on the current device, which need not be the one that holds x.
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            y: Tensor = qmm(x, w.packed, w.scale, w.zero, bits=w.bits)
        return y
