"""MLX's affine quantization, what mlx-lm reads on Apple silicon (and with mlx[cpu] or mlx[cuda] elsewhere).

Per linear: ``weight`` uint32 [N, K*b/32], the same dense little-endian bitstream as ours; ``scales`` and ``biases``
[N, G]; w = scale * code + bias, so bias = -scale * zero. With the middle code 2^(b-1) that is an exponent's shift and
exact in any float. Zero points of their own make products of up to 16 (bfloat16) or 19 (float16) significant bits:
where the scale's dtype cannot hold one, scales and biases of that layer are float32, which MLX accepts; it then
computes that layer in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dq_runtime.errors import SpecError
from dq_runtime.export.base import Progress, dense_tensors, model_config
from dq_runtime.export.exact import refit, smallest, zeros_of
from dq_runtime.packing import PackedWeight
from dq_runtime.packing.checkpoint import Checkpoint, write_json, write_weights
from dq_runtime.spec import options_from

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class Options:
    """There are none."""


def mlx_tensors(name: str, w: PackedWeight) -> dict[str, Tensor]:
    """The three tensors of one linear, by name."""
    if w.k * w.bits % 32:
        raise SpecError(f"mlx needs rows of whole words, and {name} has {w.k} inputs of {w.bits} bits; leave it dense")
    exact = -w.scale.double() * zeros_of(w).double()  # 19 significant bits of double's 53
    biases = smallest(exact, (w.scale.dtype, torch.float32))
    return {
        f"{name}.weight": w.packed.contiguous().view(torch.uint32),
        f"{name}.scales": w.scale.to(biases.dtype),
        f"{name}.biases": biases,
    }


class ToMLX:
    """``weight, scales, biases`` per linear, and config.json's ``quantization`` with every layer that differs from the
    most frequent grid by name."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        options_from(Options, "export format 'mlx'", options)

    def write(self, source: Checkpoint, directory: Path, show: Progress) -> list[str]:
        config = model_config(source)
        tensors = dense_tensors(source)
        grids: dict[str, dict[str, int]] = {}
        wide = 0
        for i, (name, stored) in enumerate(source.packed(), 1):
            w = refit(name, stored, BITS, GROUPS, "mlx")
            made = mlx_tensors(name, w)
            wide += made[f"{name}.biases"].dtype is torch.float32
            tensors |= made
            grids[name] = {"group_size": w.group_size, "bits": w.bits}
            show(i, len(source.layers))
        usual = max(grids.values(), key=list(grids.values()).count)
        quantization = {**usual, "mode": "affine", **{n: g for n, g in grids.items() if g != usual}}
        write_weights(directory, tensors)
        write_json(directory / "config.json", config | {"quantization": quantization})
        notes = ["codes and scales are those of the checkpoint, bit for bit; biases are exactly -scale * zero"]
        if wide:
            notes.append(f"{wide} layers have float32 scales and biases, because a 16-bit bias would be rounded")
        return notes
