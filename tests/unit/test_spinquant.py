"""SpinQuant: its optimiser by hand, the objective against its definition, learning, and a resumed run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dq_runtime
from dq_runtime import pipeline
from dq_runtime.grids import GRIDS
from dq_runtime.modules.kl import mean_kl
from dq_runtime.modules.rotate import RotatableModel
from dq_runtime.modules.rotate_objective import RoundedInBasis
from dq_runtime.spec import GridSpec, QuantSpec, RoundingSpec
from dq_runtime.transforms import Task
from dq_runtime.transforms.rotation import Dense, random_hadamards
from dq_runtime.transforms.spinquant import SpinQuant, cayley_step

WINDOWS = torch.randint(0, 300, (4, 32), generator=torch.Generator().manual_seed(2))


def load(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def objective_of(model: Any, bits: int | None) -> tuple[RotatableModel, RoundedInBasis]:
    rotatable = RotatableModel(model, "spinquant")
    names = [seat.name for seat in rotatable.seats if seat.name != "lm_head"]
    grids = {} if bits is None else {name: GridSpec(bits=bits, group_size=16) for name in names}
    return rotatable, RoundedInBasis(model, rotatable, grids, WINDOWS, torch.float32)


def matrices(rotatable: RotatableModel, seed: int = 0) -> list[Tensor]:
    rotations = random_hadamards(rotatable.widths, seed)
    return [rotation.apply(torch.eye(rotation.n).double()).float() for rotation in rotations]


def test_a_step_by_hand() -> None:
    """From R = I along M = (0, -1/2; 1/2, 0), skew already, so W = M and ||W||_F = 0.71. With lr 1, below 1 / 0.71, the
    step is the Cayley transform of W / 2 = (0, -1/4; 1/4, 0): the rotation (1 - t^2, -2t; 2t, 1 - t^2) / (1 + t^2) by
    2 atan(t), t = 1/4, which is (15, -8; 8, 15) / 17."""
    momentum = torch.tensor([[0.0, -0.5], [0.5, 0.0]], dtype=torch.float64)
    matrix, kept = cayley_step(torch.eye(2, dtype=torch.float64), momentum, 1.0)
    torch.testing.assert_close(matrix, torch.tensor([[15.0, -8.0], [8.0, 15.0]], dtype=torch.float64) / 17)
    assert torch.equal(kept, momentum)
    # Ten times as long, the step is limited to ||a W||_F = 1: a = 1 / 7.07, t = a 5 / 2 = 0.3536, t^2 = 1/8.
    limited, _ = cayley_step(torch.eye(2, dtype=torch.float64), 10 * momentum, 1.0)
    torch.testing.assert_close(limited[0, 0], torch.tensor(7 / 9, dtype=torch.float64))


def test_a_symmetric_gradient_turns_nothing() -> None:
    symmetric = torch.tensor([[1.0, 2.0], [2.0, 5.0]], dtype=torch.float64)
    matrix, _ = cayley_step(torch.eye(2, dtype=torch.float64), symmetric, 1.0)
    assert torch.equal(matrix, torch.eye(2, dtype=torch.float64))


def test_the_optimiser_finds_a_rotation_and_stays_orthogonal() -> None:
    """Hadamard to a nearby rotation, 16 wide: the distance falls, and 200 steps leave no drift."""
    start = random_hadamards([16], 0)[0].apply(torch.eye(16, dtype=torch.float64))
    noise = torch.randn(16, 16, generator=torch.Generator().manual_seed(1)).double() * 0.05
    target = start @ torch.matrix_exp(noise - noise.T)

    class Distance:
        windows = 1

        def kl(self, window: int, given: Any) -> Tensor:
            return (given[0] - target.float()).square().sum()

    method = SpinQuant({"steps": 200, "lr": 0.1})
    found = method.choose(Task([16], 0, lambda *a, **k: None, Distance()))
    (rotation,) = found.rotations
    assert isinstance(rotation, Dense)
    torch.testing.assert_close(rotation.matrix @ rotation.matrix.T, torch.eye(16).double(), rtol=0, atol=1e-12)
    assert found.history[-1]["kl"] < 1e-3 * found.history[0]["kl"]


def test_what_does_not_help_is_not_kept() -> None:
    class Moody:
        """Pulls away from wherever it is, and is worse off every time it is asked."""

        windows = 1
        asked = 0

        def kl(self, window: int, given: Any) -> Tensor:
            self.asked += 1
            pull = (given[0] * torch.arange(16.0).view(4, 4)).sum()
            return pull - pull.detach() + self.asked

    found = SpinQuant({"steps": 3}).choose(Task([4], 7, lambda *a, **k: None, Moody()))
    start = random_hadamards([4], 7)[0].apply(torch.eye(4).double())
    assert torch.equal(found.rotations[0].apply(torch.eye(4).double()), start)


def test_without_rounding_every_basis_costs_nothing(tiny_model: Path) -> None:
    rotatable, objective = objective_of(load(tiny_model), None)
    assert abs(float(objective.kl(0, matrices(rotatable)))) < 1e-6


@pytest.mark.parametrize("bits", [2, 4])
def test_the_objective_is_the_kl_of_the_model_that_would_be_written(tiny_model: Path, bits: int) -> None:
    rotatable, objective = objective_of(load(tiny_model), bits)
    given = matrices(rotatable, seed=3)
    found = objective.kl(1, given)

    model = load(tiny_model)
    tokens = WINDOWS[1].unsqueeze(0)
    original = model(input_ids=tokens).logits[0].detach()
    other = RotatableModel(model, "spinquant")
    other.rotate(random_hadamards(other.widths, 3))
    grid = GRIDS.get("int")(GridSpec(bits=bits, group_size=16))
    with torch.no_grad():
        for seat in other.seats:
            if seat.name != "lm_head":
                scales = grid.fit(seat.linear.weight)
                seat.linear.weight.copy_(grid.decode(grid.nearest(seat.linear.weight, scales), scales))
        expected = mean_kl(model(input_ids=tokens).logits[0], original)
    assert float(expected) > 0.001
    # A weight on the edge between two codes may fall on either side of it in float32.
    assert float(found) == pytest.approx(float(expected), rel=0.02)


def test_every_basis_gets_a_gradient_through_the_rounding(tiny_model: Path) -> None:
    rotatable, objective = objective_of(load(tiny_model), 2)
    leaves = [matrix.requires_grad_() for matrix in matrices(rotatable)]
    objective.kl(0, leaves).backward()  # type: ignore[no-untyped-call]
    for leaf in leaves:
        assert leaf.grad is not None
        assert bool(torch.isfinite(leaf.grad).all())
        assert float(leaf.grad.norm()) > 0


def test_learning_lowers_the_kl_on_its_windows(outlying_model: Path) -> None:
    rotatable, objective = objective_of(load(outlying_model), 2)
    steps: list[int] = []
    method = SpinQuant({"steps": 12, "lr": 0.3})
    found = method.choose(Task(rotatable.widths, 0, lambda step, total, **k: steps.append(step), objective))
    assert steps == list(range(1, 13))
    assert found.history[-1]["kl"] < 0.95 * found.history[0]["kl"]
    for rotation in found.rotations:
        eye = torch.eye(rotation.n, dtype=torch.float64)
        torch.testing.assert_close(rotation.apply(rotation.apply(eye).T), eye, rtol=0, atol=1e-12)


def test_a_resumed_run_rounds_in_the_same_bases_without_learning_again(
    tiny_model: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = QuantSpec(
        GridSpec(bits=3), transform="spinquant", transform_options={"steps": 2}, rounding=RoundingSpec("nearest")
    )
    settings: dict[str, Any] = {"windows": 3, "window_length": 32, "held_out_windows": 2, "compute_dtype": "float32"}

    def run(**changes: Any) -> Any:
        return dq_runtime.quantize(str(tiny_model), tmp_path / "out", spec, calibration=str(tiny_text), **settings,
                                   **changes)  # fmt: skip

    report = run()
    assert report["spec"]["transform_options"] == {
        "steps": 2,
        "batch": 1,
        "lr": SpinQuant({}).recipe.lr,
        "momentum": 0.9,
    }
    assert [row["step"] for row in report["transform"]["history"]] == [0, 1, 2, 3]
    whole = (tmp_path / "out" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "out")

    def killed(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "student_layers", killed)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert (tmp_path / "out.partial" / "basis.safetensors").exists()
    monkeypatch.setattr(SpinQuant, "choose", None)  # learning again would fail
    again = run(resume=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == whole
    assert again["transform"]["history"] == report["transform"]["history"]
