"""Which tile for how many tokens: measured once per chip, shipped as JSON, never searched for at run time.

A table lists, per width in bits, rows {max_m, min_tiles, BM, BN, num_warps, num_stages, programs}; the first row with
M <= max_m that cuts y into at least min_tiles is taken. ``programs`` is how many programs the row wants on the chip: K
is split until there are about that many; 0: K is never split. Past the last row the weights are decoded and torch
multiplies. ``DQ_TILES=file`` replaces the shipped table; ``dq bench tune`` writes one.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import triton

from dq_kernels.stream import Tile
from dq_kernels.stream_layout import ORDERS, stream_bits

MAX_SPLIT = 8  # pieces of a tile: beyond that, adding them up costs more than the programs gained


@dataclass(frozen=True)
class Row:
    """One row of a table; see the module docstring."""

    max_m: int
    BM: int
    BN: int
    num_warps: int
    num_stages: int
    programs: int
    min_tiles: int = 0

    def tiles(self, m: int, n: int) -> int:
        """How many output tiles y [m, n] is cut into."""
        return triton.cdiv(m, self.BM) * triton.cdiv(n, self.BN)

    def splits(self) -> tuple[int, ...]:
        """A whole tile and, where the row may cut one, a cut one: what offline.py compiles."""
        return (1, 2) if self.programs else (1,)

    def tile(self, m: int, n: int, k: int, bits: int) -> Tile:
        """The launch for a product of this size."""
        tiles = self.tiles(m, n)
        steps = triton.cdiv(k, ORDERS[stream_bits(bits)].block)
        split = max(1, min(self.programs // tiles, MAX_SPLIT, steps))
        return Tile(self.BM, self.BN, self.num_warps, self.num_stages, split)


Table = dict[int, tuple[Row, ...]]


def read(text: str) -> Table:
    """A table from its JSON; raises ValueError naming what is wrong."""
    try:
        rows: dict[str, list[dict[str, Any]]] = json.loads(text)["rows"]
        table = {int(bits): tuple(Row(**row) for row in found) for bits, found in rows.items()}
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"not a table of tiles: {error}") from None
    if set(table) != set(ORDERS):
        raise ValueError(f"a table of tiles has rows for {sorted(ORDERS)} bits, got {sorted(table)}")
    return table


@cache
def table_for(capability: int) -> Table:
    """The table of a chip: Hopper and big Blackwell share one (227 KB of shared memory a block), A100 and Orin have one
    (163 KB), and what has 99 KB one more."""
    override = os.environ.get("DQ_TILES")
    if override:
        return read(Path(override).read_text(encoding="utf-8"))
    name = "sm_90.json" if 90 <= capability < 120 else "sm_80.json" if capability in (80, 87) else "sm_86.json"
    return read((files("dq_kernels") / "tables" / name).read_text(encoding="utf-8"))


@cache
def capability_of(device: torch.device) -> int:
    """90 for sm_90; the interpreter, which has no chip, plays an H100."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache(maxsize=4096)
def choose(m: int, n: int, k: int, bits: int, device: torch.device) -> Tile | None:
    """The tile for x [m, k] times a weight [n, k] of ``bits`` on ``device``; None: decode and let torch multiply."""
    for row in table_for(capability_of(device))[stream_bits(bits)]:
        if m <= row.max_m and row.tiles(m, n) >= row.min_tiles:
            return row.tile(m, n, k, bits)
    return None
