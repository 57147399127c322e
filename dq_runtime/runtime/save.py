"""Write a rounded model as a checkpoint directory that carries everything needed to use it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dq_runtime.errors import SpecError
from dq_runtime.modules.surgery import tied_names
from dq_runtime.packing import PackedWeight
from dq_runtime.packing.checkpoint import packed_tensors, write_json, write_weights
from dq_runtime.packing.float4 import shared_shift
from dq_runtime.packing.quant_config import FOREIGN_PREFIX, is_standard, scheme_of, to_config
from dq_runtime.ranks import whole
from dq_runtime.runtime.transformers_model import TransformersModel
from dq_runtime.spec import GridSpec

CARRIED = ("LICENSE*", "NOTICE*", "USE_POLICY*", "COPYING*")


def write_model(
    directory: Path,
    source: TransformersModel,
    packed: Mapping[str, PackedWeight],
    grids: Mapping[str, GridSpec],
    transposed: bool,
    dtype: torch.dtype,
    dense: Mapping[str, Tensor] | None = None,
) -> None:
    """Weights, config, tokenizer, chat template, generation config and licence files into ``directory``.

    ``source.model`` still holds the unquantized tensors; those of the packed layers are skipped. ``dtype`` is the
    serving dtype of everything unquantized; ``dense``: what :func:`dense_tensors` gave, where several processes had to
    gather it. ``transposed``: some packed layer is a Conv1D.
    """
    write_settings(directory, source, grids, transposed, dtype)
    tensors: dict[str, Tensor] = {}
    shift = shared_shift(packed.values())
    for name, weight in packed.items():
        tensors |= packed_tensors(name, weight, shift)
    kept = dense_tensors(source.model, packed) if dense is None else dense
    tensors |= {name: served(name, tensor, dtype) for name, tensor in kept.items()}
    write_weights(directory, tensors)


def write_settings(
    directory: Path, source: TransformersModel, grids: Mapping[str, GridSpec], transposed: bool, dtype: torch.dtype
) -> None:
    """All but the weights. What compressed-tensors readers cannot serve, a Conv1D (which they would leave randomly
    initialised) or a table they have no name for, gets a model type that makes them fail instead."""
    model = source.model
    config = json.loads(model.config.to_json_string(use_diff=False))
    for key in ("_name_or_path", "quantization_config", "torch_dtype"):
        config.pop(key, None)
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(dtype).removeprefix("torch.")
    dense_linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    schemes = {name: scheme_of(grid) for name, grid in grids.items()}
    config["quantization_config"] = to_config(schemes, dense_linears, transposed)
    if transposed or not is_standard(schemes):
        config["model_type"] = FOREIGN_PREFIX + config["model_type"]
    write_json(directory / "config.json", config)
    if source.tokenizer is not None:
        try:
            source.tokenizer.save_pretrained(directory)
        except Exception as e:  # how the tokenizers library, written in Rust, reports a full disk
            raise OSError(None, f"the tokenizer: {e}") from e
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)
    origin = Path(source.path)
    for pattern in CARRIED if origin.is_dir() else ():
        for file in origin.glob(pattern):
            shutil.copy(file, directory / file.name)


def dense_tensors(model: Any, packed: Container[str]) -> dict[str, Tensor]:
    """The unquantized tensors by name; what several processes share out is gathered."""
    state = model.state_dict()
    return {name: whole(state[name]) for name in dense_names(model, packed)}


def served(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """An unquantized tensor as it is stored; :class:`SpecError` where it does not fit in the serving dtype."""
    stored = tensor.to(dtype) if tensor.is_floating_point() else tensor
    if stored.is_floating_point() and not bool(torch.isfinite(stored).all()):
        raise SpecError(f"{name} does not fit in {str(dtype).removeprefix('torch.')}; use scale dtype bfloat16")
    return stored


def dense_names(model: Any, packed: Container[str]) -> list[str]:
    """The names of the unquantized tensors, without those tied to another one; biases of packed layers included."""
    tied = tied_names(model)
    return [
        name
        for name in model.state_dict()
        if name not in tied and (name.rpartition(".")[0] not in packed or name.endswith(".bias"))
    ]
