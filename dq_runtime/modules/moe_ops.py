"""The torch operators ``dq_runtime::qmm_grouped`` and ``dq_runtime::qmm_grouped_prepared``: all experts of one layer.

Forward only: experts are served packed, and rounding does not train them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dq_runtime.backends import dispatch
from dq_runtime.backends.base import PreparedWeight
from dq_runtime.levels import INT
from dq_runtime.packing import PackedWeight


@dataclass(frozen=True)
class PackedExperts:
    """The packed weights [N, K] of E experts: ``packed`` int32 [E, N, ceil(K*bits/32)], ``scale`` fp16/bf16 [E, N, G],
    ``zero`` uint8 [E, N, G] or None; bits and values as in :class:`PackedWeight`."""

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    k: int
    form: str = INT

    @classmethod
    def stack(cls, weights: Sequence[PackedWeight]) -> PackedExperts:
        """One weight an expert, in order. Raises ValueError unless all have one shape, width, group size and dtype."""
        kinds = {(w.packed.shape, w.scale.shape, w.scale.dtype, w.zero is None, w.bits, w.k, w.form) for w in weights}
        if len(kinds) != 1:
            raise ValueError(f"experts of one layer must be packed alike, got {len(kinds)} ways")
        zeros = [w.zero for w in weights if w.zero is not None]
        return cls(
            torch.stack([w.packed for w in weights]),
            torch.stack([w.scale for w in weights]),
            torch.stack(zeros) if zeros else None,
            weights[0].bits,
            weights[0].k,
            weights[0].form,
        )

    def experts(self) -> list[PackedWeight]:
        """The weight of each expert, views."""
        zeros = [None] * self.packed.shape[0] if self.zero is None else list(self.zero)
        return [
            PackedWeight(*w, self.bits, self.k, self.form) for w in zip(self.packed, self.scale, zeros, strict=True)
        ]


@torch.library.custom_op("dq_runtime::qmm_grouped", mutates_args=())
def _qmm_grouped(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    expert_of: Tensor,
    bits: int,
    k: int,
    form: str = "int",
) -> Tensor:
    return dispatch.qmm_grouped(x, PackedExperts(packed, scale, zero, bits, k, form).experts(), expert_of)


@_qmm_grouped.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    expert_of: Tensor,
    bits: int,
    k: int,
    form: str = "int",
) -> Tensor:
    return x.new_empty(expert_of.shape[0], packed.shape[1])


def qmm_grouped(x: Tensor, w: PackedExperts, expert_of: Tensor) -> Tensor:
    """x [T, K] or [P, K], expert_of integer [P], P = T * top_k -> y [P, N] in x's dtype: row p is token p // top_k (row
    p of x where x has P) times the weight of expert ``expert_of[p]``. Raises :class:`BackendError` for a number that is
    no expert's, or where T does not divide P."""
    y: Tensor = _qmm_grouped(x, w.packed, w.scale, w.zero, expert_of, w.bits, w.k, w.form)
    return y


@torch.library.custom_op("dq_runtime::qmm_grouped_prepared", mutates_args=())
def _qmm_grouped_prepared(
    x: Tensor,
    weight: Sequence[Tensor],
    expert_of: Tensor,
    experts: int,
    backend: str,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    symmetric: bool,
    x_dtype: torch.dtype,
    form: str = "int",
) -> Tensor:
    w = PreparedWeight(backend, tuple(weight), n, k, bits, group_size, symmetric, x_dtype, form)
    return dispatch.qmm_grouped_prepared(x, w, experts, expert_of)


@_qmm_grouped_prepared.register_fake
def _(
    x: Tensor,
    weight: Sequence[Tensor],
    expert_of: Tensor,
    experts: int,
    backend: str,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    symmetric: bool,
    x_dtype: torch.dtype,
    form: str = "int",
) -> Tensor:
    return x.new_empty(expert_of.shape[0], n)


def qmm_grouped_prepared(x: Tensor, w: PreparedWeight, experts: int, expert_of: Tensor) -> Tensor:
    """As :func:`qmm_grouped`, of ``experts`` weights that ``dispatch.prepare_experts`` made. On a GPU the host does not
    wait for ``expert_of``, so a number that is no expert's is not noticed there: its row stays unset."""
    y: Tensor = _qmm_grouped_prepared(
        x, list(w.tensors), expert_of, experts, w.backend, w.n, w.k, w.bits, w.group_size, w.symmetric, w.x_dtype,
        w.form,
    )  # fmt: skip
    return y
