"""What a run writes, and whether there is room for it: the one place that knows, for plan and quantize."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dq_runtime.errors import DQError
from dq_runtime.planning.memory import CODES, Component, packed_size, scales_size, state_size
from dq_runtime.planning.shapes import ModelShape, shape_of
from dq_runtime.spec import GridSpec

DISK = "disk"


def disk_use(shape: ModelShape, method: str, blockwise: bool = False, streams: int = 0) -> list[Component]:
    """What lies on the disk at the worst moment: while a state replaces the one before it, or at the end, when state,
    choices and checkpoint are there together. ``blockwise``: finished blocks are files of the checkpoint already, and
    only the state of one is kept beside them. ``streams``: bytes of hidden states that lie in a file."""
    state = state_size(method, shape)
    choices = 0 if method == "nearest" else CODES * shape.weights + scales_size(shape)
    checkpoint = packed_size(shape) + 2 * shape.dense
    if blockwise:
        state, choices = 2 * state * shape.largest_block // shape.weights, 0
    found = [Component("state of the run", state, f"{state / shape.weights:.2f} B x W", DISK)]
    if 2 * state > state + choices + checkpoint:
        found.append(Component("the state that replaces it", state, "written before the old one goes", DISK))
    else:
        found.append(Component("choices", choices, "1 B x W, scales", DISK))
        found.append(Component("checkpoint", checkpoint, "bits/8 B x W, scales, 2 B x D", DISK))
    if streams:
        found.append(Component("hidden states", streams, "windows x T x H x 4 B, two streams", DISK))
    return found


def check_disk(
    output: Path, model: Any, modules: Mapping[str, Any], grids: Mapping[str, GridSpec], method: str, blockwise: bool
) -> None:
    """Refuse now rather than after hours."""
    needed = sum(component.size for component in disk_use(shape_of(model, modules, grids), method, blockwise))
    existing = next(p for p in (output, *output.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DQError(
            f"{existing} has {free / 1e9:.1f} GB free, but this run needs {needed / 1e9:.1f} GB; free some space"
        )
