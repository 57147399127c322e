"""The contract of a backend. A backend says no with a reason; it never falls back by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

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
        )


class Backend(Protocol):
    """One implementation of some of the ops ``qmm``, ``pack``, ``unpack``."""

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
