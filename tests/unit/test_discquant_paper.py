"""DiscQuant as published: its update against torch's AdamW, its schedule, what the clamp forbids, and what it finds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from students import FakeLayer, FakeStudent, MemoryStore, job, student_model
from torch import Tensor

from dq_runtime.errors import Interrupted, SpecError
from dq_runtime.modules.student_linear import Mode
from dq_runtime.rounding.base import Choice
from dq_runtime.rounding.discquant_paper import DiscQuantPaper
from dq_runtime.rounding.nearest import Nearest


def _uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def _schedule(lr: float, warmup: float, step: int, total: int) -> float:
    """Linear warm-up over round(warmup * total) steps, then half a cosine to zero."""
    warm = max(1, round(warmup * total))
    if step < warm:
        return lr * (step + 1) / warm
    return lr / 2 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))


@pytest.mark.parametrize("weight_decay", [0.01, 0.0, 0.3])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_update_is_torch_s_adamw_on_the_official_gradient(weight_decay: float, batch: int) -> None:
    n, k, total, rho, clamp = 5, 16, 12, 200.0, 0.5
    free = _uniform(n, k, seed=1) > 0.2
    y = torch.where(free, _uniform(n, k, seed=2), torch.tensor(1.7))  # outside the grid where not free
    targets = _uniform(4, n, k, seed=3)

    def kl(x: Tensor, window: int) -> Tensor:
        return 1e-4 * ((x - targets[window]).square() * (1 + x)).sum()

    seen: list[Tensor] = []
    layer = FakeLayer(y, free)
    student = FakeStudent(layer, kl)
    options = {"steps": total, "batch": batch, "lr": 0.07, "weight_decay": weight_decay}
    DiscQuantPaper(options).round(job(student, 5, monitor=lambda *a, **f: seen.append(layer.x.detach().clone())))
    assert student.asked == [i % 4 for i in range(total * batch)]

    x = torch.nn.Parameter(torch.rand(n, k, generator=torch.Generator().manual_seed(5)) * free)
    optimizer = torch.optim.AdamW([x], lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay)
    for step in range(total):
        optimizer.param_groups[0]["lr"] = _schedule(0.07, 0.125, step, total)
        optimizer.zero_grad()
        loss = sum((kl(x, (step * batch + i) % 4) for i in range(batch)), torch.zeros(())) / batch
        loss.backward()
        assert x.grad is not None
        pull = (rho / layer.mean_squared_step() * x.grad).clamp(-clamp, clamp)
        x.grad = torch.where(free, -(2 * y - 1) + pull, 0.0)  # as in the released code
        optimizer.step()
        with torch.no_grad():
            x.clamp_(0, 1)
        torch.testing.assert_close(seen[step], x.detach(), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("total", "warmup"), [(1, 0.125), (2, 0.125), (16, 0.125), (40, 0.0), (40, 0.9), (7, 0.5)])
def test_learning_rate_schedule(total: int, warmup: float) -> None:
    student = FakeStudent(FakeLayer(_uniform(2, 4)), lambda x, w: 0 * x.sum())
    history = DiscQuantPaper({"steps": total, "warmup": warmup, "lr": 0.2}).round(job(student)).history
    rates = [h["lr"] for h in history]
    assert rates == pytest.approx([_schedule(0.2, warmup, s, total) for s in range(total)])
    assert max(rates) == pytest.approx(0.2)
    assert all(0 < r <= 0.2 * (1 + 1e-12) for r in rates), "a step of rate 0 would be a step wasted"


def test_steps_default_to_one_pass_over_the_windows() -> None:
    for windows, batch, expected in ((6, 1, 6), (6, 4, 1), (6, 2, 3), (2, 4, 1)):
        student = FakeStudent(FakeLayer(_uniform(2, 4)), lambda x, w: 0 * x.sum(), windows)
        history = DiscQuantPaper({"batch": batch}).round(job(student)).history
        assert [h["step"] for h in history] == list(range(1, expected + 1))


@pytest.mark.parametrize("clamp", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("start", ["random", "original"])
def test_the_clamp_decides_who_may_leave_the_nearest_value(clamp: float, start: str) -> None:
    """An adversary pushes every weight away from its nearest value as hard as it can. Where |1 - 2y| > clamp the sign
    of the gradient never changes, so the weight ends at its nearest value; where it is smaller, the adversary wins."""
    y = _uniform(16, 64, seed=1)
    y = y[((1 - 2 * y).abs() - clamp).abs() > 0.02].unsqueeze(0)
    away = 1 - 2 * y.round()  # +1 where nearest is 0
    student = FakeStudent(FakeLayer(y), lambda x, w: -1e6 * (away * x).sum())
    options = {"steps": 200, "clamp": clamp, "start": start, "weight_decay": 0.0}
    codes = DiscQuantPaper(options).round(job(student)).codes["layer"]
    chosen = codes - student.layers["layer"].lo
    bound_to_nearest = (1 - 2 * y).abs() > clamp
    assert bool(bound_to_nearest.any())
    assert torch.equal(chosen[bound_to_nearest].float(), y.round()[bound_to_nearest])
    assert torch.equal(chosen[~bound_to_nearest].float(), 1 - y.round()[~bound_to_nearest])


def test_without_a_kl_every_weight_ends_at_its_nearest_value() -> None:
    y = _uniform(8, 64)
    student = FakeStudent(FakeLayer(y), lambda x, w: 0 * x.sum())
    layer = student.layers["layer"]
    codes = DiscQuantPaper({"steps": 300}).round(job(student)).codes["layer"]
    clear = (y - 0.5).abs() > 0.01  # weight decay pulls the undecided ones down
    assert torch.equal((codes - layer.lo)[clear], y.round().to(torch.uint8)[clear])


@pytest.mark.parametrize("seed", [0, 1])
def test_it_finds_a_known_optimum_at_a_flipped_vertex(seed: int) -> None:
    y = 0.3 + 0.4 * _uniform(6, 32, seed=seed)  # all within reach of the clamp
    best = (_uniform(6, 32, seed=seed + 10) > 0.5).float()
    assert not torch.equal(best, y.round())
    student = FakeStudent(FakeLayer(y), lambda x, w: (x - best).square().sum())
    layer = student.layers["layer"]
    codes = DiscQuantPaper({"steps": 100}).round(job(student, seed)).codes["layer"]
    assert torch.equal(codes, layer.lo + best.to(torch.uint8))


def test_a_coupled_loss_is_lower_than_nearest_s() -> None:
    """The rows must keep their sums: rounding errors have to cancel, which nearest does not know."""
    y, weights = _uniform(32, 16, seed=3), _uniform(32, 16, seed=4)

    def loss(x: Tensor, window: int = 0) -> Tensor:
        return ((weights * (x - y)).sum(1)).square().mean()

    student = FakeStudent(FakeLayer(y), loss)
    layer = student.layers["layer"]
    codes = DiscQuantPaper({"steps": 200}).round(job(student)).codes["layer"]
    assert loss((codes - layer.lo).float()) < 0.25 * loss(y.round())


@pytest.mark.parametrize("start", ["random", "original"])
def test_x_stays_in_the_unit_interval_and_at_zero_where_it_is_not_free(start: str) -> None:
    free = _uniform(8, 32, seed=1) > 0.3
    y = torch.where(free, _uniform(8, 32, seed=2), torch.tensor(2.5))
    layer = FakeLayer(y, free)
    noise = torch.randn(4, 8, 32, generator=torch.Generator().manual_seed(3))
    student = FakeStudent(layer, lambda x, w: 1e3 * (noise[w] * x).sum())
    seen: list[Tensor] = []
    options = {"steps": 20, "lr": 0.5, "start": start}
    result = DiscQuantPaper(options).round(job(student, monitor=lambda *a, **f: seen.append(layer.x.detach().clone())))
    assert len(seen) == 20
    for x in seen:
        assert 0 <= x.min() <= x.max() <= 1
        assert not x[~free].any()
    assert torch.equal(result.codes["layer"][~free], layer.lo[~free])
    assert all(0 <= h["rounded"] <= 1 for h in result.history)


def test_a_huge_but_finite_gradient_is_clamped_and_a_kl_that_is_not_finite_is_one_sentence() -> None:
    layer = FakeLayer(_uniform(2, 4))
    DiscQuantPaper({"steps": 3}).round(job(FakeStudent(layer, lambda x, w: 1e37 * x.sum())))
    assert bool(torch.isfinite(layer.x).all())
    student = FakeStudent(FakeLayer(_uniform(2, 4)), lambda x, w: x.sum() * math.nan)
    with pytest.raises(SpecError, match=r"^the KL became nan at step 1; [^\n]+$"):
        DiscQuantPaper({"steps": 3}).round(job(student))


def test_stopping_and_continuing_gives_the_same_codes_and_history() -> None:
    y, noise = _uniform(8, 32), torch.randn(4, 8, 32, generator=torch.Generator().manual_seed(1))

    def fresh() -> FakeStudent:
        return FakeStudent(FakeLayer(y), lambda x, w: 1e-4 * (noise[w] * x.square()).sum())

    method = DiscQuantPaper({"steps": 30})
    whole = method.round(job(fresh()))
    store = MemoryStore(stop_after=11)
    with pytest.raises(Interrupted, match="step 11 of 30"):
        method.round(job(fresh(), store=store))
    continued = fresh()
    rest = method.round(job(continued, store=store))
    assert torch.equal(rest.codes["layer"], whole.codes["layer"])
    assert rest.history == whole.history
    assert continued.asked == [s % 4 for s in range(11, 30)]


def test_a_stop_during_the_last_step_finishes_instead() -> None:
    student = FakeStudent(FakeLayer(_uniform(2, 4)), lambda x, w: 0 * x.sum())
    assert len(DiscQuantPaper({"steps": 5}).round(job(student, store=MemoryStore(stop_after=5))).history) == 5


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return torch.randint(3, 260, (4, 32), generator=torch.Generator().manual_seed(0))


def _packed_kl(student: Any, codes: dict[str, Tensor]) -> float:
    """Mean KL of the rounded model over the calibration windows."""
    from dq_runtime.modules.kl import kl_per_token

    total = 0.0
    with torch.no_grad():
        for tokens in student.tokens:
            student.set_mode(Mode.TEACHER)
            teacher = student.logits(tokens)
            student.set_mode(Mode.PACKED, {n: student.layers[n].pack(Choice(c)) for n, c in codes.items()})
            total += kl_per_token(teacher, student.logits(tokens)).mean().item()
    return total / len(student.tokens)


def test_forty_steps_on_a_tiny_model_beat_nearest_and_repeat_for_a_seed(tiny_model: Path, windows: Tensor) -> None:
    def run(seed: int, steps: int) -> tuple[Any, dict[str, Tensor]]:
        student = student_model(tiny_model, windows)
        student.begin()
        result = DiscQuantPaper({"steps": steps}).round(job(student, seed))
        return student, dict(result.codes)

    student, codes = run(0, 40)
    nearest = Nearest({}).round(job(student)).codes
    assert _packed_kl(student, codes) < 0.8 * _packed_kl(student, dict(nearest))

    once, again, other = (run(seed, 4)[1] for seed in (0, 0, 1))
    assert all(torch.equal(once[n], again[n]) for n in once)
    assert any(not torch.equal(once[n], other[n]) for n in once)


def test_every_code_is_one_of_the_two_neighbours(tiny_model: Path, windows: Tensor) -> None:
    student = student_model(tiny_model, windows)
    student.begin()
    for name, codes in DiscQuantPaper({"steps": 3}).round(job(student)).codes.items():
        layer = student.layers[name]
        assert codes.dtype is torch.uint8
        assert bool(((codes == layer.lo) | ((codes == layer.lo + 1) & layer.free)).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 1}, "has no option 'rate'; known: steps, batch, lr"),
        ({"lr": "fast"}, "option lr takes a float, got 'fast'"),
        ({"lr": None}, "option lr takes a float"),
        ({"lr": True}, "option lr takes a float"),
        ({"steps": "2.5"}, "option steps takes a int"),
        ({"steps": 2.5}, "option steps takes a int"),
        ({"start": 3}, "start"),
        ({"lr": 0}, "lr must be positive"),
        ({"lr": "nan"}, "lr must be positive"),
        ({"lr": "inf"}, "lr must be positive"),
        ({"rho": "inf"}, "rho must be positive"),
        ({"clamp": -1}, "clamp must be positive"),
        ({"batch": 0}, "batch must be positive"),
        ({"warmup": 1.0}, "warmup must be in"),
        ({"beta1": -0.1}, "beta1 must be in"),
        ({"beta2": 1}, "beta2 must be in"),
        ({"steps": -1}, "cannot be negative"),
        ({"weight_decay": -0.1}, "cannot be negative"),
        ({"weight_decay": "nan"}, "weight_decay"),
        ({"start": "zero"}, "start must be 'random' or 'original'"),
    ],
    ids=str,
)
def test_bad_options_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match="rounding 'discquant-paper'") as caught:
        DiscQuantPaper(options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_from_the_command_line_are_converted_and_filled_in() -> None:
    options = DiscQuantPaper({"steps": "12", "lr": "0.05", "start": "original"}).options()
    assert options["steps"] == 12
    assert options["lr"] == 0.05
    assert options["start"] == "original"
    assert options["rho"] == 200.0
    assert DiscQuantPaper(options).options() == options
