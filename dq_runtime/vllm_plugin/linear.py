"""A linear on a table inside vLLM: vLLM's own loaders fill our tensors, our kernels multiply.

N counts the rows of all members that are one matrix, K the inputs, both of one rank. Rows are independent and stay
whole codes wherever tensor parallelism cuts N; a cut of K must fall between words of 8 codes and between groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.utils import set_weight_attrs

from dq_runtime.errors import CheckpointError
from dq_runtime.levels import TABLE_BITS
from dq_runtime.modules.quant_linear import QuantLinear
from dq_runtime.packing import PackedWeight, words_per_row
from dq_runtime.packing.quant_config import Scheme
from dq_runtime.spec import PER_ROW

CODES = 32 // TABLE_BITS  # in a word


class TableLinearMethod(LinearMethodBase):  # type: ignore[misc] # vllm is not installed where types are checked
    """y = x @ decode(weight).T + bias of one linear of ``scheme``; ``name`` as vLLM calls it, for messages.

    vLLM asks for one of these a linear, so what :meth:`create_weights` learns of it is kept here.
    """

    def __init__(self, scheme: Scheme, name: str) -> None:
        self._scheme, self._name = scheme, name
        self._inputs, self._dtype = 0, torch.bfloat16

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """``weight_packed`` int32 [N, ceil(K/8)] and ``weight_scale`` [N, G] for vLLM's loaders to fill.

        Scales are float32 until they are all there, so that no loader rounds them to another serving dtype; NaN, so
        that a member of the matrix that was never loaded is found. Raises :class:`CheckpointError` for a cut that falls
        inside a word or a group.
        """
        n, k, group = sum(output_partition_sizes), input_size_per_partition, self._scheme.group_size
        rows = group == PER_ROW
        if (k != input_size and k % CODES) or (not rows and k % group):
            unit = f"words of {CODES} codes" if rows else f"groups of {group}"
            raise CheckpointError(
                f"{self._name}: {k} of {input_size} inputs a rank are no whole {unit}; serve with fewer ranks, or "
                "quantize with a smaller --group-size"
            )
        packed = torch.zeros(n, words_per_row(k, TABLE_BITS), dtype=torch.int32)
        scale = torch.full((n, 1 if rows else k // group), float("nan"), dtype=torch.float32)
        across = {"output_dim": 0, "input_dim": 1}
        self._register(layer, "weight_packed", packed, across | extra_weight_attrs)
        self._register(layer, "weight_scale", scale, ({"output_dim": 0} if rows else across) | extra_weight_attrs)
        # Stored with every layer; what vLLM needs of it, it knows.
        shape = torch.zeros(2, dtype=torch.int64)
        self._register(layer, "weight_shape", shape, {"ignore_warning": True} | extra_weight_attrs)
        self._inputs, self._dtype = k, params_dtype

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Put a :class:`QuantLinear` in place of the loaded tensors, in the order the device's kernels want."""
        if hasattr(layer, "dq_linear"):
            return
        assert isinstance(layer.weight_packed, Tensor)
        assert isinstance(layer.weight_scale, Tensor)
        scale = self._sixteen_bits(layer.weight_scale.detach())
        w = PackedWeight(layer.weight_packed.detach(), scale, None, TABLE_BITS, self._inputs, self._scheme.form)
        linear = QuantLinear(w, None)
        linear.prepare(self._dtype)
        for name in ("weight_packed", "weight_scale", "weight_shape"):
            delattr(layer, name)
        layer.dq_linear = linear

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype; ``bias`` [N]."""
        assert isinstance(layer.dq_linear, QuantLinear)
        y: Tensor = layer.dq_linear(x)
        return y if bias is None else y + bias

    def _sixteen_bits(self, scale: Tensor) -> Tensor:
        """float32 scales in the 16-bit dtype that they were stored in."""
        if not bool(torch.isfinite(scale).all()):
            raise CheckpointError(f"{self._name}: some scales are not finite, or a member of the matrix is missing")
        for dtype in (torch.bfloat16, torch.float16):
            short = scale.to(dtype)
            if torch.equal(short.float(), scale):
                return short
        raise CheckpointError(f"{self._name}: scales need more than 16 bits, which no kernel here takes")

    @staticmethod
    def _register(layer: nn.Module, name: str, values: Tensor, attributes: dict[str, Any]) -> None:
        parameter = nn.Parameter(values, requires_grad=False)
        set_weight_attrs(parameter, attributes)
        layer.register_parameter(name, parameter)
