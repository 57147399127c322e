"""The seam of the training ops: who runs lerp_mm, its gradients, the projected Adam step and the KL of a rounding loop.

Shapes: M tokens, N out_features, K in_features, G = K / group_size, V vocabulary. The implementations stand in one
table, in order of preference; each says no with a reason. ``DQ_TRAINING=name`` in the environment requests one for
every call of the process, which then never falls back, as ``DQ_BACKEND`` does for the serving ops.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Protocol

import torch
from torch import Tensor

from dq_runtime.backends.choice import first_willing
from dq_runtime.backends.layers_native import NativeLayers
from dq_runtime.errors import BackendError
from dq_runtime.levels import INT
from dq_runtime.packing.layout import unpack_codes
from dq_runtime.registry import Registry
from dq_runtime.rounding.base import AdamStep

IMPLEMENTATIONS = Registry(
    "training implementation",
    {
        "triton": "dq_runtime.backends.training_triton:TritonTraining",
        "native": "dq_runtime.backends.training_native:NativeTraining",
        "reference": "dq_runtime.backends.training_reference:ReferenceTraining",
    },
)


@dataclass(frozen=True)
class Lerp:
    """All of w_hat = scale * (lo - zero + X) but X; of a table ``form`` with levels L, of scale * (L[lo] + X (L[lo + 1]
    - L[lo])).

    ``lo`` uint8 [N, K], or the same codes as canonical bitstream int32 [N, ceil(K*bits/32)]; ``scale`` bf16/fp16
    [N, G]; ``zero`` uint8 [N, G], None where every zero point is the middle code 2^(bits-1).
    """

    lo: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    k: int
    form: str = INT

    @property
    def packed(self) -> bool:
        """Whether lo is the bitstream."""
        return self.lo.dtype == torch.int32

    def codes(self) -> Tensor:
        """lo as uint8 [N, K]."""
        return unpack_codes(self.lo, self.bits, self.k) if self.packed else self.lo


@dataclass(frozen=True)
class TrainingCall:
    """Everything an implementation may base its answer on. ``dtype``: of the activations (lerp_mm, lerp_mm_backward,
    layer_passes), of x (projected_adam) or of the logits (mean_kl_with_grad). What follows it is a Lerp's."""

    op: str
    device: str
    dtype: torch.dtype
    bits: int = 0
    group_size: int = 0
    k: int = 0
    packed: bool = False
    form: str = INT


class Training(Protocol):
    """One implementation. All four ops give the same bits for the same input."""

    name: str
    compact: bool
    """Whether a layer that will be trained here had better hold its state compactly: lo packed, y float16, free one bit
    a weight."""
    layers: NativeLayers | None
    """The passes between the matrix products of a layer; None: the model's own code is to run there."""

    def available(self) -> str | None:
        """None if it can be used here at all, else the reason it cannot. Cheap, no side effects."""
        ...

    def can_run(self, call: TrainingCall) -> str | None:
        """None if yes, else why not. Called only when :meth:`available` is None."""
        ...

    def lerp_mm(self, inputs: Tensor, x: Tensor, w: Lerp) -> Tensor:
        """See :func:`lerp_mm`."""
        ...

    def lerp_mm_backward(
        self, grad: Tensor, inputs: Tensor, x: Tensor, w: Lerp, needs: tuple[bool, bool], grad_dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        """See :func:`lerp_mm_backward`."""
        ...

    def projected_adam(
        self, x: Tensor, grad: Tensor, m: Tensor, v: Tensor, y: Tensor, free: Tensor, hyper: AdamStep
    ) -> Tensor:
        """See :func:`projected_adam`."""
        ...

    def mean_kl_with_grad(self, student: Tensor, teacher: Tensor, out: Tensor) -> Tensor:
        """See :func:`mean_kl_with_grad`."""
        ...


@cache
def implementation(name: str) -> Training:
    """The implementation of that name, built once."""
    built: Training = IMPLEMENTATIONS.get(name)()
    return built


def refusal(name: str, call: TrainingCall) -> str | None:
    """Why implementation ``name`` cannot run ``call``; None if it can."""
    candidate = implementation(name)
    return candidate.available() or candidate.can_run(call)


@lru_cache(maxsize=4096)
def _choose(call: TrainingCall, requested: str | None) -> Training:
    name = first_willing(IMPLEMENTATIONS, lambda name: refusal(name, call), call, requested, "DQ_TRAINING")
    return implementation(name)


def choose(call: TrainingCall) -> Training:
    """Who will run ``call``; raises :class:`BackendError` with every reason when nobody can."""
    return _choose(call, os.environ.get("DQ_TRAINING") or None)


def holds_compactly(device: torch.device) -> bool:
    """Whether a layer on ``device`` should hold its state compactly (see :attr:`Training.compact`)."""
    return choose(TrainingCall("projected_adam", device.type, torch.float32)).compact


def layer_passes(device: torch.device, dtype: torch.dtype) -> NativeLayers | None:
    """What a layer on ``device`` with matrix products in ``dtype`` had better run on between them (see
    :attr:`Training.layers`)."""
    return choose(TrainingCall("layer_passes", device.type, dtype)).layers


def half_state() -> bool:
    """Whether compact layers hold x in float16 and the moments in bfloat16, rounded stochastically, and x.grad in
    bfloat16: only on request, ``DQ_TRAINING_STATE=16``.

    It saves 8 bytes a weight, but in two of two runs on SmolLM2-135M (3 bits, 24 steps of 128 tokens) the KL ended at
    7.6 and 9.2, against 3.9 to 5.0 in four of four with a state in float32; why is not understood.
    """
    requested = os.environ.get("DQ_TRAINING_STATE") or "32"
    if requested not in ("16", "32"):
        raise BackendError(f"DQ_TRAINING_STATE is 16 or 32, got {requested!r}")
    return requested == "16"


def lerp_mm(inputs: Tensor, x: Tensor, w: Lerp) -> Tensor:
    """inputs [M, K] @ (scale * (lo - zero + x)).T -> [M, N] in the inputs' dtype, accumulated in float32.

    x float32 or float16 [N, K]. The weight is rounded once to the inputs' dtype; nothing is recorded for autograd.
    """
    return choose(_call("lerp_mm", inputs, w)).lerp_mm(inputs, x, w)


def lerp_mm_backward(
    grad: Tensor, inputs: Tensor, x: Tensor, w: Lerp, needs: tuple[bool, bool], grad_dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`lerp_mm` for ``grad`` [M, N] in the inputs' dtype: (grad @ w_hat [M, K] in that dtype,
    (grad.T @ inputs) * scale [N, K] in ``grad_dtype``), each only where ``needs`` says so, else None."""
    return choose(_call("lerp_mm_backward", inputs, w)).lerp_mm_backward(grad, inputs, x, w, needs, grad_dtype)


def projected_adam(
    x: Tensor, grad: Tensor, m: Tensor, v: Tensor, y: Tensor, free: Tensor, hyper: AdamStep
) -> Tensor:  # fmt: skip
    """One step of :class:`AdamStep` on x [N, K] and on the moments m, v, in place.

    x, m, v all float32; or float16, bfloat16, bfloat16, and then rounded stochastically. grad float32 or bfloat16 (may
    be overwritten); y float32 or float16; free bool [N, K] or its bits (:func:`pack_flags`). Returns the number of x
    with 0.01 < x < 0.99, an int64 scalar on x's device.
    """
    call = TrainingCall("projected_adam", x.device.type, x.dtype)
    return choose(call).projected_adam(x, grad, m, v, y, free, hyper)


def mean_kl_with_grad(student: Tensor, teacher: Tensor, reuse_teacher: bool = False) -> tuple[Tensor, Tensor]:
    """Mean over M tokens of KL(softmax(teacher) || softmax(student)) in nats, float32 scalar, and its gradient to the
    student's logits, (softmax(student) - softmax(teacher)) / M, [M, V] in their dtype. Both are float [M, V] of one
    dtype. ``reuse_teacher``: write the gradient over the teacher's logits, which are lost."""
    reusable = reuse_teacher and teacher.dtype == student.dtype and teacher.is_contiguous()
    out = teacher if reusable else torch.empty_like(student, memory_format=torch.contiguous_format)
    call = TrainingCall("mean_kl_with_grad", student.device.type, student.dtype)
    return choose(call).mean_kl_with_grad(student, teacher, out), out


def pack_flags(flags: Tensor) -> Tensor:
    """bool [N, K] -> uint8 [ceil(N*K/8)]: flag i of the flattened tensor is bit i % 8 of byte i // 8."""
    flat = flags.reshape(-1)
    padded = torch.zeros((flat.numel() + 7) // 8 * 8, dtype=torch.uint8, device=flags.device)
    padded[: flat.numel()] = flat
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=flags.device)
    return (padded.view(-1, 8) * weights).sum(-1, dtype=torch.uint8)


def unpack_flags(packed: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of :func:`pack_flags`: bool of ``shape``."""
    bits = packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (bits & 1).bool().view(-1)[: shape.numel()].view(shape)


def _call(op: str, inputs: Tensor, w: Lerp) -> TrainingCall:
    group = w.k // w.scale.shape[1]
    return TrainingCall(op, inputs.device.type, inputs.dtype, w.bits, group, w.k, w.packed, w.form)
