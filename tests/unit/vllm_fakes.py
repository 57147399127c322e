"""What our plugin uses of vLLM 0.33, as small as it can be: modules to stand in sys.modules, and linears whose loaders
cut tensors as vLLM's do. ``benchmarks/interop.py`` asks the real one (rows ``table nf4`` and ``table fp4``)."""

from __future__ import annotations

from abc import ABC
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


class QuantizationConfig(ABC):  # noqa: B024 (vLLM's has abstract methods; ours are called by the tests)
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


class LinearMethodBase(ABC):  # noqa: B024
    pass


class UnquantizedLinearMethod(LinearMethodBase):
    pass


class LinearBase(nn.Module):
    """One rank's part of a linear: ``sizes`` rows of each member over all ranks, cut along N, or along K (``row``)."""

    def __init__(
        self, config: Any, name: str, k: int, sizes: list[int], rank: int = 0, ranks: int = 1, row: bool = False
    ) -> None:
        super().__init__()
        self.rank, self.row = rank, row
        self.parts = sizes if row else [size // ranks for size in sizes]
        self.quant_method = config.get_quant_method(self, name)
        if isinstance(self.quant_method, UnquantizedLinearMethod):
            return
        inputs = k // ranks if row else k
        self.quant_method.create_weights(
            self, inputs, self.parts, k, sum(sizes), torch.float32, weight_loader=self.load
        )

    def load(self, parameter: nn.Parameter, loaded: Tensor, member: int = 0) -> None:
        """Member ``member`` of the matrix: its rows on this rank, or (``row``) its columns."""
        place = parameter.data
        across = getattr(parameter, "input_dim" if self.row else "output_dim", None)
        if across is not None:
            if not self.row:
                place = place.narrow(across, sum(self.parts[:member]), self.parts[member])
            loaded = loaded.narrow(across, self.rank * place.shape[across], place.shape[across])
        assert place.shape == loaded.shape
        place.copy_(loaded)

    def load_all(self, members: list[dict[str, Tensor]]) -> None:
        """The stored tensors of every member, by their last name."""
        parameters = dict(self.named_parameters())
        for number, tensors in enumerate(members):
            for name, tensor in tensors.items():
                parameters[name].weight_loader(parameters[name], tensor, number)
        self.quant_method.process_weights_after_loading(self)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out: Tensor = self.quant_method.apply(self, x, bias)
        return out


class ParallelLMHead(nn.Module):
    pass


REGISTERED: dict[str, type] = {}


def register_quantization_config(name: str) -> Any:
    def register(cls: type) -> type:
        REGISTERED[name] = cls
        return cls

    return register


def set_weight_attrs(parameter: Tensor, attributes: dict[str, Any]) -> None:
    for key, value in attributes.items():
        setattr(parameter, key, value)


_LAYERS = "vllm.model_executor.layers"
_NAMES: dict[str, dict[str, Any]] = {
    "vllm": {},
    "vllm.model_executor": {},
    "vllm.model_executor.utils": {"set_weight_attrs": set_weight_attrs},
    _LAYERS: {},
    f"{_LAYERS}.linear": {
        "LinearBase": LinearBase,
        "LinearMethodBase": LinearMethodBase,
        "UnquantizedLinearMethod": UnquantizedLinearMethod,
    },
    f"{_LAYERS}.quantization": {"register_quantization_config": register_quantization_config},
    f"{_LAYERS}.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
    f"{_LAYERS}.vocab_parallel_embedding": {"ParallelLMHead": ParallelLMHead},
}


def modules() -> dict[str, ModuleType]:
    """For sys.modules."""
    made = {}
    for name, members in _NAMES.items():
        made[name] = ModuleType(name)
        vars(made[name]).update(members)
    return made
