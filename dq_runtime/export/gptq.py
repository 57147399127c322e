"""GPTQ (AutoGPTQ, GPTQModel), version 2 and 1: what vLLM, SGLang, transformers with gptqmodel and ExLlamaV2 read.

Per linear: ``qweight`` int32 [K*b/32, N], the codes as one dense little-endian bitstream down each column; ``qzeros``
int32 [G, N*b/32], zero points packed likewise along N; ``scales`` float16 [G, N]; ``g_idx`` int32 [K], the group of
each input. Version 1 stores zero - 1, whose readers add 1 to whole words: a zero point of 0 would carry into its
neighbour, so it exists in version 2 only.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dq_runtime.errors import SpecError
from dq_runtime.export.base import QUANTIZER, Progress, dense_linears, dense_tensors, model_config
from dq_runtime.export.exact import cast, refit, zeros_of
from dq_runtime.packing import PackedWeight, pack_codes
from dq_runtime.packing.checkpoint import Checkpoint, write_json, write_weights
from dq_runtime.spec import PER_ROW, options_from

BITS = (2, 3, 4, 8)
GROUPS = (16, 32, 64, 128, 256, 512, 1024, PER_ROW)
Grid = tuple[int, int, bool]  # bits, group size, symmetric


@dataclass(frozen=True)
class Options:
    """``version`` of the format: 2 stores zero points as they are, 1 one less, as AutoGPTQ did."""

    version: int = 2

    def __post_init__(self) -> None:
        if self.version not in (1, 2):
            raise SpecError(f"version of the GPTQ format must be 1 or 2, got {self.version}")


def gptq_tensors(name: str, w: PackedWeight, version: int) -> dict[str, Tensor]:
    """The four tensors of one linear, by name. Raises :class:`SpecError` where GPTQ cannot hold a value."""
    if w.k * w.bits % 32 or w.n * w.bits % 32:
        raise SpecError(
            f"gptq packs {32 // w.bits if 32 % w.bits == 0 else 32} codes at a time, and {name} is {w.n} x {w.k}; "
            f"leave it dense with --override '{name}=dense'"
        )
    zeros = zeros_of(w)
    if version == 1:
        if bool((zeros == 0).any()):
            raise SpecError(
                f"{name} has zero points of 0, which version 1 of the GPTQ format cannot store; export with "
                "--set version=2"
            )
        zeros = zeros - 1
    remedy = "quantize with --scale-dtype float16"
    return {
        f"{name}.qweight": w.packed.t().contiguous(),
        f"{name}.qzeros": pack_codes(zeros.t().contiguous(), w.bits),
        f"{name}.scales": cast(w.scale, torch.float16, f"the scale of {name}", remedy).t().contiguous(),
        f"{name}.g_idx": torch.arange(w.k, dtype=torch.int32) // w.group_size,
    }


class ToGPTQ:
    """``qweight, qzeros, scales, g_idx`` per linear, ``quantize_config.json`` and config.json's quantization_config.
    Layers that differ from the most frequent grid, and linears left dense, stand under ``dynamic``."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options_from(Options, "export format 'gptq'", options)

    def write(self, source: Checkpoint, directory: Path, show: Progress) -> list[str]:
        notes = ["codes, zero points and scales are those of the checkpoint, bit for bit"]
        grids, widened = write_gptq(source, directory, self.options.version, BITS, GROUPS, show)
        if widened:
            notes.append(f"{widened} layers of 5 to 7 bits take 8, the next width that GPTQ has")
        if any(bits not in (4, 8) or not symmetric for bits, _, symmetric in grids):
            notes.append(
                "vLLM and SGLang read GPTQ at 4 and 8 bits, symmetric, only; transformers with gptqmodel reads all"
            )
        return notes


def write_gptq(
    source: Checkpoint, directory: Path, version: int, bits: Sequence[int], groups: Sequence[int], show: Progress
) -> tuple[list[Grid], int]:
    """Weights and both configs, each layer at the fewest of ``bits`` and largest of ``groups`` that hold it: (the grid
    of every layer, how many have more bits than before)."""
    config = model_config(source)
    tensors = dense_tensors(source)
    grids: dict[str, Grid] = {}
    widened = 0
    for i, (name, stored) in enumerate(source.packed(), 1):
        w = refit(name, stored, bits, groups, "gptq")
        widened += w.bits > stored.bits
        tensors |= gptq_tensors(name, w, version)
        group = PER_ROW if w.group_size == w.k and PER_ROW in groups else w.group_size
        grids[name] = (w.bits, group, w.zero is None)
        show(i, len(source.layers))
    settings = _settings(grids, dense_linears(source), version)
    write_weights(directory, tensors)
    write_json(directory / "quantize_config.json", settings)
    write_json(directory / "config.json", config | {"quantization_config": {"quant_method": "gptq"} | settings})
    return list(grids.values()), widened


def _settings(grids: Mapping[str, Grid], dense: list[str], version: int) -> dict[str, Any]:
    usual = Counter(grids.values()).most_common(1)[0][0]
    dynamic: dict[str, dict[str, Any]] = {f"-:{_pattern(name)}": {} for name in dense}
    for name, (bits, group, symmetric) in grids.items():
        if (bits, group, symmetric) != usual:
            dynamic[f"+:{_pattern(name)}"] = {"bits": bits, "group_size": group, "sym": symmetric}
    return {
        "bits": usual[0],
        "group_size": usual[1],
        "sym": usual[2],
        "desc_act": False,
        "lm_head": "lm_head" in grids,
        "checkpoint_format": "gptq_v2" if version == 2 else "gptq",
        "pack_dtype": "int32",
        "dynamic": dynamic or None,
        "meta": {"quantizer": [QUANTIZER]},
    }


def _pattern(name: str) -> str:
    """Matches a layer, and the tensors of it, which is what onnxruntime-genai's builder matches."""
    return rf"^{re.escape(name)}(\.|$)"
