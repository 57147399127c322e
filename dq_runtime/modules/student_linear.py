"""The linear that is being rounded. Teacher and student share what is stored: lo, scales, y, x; never two copies of W.

    teacher  w     = scale * (lo - zero + y)      y as the original weight gave it, so w is exact to float32 rounding
    student  w_hat = scale * (lo - zero + x)      x in [0, 1], 0 where the two neighbours coincide

(of a table grid, with L its levels, scale * (L[lo] + y (L[lo + 1] - L[lo])), and the same with x).

Shapes: N = out_features, K = in_features, G = K / group_size; x, y, lo, free are [N, K]. Bytes a weight (3 bits):

             lo      y   free   x   m + v   x.grad   together
    plain    1       4   1      4   4 + 4   4        22
    compact  0.375   2   0.125  4   4 + 4   4        18.5
    in half  0.375   2   0.125  2   2 + 2   2        10.5

Compact is how layers are held where the training ops want it (on a GPU with Triton): lo as bitstream, y float16 (within
2^-12 of a grid step of the original: 1/1000 of the rounding error that is being spread), free as bits, and the
activations in the dtype of the matmuls. In half, only on request, see ``backends.training.half_state``.

Of several processes that round one model each holds some rows of lo, y, free and the scales (dq_runtime/ranks.py), and
gathers the rest when it is asked for: all must ask for the same. There is no x then.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import torch
from torch import Tensor, nn

from dq_runtime.backends import dispatch, training
from dq_runtime.backends.training import Lerp
from dq_runtime.backends.training_reference import lerp_slope, lerp_weight
from dq_runtime.environment import give_back_memory
from dq_runtime.grids import Grid, Scales
from dq_runtime.levels import INT
from dq_runtime.modules.ops import qmm
from dq_runtime.modules.rebuilt import rebuilt_mm
from dq_runtime.modules.training_ops import lerp_mm
from dq_runtime.packing import PackedWeight, pack_codes
from dq_runtime.ranks import Ranks, whole
from dq_runtime.rounding.base import AdamStep, Choice, Moments, whole_choice, whole_scales


class Mode(Enum):
    """Which weights a forward pass uses."""

    TEACHER = "teacher"
    RELAXED = "relaxed"
    CANDIDATE = "candidate"
    REBUILT = "rebuilt"  # the candidate too, built again in the backward pass instead of kept for it
    PACKED = "packed"


class StudentLinear(nn.Module):
    """Replaces a linear while its model is rounded; see the module docstring for the algebra.

    ``compute_dtype`` is the dtype of the teacher's and the relaxed student's matmuls; the packed weights go through the
    same ``qmm`` that serves them. A layer made of a weight on the meta device holds nothing until :meth:`hold`.
    """

    _lo: Tensor
    _y: Tensor
    _free: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None

    def __init__(self, w: Tensor, bias: Tensor | None, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.out_features, self.in_features = w.shape
        self.compact = self.half_state = False
        for name in ("_lo", "_y", "_free", "scale"):
            self.register_buffer(name, torch.empty(0))
        self.register_buffer("zero", None)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.x = nn.Parameter(torch.empty(0), requires_grad=False)  # allocated by begin_relaxation
        self.mode = Mode.TEACHER
        self.compute_dtype = torch.float32
        self.packed: PackedWeight | None = None
        self.candidate: Callable[[], Tensor] | None = None  # any weight [N, K], built when needed
        self.observer: Callable[[Tensor], object] | None = None  # sees the inputs [..., K]
        if not w.is_meta:
            self.hold(w)

    def hold(self, w: Tensor) -> None:
        """Put the weight [N, K], of any float dtype, on its grid, and hold it on ``w``'s device."""
        give_back_memory(4 * w.numel())  # of the layer before: fitting takes several times what is kept
        w = w.detach().float()
        scales = self.grid.fit(w)
        lo, hi = self.grid.neighbours(w, scales)
        y, free = self.grid.position(w, scales) - lo, hi > lo
        self.compact = training.holds_compactly(w.device)
        self.half_state = self.compact and training.half_state()
        self._lo = pack_codes(lo, self.grid.spec.bits) if self.compact else lo
        self._y = y.half() if self.compact else y
        self._free = training.pack_flags(free) if self.compact else free
        self.scale, self.zero = scales.scale, scales.zero

    def release(self) -> None:
        """Give back all that :meth:`hold` took, and whatever weight was put in its place."""
        self._lo = self._y = self._free = self.scale = torch.empty(0)
        self.zero = self.candidate = self.packed = None

    def share(self, ranks: Ranks) -> None:
        """Keep the rows of this process of all that is stored."""
        for name in ("_lo", "_y", "_free", "scale", "zero"):
            if getattr(self, name) is not None:
                setattr(self, name, ranks.share(getattr(self, name)))

    @property
    def scales(self) -> Scales:
        return whole_scales(Scales(self.scale, self.zero))

    @property
    def lerp(self) -> Lerp:
        """What teacher and student have in common, as the training ops take it."""
        form, scales = self.grid.decode_form.name, self.scales
        return Lerp(whole(self._lo), scales.scale, scales.zero, self.grid.spec.bits, self.in_features, form)

    @property
    def lo(self) -> Tensor:
        """The code below each weight, uint8 [N, K]; unpacked anew where it is held packed."""
        return self.lerp.codes()

    @property
    def y(self) -> Tensor:
        """Where the original weight lies above lo, float32 [N, K]."""
        return whole(self._y).float()

    @property
    def free(self) -> Tensor:
        """Whether the two neighbours differ, bool [N, K]."""
        free = whole(self._free)
        return training.unpack_flags(free, self._y.shape) if self.compact else free

    def begin_relaxation(self) -> None:
        """Allocate x (zeros); methods that do not need the student never pay for it."""
        self.x = nn.Parameter(torch.zeros_like(self._y, dtype=torch.float16 if self.half_state else torch.float32))
        if self.half_state:
            self.x.grad_dtype = torch.bfloat16  # else autograd would widen what lerp_mm's backward returns

    def end_relaxation(self) -> None:
        """Drop x; the codes have been taken."""
        self.x = nn.Parameter(torch.empty(0), requires_grad=False)

    def weight(self) -> Tensor:
        """The original weight, float32 [N, K], rebuilt from what is stored."""
        return lerp_weight(self.lerp, whole(self._y), torch.float32)

    def moments(self) -> Moments:
        """Zeros of x's shape: float32, or bfloat16 where the state is held in half."""
        dtype = torch.bfloat16 if self.half_state else torch.float32
        zeros = torch.zeros_like(self.x, dtype=dtype, requires_grad=False)
        return Moments(zeros, zeros.clone())

    def step(self, moments: Moments, hyper: AdamStep) -> Tensor:
        """One projected AdamW step; see :class:`dq_runtime.rounding.base.Relaxation`."""
        # An expert that no token of the windows reached has no gradient: only c* pulls there.
        grad = torch.zeros_like(self.x) if self.x.grad is None else self.x.grad
        undecided = training.projected_adam(
            self.x.detach(), grad, moments.m, moments.v, self._y, self._free, hyper
        )  # fmt: skip
        self.x.grad = None
        return undecided

    def codes(self) -> Tensor:
        return self.lo + self.x.detach().round().to(torch.uint8)

    def mean_squared_step(self) -> float:
        """Mean of (distance between the two neighbours)^2."""
        step = self.scale.float() if self.grid.decode_form.name == INT else lerp_slope(self.lerp)
        return float(step.square().mean())

    def pack(self, choice: Choice) -> PackedWeight:
        """The checkpoint form of a choice: its codes, with its scales or the layer's own."""
        device, bits, choice = self.scale.device, self.grid.spec.bits, whole_choice(choice)
        scales = choice.scales or self.scales
        zero = None if scales.zero is None else scales.zero.to(device)
        packed = dispatch.pack(choice.codes.to(device), bits)
        return PackedWeight(packed, scales.scale.to(device), zero, bits, self.in_features, self.grid.decode_form.name)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs [..., K] -> [..., N], in the inputs' dtype; held compactly, in that of the matmuls."""
        if self.observer is not None:
            self.observer(inputs)
        dtype = inputs.dtype
        if self.mode is Mode.PACKED:
            assert self.packed is not None
            y = qmm(inputs, self.packed)
        elif self.mode is Mode.CANDIDATE:
            assert self.candidate is not None
            y = nn.functional.linear(inputs.to(self.compute_dtype), self.candidate().to(self.compute_dtype))
        elif self.mode is Mode.REBUILT:
            assert self.candidate is not None
            y = rebuilt_mm(inputs.to(self.compute_dtype), self.candidate)
        else:
            flat = inputs.reshape(-1, self.in_features).to(self.compute_dtype)
            dtype = self.compute_dtype if self.compact else dtype
            x = self.x if self.mode is Mode.RELAXED else whole(self._y)
            y = lerp_mm(flat, x, self.lerp, torch.bfloat16 if self.half_state else torch.float32)
            y = y.view(*inputs.shape[:-1], self.out_features)
        y = y.to(dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)
