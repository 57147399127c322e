"""The linear that is being rounded. Teacher and student share what is stored: lo, scales, y, x; never two copies of W.

    teacher  w     = scale * (lo - zero + y)      y as the original weight gave it, so w is exact to float32 rounding
    student  w_hat = scale * (lo - zero + x)      x in [0, 1], 0 where the two neighbours coincide

Shapes: N = out_features, K = in_features, G = K / group_size; x, y, lo, free are [N, K].
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from dq_runtime.grids import Grid, Scales
from dq_runtime.modules.ops import qmm
from dq_runtime.packing import PackedWeight, pack_codes
from dq_runtime.transforms import Transform


class Mode(Enum):
    """Which weights a forward pass uses."""

    TEACHER = "teacher"
    RELAXED = "relaxed"
    PACKED = "packed"


def lerp_weight(lo: Tensor, x: Tensor, scales: Scales, middle: int, dtype: torch.dtype) -> Tensor:
    """scale * (lo - zero + x) as a dense [N, K] tensor of ``dtype``."""
    n, k = lo.shape
    groups = scales.scale.shape[1]
    zero: Tensor | float = float(middle) if scales.zero is None else scales.zero.float().unsqueeze(-1)
    w = torch.add(x, lo).view(n, groups, -1)  # uint8 + float32 in one pass
    return w.sub_(zero).mul_(scales.scale.float().unsqueeze(-1)).view(n, k).to(dtype)


class LerpMM(torch.autograd.Function):
    """y = inputs @ w_hat(x).T; gradients to the inputs and to x. W is rebuilt in backward instead of being kept."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, x: Tensor, layer: StudentLinear, dtype: torch.dtype) -> Tensor:
        flat = inputs.reshape(-1, inputs.shape[-1]).to(dtype)
        w = lerp_weight(layer.lo, x.detach(), layer.scales, layer.middle, dtype)
        ctx.layer, ctx.dtype, ctx.shape, ctx.input_dtype = layer, dtype, inputs.shape, inputs.dtype
        ctx.save_for_backward(flat, x)
        return (flat @ w.t()).view(*inputs.shape[:-1], w.shape[0])

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        flat, x = ctx.saved_tensors
        layer: StudentLinear = ctx.layer
        grad = outputs[0].reshape(-1, outputs[0].shape[-1]).to(ctx.dtype)
        grad_inputs = grad_x = None
        if ctx.needs_input_grad[0]:
            w = lerp_weight(layer.lo, x.detach(), layer.scales, layer.middle, ctx.dtype)
            grad_inputs = (grad @ w).view(ctx.shape).to(ctx.input_dtype)
        if ctx.needs_input_grad[1]:
            n, k = x.shape
            scale = layer.scales.scale.float().unsqueeze(-1)
            grad_x = (grad.t() @ flat).float().view(n, scale.shape[1], -1).mul_(scale).view(n, k)
        return grad_inputs, grad_x, None, None


class StudentLinear(nn.Module):
    """Replaces a linear while its model is rounded; see the module docstring for the algebra.

    ``compute_dtype`` is the dtype of the teacher's and the relaxed student's matmuls; the packed weights go through the
    same ``qmm`` that serves them.
    """

    lo: Tensor
    y: Tensor
    free: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None

    def __init__(self, w: Tensor, bias: Tensor | None, grid: Grid, transform: Transform) -> None:
        super().__init__()
        self.grid = grid
        self.transform = transform
        self.out_features, self.in_features = w.shape
        w = transform.fold(w.detach().float())
        scales = grid.fit(w)
        lo, hi = grid.neighbours(w, scales)
        self.register_buffer("lo", lo)
        self.register_buffer("y", grid.position(w, scales) - lo)
        self.register_buffer("free", hi > lo)
        self.register_buffer("scale", scales.scale)
        self.register_buffer("zero", scales.zero)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.middle = 2 ** (grid.spec.bits - 1)
        self.x = nn.Parameter(torch.empty(0), requires_grad=False)  # allocated by begin_relaxation
        self.mode = Mode.TEACHER
        self.compute_dtype = torch.float32
        self.packed: PackedWeight | None = None

    @property
    def scales(self) -> Scales:
        return Scales(self.scale, self.zero)

    def begin_relaxation(self) -> None:
        """Allocate x (zeros); methods that do not need the student never pay for it."""
        self.x = nn.Parameter(torch.zeros_like(self.y))

    def end_relaxation(self) -> None:
        """Drop x; the codes have been taken."""
        self.x = nn.Parameter(torch.empty(0), requires_grad=False)

    def weight(self) -> Tensor:
        """The original (transformed) weight, float32 [N, K], rebuilt from what is stored."""
        return lerp_weight(self.lo, self.y, self.scales, self.middle, torch.float32)

    def codes(self) -> Tensor:
        return self.lo + self.x.detach().round().to(torch.uint8)

    def mean_squared_step(self) -> float:
        return float(self.scale.float().square().mean())

    def pack(self, codes: Tensor) -> PackedWeight:
        """The checkpoint form of these codes."""
        spec = self.grid.spec
        return PackedWeight(pack_codes(codes, spec.bits), self.scale, self.zero, spec.bits, self.in_features)

    def forward(self, inputs: Tensor) -> Tensor:
        h = self.transform.apply_input(inputs)
        if self.mode is Mode.PACKED:
            assert self.packed is not None
            y = qmm(h, self.packed)
        elif self.mode is Mode.RELAXED:
            y = LerpMM.apply(h, self.x, self, self.compute_dtype)  # type: ignore[no-untyped-call]
        else:
            w = lerp_weight(self.lo, self.y, self.scales, self.middle, self.compute_dtype)
            y = h.to(self.compute_dtype) @ w.t()
        y = self.transform.apply_output(y.to(inputs.dtype))
        return y if self.bias is None else y + self.bias
