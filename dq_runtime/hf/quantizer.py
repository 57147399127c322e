"""The quantizer that transformers asks for a packed checkpoint: for those of ``quant_method: dq`` always, for those of
compressed-tensors once :func:`use_packed_linears` was called.

transformers' own (through the compressed-tensors library) expands every weight at the first forward pass, and does not
load asymmetric ones packed. This one puts :class:`PackedLinear` in their place before anything is loaded: the model
then runs on our kernels in ``generate``, pipelines and PEFT, and saves itself as the checkpoint it came from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dq_runtime.errors import CheckpointError
from dq_runtime.hf.linear import StoredLinear
from dq_runtime.hf.model_types import register_model_types
from dq_runtime.modules.surgery import linears, replace_module
from dq_runtime.packing.host import INFINITY_BITS, words_per_row
from dq_runtime.packing.quant_config import OWN_METHOD, Scheme, Targets, from_config, orders_columns
from dq_runtime.packing.readers.compressed_tensors import SUFFIXES, stored_layer, verify_names
from dq_runtime.packing.tensor_file import TensorFile

METHOD = "compressed-tensors"


class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc] # transformers is not typed
    """``quantization_config`` of config.json as it stands there; transformers' own class for it needs the
    compressed-tensors library."""

    def __init__(self, **stated: Any) -> None:
        self.stated = {key: value for key, value in stated.items() if key != "quant_method"}
        self.quant_method = stated.get("quant_method", METHOD)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As transformers calls it; ``kwargs`` of from_pretrained mean nothing here."""
        return (cls(**config_dict), kwargs) if return_unused_kwargs else cls(**config_dict)

    def to_dict(self) -> dict[str, Any]:
        """What :meth:`from_dict` was given."""
        return {"quant_method": self.quant_method, **self.stated}


class PackedQuantizer(HfQuantizer):  # type: ignore[misc] # transformers is not typed
    """Loads compressed-tensors ``pack-quantized``, ``mxfp4-`` and ``nvfp4-pack-quantized`` checkpoints, and our own of
    tables, packed. Raises :class:`CheckpointError` for what is not such a checkpoint, or does not fit the model."""

    requires_calibration = True

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        stated = quantization_config.to_dict()
        self._schemes, self._ordered = from_config(stated, "quantization_config"), orders_columns(stated)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        modules = linears(model)
        targets = Targets(self._schemes, "quantization_config")
        files = [TensorFile(Path(file)) for file in kwargs["checkpoint_files"]]
        stored = {name: file for file in files for name in file.names()}
        for name in stored:
            layer, _, kind = name.rpartition(".")
            if kind == "weight_packed":
                verify_names(layer, targets.match(layer), self._ordered, stored, stored[name].path)
                _place(model, modules, layer, targets.match(layer), stored)

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


def _place(model: Any, modules: dict[str, nn.Module], layer: str, scheme: Scheme, files: dict[str, TensorFile]) -> None:
    """A :class:`StoredLinear` where the model has the linear of that name, of what ``files`` (tensor name -> its file)
    hold."""
    file = files[f"{layer}.weight_packed"].path
    old = modules.get(layer)
    if not isinstance(old, nn.Linear):
        raise CheckpointError(
            f"{file}: {layer} is packed, but transformers' model has no linear of that name (experts and transposed "
            "linears run through dq_runtime.load)"
        )
    found = stored_layer(layer, scheme, files, file)
    n, k = old.weight.shape
    if [found.n, found.k] != [n, k]:
        raise CheckpointError(f"{file}: {layer} is {[found.n, found.k]}, but the model wants {[n, k]}")
    tensors = {s: files[f"{layer}.{s}"].tensor(f"{layer}.{s}") for s in SUFFIXES if f"{layer}.{s}" in files}
    scale, why = tensors["weight_scale"], found.reason()
    if why is None and tensors["weight_packed"].dtype == "int32":
        if scale.dtype not in INFINITY_BITS:
            why = f"its scales are stored as {scale.dtype}"
        elif tensors["weight_packed"].shape != [n, words_per_row(k, scheme.bits)]:
            why = "its words are those of compressed-tensors before 0.18"
        elif not scale.is_finite():
            raise CheckpointError(f"{file}: {layer}.weight_scale holds NaN or infinity")
    if why is not None:
        raise CheckpointError(
            f"{file}: {layer} cannot stay packed as it is in transformers ({why}); run it through dq_runtime.load"
        )
    replace_module(model, layer, StoredLinear(k, scheme, tensors, old.bias))


def use_packed_linears() -> None:
    """From now on ``from_pretrained`` of a packed checkpoint, in this process, gives a model whose linears stay packed
    and run on our kernels. Calling it again changes nothing."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = PackedConfig
    AUTO_QUANTIZER_MAPPING[METHOD] = PackedQuantizer


register_quantization_config(OWN_METHOD)(PackedConfig)
register_quantizer(OWN_METHOD)(PackedQuantizer)
register_model_types()
