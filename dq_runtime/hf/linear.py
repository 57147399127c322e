"""The packed linear inside a transformers model: a :class:`QuantLinear` whose state dict is the checkpoint's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dq_runtime.modules.quant_linear import QuantLinear
from dq_runtime.packing import HostTensor, PackedWeight, unpack_codes
from dq_runtime.packing.bridge import host_of, packed_of
from dq_runtime.packing.checkpoint import packed_tensors
from dq_runtime.packing.quant_config import FLOAT_FORMATS, Scheme
from dq_runtime.packing.readers.float4 import StoredFloat4


class StoredLinear(nn.Module):
    """What from_pretrained fills: the tensors of one linear [N, K] under their names on disk, of the dtypes and shapes
    of ``stored`` (see :mod:`dq_runtime.packing.checkpoint`); ``bias`` [N] where the model has one."""

    def __init__(self, k: int, scheme: Scheme, stored: Mapping[str, HostTensor], bias: nn.Parameter | None) -> None:
        super().__init__()
        self.scheme, self.k = scheme, k
        for name, tensor in stored.items():
            self.register_buffer(name, torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype), device="meta"))
        self.bias = bias

    def packed_linear(self) -> PackedLinear:
        """The linear that serves, over the tensors that were loaded."""
        tensors = dict(self.named_buffers())
        bias = None if self.bias is None else self.bias.detach()
        packed, form = tensors["weight_packed"], self.scheme.form
        if form in FLOAT_FORMATS:
            host = StoredFloat4(form, form, {name: host_of(tensor.cpu()) for name, tensor in tensors.items()}).weight()
            w = packed_of(host)
            w = PackedWeight(w.packed.to(packed.device), w.scale.to(packed.device), None, w.bits, w.k, form)
            whole = tensors.get("weight_global_scale")
            return PackedLinear(w, bias, None if whole is None else math.frexp(float(whole))[1] - 1)
        zero = None
        if not self.scheme.symmetric:
            stored = tensors["weight_zero_point"].t().contiguous()
            zero = unpack_codes(stored, self.scheme.bits, packed.shape[0]).t().contiguous()
        return PackedLinear(PackedWeight(packed, tensors["weight_scale"], zero, self.scheme.bits, self.k, form), bias)


class PackedLinear(QuantLinear):
    """:class:`QuantLinear` for a model that transformers owns: ``save_pretrained`` writes it as it was loaded, and it
    is never repacked, so that it can be moved and differentiated. ``shift``: log2 of the global scale of nvfp4."""

    def __init__(self, w: PackedWeight, bias: Tensor | None, shift: int | None = None) -> None:
        super().__init__(w, bias)
        self.shift = shift

    @property
    def qweight(self) -> Tensor:
        """The codes, under the name by which PEFT finds out where a quantized layer is."""
        return self.packed.packed

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        tensors = packed_tensors(prefix.removesuffix("."), self.packed, self.shift)
        if self.bias is not None:
            tensors[f"{prefix}bias"] = self.bias
        for name, tensor in tensors.items():
            destination[name] = tensor if keep_vars else tensor.detach()
