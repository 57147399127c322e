"""The native passes of the rounding loop against their PyTorch definitions."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from dq_runtime.backends.training import Lerp, TrainingCall
from dq_runtime.backends.training_native import NativeTraining
from dq_runtime.backends.training_reference import ReferenceTraining
from dq_runtime.rounding.base import AdamStep

pytestmark = pytest.mark.skipif(os.environ.get("DQ_NATIVE") == "0", reason="DQ_NATIVE=0: built without the extension")

NATIVE, REFERENCE = NativeTraining(), ReferenceTraining()


def lerp(n: int, k: int, group: int, bits: int, symmetric: bool, dtype: torch.dtype) -> tuple[Lerp, Tensor]:
    g = torch.Generator().manual_seed(n + k + bits)
    lo = torch.randint(0, 2**bits - 1, (n, k), generator=g, dtype=torch.uint8)
    scale = (torch.rand(n, k // group, generator=g) * 0.1).to(dtype)
    zero = None if symmetric else torch.randint(0, 2**bits, (n, k // group), generator=g, dtype=torch.uint8)
    return Lerp(lo, scale, zero, bits, k), torch.rand(n, k, generator=g)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("n", "k", "group"), [(192, 576, 64), (67, 100, 100), (5, 33, 11), (1, 7, 7)])
def test_matmuls_are_bit_equal(n: int, k: int, group: int, symmetric: bool, dtype: torch.dtype) -> None:
    """The rebuilt weight is the same to the bit, and what follows is the same torch call."""
    w, x = lerp(n, k, group, 3, symmetric, dtype)
    inputs, grad = torch.randn(17, k), torch.randn(17, n)
    assert torch.equal(NATIVE.lerp_mm(inputs, x, w), REFERENCE.lerp_mm(inputs, x, w))
    for needs in ((True, True), (True, False), (False, True)):
        found = NATIVE.lerp_mm_backward(grad, inputs, x, w, needs, torch.float32)
        expected = REFERENCE.lerp_mm_backward(grad, inputs, x, w, needs, torch.float32)
        for a, b, needed in zip(found, expected, needs, strict=True):
            assert (a is not None) == needed
            assert a is None or (b is not None and torch.equal(a, b))


@pytest.mark.parametrize("count", [1, 15, 16, 17, 1000, 40001])
@pytest.mark.parametrize("threads", [1, 2])
def test_adam(count: int, threads: int) -> None:
    """Ten steps from random states. A step rounds some ten float32 operations, each to half an eps of values up to 1,
    or to a relative half eps of the update, which is at most lr / (1 - beta1) of it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    g = torch.Generator().manual_seed(count)
    x, y = torch.rand(count, generator=g), torch.rand(count, generator=g)
    free = torch.rand(count, generator=g) > 0.05
    states = [[x.clone(), torch.zeros(count), torch.zeros(count)] for _ in range(2)]
    for step in range(1, 11):
        grad = torch.randn(count, generator=g)
        hyper = AdamStep(step=step, lr=0.05, kl_weight=3.0, clamp=1.5, beta1=0.9, beta2=0.999, weight_decay=0.01)
        undecided = NATIVE.projected_adam(*_reordered(states[0], grad.clone()), y, free, hyper)
        REFERENCE.projected_adam(*_reordered(states[1], grad.clone()), y, free, hyper)
        assert int(undecided) == int(((states[0][0] > 0.01) & (states[0][0] < 0.99)).sum())
    for a, b in zip(*states, strict=True):
        assert ((a - b).abs() <= 100 * 2.0**-23 * (1 + b.abs())).all()
    assert ((states[0][0] >= 0) & (states[0][0] <= 1)).all()
    torch.set_num_threads(before)


def _reordered(state: list[Tensor], grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return state[0], grad, state[1], state[2]


def test_what_it_leaves_to_others() -> None:
    assert NATIVE.available() is None
    assert NATIVE.can_run(TrainingCall("projected_adam", "cpu", torch.float32)) is None
    for call, reason in (
        (TrainingCall("mean_kl_with_grad", "cpu", torch.float32), "has no mean_kl_with_grad"),
        (TrainingCall("lerp_mm", "cuda", torch.float32), "cpu tensors only"),
        (TrainingCall("lerp_mm", "cpu", torch.float64), "takes float32"),
        (TrainingCall("lerp_mm", "cpu", torch.float32, packed=True), "unpacked"),
    ):
        assert reason in str(NATIVE.can_run(call))
