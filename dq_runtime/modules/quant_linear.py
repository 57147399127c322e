"""The linear that serves: its weight stays packed, in memory as on disk."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dq_runtime.backends import dispatch
from dq_runtime.backends.base import PreparedWeight
from dq_runtime.errors import DQError
from dq_runtime.modules.ops import qmm, qmm_prepared
from dq_runtime.packing import PackedWeight


class QuantLinear(nn.Module):
    """y = x @ decode(weight).T + bias. ``weight_packed`` int32 [N, ceil(K*bits/32)], ``weight_scale`` fp16/bf16 [N, G],
    ``weight_zero`` uint8 [N, G] or None, ``bias`` [N] or None. Integer buffers, so a dtype cast cannot touch codes.

    :meth:`prepare` exchanges them for the order the device's kernels are fastest on; do it last, for inference only.
    """

    weight_packed: Tensor | None
    weight_scale: Tensor | None
    weight_zero: Tensor | None
    bias: Tensor | None

    def __init__(self, w: PackedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits, self.group_size = w.k, w.n, w.bits, w.group_size
        self.form = w.form
        self.register_buffer("weight_packed", w.packed)
        self.register_buffer("weight_scale", w.scale)
        self.register_buffer("weight_zero", w.zero)
        self.register_buffer("bias", bias)
        self.prepared: PreparedWeight | None = None

    @property
    def packed(self) -> PackedWeight:
        """The weight as on disk; gone after :meth:`prepare`."""
        if self.weight_packed is None or self.weight_scale is None:
            raise DQError("this linear was prepared for its device, which drops the canonical weight; load it again")
        return PackedWeight(
            self.weight_packed, self.weight_scale, self.weight_zero, self.bits, self.in_features, self.form
        )

    def prepare(self, dtype: torch.dtype) -> None:
        """Repack for activations of ``dtype`` on the device the weight is on; nothing changes where that cannot help.

        Afterwards the module can neither move nor be differentiated: the packed buffers are freed.
        """
        self.prepared = dispatch.prepare(self.packed, dtype)
        if self.prepared is not None:
            self.weight_packed = self.weight_scale = self.weight_zero = None

    def forward(self, x: Tensor) -> Tensor:
        y = qmm(x, self.packed) if self.prepared is None else qmm_prepared(x, self.prepared)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, form={self.form}"
        )
