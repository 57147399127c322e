"""The KL and its hand-written gradient, against torch's own in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dq_runtime.modules.kl import CHUNK, kl_per_token, mean_kl

RAGGED = (1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3)
VOCABULARY = 97


def _logits(tokens: int, seed: int, dtype: torch.dtype = torch.float32, size: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (size * torch.randn(tokens, VOCABULARY, generator=generator)).to(dtype)


def _exact(teacher: Tensor, student: Tensor) -> Tensor:
    """KL of each token by torch.nn.functional.kl_div in float64."""
    p, q = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
    return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", RAGGED)
def test_values_match_kl_div_in_float64(tokens: int, dtype: torch.dtype) -> None:
    teacher, student = _logits(tokens, 0, dtype), _logits(tokens, 1, dtype)
    exact = _exact(teacher, student)
    # The inputs are exact in float64; the error is that of float32 log-softmax and a sum over the vocabulary.
    per_token = kl_per_token(teacher, student)
    assert per_token.dtype is torch.float32
    torch.testing.assert_close(per_token.double(), exact, rtol=1e-5, atol=1e-5)
    loss = mean_kl(student, teacher)
    assert loss.dtype is torch.float32
    assert loss.shape == ()
    torch.testing.assert_close(loss.double(), exact.mean(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", RAGGED)
def test_gradient_matches_autograd_of_the_plain_formula(tokens: int) -> None:
    teacher, student = _logits(tokens, 2), _logits(tokens, 3).requires_grad_()
    (3.0 * mean_kl(student, teacher)).backward()
    plain = student.detach().double().requires_grad_()
    (3.0 * _exact(teacher, plain).mean()).backward()
    assert student.grad is not None
    assert plain.grad is not None
    torch.testing.assert_close(student.grad.double(), plain.grad, rtol=1e-4, atol=1e-6 / tokens)


def test_bfloat16_gradient_is_that_of_the_rounded_logits() -> None:
    teacher, student = _logits(CHUNK + 1, 4, torch.bfloat16), _logits(CHUNK + 1, 5, torch.bfloat16).requires_grad_()
    mean_kl(student, teacher).backward()
    plain = student.detach().double().requires_grad_()
    _exact(teacher, plain).mean().backward()
    assert student.grad is not None
    assert plain.grad is not None
    assert student.grad.dtype is torch.bfloat16
    # Each entry is rounded to bfloat16 once (2^-9 relative) after subtracting two float32 probabilities.
    torch.testing.assert_close(student.grad.double(), plain.grad, rtol=2**-8, atol=1e-7 / CHUNK)


def test_no_gradient_reaches_the_teacher() -> None:
    teacher, student = _logits(3, 6).requires_grad_(), _logits(3, 7).requires_grad_()
    mean_kl(student, teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_of_equal_distributions_is_zero_with_zero_gradient(dtype: torch.dtype) -> None:
    logits = _logits(CHUNK + 1, 8, dtype)
    assert kl_per_token(logits, logits.clone()).abs().max() == 0
    student = logits.clone().requires_grad_()
    loss = mean_kl(student, logits)
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_adding_a_constant_to_the_logits_changes_nothing() -> None:
    teacher, student = _logits(5, 9), _logits(5, 10)
    torch.testing.assert_close(kl_per_token(teacher + 4, student - 2), kl_per_token(teacher, student))


@pytest.mark.parametrize("size", [1e3, 1e4, 1e30])
def test_large_logits_stay_finite(size: float) -> None:
    teacher, student = _logits(4, 11, size=size), _logits(4, 12, size=size).requires_grad_()
    loss = mean_kl(student, teacher)
    loss.backward()
    assert math.isfinite(loss.item())
    assert student.grad is not None
    assert bool(torch.isfinite(student.grad).all())
    assert bool(torch.isfinite(kl_per_token(teacher, student.detach())).all())


def test_known_value() -> None:
    teacher = torch.tensor([[math.log(0.75), math.log(0.25)]])
    student = torch.tensor([[math.log(0.5), math.log(0.5)]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert kl_per_token(teacher, student).item() == pytest.approx(expected, rel=1e-6)
