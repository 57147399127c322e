"""A model as its config describes it: the shapes of its layers, and not one weight.

The model is built by transformers on the meta device, where a tensor is a shape and a dtype; which of its layers are
quantized, and on which grid, is asked of the same code that quantizes (``preflight.plan``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dq_runtime.errors import DQError
from dq_runtime.modules.surgery import linears, weight_of
from dq_runtime.packing.readers.gguf import gguf_file
from dq_runtime.packing.readers.gguf_model import read_model
from dq_runtime.preflight import plan
from dq_runtime.spec import GridSpec, QuantSpec

_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class LayerShape:
    """One quantized linear [n, k] with ``groups`` scales a row; ``block`` it is part of, "" for none."""

    name: str
    n: int
    k: int
    bits: int
    groups: int
    symmetric: bool
    block: str

    @property
    def weights(self) -> int:
        return self.n * self.k

    @property
    def scales(self) -> int:
        return self.n * self.groups


@dataclass(frozen=True)
class ModelShape:
    """``layers``: what is quantized; ``dense``: parameters that are not (``largest_dense`` of them in one tensor);
    ``stored_dtype``: of the weights on disk, "" for a GGUF; ``context`` 0 where the config states none."""

    name: str
    layers: tuple[LayerShape, ...]
    dense: int
    largest_dense: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    blocks: int
    context: int
    stored_dtype: str

    @property
    def weights(self) -> int:
        """Quantized weights."""
        return sum(layer.weights for layer in self.layers)

    @property
    def scales(self) -> int:
        return sum(layer.scales for layer in self.layers)

    @property
    def parameters(self) -> int:
        return self.weights + self.dense

    @property
    def largest(self) -> int:
        """Weights of the largest quantized layer."""
        return max(layer.weights for layer in self.layers)

    @property
    def largest_block(self) -> int:
        """Quantized weights of the largest block (a layer outside of all blocks is one of its own)."""
        sums: dict[str, int] = {}
        for layer in self.layers:
            key = layer.block or layer.name
            sums[key] = sums.get(key, 0) + layer.weights
        return max(sums.values())

    @property
    def stored_size(self) -> int:
        """Bytes of a parameter on disk; 1 of a GGUF, whose blocks are smaller than that on average."""
        return _SIZE.get(self.stored_dtype, 1 if not self.stored_dtype else 4)


def model_shape(source: str, spec: QuantSpec) -> ModelShape:
    """Of a config.json, a model directory, a GGUF file or a hub name whose config is in the cache; raises
    :class:`DQError` for anything else, and for what ``dq quantize`` would refuse of the grid."""
    config = _config(source)
    if config.pop("quantization_config", None) is not None:
        raise DQError(f"{source} is already quantized; give the original model")
    model = _on_meta(source, config)
    modules = linears(model)
    stored = "" if source.endswith(".gguf") else str(config.get("dtype") or config.get("torch_dtype") or "")
    return shape_of(model, modules, plan(modules, spec), stored)


def shape_of(
    model: Any, modules: Mapping[str, Any], grids: Mapping[str, GridSpec], stored_dtype: str = "float32"
) -> ModelShape:
    """Of a transformers model whose ``modules`` of ``grids`` are still its own linears."""
    layers = []
    for name, grid in grids.items():
        n, k = weight_of(modules[name]).shape
        found = re.match(r"(.+?\.\d+)\.", name)  # model.layers.7. in model.layers.7.mlp.up_proj
        block = found.group(1) if found else ""
        layers.append(LayerShape(name, n, k, grid.bits, grid.groups(k), grid.symmetric, block))
    quantized = {id(modules[name].weight) for name in grids}
    dense = [p.numel() for p in model.parameters() if id(p) not in quantized]
    text = model.config.get_text_config()
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    hidden = int(embedding.shape[1])
    heads = int(getattr(text, "num_attention_heads", None) or 1)  # a state-space model has none
    return ModelShape(
        name=type(model).__name__,
        layers=tuple(layers),
        dense=sum(dense),
        largest_dense=max(dense, default=0),
        hidden=hidden,
        intermediate=int(getattr(text, "intermediate_size", None) or 4 * hidden),
        heads=heads,
        kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(text, "head_dim", None) or hidden // heads),
        vocab=int(embedding.shape[0]),
        tied=head is not None and head.weight is embedding,
        blocks=len({layer.block for layer in layers if layer.block}),
        context=int(getattr(text, "max_position_embeddings", None) or 0),
        stored_dtype=stored_dtype,
    )


def _config(source: str) -> dict[str, Any]:
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise DQError(f"{source} does not exist")
        model = read_model(gguf_file(path))
        if isinstance(model, str):
            raise DQError(f"{source} cannot be planned from its metadata: {model}; give the original's config.json")
        return dict(model.config)
    if path.is_dir():
        path = path / "config.json"
    elif not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(source, "config.json")
        if not isinstance(cached, str):
            raise DQError(f"the config of {source} is not in the hub's cache; download its config.json and give that")
        path = Path(cached)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DQError(
            f"{path} does not exist; give a config.json, a model directory, a .gguf file or a hub name"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise DQError(f"{path} is not valid JSON; restore it from the original model") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise DQError(f"{path} is no config of a model: it has no model_type")
    return config


def _on_meta(source: str, config: dict[str, Any]) -> Any:
    """The model without memory for weights."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        built = AutoConfig.for_model(**config)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(built)
    except Exception as e:  # transformers raises many types for a config it does not understand
        why = " ".join(str(e).split())[:300]
        raise DQError(f"{source} does not describe a causal LM: {why}") from None
