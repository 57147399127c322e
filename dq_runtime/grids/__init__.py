"""Axis 1: which values may a weight take? One file a grid, one line here."""

from dq_runtime.grids.base import Affine, Grid, Scales, Table
from dq_runtime.registry import Registry

GRIDS = Registry(
    "grid",
    {
        "int": "dq_runtime.grids.int_grid:IntGrid",
        "nf4": "dq_runtime.grids.table_grid:TableGrid",
        "fp4": "dq_runtime.grids.table_grid:TableGrid",
        "mxfp4": "dq_runtime.grids.block_grids:Mxfp4Grid",
        "nvfp4": "dq_runtime.grids.block_grids:Nvfp4Grid",
    },
)

__all__ = ["GRIDS", "Affine", "Grid", "Scales", "Table"]
