"""Axis 1: which values may a weight take? One file a grid, one line here."""

from dq_runtime.grids.base import Affine, Grid, Scales
from dq_runtime.registry import Registry

GRIDS = Registry("grid", {"int": "dq_runtime.grids.int_grid:IntGrid"})

__all__ = ["GRIDS", "Affine", "Grid", "Scales"]
