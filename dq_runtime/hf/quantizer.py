"""The quantizer that transformers asks for a packed checkpoint once :func:`use_packed_linears` was called.

transformers' own (through the compressed-tensors library) expands every weight at the first forward pass, and does not
load asymmetric ones packed. This one puts :class:`PackedLinear` in their place before anything is loaded: the model
then runs on our kernels in ``generate``, pipelines and PEFT, and saves itself as the checkpoint it came from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dq_runtime.errors import CheckpointError
from dq_runtime.hf.linear import StoredLinear
from dq_runtime.levels import INT
from dq_runtime.modules.surgery import linears, replace_module
from dq_runtime.packing.host import words_per_row
from dq_runtime.packing.quant_config import Scheme, Targets, from_config
from dq_runtime.packing.tensor_file import TensorFile

METHOD = "compressed-tensors"


class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc] # transformers is not typed
    """``quantization_config`` of config.json as it stands there; transformers' own class for it needs the
    compressed-tensors library."""

    def __init__(self, **stated: Any) -> None:
        self.stated = {key: value for key, value in stated.items() if key != "quant_method"}
        self.quant_method = METHOD

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As transformers calls it; ``kwargs`` of from_pretrained mean nothing here."""
        return (cls(**config_dict), kwargs) if return_unused_kwargs else cls(**config_dict)

    def to_dict(self) -> dict[str, Any]:
        """What :meth:`from_dict` was given."""
        return {"quant_method": METHOD, **self.stated}


class PackedQuantizer(HfQuantizer):  # type: ignore[misc] # transformers is not typed
    """Loads compressed-tensors ``pack-quantized`` checkpoints packed. Raises :class:`CheckpointError` for what is not
    such a checkpoint, or does not fit the model."""

    requires_calibration = True

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._schemes = from_config(quantization_config.to_dict(), "quantization_config")
        forms = {scheme.form for scheme in self._schemes.values()} - {INT}
        if forms:
            raise CheckpointError(
                f"packed linears in transformers hold integer grids only, not {min(forms)}; run it through "
                "dq_runtime.load, or do not call use_packed_linears()"
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        modules = linears(model)
        targets = Targets(self._schemes, "quantization_config")
        for file in kwargs["checkpoint_files"]:
            stored = TensorFile(Path(file))
            for name in stored.names():
                layer, _, kind = name.rpartition(".")
                if kind == "weight_packed":
                    _place(model, modules, layer, targets.match(layer), stored, file)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for name, module in list(model.named_modules()):
            if isinstance(module, StoredLinear):
                replace_module(model, name, module.packed_linear())

    def is_serializable(self) -> bool:
        """``save_pretrained`` writes the packed tensors back."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes and scales are fixed, but gradients pass through to adapters."""
        return True


def _place(
    model: Any, modules: dict[str, nn.Module], layer: str, scheme: Scheme, stored: TensorFile, file: str
) -> None:
    """A :class:`StoredLinear` where the model has the linear of that name, of the shapes in the file's header."""
    old = modules.get(layer)
    if not isinstance(old, nn.Linear):
        raise CheckpointError(
            f"{file}: {layer} is packed, but transformers' model has no linear of that name (experts and transposed "
            "linears run through dq_runtime.load)"
        )
    n, k = old.weight.shape
    packed, scale = stored.tensor(f"{layer}.weight_packed"), stored.tensor(f"{layer}.weight_scale")
    if packed.shape != [n, words_per_row(k, scheme.bits)]:
        raise CheckpointError(
            f"{file}: {layer}.weight_packed is {packed.shape}, but {scheme.bits} bits of the model's {[n, k]} are "
            f"{[n, words_per_row(k, scheme.bits)]}"
        )
    if not scale.is_finite():
        raise CheckpointError(f"{file}: {layer}.weight_scale holds NaN or infinity")
    bias = old.bias
    replace_module(model, layer, StoredLinear(n, k, scheme, getattr(torch, scale.dtype), bias))


def use_packed_linears() -> None:
    """From now on ``from_pretrained`` of a packed checkpoint, in this process, gives a model whose linears stay packed
    and run on our kernels. Calling it again changes nothing."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = PackedConfig
    AUTO_QUANTIZER_MAPPING[METHOD] = PackedQuantizer
