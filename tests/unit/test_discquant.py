"""DiscQuant: its two stages, how it is resumed, and what it promises about rates, memory and divergence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from students import MemoryStore, student_linear, student_model
from torch import Tensor

from dq_runtime.errors import Interrupted, SpecError
from dq_runtime.modules.blocks import ModelBlocks
from dq_runtime.modules.kl import kl_per_token
from dq_runtime.modules.student import StudentModel
from dq_runtime.modules.student_linear import Mode
from dq_runtime.rounding import ROUNDINGS, Choice, Job, Needs, Rounded, Weights
from dq_runtime.rounding.base import choices_to_tensors
from dq_runtime.rounding.discquant import DiscQuant, Recipe, distil, usual_rate, window_batches, window_order
from dq_runtime.rounding.latent import Latent

QUICK = {"iters": 8, "batch": 2, "epochs": 3, "lr": 0.02}


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return torch.randint(3, 260, (4, 32), generator=torch.Generator().manual_seed(0))


def _round(
    student: StudentModel,
    options: dict[str, Any],
    store: MemoryStore | None = None,
    method: str = "discquant",
    **job: Any,
) -> Rounded:
    rounding = ROUNDINGS.get(method)(options)
    student.begin(relaxed=Needs.RELAXED in rounding.needs)
    try:
        monitor = job.pop("monitor", lambda *a, **k: None)
        blocks = ModelBlocks(student)
        rounded: Rounded = rounding.round(Job(student.layers, student, 0, store or MemoryStore(), monitor, blocks))
        return rounded
    finally:
        student.end()


def _same(a: Rounded, b: Rounded) -> bool:
    left, right = choices_to_tensors(a.choices), choices_to_tensors(b.choices)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@torch.no_grad()
def _kl(student: StudentModel, rounded: Rounded) -> float:
    """Mean over the calibration windows."""
    total = 0.0
    for tokens in student.tokens:
        student.set_mode(Mode.TEACHER)
        teacher = student.logits(tokens)
        student.set_mode(Mode.PACKED, {n: student.layers[n].pack(c) for n, c in rounded.choices.items()})
        total += kl_per_token(teacher, student.logits(tokens)).mean().item()
    return total / len(student.tokens)


def test_the_second_stage_begins_where_autoround_ends_and_lowers_the_kl(tiny_model: Path, windows: Tensor) -> None:
    student = student_model(tiny_model, windows, bits=2, group_size=32)
    blockwise = {"iters": 8, "batch": 2}
    first = _round(student, blockwise, method="autoround")
    still = _round(student, QUICK | {"lr": 1e-9, "epochs": 1})
    for name, choice in first.choices.items():
        assert torch.equal(still.choices[name].codes, choice.codes)
        assert choice.scales is not None
        assert torch.equal(still.choices[name].scales.scale, choice.scales.scale)  # type: ignore[union-attr]
    assert still.history[: len(first.history)] == first.history
    moved = _round(student, QUICK | {"epochs": 8})
    assert _kl(student, moved) < 0.9 * _kl(student, first)
    assert all(torch.equal(c.scales.scale, first.choices[n].scales.scale) for n, c in moved.choices.items())  # type: ignore[union-attr]


def test_steps_of_several_windows_continue_bit_for_bit(tiny_model: Path, windows: Tensor) -> None:
    """Six steps of two windows."""
    options = QUICK | {"model_batch": 2}
    whole = _round(student_model(tiny_model, windows, bits=3, group_size=16), options)
    store = MemoryStore(stop_after=5)
    with pytest.raises(Interrupted):
        _round(student_model(tiny_model, windows, bits=3, group_size=16), options, store)
    assert store.saved is not None
    assert store.saved[2]["part"] == "model"
    rest = _round(student_model(tiny_model, windows, bits=3, group_size=16), options, store)
    assert _same(whole, rest)
    assert rest.history == whole.history
    assert sum("kl" in row for row in whole.history) == 6


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("stop", [1, 3, 9, 13])
def test_stopped_anywhere_it_continues_bit_for_bit(
    tiny_model: Path, windows: Tensor, stop: int, symmetric: bool
) -> None:
    """Two blocks, then 12 steps; a stop at the end of the first stage would be seen after the first step."""
    grid = {"bits": 3, "group_size": 16, "symmetric": symmetric}
    whole = _round(student_model(tiny_model, windows, **grid), QUICK)
    store = MemoryStore(stop_after=stop)
    with pytest.raises(Interrupted):
        _round(student_model(tiny_model, windows, **grid), QUICK, store)
    assert store.saved is not None
    assert store.saved[2]["part"] == ("blocks" if stop == 1 else "model")
    rest = _round(student_model(tiny_model, windows, **grid), QUICK, store)
    assert _same(whole, rest)
    assert rest.history == whole.history
    assert [row["step"] for row in rest.history] == list(range(1, len(rest.history) + 1))


def test_progress_is_one_bar_that_never_goes_back(tiny_model: Path, windows: Tensor) -> None:
    seen: list[tuple[int, int]] = []
    student = student_model(tiny_model, windows)
    _round(student, QUICK, monitor=lambda step, total, **figures: seen.append((step, total)))
    assert {total for _, total in seen} == {round(0.75 * 8 * 2) + 3 * 4}
    steps = [step for step, _ in seen]
    assert steps == sorted(steps)
    assert steps[-1] == seen[-1][1]


def test_every_window_comes_once_an_epoch_in_an_order_of_the_seed() -> None:
    order = window_order(5, 3, 1)
    epochs = [order[i : i + 5] for i in (0, 5, 10)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert window_order(5, 3, 2) != order == window_order(5, 3, 1)


def test_steps_of_several_windows_cut_that_order() -> None:
    order = window_order(5, 3, 1)
    assert window_batches(5, Recipe(epochs=3), 1) == [[window] for window in order]
    fours = window_batches(5, Recipe(epochs=3, model_batch=4), 1)
    assert [len(batch) for batch in fours] == [4, 4, 4]  # 15 windows: three are left over
    assert [window for batch in fours for window in batch] == order[:12]
    assert window_batches(5, Recipe(epochs=3, model_batch=15), 1) == [order]
    with pytest.raises(SpecError, match=r"model_batch 16 is more than 3 epochs of 5 windows have"):
        window_batches(5, Recipe(epochs=3, model_batch=16), 1)


def test_several_windows_make_one_step_with_the_sum_of_their_gradients(tiny_model: Path, windows: Tensor) -> None:
    """Against a latent that is handed the sum: the weights do not move before the last window. The KL is the mean."""
    student = student_model(tiny_model, windows, bits=2, group_size=32)
    choices = {n: Choice(la.grid.nearest(la.weight(), la.scales)) for n, la in student.layers.items()}
    (batch,) = window_batches(len(windows), Recipe(epochs=1, model_batch=4), 0)
    latents, alone = ({n: Latent.start(la, choices[n], 0.45, 5) for n, la in student.layers.items()} for _ in range(2))
    history = distil(
        Job(student.layers, student, 0, MemoryStore(), lambda *a, **k: None),
        None,
        latents,
        Recipe(epochs=1, model_batch=4, lr=0.05),
        [],
    )
    leaves = {n: latent.decoded().requires_grad_() for n, latent in alone.items()}
    weights = {n: (lambda w=leaf: w) for n, leaf in leaves.items()}
    kls = [float(student.kl_backward(window, weights)) for window in batch]
    assert [row["kl"] for row in history] == [pytest.approx(sum(kls) / 4, rel=1e-6)]
    for name, latent in alone.items():
        latent.lr = 0.05
        gradient = leaves[name].grad
        assert gradient is not None
        latent.step(gradient)
        assert latents[name].moments.steps == 1
        assert torch.equal(latents[name].u, latent.u)
        assert latents[name]._sum is None


def test_rates_follow_the_bits_of_each_layer(tiny_model: Path, windows: Tensor) -> None:
    assert [usual_rate(bits) for bits in (2, 3, 4)] == [0.004, 0.002, 0.001]
    student = student_model(tiny_model, windows, bits=4)
    history = _round(student, {"iters": 1, "epochs": 2, "warmup": 0.25}).history
    rates = [row["lr"] for row in history if "lr" in row]
    assert len(rates) == 8
    assert max(rates) == pytest.approx(usual_rate(4))
    assert rates[0] == pytest.approx(usual_rate(4) / 2)
    assert 0 < rates[-1] < 0.1 * usual_rate(4)


class Drifting:
    """A ``Student`` whose KL is multiplied by ``factor`` at every step."""

    def __init__(self, factor: float) -> None:
        self.windows, self.layers, self._kl, self._factor = 100, dict[str, Any](), 0.1, factor

    def kl_backward(self, window: int, weights: Weights | None = None) -> Tensor:
        self._kl *= self._factor
        return torch.tensor(self._kl)


@pytest.mark.parametrize("before", [0, 50])
def test_a_run_that_diverges_stops_and_says_what_to_lower(before: int) -> None:
    """The means of 32 steps that end n steps apart differ by factor^n: 1.1^15 is 4.2, so the limit of 4 is passed 15
    steps after the first 32, but nothing is said before there are twice 32. At 1.01 a run ends at 1.01^68 = 2."""
    layer = student_linear(torch.ones(2, 16), bits=3, group_size=16)
    nearest = Choice(layer.grid.nearest(layer.weight(), layer.scales))
    rows = [{"step": i + 1.0, "loss": 0.5} for i in range(before)]

    def run(factor: float) -> list[dict[str, float]]:
        latents = {"layer": Latent.start(layer, nearest, 0.45, 0)}
        quiet = Job({"layer": layer}, Drifting(factor), 0, MemoryStore(), lambda *a, **k: None)
        return distil(quiet, None, latents, Recipe(epochs=1), rows)

    assert len(run(1.01)) == before + 100
    with pytest.raises(SpecError, match=r"^the KL rose from [\d.]+ to [\d.]+ in 64 steps; use a smaller lr [^\n]+$"):
        run(1.1)
    with pytest.raises(SpecError, match=r"^the KL became inf at step \d+; use a smaller lr [^\n]+$"):
        run(1e40)


def test_nothing_is_kept_between_the_passes(tiny_model: Path, windows: Tensor) -> None:
    """No gradient outlives its layer's step, and x is never allocated."""
    student = student_model(tiny_model, windows)
    seen: list[int] = []

    def look(step: int, total: int, **figures: float) -> None:
        if "kl" in figures:
            seen.extend(layer.x.numel() for layer in student.layers.values())

    _round(student, QUICK | {"epochs": 1}, monitor=look)
    assert seen
    assert not any(seen)
    assert all(p.grad is None for p in student.model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iters": 0}, "iters must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"model_batch": 0}, "model_batch must be at least 1"),
        ({"lr": -1}, "lr must be 0 or more"),
        ({"lr": "nan"}, "lr must be 0 or more"),
        ({"lr": "inf"}, "lr must be 0 or more"),
        ({"warmup": 1}, "warmup must be in"),
        ({"room": 0.6}, "room must be in"),
        ({"room": "nan"}, "room must be in"),
        ({"clamp": 0.5}, "has no option 'clamp'; known: iters, batch, epochs, model_batch, lr"),
    ],
    ids=str,
)
def test_bad_options_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match="rounding 'discquant'") as caught:
        DiscQuant(options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
