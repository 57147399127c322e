"""Find the linears of a model and put others in their place. Knows nn.Linear and GPT-2's transposed Conv1D."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's ``Conv1D``: a linear that stores its weight as [K, N]. By name, so that transformers is not imported."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every nn.Linear and Conv1D by qualified name, in model order. A weight shared with an embedding is left out:
    quantizing a tied ``lm_head`` would quantize the input embedding too."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or is_conv1d(module)) and id(module.weight) not in embeddings
    }


def weight_of(module: nn.Module) -> Tensor:
    """The weight as [N, K], whichever way the module stores it."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.t() if is_conv1d(module) else weight


def bias_of(module: nn.Module) -> Tensor | None:
    bias = module.bias
    assert bias is None or isinstance(bias, Tensor)
    return bias


def tied_to(model: Any) -> dict[str, str]:
    """Of a transformers model's tensors that are another tensor under a second name: that other's name."""
    if not model.config.get_text_config().tie_word_embeddings:
        return {}
    return dict(model.all_tied_weights_keys)


def tied_names(model: Any) -> set[str]:
    """Names of a transformers model's tensors that are another tensor under a second name: not stored, not missing."""
    return set(tied_to(model))


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` where the module called ``name`` is."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
