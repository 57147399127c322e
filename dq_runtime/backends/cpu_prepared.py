"""Weights in the order the CPU kernels want them (csrc/cpu/prepared.h), made once at load.

Rows of several weights can be joined into one: q, k, v below each other, gate and up in alternating blocks of 16 rows.
Parts of different bit widths are stored in the widest of them, with zero points of their own; nothing is rounded again.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dq_runtime.backends.base import PreparedWeight
from dq_runtime.errors import BackendError
from dq_runtime.packing import PackedWeight

BLOCK = 16  # rows of a block, csrc/cpu/prepared.h
FLOAT = 16  # the storage of unquantized 16-bit weights
MOST_ACTIVATIONS = 128  # int8 activations share a scale over at most this many columns
ALIGNMENT = 64
HUGE_PAGE = 2**21
FLOAT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True)
class Part:
    """Rows of one weight, packed or dense [n, k]: its i-th block of 16 rows becomes block ``first + i * step``."""

    weight: PackedWeight | Tensor
    first: int = 0
    step: int = 1

    @property
    def n(self) -> int:
        return self.weight.n if isinstance(self.weight, PackedWeight) else self.weight.shape[0]

    @property
    def k(self) -> int:
        return self.weight.k if isinstance(self.weight, PackedWeight) else self.weight.shape[1]


@dataclass(frozen=True)
class Plan:
    """How some parts are stored together: sizes in bytes (``codes``) and elements (``scales``; as many zero points
    where ``zeros``). ``group`` columns share a scale, and an int8 activation scale."""

    parts: tuple[Part, ...]
    n: int
    k: int
    group: int
    storage: int
    middle: int
    zeros: bool
    is_bf16: bool
    codes: int
    scales: int

    @property
    def nbytes(self) -> int:
        """Bytes that :func:`prepare` takes from its arena."""
        return sum(_aligned(size) for size in (self.codes, 2 * self.scales, self.scales if self.zeros else 0))


class Arena:
    """One allocation for many tensors, in 2 MB pages where the system offers them: with 4 KB pages a decode step spends
    a third of its time on address translation (virtual machine, SmolLM2-135M: 2.2 against 1.6 ms of matmul a token)."""

    def __init__(self, nbytes: int) -> None:
        self._memory = zeros(nbytes)
        self._used = 0

    def take(self, nbytes: int) -> Tensor:
        """The next ``nbytes`` bytes, uint8, aligned to 64."""
        start = self._used
        self._used += _aligned(nbytes)
        return self._memory[start : start + nbytes]


def zeros(nbytes: int) -> Tensor:
    """uint8 [nbytes] aligned to 64 bytes, in huge pages if it is larger than one; pages come as they are touched."""
    slack = HUGE_PAGE if nbytes >= HUGE_PAGE else ALIGNMENT
    pages = mmap.mmap(-1, nbytes + slack, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    start = -memory.data_ptr() % slack
    if nbytes >= HUGE_PAGE:
        native().advise_huge(memory.data_ptr() + start, nbytes)
    return memory[start : start + nbytes]


@dataclass(frozen=True)
class NativeWeight:
    """``handle`` [n, k] is what the kernels take; ``tensors`` (codes uint8, scales, and zero points uint8 if any) are
    the memory it points into."""

    handle: Any
    tensors: tuple[Tensor, ...]
    n: int
    k: int

    @classmethod
    def of(cls, w: PreparedWeight) -> NativeWeight:
        """The weight whose tensors :func:`prepare` made of one packed weight."""
        group = activation_group(w.group_size)
        return cls.over(w.tensors, w.n, w.k, group, native().storage_of(w.bits, group), 2 ** (w.bits - 1))

    @classmethod
    def over(cls, tensors: tuple[Tensor, ...], n: int, k: int, group: int, storage: int, middle: int) -> NativeWeight:
        """A handle to ``tensors``, sized as :class:`Plan` says."""
        codes, scale, *zero = tensors
        is_bf16 = scale.dtype == torch.bfloat16
        pointers = (codes.data_ptr(), scale.data_ptr(), zero[0].data_ptr() if zero else 0)
        return cls(native().Prepared(*pointers, n, k, group, storage, middle, is_bf16), tensors, n, k)


def native() -> Any:
    """The extension module; asked for here and not at import, so that what needs no kernel runs without it."""
    return import_module("dq_runtime._native")


def plan(parts: Sequence[Part], n: int, exact: bool) -> Plan:
    """How to store ``parts``, which together fill the blocks of ``n`` rows.

    Dense parts become 8 bits, or stay 16-bit floats where ``exact``. Raises :class:`BackendError` for what the kernels
    cannot hold: scales of two dtypes, quantized rows beside unquantized ones in exact mode, float32 in exact mode.
    """
    k = parts[0].k
    packed = [p.weight for p in parts if isinstance(p.weight, PackedWeight)]
    dense = [p.weight for p in parts if isinstance(p.weight, Tensor)]
    if packed and dense:
        raise BackendError("the CPU kernels cannot join quantized and unquantized rows")
    if dense:
        return _plan_dense(tuple(parts), {w.dtype for w in dense}, n, k, exact)
    group = activation_group(math.gcd(*(w.group_size for w in packed)))
    dtypes = {w.scale.dtype for w in packed}
    if len(dtypes) > 1:
        raise BackendError(f"the CPU kernels need scales of one dtype, got {sorted(map(str, dtypes))}")
    bits = max(w.bits for w in packed)
    middle = 2 ** (bits - 1)
    zeros = any(w.zero is not None or w.bits != bits for w in packed)
    storage = native().storage_of(bits, group)
    codes, scales = native().prepared_sizes(n, k, group, storage)
    return Plan(tuple(parts), n, k, group, storage, middle, zeros, dtypes == {torch.bfloat16}, codes, scales)


def _plan_dense(parts: tuple[Part, ...], dtypes: set[torch.dtype], n: int, k: int, exact: bool) -> Plan:
    if exact and (len(dtypes) > 1 or not dtypes <= {torch.bfloat16, torch.float16}):
        raise BackendError("in exact mode the CPU kernels need unquantized weights in bfloat16 or float16")
    group, storage = (k, FLOAT) if exact else (_dense_group(k), 8)
    codes, scales = native().prepared_sizes(n, k, group, storage)
    is_bf16 = dtypes == {torch.bfloat16} if exact else True
    return Plan(parts, n, k, group, storage, 128, False, is_bf16, codes, 0 if exact else scales)


def activation_group(group_size: int) -> int:
    """Columns that share an activation scale where the weight's scale covers ``group_size``: that many, or for long
    groups their largest divisor up to 128 that wastes no padding (multiples of 32, else of 16, else any)."""
    if group_size <= MOST_ACTIVATIONS:
        return group_size
    for step in (32, 16, 1):
        for group in range(MOST_ACTIVATIONS // step * step, 15, -step):
            if group_size % group == 0:
                return group
    return group_size


def _dense_group(k: int) -> int:
    return next((group for group in (32, 16) if k % group == 0), activation_group(k))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def prepare(plan: Plan, arena: Arena, threads: int) -> NativeWeight:
    """Repack the plan's parts into memory of ``arena``."""
    codes = arena.take(plan.codes)
    scale = arena.take(2 * plan.scales).view(torch.bfloat16 if plan.is_bf16 else torch.float16)
    tensors = (codes, scale, arena.take(plan.scales)) if plan.zeros else (codes, scale)
    ready = NativeWeight.over(tensors, plan.n, plan.k, plan.group, plan.storage, plan.middle)
    handle, native_ = ready.handle, native()
    for part in plan.parts:
        w = part.weight
        if isinstance(w, Tensor):
            values = w.contiguous()
            kind = FLOAT_TYPES[values.dtype]
            native_.repack_float(handle, part.first, part.step, values.data_ptr(), kind, part.n, threads)
            continue
        packed, scales = w.packed.contiguous(), w.scale.contiguous()
        zeros = None if w.zero is None else w.zero.contiguous()
        native_.repack_packed(
            handle,
            part.first,
            part.step,
            packed.data_ptr(),
            scales.data_ptr(),
            0 if zeros is None else zeros.data_ptr(),
            w.n,
            w.bits,
            w.group_size,
            threads,
        )
    return ready


def qmm_prepared(x: Tensor, w: NativeWeight, exact: bool, threads: int) -> Tensor:
    """x [M, K] -> float32 [M, N] = x @ w.T; activations rounded to int8 per group, or used as they are."""
    if x.ndim != 2 or x.shape[1] != w.k or x.device.type != "cpu" or not x.is_floating_point():
        raise BackendError(
            f"native qmm needs floating-point x [M, {w.k}] on the CPU, got {list(x.shape)} {x.dtype} on {x.device}"
        )
    x32 = x.to(torch.float32).contiguous()
    y = torch.empty(x.shape[0], w.n, dtype=torch.float32)
    if y.numel():
        native().qmm_prepared(w.handle, x32.data_ptr(), x.shape[0], y.data_ptr(), threads, exact)
    return y
