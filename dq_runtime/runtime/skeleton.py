"""Run an architecture that our decoder does not know: transformers' model without weights, packed linears put in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dq_runtime.errors import CheckpointError
from dq_runtime.modules.quant_experts import QuantExperts, model_name, place_experts
from dq_runtime.modules.quant_linear import QuantLinear
from dq_runtime.modules.surgery import bias_of, linears, replace_module, tied_names, weight_of
from dq_runtime.packing.checkpoint import Checkpoint
from dq_runtime.packing.quant_config import FOREIGN_PREFIX
from dq_runtime.runtime.tokenizer import load_tokenizer
from dq_runtime.runtime.transformers_model import TransformersModel


def load_through_transformers(checkpoint: Checkpoint, device: str, dtype: torch.dtype) -> TransformersModel:
    """The checkpoint as a transformers model on ``device`` whose packed linears are :class:`QuantLinear`,
    and whose packed experts :class:`QuantExperts`."""
    model = skeleton(checkpoint)
    _fill(model, checkpoint, dtype)
    read_generation_config(model, checkpoint.path)
    model.eval().to(device)
    for module in model.modules():
        if isinstance(module, QuantLinear | QuantExperts):
            module.prepare(dtype)
    return TransformersModel(model, load_tokenizer(checkpoint.path), str(checkpoint.path))


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters registered inside take no memory; buffers (rotary tables) are computed as usual."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def skeleton(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Any:
    """The transformers model that ``checkpoint``'s config describes, its parameters on the meta device; ``dtype``: its
    own by default."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = dict(checkpoint.config)
    config.pop("quantization_config", None)
    config["model_type"] = str(config.get("model_type", "")).removeprefix(FOREIGN_PREFIX)
    try:
        built = AutoConfig.for_model(**config)
        with parameters_on_meta():
            return AutoModelForCausalLM.from_config(built, **({} if dtype is None else {"dtype": dtype}))
    except Exception as e:  # transformers raises many types for a config it does not understand
        why = " ".join(str(e).split())[:300]
        raise CheckpointError(f"{checkpoint.path / 'config.json'} does not describe a causal LM: {why}") from None


def _fill(model: Any, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Check every name and shape against the model, then put the tensors in place."""
    where = checkpoint.path
    packed = dict(checkpoint.packed())
    names = dict(model.named_modules())
    dense_names = {stored: model_name(stored, names) for stored in checkpoint.dense}
    place_experts(model, packed, str(where))
    modules = linears(model)
    for name, weight in packed.items():
        if name not in modules:
            raise CheckpointError(f"{where}: {name} is packed, but the model has no linear of that name")
        expected = list(weight_of(modules[name]).shape)
        if expected != [weight.n, weight.k]:
            raise CheckpointError(f"{where}: {name} is {[weight.n, weight.k]}, but the model wants {expected}")
    wanted = {n: p for n, p in model.state_dict(keep_vars=True).items() if n.rpartition(".")[0] not in packed}
    wanted |= {f"{n}.bias": b for n in packed if (b := bias_of(modules[n])) is not None}
    tied = tied_names(model)
    missing = sorted(set(wanted) - set(dense_names.values()) - tied)
    unknown = sorted(set(dense_names.values()) - set(wanted))
    if missing or unknown:
        problem = f"{missing[0]} is missing" if missing else f"{unknown[0]} is not part of the model"
        raise CheckpointError(f"{where}: {problem}")
    dense: dict[str, Tensor] = {}
    for stored, tensor in checkpoint.read(list(dense_names)):
        name = dense_names[stored]
        if tensor.shape != wanted[name].shape:
            expected = list(wanted[name].shape)
            raise CheckpointError(f"{where}: {name} is {list(tensor.shape)}, but the model wants {expected}")
        if tensor.is_floating_point() != wanted[name].is_floating_point():
            raise CheckpointError(f"{where}: {name} is {tensor.dtype}, but the model wants {wanted[name].dtype}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{where}: {name} holds NaN or infinity")
        dense[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor

    for name, weight in packed.items():
        replace_module(model, name, QuantLinear(weight, dense.pop(f"{name}.bias", None)))
    for name, tensor in dense.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[leaf] = tensor
    model.tie_weights()
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise CheckpointError(f"{where}: {name} is missing")


def read_generation_config(model: Any, path: Path) -> None:
    """End tokens beyond the config's own: chat models list several there."""
    if not (path / "generation_config.json").exists():
        return
    from transformers import GenerationConfig

    try:
        model.generation_config = GenerationConfig.from_pretrained(path)
    except Exception as e:
        raise CheckpointError(f"{path / 'generation_config.json'} could not be read: {e}") from None
