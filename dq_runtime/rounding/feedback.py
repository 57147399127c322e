"""Column after column, each carrying the error of those before it: the walk that GPTQ, its relatives and cyclic
coordinate descent share.

    v_j = start_j + sum_{i<j} (e_i F_ij + v_i S_ij)      the value to round, one column of it, [N]
    q_j = Q_j(v_j)                                       the grid's nearest value
    e_j = target_j - q_j

F ("feedback") and S ("carry") are strictly upper triangular [K, K]. In lazy blocks of 128 columns (OPTQ, arXiv
2210.17323, section 3.3): sums over earlier blocks are matrix products, the columns within a block go one by one, in
C++ where that is built (csrc/cpu/gptq.h) and in PyTorch otherwise; both round and add in the same order, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dq_runtime.errors import SpecError
from dq_runtime.grids import Affine, Grid, Scales
from dq_runtime.rounding.base import Choice
from dq_runtime.rounding.linalg import Curvature

_native: Any
try:
    _native = import_module("dq_runtime._native")
except ImportError:
    _native = None

BLOCK = 128


@dataclass(frozen=True)
class Near:
    """Where codes may go: within ``reach`` levels of ``codes``, uint8 [N, K] in the walk's order."""

    codes: Tensor
    reach: int


@dataclass(frozen=True)
class Walk:
    """Everything about one walk but where it starts; ``order`` int64 [K] holds the layer's column that is i-th, and all
    but ``own``, the layer's scales, is in that order."""

    grid: Grid
    own: Scales
    order: Tensor
    feedback: Tensor
    carry: Tensor | None = None
    near: Near | None = None

    @cached_property
    def groups(self) -> Tensor:
        """The group of ``own`` that each column belongs to, int32 [K]."""
        return (self.order // (len(self.order) // self.own.scale.shape[1])).int()

    @cached_property
    def wide(self) -> Scales:
        """One scale and zero point for each weight, [N, K]."""
        wide = self.own.wide(len(self.order))
        return Scales(wide.scale[:, self.order], None if wide.zero is None else wide.zero[:, self.order])


def walk(plan: Walk, start: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The codes uint8 [N, K] and the errors e float32 [N, K] for ``start`` and ``target`` float32 [N, K], all in the
    walk's order."""
    n, k = target.shape
    error, values = torch.empty_like(target), torch.empty_like(target)
    codes = torch.empty(n, k, dtype=torch.uint8, device=target.device)
    for begin in range(0, k, BLOCK):
        part = slice(begin, min(begin + BLOCK, k))
        value = start[:, part].clone()
        if begin:
            value.addmm_(error[:, :begin], plan.feedback[:begin, part])
            if plan.carry is not None:
                value.addmm_(values[:, :begin], plan.carry[:begin, part])
        round_columns(plan, part, value, target, error, codes)
        if plan.carry is not None:
            values[:, part] = value
    return codes, error


def round_columns(plan: Walk, part: slice, value: Tensor, target: Tensor, error: Tensor, codes: Tensor) -> None:
    """Round the columns ``part``: fills these of ``codes`` and ``error`` [N, K]; ``value`` [N, columns] holds their
    start with the feedback of earlier blocks, and afterwards what was rounded."""
    form = plan.grid.decode_form
    if _native is None or target.device.type != "cpu" or not isinstance(form, Affine):
        round_columns_reference(plan, part, value, target, error, codes)
        return
    own = plan.own
    middle = float(2 ** (form.bits - 1))
    scale = own.scale.float().contiguous()
    zero = torch.full_like(scale, middle) if own.zero is None else own.zero.float().contiguous()
    feedback = plan.feedback[part, part].T.contiguous()
    carry = None if plan.carry is None else plan.carry[part, part].T.contiguous()
    group = plan.groups[part].contiguous()
    near = None if plan.near is None else plan.near.codes.contiguous()
    n, k = target.shape
    target = target.contiguous()
    _native.gptq_block(
        value.data_ptr(),
        target.data_ptr() + 4 * part.start,
        feedback.data_ptr(),
        0 if carry is None else carry.data_ptr(),
        scale.data_ptr(),
        zero.data_ptr(),
        group.data_ptr(),
        0 if near is None else near.data_ptr() + part.start,
        0 if plan.near is None else plan.near.reach,
        codes.data_ptr() + part.start,
        error.data_ptr() + 4 * part.start,
        n,
        value.shape[1],
        k,
        scale.shape[1],
        2**form.bits - 1,
        torch.get_num_threads(),
    )


def round_columns_reference(
    plan: Walk, part: slice, value: Tensor, target: Tensor, error: Tensor, codes: Tensor
) -> None:
    """The definition of :func:`round_columns`."""
    for i, j in enumerate(range(part.start, part.stop)):
        scales = plan.wide.columns(j, j + 1)
        code = plan.grid.nearest(value[:, i : i + 1], scales)
        if plan.near is not None:
            around = plan.near.codes[:, j : j + 1].int()
            low, high = around - plan.near.reach, around + plan.near.reach
            code = code.int().clamp(low, high).to(torch.uint8)
        codes[:, j : j + 1] = code
        error[:, j : j + 1] = target[:, j : j + 1] - plan.grid.decode(code, scales)
        rest = slice(j + 1, part.stop)
        value[:, i + 1 :] += error[:, j : j + 1] * plan.feedback[j, rest]
        if plan.carry is not None:
            value[:, i + 1 :] += value[:, i : i + 1] * plan.carry[j, rest]


def walk_refitting(grid: Grid, w: Tensor, curve: Curvature, size: int) -> Choice:
    """GPTQ without static groups: at the first column of each group its scales are fitted to the weights as they are
    compensated by then, in natural order. ``w`` float32 [N, K], ``size`` weights a group.

    The compensated weights of a group g are those that would make up best for the error e of the columns before it:
    w_g + e_{<g} R_{<g,g} (R_gg)^-1 minimises ||e R||^2 over the group.
    """
    if not isinstance(grid.decode_form, Affine):
        raise SpecError(f"scales cannot be refitted on grid {grid.spec.name} group by group; round with fixed scales")
    k = w.shape[1]
    feedback = curve.feedback()
    error = torch.empty_like(w)
    codes = torch.empty_like(w, dtype=torch.uint8)
    fitted: list[Scales] = []
    for begin in range(0, k, size):
        group = slice(begin, begin + size)
        factor = curve.factor[group, group]
        pushed = error[:, :begin] @ curve.factor[:begin, group]
        ideal = w[:, group] + torch.linalg.solve_triangular(factor, pushed, upper=True, left=False)
        scales = grid.fit(ideal)
        fitted.append(scales)
        inner = Walk(grid, scales, torch.arange(size, device=w.device), feedback[group, group])
        start = w[:, group] + pushed / factor.diagonal()
        codes[:, group], error[:, group] = walk(inner, start, w[:, group].contiguous())
    zeros = [scales.zero for scales in fitted if scales.zero is not None]
    scale = torch.cat([scales.scale for scales in fitted], 1)
    return Choice(codes, Scales(scale, torch.cat(zeros, 1) if zeros else None))
