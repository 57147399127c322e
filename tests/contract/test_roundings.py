"""What every registered rounding method promises, on a student built as the pipeline builds it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dq_runtime.errors import Interrupted, SpecError
from dq_runtime.grids import GRIDS
from dq_runtime.modules.blocks import ModelBlocks
from dq_runtime.modules.fisher import kronecker_fisher
from dq_runtime.modules.student import StudentModel
from dq_runtime.modules.student_linear import StudentLinear
from dq_runtime.modules.surgery import bias_of, linears, replace_module, weight_of
from dq_runtime.packing.float4 import float4_tensors
from dq_runtime.rounding import ROUNDINGS, Job, Needs, Rounded
from dq_runtime.rounding.base import choices_to_tensors
from dq_runtime.spec import GridSpec

WINDOWS, LENGTH = 4, 24
# Settings that keep these tests short, for methods whose defaults are made for real models.
QUICK: dict[str, dict[str, Any]] = {
    "discquant": {"iters": 8, "batch": 2, "epochs": 2, "lr": 0.02},
    "autoround": {"iters": 8, "batch": 2},
    "adaround": {"iters": 16, "batch": 2, "lr": 0.2},
    "adaquant": {"iters": 8, "batch": 2, "lr": 0.1},
    "flexround": {"iters": 8, "batch": 2, "lr": 0.05},
    "omniquant": {"iters": 8, "batch": 2, "lr": 0.3},
    "gsq": {"iters": 8, "batch": 2, "lr": 0.005},
    "obc": {"order": "natural"},  # in a common order rows share their inverse: 0.1 s a run instead of 2
    "magr": {"iterations": 10},
}
every_method = pytest.mark.parametrize("method", list(ROUNDINGS))
every_grid = pytest.mark.parametrize(
    "grid", [GridSpec(bits=3), GridSpec(bits=2, group_size=16, symmetric=False)], ids=["3bit-sym", "2bit-asym"]
)


class Store:
    """A ``StateStore`` in memory, which can ask the method to stop after some steps."""

    def __init__(self, stop_after: int = 10**9) -> None:
        self.saved: tuple[int, dict[str, Tensor], dict[str, Any]] | None = None
        self.calls, self.stop_after = 0, stop_after

    def due(self) -> bool:
        return False

    def save(self, step: int, tensors: Mapping[str, Tensor], extra: Mapping[str, Any]) -> None:
        self.saved = step, {name: tensor.clone() for name, tensor in tensors.items()}, dict(extra)

    def load(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        return self.saved

    def stop_requested(self) -> bool:
        self.calls += 1
        return self.calls >= self.stop_after

    def stop(self, step: int, total: int) -> None:
        raise Interrupted(f"stopped after step {step} of {total}")


def build_student(directory: Path, spec: GridSpec) -> StudentModel:
    """As in the pipeline: every linear but the tied head becomes a StudentLinear."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    layers = {}
    for name, module in linears(model).items():
        layers[name] = StudentLinear(weight_of(module), bias_of(module), GRIDS.get(spec.name)(spec))
        replace_module(model, name, layers[name])
    vocabulary = model.config.vocab_size
    windows = torch.randint(0, vocabulary, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(3))
    return StudentModel(model, layers, windows, torch.float32)


def run(student: StudentModel, method: str, seed: int = 0, store: Store | None = None) -> Rounded:
    rounding = ROUNDINGS.get(method)(QUICK.get(method, {}))
    with_student = Needs.STUDENT in rounding.needs
    if with_student:
        student.begin(relaxed=Needs.RELAXED in rounding.needs)
    job = Job(
        student.layers,
        student if with_student else None,
        seed,
        store or Store(),
        lambda step, total, **figures: None,
        ModelBlocks(student) if Needs.BLOCKS in rounding.needs else None,
        (lambda: kronecker_fisher(student, seed)) if Needs.FISHER in rounding.needs else None,
    )
    try:
        rounded: Rounded = rounding.round(job)
        return rounded
    finally:
        student.end()


def same(a: Rounded, b: Rounded) -> bool:
    left, right = choices_to_tensors(a.choices), choices_to_tensors(b.choices)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@every_method
@every_grid
def test_codes_are_bytes_in_range_for_every_layer(tiny_model: Path, method: str, grid: GridSpec) -> None:
    student = build_student(tiny_model, grid)
    rounded = run(student, method)
    codes = rounded.codes
    assert set(codes) == set(student.layers)
    for name, layer in student.layers.items():
        assert codes[name].dtype is torch.uint8
        assert codes[name].shape == (layer.out_features, layer.in_features)
        assert int(codes[name].max()) < 2**grid.bits
        if (scales := rounded.choices[name].scales) is not None:
            assert scales.scale.shape == layer.scale.shape
            assert scales.scale.dtype is layer.scale.dtype, "in the serving dtype"
            assert bool(torch.isfinite(scales.scale).all() and (scales.scale != 0).all())
            assert (scales.zero is None) == grid.symmetric
            assert scales.zero is None or (scales.zero.dtype is torch.uint8 and int(scales.zero.max()) < 2**grid.bits)


@pytest.mark.parametrize("method", [name for name in ROUNDINGS if ROUNDINGS.get(name).any_grid])
@pytest.mark.parametrize("name", ["nf4", "nvfp4"])
def test_methods_of_any_grid_round_on_tables_no_worse_than_nearest_asks(
    tiny_model: Path, method: str, name: str
) -> None:
    """Codes in range, scales that the grid can store, and no weight further off than a few of its steps."""
    grid = GridSpec.named(name, group_size=None if name == "nvfp4" else 64)
    student = build_student(tiny_model, grid)
    rounded = run(student, method)
    for layer_name, layer in student.layers.items():
        choice = rounded.choices[layer_name]
        w = layer.weight()
        assert choice.codes.dtype is torch.uint8
        assert int(choice.codes.max()) < 16
        scales = choice.scales or layer.scales
        if name == "nvfp4":
            float4_tensors(layer_name, layer.pack(choice))  # raises where a scale is no e4m3
        values = layer.grid.decode(choice.codes.to(w.device), scales)
        nearest = layer.grid.decode(layer.grid.nearest(w, layer.scales), layer.scales)
        assert float((values - w).square().mean()) <= 9 * float((nearest - w).square().mean())


@every_method
@every_grid
def test_codes_are_neighbours_of_the_weight_where_the_method_says_so(
    tiny_model: Path, method: str, grid: GridSpec
) -> None:
    if not ROUNDINGS.get(method)({}).between_neighbours:
        pytest.skip(f"{method} may leave the two neighbours")
    student = build_student(tiny_model, grid)
    codes = run(student, method).codes
    for name, layer in student.layers.items():
        lo = layer.lo.int()
        step = codes[name].int() - lo
        assert bool(((step == 0) | ((step == 1) & layer.free)).all()), name


@every_method
def test_the_same_seed_gives_the_same_codes(tiny_model: Path, method: str) -> None:
    first, second = (run(build_student(tiny_model, GridSpec(bits=3)), method, seed=7) for _ in range(2))
    assert same(first, second)


@every_method
def test_rounding_leaves_the_student_as_it_was(tiny_model: Path, method: str) -> None:
    student = build_student(tiny_model, GridSpec(bits=3))
    before = {name: (layer.lo.clone(), layer.y.clone(), layer.scale.clone()) for name, layer in student.layers.items()}
    run(student, method)
    for name, layer in student.layers.items():
        after = (layer.lo, layer.y, layer.scale)
        assert all(torch.equal(a, b) for a, b in zip(after, before[name], strict=True))
        assert layer.x.numel() == 0, "x is freed"


@every_method
def test_stopped_and_resumed_gives_the_codes_of_an_uninterrupted_run(tiny_model: Path, method: str) -> None:
    whole = run(build_student(tiny_model, GridSpec(bits=3)), method)
    store = Store(stop_after=2)
    try:
        resumed = run(build_student(tiny_model, GridSpec(bits=3)), method, store=store)
    except Interrupted:
        assert store.saved is not None
        store.stop_after = 10**9
        resumed = run(build_student(tiny_model, GridSpec(bits=3)), method, store=store)
    assert same(whole, resumed)
    assert whole.history == resumed.history


@every_method
@every_grid
def test_no_layer_or_block_ends_worse_than_nearest_on_the_objective_of_the_method(
    tiny_model: Path, method: str, grid: GridSpec
) -> None:
    history = run(build_student(tiny_model, grid), method).history
    for row in history:
        if "loss_nearest" in row:
            assert 0 <= row["loss"] <= row["loss_nearest"], row
    if Needs.BLOCKS in ROUNDINGS.get(method)({}).needs:
        assert any("loss_nearest" in row for row in history), "methods that go layer by layer say what they reached"


@every_method
def test_every_method_but_nearest_finds_other_weights_than_nearest(tiny_model: Path, method: str) -> None:
    student = build_student(tiny_model, GridSpec(bits=3))
    moved = 0
    for name, choice in run(student, method).choices.items():
        layer = student.layers[name]
        nearest = layer.grid.decode(layer.grid.nearest(layer.weight(), layer.scales), layer.scales)
        moved += int((layer.grid.decode(choice.codes, choice.scales or layer.scales) != nearest).sum())
    assert (moved > 0) == (method != "nearest")


@every_method
def test_dead_inputs_and_repeated_tokens_are_survived(tiny_model: Path, method: str) -> None:
    """One token over and over: every second moment is of rank one, and columns whose input is 0 have none at all."""
    student = build_student(tiny_model, GridSpec(bits=3))
    with torch.no_grad():
        student.model.get_input_embeddings().weight[:, 5] = 0
    student.tokens.fill_(7)
    for name, choice in run(student, method).choices.items():
        layer = student.layers[name]
        decoded = layer.grid.decode(choice.codes, choice.scales or layer.scales)
        assert bool(torch.isfinite(decoded).all())
        assert float(decoded.abs().max()) <= 4 * float(layer.weight().abs().max()), name


@every_method
def test_options_are_complete_and_build_the_same_method_again(method: str) -> None:
    options = ROUNDINGS.get(method)({}).options()
    assert ROUNDINGS.get(method)(options).options() == options
    as_text = {name: str(value) for name, value in options.items()}  # as `dq quantize --set` passes them
    assert ROUNDINGS.get(method)(as_text).options() == options


@every_method
def test_an_unknown_option_is_refused_naming_the_known_ones(method: str) -> None:
    known = list(ROUNDINGS.get(method)({}).options())
    with pytest.raises(SpecError) as caught:
        ROUNDINGS.get(method)({"no_such_option": 1})
    assert method in str(caught.value)
    assert "no_such_option" in str(caught.value)
    assert all(name in str(caught.value) for name in known)


@every_method
def test_an_option_of_the_wrong_kind_is_refused(method: str) -> None:
    for name, value in ROUNDINGS.get(method)({}).options().items():
        bad = "certainly not" if not isinstance(value, str) else "no-such-choice"
        with pytest.raises(SpecError, match=name):
            ROUNDINGS.get(method)({name: bad})
        if isinstance(value, float):
            with pytest.raises(SpecError, match=name):
                ROUNDINGS.get(method)({name: "nan"})


def test_an_unknown_method_is_refused_naming_the_known_ones() -> None:
    with pytest.raises(SpecError, match=f"no-such.*{'.*'.join(ROUNDINGS)}"):
        ROUNDINGS.get("no-such")
