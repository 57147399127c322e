"""compressed-tensors ``pack-quantized`` again, in the form that vLLM loads: what fused layers and shards need.

vLLM multiplies q, k, v (and gate, up) as one matrix of one scheme, splits the inputs of o and down among the ranks of
tensor parallelism, and casts scales to the serving dtype. All of that can be had without rounding anything: the fewer
bits of fused neighbours widen to the most, coarser groups repeat their scales, and a symmetric layer beside an
asymmetric one writes its zero points down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dq_runtime.errors import SpecError
from dq_runtime.export.base import Progress, dense_linears, dense_tensors, model_config
from dq_runtime.export.engines import fused_groups, input_shards
from dq_runtime.export.exact import cast, regroup, require_int, widen, with_zeros
from dq_runtime.levels import INT
from dq_runtime.packing import PackedWeight
from dq_runtime.packing.checkpoint import Checkpoint, packed_tensors, write_json, write_weights
from dq_runtime.packing.float4 import shared_shift
from dq_runtime.packing.quant_config import FLOAT_FORMATS, Scheme, to_config
from dq_runtime.spec import PER_ROW, options_from

GROUPS = (128, 64, 32, 16)


@dataclass(frozen=True)
class Options:
    """``dtype`` is the serving dtype ("": the checkpoint's own); ``tensor_parallel`` the number of ranks that groups
    must not straddle."""

    dtype: str = ""
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in ("", "bfloat16", "float16"):
            raise SpecError(f"dtype must be bfloat16 or float16, got {self.dtype!r}")
        if self.tensor_parallel < 1:
            raise SpecError(f"tensor_parallel must be at least 1, got {self.tensor_parallel}")


class ToCompressedTensors:
    """The checkpoint as ``dq quantize`` writes it, with one scheme for every set of fused layers."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options_from(Options, "export format 'compressed-tensors'", options)

    def write(self, source: Checkpoint, directory: Path, show: Progress) -> list[str]:
        config = model_config(source)
        name = self.options.dtype or str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
        dtype: torch.dtype = getattr(torch, name)
        if dtype not in (torch.bfloat16, torch.float16):
            raise SpecError(f"the checkpoint is served in {name}; choose --set dtype=bfloat16 or dtype=float16")
        remedy = f"choose the other dtype than {name}, or keep the checkpoint as it is"
        tensors = {
            n: cast(t, dtype, n, remedy) if t.is_floating_point() else t for n, t in dense_tensors(source).items()
        }
        changed = 0
        schemes: dict[str, Scheme] = {}
        stored = dict(source.packed())
        for layer, w in stored.items():
            if w.form not in FLOAT_FORMATS:
                require_int(layer, w, "compressed-tensors")
        shift = shared_shift(stored.values())
        done = 0
        for members in fused_groups(list(stored)):
            for layer, w in _shared({m: stored[m] for m in members}, self.options.tensor_parallel).items():
                changed += w is not stored[layer]
                if w.form == INT:  # block formats have scales of a dtype of their own
                    w = replace(w, scale=cast(w.scale, dtype, f"the scale of {layer}", remedy))
                tensors |= packed_tensors(layer, w, shift)
                group = PER_ROW if w.group_size == w.k else w.group_size
                schemes[layer] = Scheme(w.bits, group, w.zero is None, w.form)
                done += 1
                show(done, len(stored))
        ignore = dense_linears(source) + (["lm_head"] if "lm_head" not in schemes else [])
        write_weights(directory, tensors)
        stored_as = to_config(schemes, ignore)
        write_json(directory / "config.json", config | {"dtype": name, "quantization_config": stored_as})
        notes = [f"codes decode to the values of the checkpoint, bit for bit; scales and the rest are {name}"]
        if changed:
            notes.append(f"{changed} layers were given wider codes, finer groups or zero points to share a scheme")
        return notes


def _shared(layers: Mapping[str, PackedWeight], ranks: int) -> dict[str, PackedWeight]:
    """The layers of one fused matrix at the bits, groups and symmetry that all of them can take exactly."""
    first = next(iter(layers.values()))
    symmetric = all(w.zero is None for w in layers.values())
    bits = max(w.bits for w in layers.values())
    shard = first.k // ranks if all(input_shards(name) for name in layers) else first.k
    whole = all(w.group_size == w.k for w in layers.values())
    sizes = {w.group_size for w in layers.values()}
    group = min(sizes)
    if first.form != INT:
        if shard % group or len({w.form for w in layers.values()}) > 1:
            raise SpecError(
                f"{' and '.join(layers)} have {first.k} inputs, whose groups of {group} cannot be shared by {ranks} "
                "ranks; serve with fewer"
            )
        return dict(layers)
    if not whole or shard != first.k:
        fits = [g for g in (group, *GROUPS) if shard % g == 0 and all(size % g == 0 for size in sizes)]
        if not fits:
            raise SpecError(
                f"{' and '.join(layers)} have {first.k} inputs in groups of {sorted(sizes)}, which no group size "
                f"divides over {ranks} ranks; serve with fewer"
            )
        group = fits[0]
    made = {}
    for name, w in layers.items():
        fitted = widen(regroup(w, group), bits)
        made[name] = fitted if symmetric or fitted.zero is not None else with_zeros(fitted)
    return made
