"""The CUDA kernels of csrc/cuda on GPU tensors: pack, unpack, compare codes, fit a grid in one launch.

They are a plain shared library of ``extern "C"`` functions, so ctypes is enough: no torch header, one library for every
Python and torch. This file checks every shape and dtype, then passes addresses and torch's current stream.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dq_runtime.backends.base import Call
from dq_runtime.errors import BackendError, SpecError
from dq_runtime.grids import Scales
from dq_runtime.packing import words_per_row
from dq_runtime.spec import GridSpec

LIBRARY = Path(__file__).resolve().parents[1] / "_cuda_pack.so"
WEIGHT_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # dq::Dtype of csrc/cuda/grid.cuh
OVERFLOW, NOT_FINITE = 1, 2  # bits of dq_cuda_fit's `problem`
P, I32, I64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
SIGNATURES = {
    "dq_cuda_pack": (P, I64, I64, I32, P, I32, P),
    "dq_cuda_unpack": (P, I64, I64, I32, P, I32, P),
    "dq_cuda_count_different": (P, P, I64, I64, I32, P, I32, P),
    "dq_cuda_fit": (P, I32, I64, I64, I32, I32, I32, P, P, P, P, I32, P),
}


@cache
def library(path: Path) -> ctypes.CDLL | str:
    """The loaded library, or why there is none; loading it starts no CUDA."""
    how = "with CUDA's nvcc installed, run `python csrc/cuda/build.py` in the source tree"
    if not path.exists():
        return f"the CUDA library {path.name} is not built; {how}"
    try:
        loaded = ctypes.CDLL(str(path))
        for name, arguments in SIGNATURES.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = arguments, I32
        loaded.dq_cuda_error.argtypes, loaded.dq_cuda_error.restype = (I32,), ctypes.c_char_p
    except (OSError, AttributeError) as error:
        return f"the CUDA library {path} does not load ({error}); {how}"
    return loaded


def launch(name: str, *arguments: int) -> None:
    """One entry point of the library; an error becomes a :class:`BackendError` with CUDA's own sentence."""
    loaded = library(LIBRARY)
    if isinstance(loaded, str):
        raise BackendError(loaded)
    code = getattr(loaded, name)(*arguments)
    if code != 0:
        reason = loaded.dq_cuda_error(code).decode()
        raise BackendError(f"{name} was not launched: {reason} (cudaError {code}); is there a usable NVIDIA GPU?")


def place(tensor: Tensor) -> tuple[int, int]:
    """The last two arguments of every entry point: the device's index and torch's current stream on it."""
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


class CudaPack:
    """Codes on NVIDIA GPUs: pack, unpack and compare in the canonical bit order, fit the absmax grid; bit for bit."""

    name = "cuda"
    ops = frozenset({"pack", "unpack"})

    def available(self) -> str | None:
        loaded = library(LIBRARY)
        if isinstance(loaded, str):
            return loaded
        return None if torch.cuda.is_available() else "no CUDA device"

    def can_run(self, call: Call) -> str | None:
        if call.op not in self.ops:
            return f"cuda has no {call.op}"
        if call.device != "cuda":
            return f"tensors must be on cuda, got {call.device}"
        if not 2 <= call.bits <= 8:
            return f"bits must be 2 to 8, got {call.bits}"
        return None

    def pack(self, codes: Tensor, bits: int) -> Tensor:
        """uint8 codes [N, K] (each < 2^bits) -> int32 [N, ceil(K*bits/32)]; higher bits of a code are dropped."""
        _check_bits(bits)
        if codes.ndim != 2 or codes.dtype != torch.uint8 or not codes.is_cuda:
            raise BackendError(
                f"cuda pack needs uint8 codes [N, K] on a GPU, got {list(codes.shape)} {codes.dtype} on {codes.device}"
            )
        n, k = codes.shape
        codes = codes.contiguous()
        packed = torch.empty(n, words_per_row(k, bits), dtype=torch.int32, device=codes.device)
        launch("dq_cuda_pack", codes.data_ptr(), n, k, bits, packed.data_ptr(), *place(codes))
        return packed

    def unpack(self, packed: Tensor, bits: int, k: int) -> Tensor:
        """int32 [N, ceil(k*bits/32)] -> uint8 codes [N, k]."""
        packed = _checked_packed(packed, bits, k)
        codes = torch.empty(packed.shape[0], k, dtype=torch.uint8, device=packed.device)
        launch("dq_cuda_unpack", packed.data_ptr(), packed.shape[0], k, bits, codes.data_ptr(), *place(packed))
        return codes

    def count_different(self, a: Tensor, b: Tensor, bits: int, k: int) -> Tensor:
        """How many codes differ between two packed int32 [N, ceil(k*bits/32)]: int64 scalar on their device."""
        a, b = _checked_packed(a, bits, k), _checked_packed(b, bits, k)
        if a.shape != b.shape or a.device != b.device:
            raise BackendError(
                f"only packed tensors of one shape and device can be compared, got {list(a.shape)} on {a.device} and "
                f"{list(b.shape)} on {b.device}"
            )
        count = torch.zeros((), dtype=torch.int64, device=a.device)
        addresses = (a.data_ptr(), b.data_ptr())
        launch("dq_cuda_count_different", *addresses, a.shape[0], k, bits, count.data_ptr(), *place(a))
        return count

    def fit_nearest(self, w: Tensor, spec: GridSpec) -> tuple[Scales, Tensor]:
        """Scales and nearest codes (uint8 [N, K]) of finite weights [N, K] in float32, bfloat16 or float16.

        The bits of ``IntGrid(spec).fit`` and ``.nearest`` as the CPU computes them, in one launch; scale rule absmax
        only. Waits for the GPU, because weights that are not finite, or too large for the scale dtype, raise
        :class:`SpecError`.
        """
        if spec.name != "int" or spec.scale != "absmax":
            raise SpecError(f"cuda fits the int grid by absmax, got grid {spec.name} and scale rule {spec.scale}")
        if w.ndim != 2 or w.dtype not in WEIGHT_DTYPES or not w.is_cuda:
            raise BackendError(
                f"cuda fit needs weights [N, K] in float32, bfloat16 or float16 on a GPU, got {list(w.shape)} "
                f"{w.dtype} on {w.device}"
            )
        n, k = w.shape
        groups = spec.groups(k)
        w = w.contiguous()
        scale_dtype: torch.dtype = getattr(torch, spec.scale_dtype)
        scale = torch.empty(n, groups, dtype=scale_dtype, device=w.device)
        zero = None if spec.symmetric else torch.empty(n, groups, dtype=torch.uint8, device=w.device)
        codes = torch.empty(n, k, dtype=torch.uint8, device=w.device)
        problem = torch.zeros((), dtype=torch.int32, device=w.device)
        grid = (spec.bits, int(spec.symmetric), WEIGHT_DTYPES[scale_dtype])
        outputs = (scale.data_ptr(), 0 if zero is None else zero.data_ptr(), codes.data_ptr(), problem.data_ptr())
        if w.numel():
            size = k // groups
            launch("dq_cuda_fit", w.data_ptr(), WEIGHT_DTYPES[w.dtype], n * groups, size, *grid, *outputs, *place(w))
        found = int(problem)
        if found & NOT_FINITE:
            raise SpecError(f"a weight [{n}, {k}] holds infinities or NaN; no grid has a level for them")
        if found & OVERFLOW:
            raise SpecError(
                f"a weight of magnitude {float(w.abs().max()):.3g} needs a scale that {spec.scale_dtype} cannot hold; "
                "use scale_dtype bfloat16"
            )
        return Scales(scale, zero), codes


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise BackendError(f"cuda packs 2 to 8 bits, got {bits}")


def _checked_packed(packed: Tensor, bits: int, k: int) -> Tensor:
    _check_bits(bits)
    words = words_per_row(k, bits)
    if packed.ndim != 2 or packed.shape[1] != words or packed.dtype != torch.int32 or not packed.is_cuda:
        raise BackendError(
            f"{bits}-bit codes of K={k} are int32 [N, {words}] on a GPU, got {list(packed.shape)} {packed.dtype} on "
            f"{packed.device}"
        )
    return packed.contiguous()
