"""The contract of a backend. A backend says no with a reason; it never falls back by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dq_runtime.levels import INT
from dq_runtime.packing import PackedWeight


@dataclass(frozen=True)
class Call:
    """Everything a backend may base its answer on; printed whole when nothing can run it."""

    op: str
    device: str
    m: int
    n: int
    k: int
    bits: int
    group_size: int
    symmetric: bool
    x_dtype: torch.dtype
    scale_dtype: torch.dtype
    form: str = INT

    @classmethod
    def qmm(cls, x: Tensor, w: PackedWeight) -> Call:
        """The call ``x [..., K] @ w.T``."""
        return cls(
            "qmm",
            x.device.type,
            x.numel() // w.k,
            w.n,
            w.k,
            w.bits,
            w.group_size,
            w.zero is None,
            x.dtype,
            w.scale.dtype,
            w.form,
        )


@dataclass(frozen=True)
class PreparedWeight:
    """A weight in the order one backend's kernels want, made once at load; the checkpoint's bytes are not kept.

    ``tensors`` belong to ``backend``, which alone knows their layout; ``x_dtype`` is what activations it was made for.
    """

    backend: str
    tensors: tuple[Tensor, ...]
    n: int
    k: int
    bits: int
    group_size: int
    symmetric: bool
    x_dtype: torch.dtype
    form: str = INT

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)


class Backend(Protocol):
    """One implementation of some of the ops ``qmm``, ``pack``, ``unpack``; only those in ``ops`` are ever called."""

    name: str
    ops: frozenset[str]

    def available(self) -> str | None:
        """None if this backend can be used here at all, else the reason it cannot. Cheap, no side effects."""
        ...

    def can_run(self, call: Call) -> str | None:
        """None if yes, else why not. Called only when :meth:`available` is None."""
        ...

    def qmm(self, x: Tensor, w: PackedWeight) -> Tensor:
        """x [M, K] -> y [M, N] = x @ decode(w).T, in x's dtype, accumulated in float32."""
        ...

    def pack(self, codes: Tensor, bits: int) -> Tensor:
        """uint8 codes [N, K] -> int32 [N, ceil(K*bits/32)]: the bits of ``packing.pack_codes``."""
        ...

    def prepare(self, w: PackedWeight, x_dtype: torch.dtype) -> PreparedWeight | None:
        """``w`` in this backend's own order, for repeated use; None where it would gain nothing over ``qmm``."""
        ...

    def qmm_prepared(self, x: Tensor, w: PreparedWeight) -> Tensor:
        """As :meth:`qmm`, of a weight that :meth:`prepare` of this backend made."""
        ...


@runtime_checkable
class GroupedBackend(Backend, Protocol):
    """A backend that multiplies all experts of a layer in one call; for others the dispatcher calls one by one."""

    def prepare_experts(self, experts: Sequence[PackedWeight], x_dtype: torch.dtype) -> PreparedWeight | None:
        """As :meth:`prepare`, of the experts of one layer (of one shape, width and group size), in order."""
        ...

    def qmm_grouped(self, x: Tensor, w: PreparedWeight, expert_of: Tensor) -> Tensor:
        """x [T, K] or [P, K] -> y [P, N]: what :func:`dq_runtime.backends.reference.qmm_grouped` defines."""
        ...
