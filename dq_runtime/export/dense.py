"""Dense safetensors: every weight multiplied out, for engines that know no packed weights at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dq_runtime.errors import SpecError
from dq_runtime.export.base import Progress, dense_tensors, model_config
from dq_runtime.export.exact import held_by
from dq_runtime.packing.checkpoint import Checkpoint, write_json, write_weights
from dq_runtime.spec import options_from

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Options:
    """``dtype`` float32 is exact: a 16-bit scale times a code of at most 8 bits has at most 19 significant bits. The
    16-bit dtypes round most products, so they are used only where they are asked for."""

    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise SpecError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")


class ToDense:
    """``model.safetensors`` with ``weight`` [N, K] for every linear, and config.json without quantization_config."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options_from(Options, "export format 'dense'", options)

    def write(self, source: Checkpoint, directory: Path, show: Progress) -> list[str]:
        dtype: torch.dtype = getattr(torch, self.options.dtype)
        config = model_config(source) | {"dtype": self.options.dtype}
        tensors = {}
        rounded = 0
        for name, tensor in dense_tensors(source).items():
            if tensor.is_floating_point():
                rounded += not held_by(tensor, dtype)
                tensor = tensor.to(dtype)
            tensors[name] = tensor
        for i, (name, w) in enumerate(source.packed(), 1):
            exact = w.decode()
            tensors[f"{name}.weight"] = exact.to(dtype)
            rounded += not held_by(exact, dtype)
            show(i, len(source.layers))
        write_weights(directory, tensors)
        write_json(directory / "config.json", config)
        if not rounded:
            return [f"every value is exact in {self.options.dtype}"]
        return [f"{rounded} tensors hold values that were rounded to {self.options.dtype}, as asked; float32 is exact"]
