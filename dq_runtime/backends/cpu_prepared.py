"""Weights in the order the CPU kernels want them (csrc/cpu/prepared.h), made once at load.

Rows of several weights can be joined into one: q, k, v below each other, gate and up in alternating blocks of 16 rows.
Parts of different bit widths are stored in the widest of them, with zero points of their own; nothing is rounded again.
All of it on numpy arrays: ``dq generate`` on a CPU runs without torch.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dq_runtime.errors import BackendError
from dq_runtime.levels import INT, LEVELS
from dq_runtime.packing import HostTensor, HostWeight

BLOCK = 16  # rows of a block, csrc/cpu/prepared.h
FLOAT = 16  # the storage of unquantized 16-bit weights
TABLE = 20  # of codes that are places in a table
MOST_ACTIVATIONS = 128  # int8 activations share a scale over at most this many columns
ALIGNMENT = 64
PLANE_COLUMNS, PLANE_BYTES = 64, 20  # the lower plane of a head comes in pieces of so many columns and bytes
# Columns from which a head has two planes. What they save grows with the columns, what choosing rows costs does not:
# at 2048 (Llama-3.2-1B) a decode step became 1.06 times as fast, at 576 (SmolLM2-135M) 0.91 on a Zen 4. On a Xeon it
# became 1.06 there too, but a 3-bit discquant checkpoint's KL to the definition rose from 7e-4 to 2.5e-3.
PLANES_FROM = 1024
HUGE_PAGE = 2**21
FLOAT_TYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
PIECE = 2**23  # bytes of a weight repacked before the pages they were read from are given back


@dataclass(frozen=True)
class Part:
    """Rows of one weight, packed or dense [n, k]: its i-th block of 16 rows becomes block ``first + i * step``."""

    weight: HostWeight | HostTensor
    first: int = 0
    step: int = 1

    @property
    def n(self) -> int:
        return self.weight.n if isinstance(self.weight, HostWeight) else self.weight.shape[0]

    @property
    def k(self) -> int:
        return self.weight.k if isinstance(self.weight, HostWeight) else self.weight.shape[1]

    @property
    def weight_bytes(self) -> int:
        return self.weight.packed.nbytes if isinstance(self.weight, HostWeight) else self.weight.nbytes


@dataclass(frozen=True)
class Levels:
    """A table as the kernels take it: ``values`` at scale 1, and ``step * (bytes - middle)`` where activations are
    integers. The same thing for e2m1, whose levels are multiples of 0.5; for nf4 within 0.4% of its largest."""

    values: tuple[float, ...]
    bytes: tuple[int, ...]
    middle: int
    step: float


@cache  # a matmul asks for them each time
def levels_of(form: str) -> Levels:
    """The :class:`Levels` of a table of :mod:`dq_runtime.levels`."""
    values = LEVELS[form]
    if all((2 * v).is_integer() for v in values):
        step, middle = 0.5, int(2 * max(values))  # the smallest bytes: 0 .. 24
    else:
        step, middle = max(abs(v) for v in values) / 127, 128
    return Levels(values, tuple(middle + round(v / step) for v in values), middle, step)


@dataclass(frozen=True)
class Plan:
    """How some parts are stored together: sizes in bytes (``codes``) and elements (``scales``; as many zero points
    where ``zeros``). ``group`` columns share a scale, and an int8 activation scale. ``rest``: bytes of the
    lower plane of a head, 0 where there is none."""

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
    rest: int
    levels: Levels | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that :func:`prepare` takes from its arena."""
        zeros = self.scales if self.zeros else 0
        return sum(_aligned(size) for size in (self.codes, 2 * self.scales, zeros, self.rest))


class Arena:
    """One allocation for many tensors, in 2 MB pages where the system offers them: with 4 KB pages a decode step spends
    a third of its time on address translation (virtual machine, SmolLM2-135M: 2.2 against 1.6 ms of matmul a token)."""

    def __init__(self, nbytes: int) -> None:
        self._memory = zeros(nbytes)
        self._used = 0

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        """The next ``nbytes`` bytes, aligned to 64."""
        start = self._used
        self._used += _aligned(nbytes)
        return self._memory[start : start + nbytes]


def zeros(nbytes: int) -> NDArray[np.uint8]:
    """[nbytes] aligned to 64 bytes, in huge pages if it is larger than one; pages come as they are touched."""
    slack = HUGE_PAGE if nbytes >= HUGE_PAGE else ALIGNMENT
    pages = mmap.mmap(-1, nbytes + slack, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = np.frombuffer(pages, np.uint8)
    start = -address(memory) % slack
    if nbytes >= HUGE_PAGE:
        native().advise_huge(address(memory) + start, nbytes)
    return memory[start : start + nbytes]


def address(array: NDArray[Any]) -> int:
    """Where the first value lies."""
    pointer: int = array.__array_interface__["data"][0]  # array.ctypes.data would import ctypes, 10 ms
    return pointer


@dataclass(frozen=True)
class NativeWeight:
    """``handle`` [n, k] is what the kernels take; ``arrays`` (codes uint8, the bits of scales uint16, and uint8 the
    zero points and the lower plane, if any) are the memory it points into, sized as :class:`Plan` says."""

    handle: Any
    arrays: tuple[NDArray[Any], ...]
    n: int
    k: int


def native() -> Any:
    """The extension module; asked for here and not at import, so that what needs no kernel runs without it."""
    return import_module("dq_runtime._native")


def plan(parts: Sequence[Part], n: int, exact: bool, head: bool = False) -> Plan:
    """How to store ``parts``, which together fill the blocks of ``n`` rows.

    Dense parts become 8 bits, or stay 16-bit floats where ``exact``; a ``head``'s 8 bits lie in two planes where the
    columns are a multiple of 64 and at least PLANES_FROM (csrc/cpu/head.h): the decoder reads the lower one,
    :func:`qmm_prepared` does not. Raises :class:`BackendError` for what the kernels cannot hold: scales of two dtypes,
    quantized rows beside unquantized ones in exact mode, float32 in exact mode.
    """
    k = parts[0].k
    packed = [p.weight for p in parts if isinstance(p.weight, HostWeight)]
    dense = [p.weight for p in parts if isinstance(p.weight, HostTensor)]
    if packed and dense:
        raise BackendError("the CPU kernels cannot join quantized and unquantized rows")
    if dense:
        return _plan_dense(tuple(parts), {w.dtype for w in dense}, n, k, exact, head)
    group = activation_group(math.gcd(*(w.group_size for w in packed)))
    dtypes = {w.scale.dtype for w in packed}
    if len(dtypes) > 1:
        raise BackendError(f"the CPU kernels need scales of one dtype, got {sorted(dtypes)}")
    forms = {w.form for w in packed}
    if len(forms) > 1:
        raise BackendError(f"the CPU kernels join weights of one form, got {sorted(forms)}")
    (form,) = forms
    if form != INT:
        levels = levels_of(form)
        codes, scales = native().prepared_sizes(n, k, group, TABLE)
        bf16 = dtypes == {"bfloat16"}
        return Plan(tuple(parts), n, k, group, TABLE, levels.middle, False, bf16, codes, scales, 0, levels)
    bits = max(w.bits for w in packed)
    middle = 2 ** (bits - 1)
    zeros = any(w.zero is not None or w.bits != bits for w in packed)
    storage = native().storage_of(bits, group)
    codes, scales = native().prepared_sizes(n, k, group, storage)
    return Plan(tuple(parts), n, k, group, storage, middle, zeros, dtypes == {"bfloat16"}, codes, scales, 0)


def _plan_dense(parts: tuple[Part, ...], dtypes: set[str], n: int, k: int, exact: bool, head: bool) -> Plan:
    if exact and (len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"}):
        raise BackendError("in exact mode the CPU kernels need unquantized weights in bfloat16 or float16")
    planes = head and not exact and k >= PLANES_FROM and k % PLANE_COLUMNS == 0
    group, storage = (k, FLOAT) if exact else (_dense_group(k), 6 if planes else 8)
    codes, scales = native().prepared_sizes(n, k, group, storage)
    is_bf16 = dtypes == {"bfloat16"} if exact else True
    middle, rest = (32, n * k // PLANE_COLUMNS * PLANE_BYTES) if planes else (128, 0)
    return Plan(parts, n, k, group, storage, middle, False, is_bf16, codes, 0 if exact else scales, rest)


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


def prepare(plan: Plan, arena: Arena, threads: int, release: Callable[[], None] = lambda: None) -> NativeWeight:
    """Repack the plan's parts into memory of ``arena``; ``release`` is called between pieces of a large one."""
    codes, scale = arena.take(plan.codes), arena.take(2 * plan.scales).view(np.uint16)
    zeros = arena.take(plan.scales) if plan.zeros else None
    rest = arena.take(plan.rest) if plan.rest else None
    handle = native().Prepared(
        address(codes),
        address(scale),
        0 if zeros is None else address(zeros),
        plan.n,
        plan.k,
        plan.group,
        plan.storage,
        plan.middle,
        plan.is_bf16,
        0 if rest is None else address(rest),
        **table_arguments(plan.levels),
    )
    for part in plan.parts:
        rows = max(1, PIECE // (part.weight_bytes // part.n) // BLOCK) * BLOCK
        for start in range(0, part.n, rows):
            if start:
                release()
            _repack(handle, part, start, min(start + rows, part.n), threads)
    held = tuple(array for array in (codes, scale, zeros, rest) if array is not None)
    return NativeWeight(handle, held, plan.n, plan.k)


def table_arguments(levels: Levels | None) -> dict[str, Any]:
    """What a native Prepared takes besides, for a table."""
    if levels is None:
        return {}
    return {"levels": levels.values, "level_bytes": levels.bytes, "level_step": levels.step}


def _repack(handle: Any, part: Part, start: int, stop: int, threads: int) -> None:
    """Rows ``start:stop`` of a part; ``start`` is a multiple of a block."""
    first = part.first + start // BLOCK * part.step
    if isinstance(part.weight, HostTensor):
        dense = part.weight.rows(start, stop).contiguous()
        kind = FLOAT_TYPES[dense.dtype]
        native().repack_float(handle, first, part.step, address(dense.values), kind, stop - start, threads)
        return
    w = part.weight.rows(start, stop)
    packed, scales = np.ascontiguousarray(w.packed), w.scale.contiguous().values
    zeros = None if w.zero is None else np.ascontiguousarray(w.zero)
    native().repack_packed(
        handle,
        first,
        part.step,
        address(packed),
        address(scales),
        0 if zeros is None else address(zeros),
        w.n,
        w.bits,
        w.group_size,
        threads,
    )


def qmm_prepared(
    x: NDArray[np.float32], w: NativeWeight, exact: bool, threads: int, prompt: bool = False
) -> NDArray[np.float32]:
    """x [M, K] -> float32 [M, N] = x @ w.T; activations rounded to int8 per group, or used as they are, or as the
    decoder takes those of a ``prompt``: to bfloat16 on CPUs with AMX, else to int8."""
    if x.ndim != 2 or x.shape[1] != w.k or x.dtype != np.float32:
        raise BackendError(f"native qmm needs float32 x [M, {w.k}], got {list(x.shape)} {x.dtype}")
    x = np.ascontiguousarray(x)
    y = np.empty((x.shape[0], w.n), np.float32)
    if y.size:
        native().qmm_prepared(w.handle, address(x), x.shape[0], address(y), threads, exact, prompt)
    return y
