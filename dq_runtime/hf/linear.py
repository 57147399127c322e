"""The packed linear inside a transformers model: a :class:`QuantLinear` whose state dict is the checkpoint's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dq_runtime.modules.quant_linear import QuantLinear
from dq_runtime.packing import PackedWeight, pack_codes, unpack_codes, words_per_row
from dq_runtime.packing.quant_config import Scheme


class StoredLinear(nn.Module):
    """What from_pretrained fills: the tensors of one linear under their names on disk. Shapes as in
    :mod:`dq_runtime.packing.checkpoint`; ``bias`` [N] where the model has one."""

    def __init__(self, n: int, k: int, scheme: Scheme, scale_dtype: torch.dtype, bias: nn.Parameter | None) -> None:
        super().__init__()
        groups = 1 if scheme.group_size == -1 else k // scheme.group_size
        self.scheme, self.k = scheme, k
        packed = torch.empty(n, words_per_row(k, scheme.bits), dtype=torch.int32, device="meta")
        self.register_buffer("weight_packed", packed)
        self.register_buffer("weight_scale", torch.empty(n, groups, dtype=scale_dtype, device="meta"))
        self.register_buffer("weight_shape", torch.empty(2, dtype=torch.int64, device="meta"))
        zeros = None
        if not scheme.symmetric:
            zeros = torch.empty(words_per_row(n, scheme.bits), groups, dtype=torch.int32, device="meta")
        self.register_buffer("weight_zero_point", zeros)
        self.bias = bias

    def packed_linear(self) -> PackedLinear:
        """The linear that serves, over the tensors that were loaded."""
        tensors = dict(self.named_buffers())
        zero = None
        if not self.scheme.symmetric:
            stored = tensors["weight_zero_point"].t().contiguous()
            n = tensors["weight_packed"].shape[0]
            zero = unpack_codes(stored, self.scheme.bits, n).t().contiguous()
        w = PackedWeight(tensors["weight_packed"], tensors["weight_scale"], zero, self.scheme.bits, self.k)
        return PackedLinear(w, None if self.bias is None else self.bias.detach())


class PackedLinear(QuantLinear):
    """:class:`QuantLinear` for a model that transformers owns: ``save_pretrained`` writes it as it was loaded, and it
    is never repacked, so that it can be moved and differentiated."""

    @property
    def qweight(self) -> Tensor:
        """The codes, under the name by which PEFT finds out where a quantized layer is."""
        return self.packed.packed

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        w = self.packed
        tensors: dict[str, Tensor] = {
            "weight_packed": w.packed,
            "weight_scale": w.scale,
            "weight_shape": torch.tensor([w.n, w.k], dtype=torch.int64),
        }
        if w.zero is not None:
            tensors["weight_zero_point"] = pack_codes(w.zero.t().contiguous(), w.bits).t().contiguous()
        if self.bias is not None:
            tensors["bias"] = self.bias
        for name, tensor in tensors.items():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()
