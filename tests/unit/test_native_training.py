"""The native passes of the rounding loop against their PyTorch definitions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from students import job, student_model
from torch import Tensor

from dq_runtime.backends import training
from dq_runtime.backends.training import Lerp, TrainingCall
from dq_runtime.backends.training_native import NativeTraining
from dq_runtime.backends.training_reference import ReferenceTraining, lerp_weight
from dq_runtime.rounding.base import AdamStep
from dq_runtime.rounding.discquant_paper import DiscQuantPaper

pytestmark = pytest.mark.skipif(os.environ.get("DQ_NATIVE") == "0", reason="DQ_NATIVE=0: built without the extension")

NATIVE, REFERENCE = NativeTraining(), ReferenceTraining()


@pytest.fixture
def _fresh() -> Iterator[None]:
    """Forget which implementation was chosen, before and after."""
    training._choose.cache_clear()
    yield
    training._choose.cache_clear()


def lerp(n: int, k: int, group: int, bits: int, symmetric: bool, dtype: torch.dtype) -> tuple[Lerp, Tensor]:
    g = torch.Generator().manual_seed(n + k + bits)
    lo = torch.randint(0, 2**bits - 1, (n, k), generator=g, dtype=torch.uint8)
    scale = (torch.rand(n, k // group, generator=g) * 0.1).to(dtype)
    zero = None if symmetric else torch.randint(0, 2**bits, (n, k // group), generator=g, dtype=torch.uint8)
    return Lerp(lo, scale, zero, bits, k), torch.rand(n, k, generator=g)


SHAPES = [(192, 576, 64), (67, 100, 100), (5, 33, 11), (1, 7, 7)]
MS = (1, 2, 3, 16, 17, 64, 65)
ACTIVATIONS = [torch.float32, torch.bfloat16]


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("activations", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_matmuls_are_bit_equal(
    n: int, k: int, group: int, symmetric: bool, dtype: torch.dtype, activations: torch.dtype
) -> None:
    """The rebuilt weight is the same to the bit, what follows is the same torch call, and so is the scaling."""
    w, x = lerp(n, k, group, 3, symmetric, dtype)
    for m in MS:
        inputs, grad = normal(m, k, seed=m, dtype=activations), normal(m, n, seed=m + 1, dtype=activations)
        assert torch.equal(NATIVE.lerp_mm(inputs, x, w), REFERENCE.lerp_mm(inputs, x, w))
        for needs in ((True, True), (True, False), (False, True)):
            found = NATIVE.lerp_mm_backward(grad, inputs, x, w, needs, torch.float32)
            expected = REFERENCE.lerp_mm_backward(grad, inputs, x, w, needs, torch.float32)
            for a, b, needed in zip(found, expected, needs, strict=True):
                assert (a is not None) == needed
                assert a is None or (b is not None and torch.equal(a, b))


@pytest.mark.parametrize("out", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_every_weight_is_written_and_rounded_as_torch_rounds(out: torch.dtype, threads: int) -> None:
    """The buffer is shared by layers: poisoned before, no NaN after; values from zero to 2^127 and a NaN among them."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for n, k, group in (*SHAPES, (3, 40000, 16), (700, 24, 8)):
            w, x = lerp(n, k, group, 8, True, torch.bfloat16)
            x = (x - 0.5) * torch.logspace(-30, 127, n * k, base=2).view(n, k)
            x[-1, -1] = torch.nan
            NATIVE._buffer((n, k), out).fill_(torch.nan)
            expected = lerp_weight(w, x, out)
            torch.testing.assert_close(NATIVE._weight(w, x, out), expected, rtol=0, atol=0, equal_nan=True)
            assert int(expected.isnan().sum()) == 1
    finally:
        torch.set_num_threads(before)


def test_a_gradient_outlives_the_next_layer_s() -> None:
    """What is returned must not lie in the buffer that the next layer overwrites."""
    w, x = lerp(192, 576, 64, 3, True, torch.bfloat16)
    for dtype in ACTIVATIONS:
        inputs, grad = normal(17, 576, seed=0, dtype=dtype), normal(17, 192, seed=1, dtype=dtype)
        first = NATIVE.lerp_mm_backward(grad, inputs, x, w, (True, True), torch.float32)
        kept = [t.clone() for t in first if t is not None]
        y = NATIVE.lerp_mm(inputs, x, w)
        NATIVE.lerp_mm_backward(2 * grad, 3 * inputs, x, w, (True, True), torch.float32)
        NATIVE.lerp_mm(5 * inputs, x, w)
        assert len(kept) == 2
        assert all(torch.equal(a, b) for a, b in zip(kept, first, strict=True) if b is not None)
        assert torch.equal(y, REFERENCE.lerp_mm(inputs, x, w))


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("vocabulary", [1, 15, 16, 97, 3000])
def test_kl_and_its_gradient(vocabulary: int, threads: int, dtype: torch.dtype) -> None:
    """Against autograd in float64. log p carries half an eps of each of: the logit less the maximum (up to 30 here) and
    log of the sum, whose terms are added 64 at a time; p is that times itself, and the gradient is rounded to dtype."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    eps = 2.0**-23
    for tokens in MS:
        student, teacher = (4 * normal(tokens, vocabulary, seed=s, dtype=dtype) for s in (tokens, tokens + 1))
        exact = student.double().requires_grad_()
        log_p, log_q = teacher.double().log_softmax(-1), exact.log_softmax(-1)
        expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        expected.backward()
        assert exact.grad is not None
        out = torch.full_like(student, torch.nan)
        loss = NATIVE.mean_kl_with_grad(student, teacher, out)
        assert loss.dtype is torch.float32
        off = 64 * eps * float((log_p.exp() * (1 + log_p.abs() + log_q.detach().abs())).sum(-1).mean())
        assert abs(loss.double() - expected) <= off
        bound = 64 * eps * (log_p.exp() + log_q.exp()) / tokens + torch.finfo(dtype).eps / 2 * exact.grad.abs()
        assert ((out.double() - exact.grad).abs() <= bound).all()
        reused = teacher.clone()
        assert torch.equal(NATIVE.mean_kl_with_grad(student, reused, reused), loss)  # over the teacher: the same bits
        assert torch.equal(reused, out)
    torch.set_num_threads(before)


def test_the_kl_of_a_bad_logit_is_nan_as_the_reference_s() -> None:
    for where in range(2):
        for bad in (torch.nan, torch.inf):
            logits = [normal(3, 40, seed=0), normal(3, 40, seed=1)]
            logits[where][1, 7] = bad
            for implementation in (NATIVE, REFERENCE):
                assert implementation.mean_kl_with_grad(*logits, torch.empty(3, 40)).isnan()


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("start", ["random", "original"])
def test_rounding_in_float32_equals_the_plain_loop(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    """x after 6 steps. A step moves x by lr * m / sqrt(v): of a gradient's relative float32 error e the share lr * e.
    A sum of 128 products has 128 half eps, a layer a few of those; the losses' curvature adds them up."""
    windows = torch.randint(3, 260, (3, 32), generator=torch.Generator().manual_seed(0))
    results = []
    for name in ("native", "reference"):
        monkeypatch.setenv("DQ_TRAINING", name)
        student = student_model(tiny_model, windows)
        student.begin()
        history = DiscQuantPaper({"steps": 6, "start": start}).round(job(student)).history
        results.append(({n: layer.x.detach().clone() for n, layer in student.layers.items()}, history))
    (found, ours), (expected, plain) = results
    for a, b in zip(ours, plain, strict=True):
        assert a["kl"] == pytest.approx(b["kl"], rel=1e-3)
    x, y = (torch.cat([t.flatten() for t in side.values()]) for side in (found, expected))
    # Adam divides by sqrt(v): where a gradient is nearly zero, rounding decides its sign and x moves by up to lr.
    assert float(((x - y).abs() > 1e-3).float().mean()) < 1e-3
    assert float((x.round() != y.round()).float().mean()) < 1e-3


@pytest.mark.usefixtures("_fresh")
def test_one_bfloat16_step_has_the_reference_s_gradients(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the KL is bit-equal there; its gradient differs where a float32 tips the rounding to bfloat16,
    2^-8 of an entry at most, so x's gradients are within that of their size."""
    windows = torch.randint(3, 260, (1, 32), generator=torch.Generator().manual_seed(0))
    grads = []
    for name in ("native", "reference"):
        monkeypatch.setenv("DQ_TRAINING", name)
        student = student_model(tiny_model, windows)
        student.compute_dtype = torch.bfloat16
        student.begin()
        with torch.no_grad():
            for i, layer in enumerate(student.layers.values()):
                layer.x.copy_(torch.rand(layer.x.shape, generator=torch.Generator().manual_seed(i)) * layer.free)
        loss = student.kl_backward(0)
        grads.append((loss, [layer.x.grad for layer in student.layers.values()]))
    assert float(grads[0][0]) == pytest.approx(float(grads[1][0]), rel=1e-5)
    for a, b in zip(grads[0][1], grads[1][1], strict=True):
        assert a is not None
        assert b is not None
        assert float((a - b).norm() / b.norm()) < 2.0**-8


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
        (TrainingCall("mean_kl_with_grad", "cpu", torch.float16), "takes float32 or bfloat16"),
        (TrainingCall("projected_adam", "cpu", torch.bfloat16), "projected_adam on native takes float32"),
        (TrainingCall("lerp_mm", "cuda", torch.float32), "cpu tensors only"),
        (TrainingCall("lerp_mm", "cpu", torch.float64), "takes float32 or bfloat16"),
        (TrainingCall("lerp_mm", "cpu", torch.float32, packed=True), "unpacked"),
    ):
        assert reason in str(NATIVE.can_run(call))
