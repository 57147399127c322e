"""The contract of a grid. Shapes: N = out_features, K = in_features, G = K / group_size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dq_runtime.levels import INT, LEVELS
from dq_runtime.spec import GridSpec


@dataclass(frozen=True)
class Affine:
    """value = scale * (code - zero): the decode form of every integer grid, the only thing a kernel knows of one."""

    bits: int
    name: str = INT


@dataclass(frozen=True)
class Table:
    """value = scale * LEVELS[name][code] (:mod:`dq_runtime.levels`): the decode form of every other grid."""

    bits: int
    name: str

    @property
    def levels(self) -> tuple[float, ...]:
        """The values of the codes at scale 1, ascending."""
        return LEVELS[self.name]


@dataclass(frozen=True)
class Scales:
    """Per-group parameters of one weight: ``scale`` [N, G] in the serving dtype; ``zero`` uint8 [N, G], or None where
    every zero point is the middle code 2^(bits-1) (symmetric)."""

    scale: Tensor
    zero: Tensor | None = None

    def wide(self, k: int) -> Scales:
        """One group per weight, [N, K] each: a slice of columns of these belongs to those columns of the weight."""
        size = k // self.scale.shape[1]
        zero = None if self.zero is None else self.zero.repeat_interleave(size, 1)
        return Scales(self.scale.repeat_interleave(size, 1), zero)

    def columns(self, start: int, stop: int) -> Scales:
        """Groups ``start`` to ``stop``; of :meth:`wide` scales, columns."""
        zero = None if self.zero is None else self.zero[:, start:stop]
        return Scales(self.scale[:, start:stop], zero)


class Grid(Protocol):
    """A grid is built from its :class:`GridSpec` and is stateless beyond it."""

    spec: GridSpec
    decode_form: Affine | Table

    def __init__(self, spec: GridSpec) -> None: ...

    def fit(self, w: Tensor) -> Scales:
        """Scales for a float weight [N, K]."""
        ...

    def position(self, w: Tensor, scales: Scales) -> Tensor:
        """Where each weight lies on the code axis, float32 [N, K]: the real number v with w = scale * (v - zero), and
        in a table the one that lies between two codes as the weight does between their values."""
        ...

    def neighbours(self, w: Tensor, scales: Scales) -> tuple[Tensor, Tensor]:
        """The two codes around each weight, uint8 [N, K] each, hi = lo + 1; lo == hi where the weight is outside the
        grid or on one of its values."""
        ...

    def nearest(self, w: Tensor, scales: Scales) -> Tensor:
        """The code closest to each weight, uint8 [N, K]."""
        ...

    def decode(self, codes: Tensor, scales: Scales, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values of codes [N, K]."""
        ...
