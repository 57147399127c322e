"""The linear that serves: its weight stays packed, in memory as on disk."""

from __future__ import annotations

from torch import Tensor, nn

from dq_runtime.modules.ops import qmm
from dq_runtime.packing import PackedWeight
from dq_runtime.transforms import Transform


class QuantLinear(nn.Module):
    """y = x @ decode(weight).T + bias. ``weight_packed`` int32 [N, ceil(K*bits/32)], ``weight_scale`` fp16/bf16 [N, G],
    ``weight_zero`` uint8 [N, G] or None, ``bias`` [N] or None. Integer buffers, so a dtype cast cannot touch codes.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero: Tensor | None
    bias: Tensor | None

    def __init__(self, w: PackedWeight, bias: Tensor | None, transform: Transform) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = w.k, w.n, w.bits
        self.transform = transform
        self.register_buffer("weight_packed", w.packed)
        self.register_buffer("weight_scale", w.scale)
        self.register_buffer("weight_zero", w.zero)
        self.register_buffer("bias", bias)

    @property
    def packed(self) -> PackedWeight:
        return PackedWeight(self.weight_packed, self.weight_scale, self.weight_zero, self.bits, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        y = self.transform.apply_output(qmm(self.transform.apply_input(x), self.packed))
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        group = self.packed.group_size
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, group_size={group}"
