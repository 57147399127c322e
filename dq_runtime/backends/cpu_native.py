"""The C++ kernels of csrc/cpu on CPU tensors: checks every shape and dtype, then passes addresses.

Few tokens: one fused kernel that decodes a row of the weight in L1 and multiplies it with every token. Many tokens:
decode a tile of rows into a buffer and let ``torch.mm`` (a tuned BLAS) multiply. Neither makes a dense copy of a layer.
Weights that serve are prepared first (cpu_prepared.py) and then run on the SIMD kernels, with activations as they are:
what rounds activations to int8 is the native decoder, which its caller chooses.
"""

from __future__ import annotations

import threading
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dq_runtime.backends.base import Call, PreparedWeight
from dq_runtime.backends.cpu_prepared import (
    TABLE,
    Arena,
    NativeWeight,
    Part,
    activation_group,
    levels_of,
    plan,
    prepare,
    qmm_prepared,
    table_arguments,
)
from dq_runtime.errors import BackendError
from dq_runtime.levels import INT, LEVELS
from dq_runtime.packing import HostTensor, PackedWeight, words_per_row
from dq_runtime.packing.bridge import host_weight_of, tensor_of

_native: Any
try:
    _native = import_module("dq_runtime._native")
except ImportError as error:
    _native = None
    _import_error = str(error)

# Tokens up to which the fused kernel runs. N=1536, K=576, 3 bits, one Zen 4 core, best of 60, scalar (SSE2) against
# tile + torch.mm: 0.48 / 0.50 ms at M=1, 0.58 / 0.60 at 2, 0.60 / 0.45 at 4, 0.91 / 0.64 at 8. With two threads and the
# other core busy, torch.mm's OpenMP barrier stalls for 16 ms and our pool does not: hence 4, not 2.
FUSED_TOKENS = 4
# Rows decoded at once: 2^21 weights = 8 MB of float32.
TILE_WEIGHTS = 2**21
X_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALE_DTYPES = (torch.bfloat16, torch.float16)


class CpuNative:
    """Fused dequantize-and-multiply in C++ for CPU tensors, accumulated in float32; exact decode."""

    name = "native"
    ops = frozenset({"qmm", "pack", "unpack"})

    def __init__(self) -> None:
        self._local = threading.local()  # a tile buffer per thread: 8 MB fresh from the kernel is 2048 page faults

    def available(self) -> str | None:
        if _native is None:
            return (
                f"the C++ extension dq_runtime._native is not built ({_import_error}); with a C++17 compiler "
                "installed, run `pip install -e .` in the source tree"
            )
        return None

    def can_run(self, call: Call) -> str | None:
        if call.op not in self.ops:
            return f"native has no {call.op}"
        if call.device != "cpu":
            return f"native runs on cpu tensors only, got {call.device}"
        if not 2 <= call.bits <= 8:
            return f"native packs 2 to 8 bits, got {call.bits}"
        if call.op != "qmm":
            return None
        if call.x_dtype not in X_DTYPES:
            return f"activations must be float32, bfloat16 or float16, got {call.x_dtype}"
        if call.scale_dtype not in SCALE_DTYPES:
            return f"scales must be bfloat16 or float16, got {call.scale_dtype}"
        return None

    def qmm(self, x: Tensor, w: PackedWeight) -> Tensor:
        """x float32/bfloat16/float16 [M, K] -> y [M, N] = x @ decode(w).T in x's dtype, accumulated in float32."""
        if x.ndim != 2 or x.shape[1] != w.k or x.dtype not in X_DTYPES or x.device.type != "cpu":
            raise BackendError(
                f"native qmm needs x [M, {w.k}] in float32, bfloat16 or float16 on the CPU, got {list(x.shape)} "
                f"{x.dtype} on {x.device}"
            )
        packed, scale, zero = _checked(w)
        m, n = x.shape[0], w.n
        x32 = x.to(torch.float32).contiguous()
        y = torch.empty(m, n, dtype=torch.float32)
        threads = torch.get_num_threads()
        is_bf16 = scale.dtype == torch.bfloat16
        zero_ptr = 0 if zero is None else zero.data_ptr()
        weight = (packed.data_ptr(), scale.data_ptr(), is_bf16, zero_ptr)
        levels = None if w.form == INT else torch.tensor(LEVELS[w.form])
        at = 0 if levels is None else levels.data_ptr()
        if m == 0 or n == 0:
            pass
        elif m <= FUSED_TOKENS:
            _native.qmm(x32.data_ptr(), m, *weight, n, w.k, w.bits, w.group_size, y.data_ptr(), threads, at)
        else:
            rows = min(n, max(1, TILE_WEIGHTS // w.k))
            tile = self._tile(rows * w.k)
            for start in range(0, n, rows):
                stop = min(start + rows, n)
                _native.dequantize(*weight, start, stop, w.k, w.bits, w.group_size, tile.data_ptr(), threads, at)
                values = tile[: (stop - start) * w.k].view(stop - start, w.k)
                torch.mm(x32, values.t(), out=y[:, start:stop])
        return y.to(x.dtype)

    def prepare(self, w: PackedWeight, x_dtype: torch.dtype) -> PreparedWeight | None:
        """``w`` in the order of the SIMD kernels, the same for every ``x_dtype``; None for an empty weight."""
        _checked(w)
        if w.n == 0:
            return None
        layout = plan([Part(host_weight_of(w))], w.n, exact=True)
        codes, scale, *zero = prepare(layout, Arena(layout.nbytes), torch.get_num_threads()).arrays
        scales = tensor_of(HostTensor(scale, str(w.scale.dtype).removeprefix("torch.")))
        tensors = (torch.from_numpy(codes), scales, *map(torch.from_numpy, zero))
        return PreparedWeight(self.name, tensors, w.n, w.k, w.bits, w.group_size, w.zero is None, x_dtype, w.form)

    def qmm_prepared(self, x: Tensor, w: PreparedWeight) -> Tensor:
        """As :meth:`qmm`; |error| <= K eps sum |x| |w|, whatever the number of threads."""
        if x.ndim != 2 or x.shape[1] != w.k or x.dtype not in X_DTYPES or not x.is_cpu:
            raise BackendError(
                f"native qmm needs x [M, {w.k}] in float32, bfloat16 or float16 on the CPU, got {list(x.shape)} "
                f"{x.dtype} on {x.device}"
            )
        x32 = x.detach().to(torch.float32).numpy()
        return torch.from_numpy(qmm_prepared(x32, _weight(w), True, torch.get_num_threads())).to(x.dtype)

    def pack(self, codes: Tensor, bits: int) -> Tensor:
        """uint8 codes [N, K] (each < 2^bits) -> int32 [N, ceil(K*bits/32)]."""
        if codes.ndim != 2 or codes.dtype != torch.uint8 or codes.device.type != "cpu":
            raise BackendError(
                f"native pack needs uint8 codes [N, K] on the CPU, got {list(codes.shape)} {codes.dtype}"
            )
        n, k = codes.shape
        codes = codes.contiguous()
        packed = torch.empty(n, words_per_row(k, bits), dtype=torch.int32)
        if codes.numel():
            _native.pack(codes.data_ptr(), n, k, bits, packed.data_ptr())
        return packed

    def unpack(self, packed: Tensor, bits: int, k: int) -> Tensor:
        """int32 [N, ceil(k*bits/32)] -> uint8 codes [N, k]."""
        _check_packed(packed, bits, k)
        packed = packed.contiguous()
        codes = torch.empty(packed.shape[0], k, dtype=torch.uint8)
        if codes.numel():
            _native.unpack(packed.data_ptr(), packed.shape[0], k, bits, codes.data_ptr())
        return codes

    def _tile(self, size: int) -> Tensor:
        tile: Tensor | None = getattr(self._local, "tile", None)
        if tile is None or tile.numel() < size:
            with torch.inference_mode(False):  # the buffer outlives the caller's mode
                tile = torch.empty(size, dtype=torch.float32)
            self._local.tile = tile
        return tile


def _check_packed(packed: Tensor, bits: int, k: int) -> None:
    words = words_per_row(k, bits)
    if packed.ndim != 2 or packed.shape[1] != words or packed.dtype != torch.int32 or packed.device.type != "cpu":
        raise BackendError(
            f"{bits}-bit codes of K={k} are int32 [N, {words}] on the CPU, got {list(packed.shape)} {packed.dtype} on "
            f"{packed.device}"
        )


def _weight(w: PreparedWeight) -> NativeWeight:
    """What the kernels take, over the tensors that :meth:`CpuNative.prepare` made."""
    codes, scale, *zero = w.tensors
    group = activation_group(w.group_size)
    levels = None if w.form == INT else levels_of(w.form)
    handle = _native.Prepared(
        codes.data_ptr(),
        scale.data_ptr(),
        zero[0].data_ptr() if zero else 0,
        w.n,
        w.k,
        group,
        _native.storage_of(w.bits, group) if levels is None else TABLE,
        2 ** (w.bits - 1) if levels is None else levels.middle,
        scale.dtype == torch.bfloat16,
        **table_arguments(levels),
    )
    return NativeWeight(handle, (), w.n, w.k)  # the caller's tensors outlive the call


def _checked(w: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """The weight's tensors, contiguous, after every check that keeps the kernel inside their memory."""
    _check_packed(w.packed, w.bits, w.k)
    n, scale, zero = w.n, w.scale, w.zero
    groups = scale.shape[1] if scale.ndim == 2 else 0
    if groups == 0 or w.k % groups or scale.shape[0] != n or scale.dtype not in SCALE_DTYPES or not scale.is_cpu:
        raise BackendError(
            f"scales of an [{n}, {w.k}] weight are bfloat16 or float16 [{n}, G] with G dividing {w.k}, on the CPU, got "
            f"{list(scale.shape)} {scale.dtype} on {scale.device}"
        )
    if zero is not None:
        if zero.shape != scale.shape or zero.dtype != torch.uint8 or not zero.is_cpu:
            raise BackendError(
                f"zero points must be uint8 {list(scale.shape)} on the CPU, got {list(zero.shape)} {zero.dtype} on "
                f"{zero.device}"
            )
        zero = zero.contiguous()
    return w.packed.contiguous(), scale.contiguous(), zero
