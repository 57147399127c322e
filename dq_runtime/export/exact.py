"""The same weight in another form, exactly: another dtype of scales, finer groups, wider codes. Never another value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dq_runtime.errors import SpecError
from dq_runtime.levels import INT
from dq_runtime.packing import PackedWeight, pack_codes


def held_by(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether every value of a float tensor is representable in ``dtype``."""
    return bool((values.to(dtype).double() == values.double()).all())


def cast(values: Tensor, dtype: torch.dtype, what: str, remedy: str) -> Tensor:
    """``values`` in ``dtype``, or :class:`SpecError`: ``what`` is whose they are, ``remedy`` what to do instead."""
    if values.dtype is not dtype and not held_by(values, dtype):
        lost = values[values.to(dtype).double() != values.double()].flatten()[0].item()
        name = str(dtype).removeprefix("torch.")
        raise SpecError(f"{what} holds {lost:.6g}, which {name} cannot represent exactly; {remedy}")
    return values.to(dtype)


def smallest(values: Tensor, dtypes: Sequence[torch.dtype]) -> Tensor:
    """``values`` in the first of ``dtypes`` that holds them all; the last one must."""
    for dtype in dtypes[:-1]:
        if held_by(values, dtype):
            return values.to(dtype)
    return cast(values, dtypes[-1], "a tensor", "it has no exact form here")


def zeros_of(w: PackedWeight) -> Tensor:
    """uint8 [N, G]: the zero points, also where all are the middle code."""
    return torch.full(w.scale.shape, 2 ** (w.bits - 1), dtype=torch.uint8) if w.zero is None else w.zero


def refit(name: str, w: PackedWeight, bits: Sequence[int], groups: Sequence[int], form: str) -> PackedWeight:
    """``w`` at the fewest of ``bits`` and in the largest of ``groups`` (-1: a whole row) that hold it exactly.

    Finer groups repeat a scale, wider codes are the same integers about a wider middle. Coarser groups and narrower
    codes would round: :class:`SpecError` says which grid the format ``form`` takes.
    """
    require_int(name, w, form)
    wider = [b for b in sorted(bits) if b >= w.bits]
    finer = [g for g in sorted(groups, reverse=True) if 0 < g <= w.group_size and w.group_size % g == 0]
    group = w.group_size if w.group_size in groups or (w.group_size == w.k and -1 in groups) else None
    if group is None:
        group = finer[0] if finer else None
    if not wider or group is None:
        raise SpecError(
            f"{form} cannot hold {name} ({w.bits} bits, groups of {w.group_size}) without rounding it again; quantize "
            f"with --bits {_choice(bits)} and --group-size {_choice(groups)}"
        )
    return widen(regroup(w, group), wider[0])


def require_int(name: str, w: PackedWeight, form: str) -> None:
    """:class:`SpecError` for a layer whose levels are not evenly spaced, which ``form`` does not have."""
    if w.form != INT:
        raise SpecError(
            f"{form} has no {w.form}, the grid of {name}; export it to dense, or quantize with another --grid"
        )


def regroup(w: PackedWeight, group: int) -> PackedWeight:
    """The same values in groups of ``group`` weights, a divisor of the present group size."""
    times = w.group_size // group
    if times == 1:
        return w
    zero = None if w.zero is None else w.zero.repeat_interleave(times, 1)
    return replace(w, scale=w.scale.repeat_interleave(times, 1), zero=zero)


def widen(w: PackedWeight, bits: int) -> PackedWeight:
    """The same values in codes of ``bits`` >= w.bits bits. Symmetric codes keep their distance from the middle code,
    asymmetric ones and their zero points stay as they are."""
    if bits == w.bits:
        return w
    shift = 0 if w.zero is not None else 2 ** (bits - 1) - 2 ** (w.bits - 1)
    return PackedWeight(pack_codes(w.codes() + shift, bits), w.scale, w.zero, bits, w.k)


def with_zeros(w: PackedWeight) -> PackedWeight:
    """The same values with explicit zero points."""
    return replace(w, zero=zeros_of(w))


def _choice(values: Sequence[int]) -> str:
    return " or ".join("row" if v == -1 else str(v) for v in values)
