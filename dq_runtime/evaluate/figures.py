"""The figures of report.json that need no text: sizes, and what became of every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dq_runtime.evaluate.metrics import Quality
from dq_runtime.grids import Scales
from dq_runtime.modules.student_linear import StudentLinear
from dq_runtime.packing import PackedWeight


def sizes(
    model: nn.Module, weights: int, packed_bytes: int, directory: Path, original_parameters: int
) -> dict[str, Any]:
    """Bytes of the packed layers, of the checkpoint in ``directory``, and of the original model with every tensor in 16
    bits. ``model`` is the one that was rounded, its layers replaced by StudentLinears with so many ``weights``, which
    take ``packed_bytes``."""
    size = sum(f.stat().st_size for f in directory.glob("*.safetensors"))
    # StudentLinears have no parameters: what is counted here is the unquantized rest.
    rest = sum(p.numel() for p in model.parameters())
    return {
        "bits_per_weight": 8 * packed_bytes / weights,
        "quantized_weights": weights,
        "unquantized_parameters": rest,
        "packed_bytes": packed_bytes,
        "size_bytes": size,
        "reference_bytes": 2 * original_parameters,
    }


@dataclass
class Measured:
    """What was measured of a rounded model: quality by method, and of its layers, added one after the other, the rows
    of :func:`layer_rows`, weights, bytes, and whether the method moved any scale (codes and errors then say nothing
    against another's)."""

    results: Mapping[str, Quality] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    weights: int = 0
    packed_bytes: int = 0
    learned_scales: bool = False

    def add(
        self,
        layers: Mapping[str, StudentLinear],
        rounded: Mapping[str, PackedWeight],
        nearest: Mapping[str, PackedWeight],
    ) -> None:
        """Some layers, held by their StudentLinears; the packed weights may be those of more layers."""
        self.rows += layer_rows(layers, rounded, nearest)
        for name in layers:
            self.weights += rounded[name].n * rounded[name].k
            self.packed_bytes += rounded[name].nbytes
            self.learned_scales |= not torch.equal(rounded[name].scale, nearest[name].scale)


def layer_rows(
    layers: Mapping[str, StudentLinear], rounded: Mapping[str, PackedWeight], nearest: Mapping[str, PackedWeight]
) -> list[dict[str, Any]]:
    """Per layer: shape, bits, relative weight error of the method and of nearest, share of codes that differ."""
    rows = []
    for name, layer in layers.items():
        w = layer.weight()
        norm = float(w.square().sum()) or 1.0
        chosen = rounded[name]
        on_its_scales = layer.grid.nearest(w, Scales(chosen.scale, chosen.zero))
        rows.append(
            {
                "name": name,
                "out_features": chosen.n,
                "in_features": chosen.k,
                "weights": chosen.n * chosen.k,
                "bits": chosen.bits,
                "group_size": layer.grid.spec.group_size,
                "bits_per_weight": 8 * chosen.nbytes / (chosen.n * chosen.k),
                "relative_error": float((chosen.decode() - w).square().sum()) / norm,
                "relative_error_nearest": float((nearest[name].decode() - w).square().sum()) / norm,
                # Against nearest on the method's own scales: with learned scales other codes alone mean nothing.
                "moved": (chosen.codes() != on_its_scales).float().mean().item(),
            }
        )
    return rows
