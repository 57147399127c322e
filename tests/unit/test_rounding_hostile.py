"""Input that no rounding method can make sense of: one sentence or the stated fallback, never bad codes."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_model
from safetensors.torch import load_file, save_file
from students import MemoryStore, student_linear
from torch import Tensor, nn

import dq_runtime
from dq_runtime.errors import DQError, SpecError
from dq_runtime.modules.blocks import ModelBlocks
from dq_runtime.modules.fisher import kronecker_fisher
from dq_runtime.modules.student import StudentModel
from dq_runtime.modules.surgery import linears, replace_module
from dq_runtime.rounding import ROUNDINGS, Job, Needs, Rounded
from dq_runtime.runtime.dense import load_dense
from dq_runtime.spec import GridSpec, Override, QuantSpec, RoundingSpec, Target

# Of every method that has it, so that this file says nothing of any method in particular.
FEW = {"steps": 2, "iters": 2, "batch": 2, "passes": 2, "epochs": 1}
every_method = pytest.mark.parametrize("method", list(ROUNDINGS))


def _options(method: str) -> dict[str, Any]:
    known = ROUNDINGS.get(method)({}).options()
    return {name: value for name, value in FEW.items() if name in known}


def _quantize(model: Path, text: Path, output: Path, spec: QuantSpec, **changes: Any) -> Any:
    settings = {"windows": 2, "window_length": 32, "held_out_windows": 2, "compute_dtype": "float32", **changes}
    return dq_runtime.quantize(str(model), output, spec, calibration=str(text), **settings)


@pytest.fixture(scope="module")
def smallest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of at most 64 x 32, on which the O(N K^3) of obc takes no time."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    return build_tiny_model(tmp_path_factory.mktemp("models") / "smallest", **sizes)


@pytest.fixture(scope="module")
def overflowing(smallest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of finite weights whose activations are not: one norm multiplies by 3e38."""
    path = tmp_path_factory.mktemp("models") / "overflowing"
    shutil.copytree(smallest, path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"].fill_(3e38)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@every_method
def test_activations_that_overflow_are_one_sentence_and_leave_nothing(
    overflowing: Path, tiny_text: Path, tmp_path: Path, method: str
) -> None:
    spec = QuantSpec(GridSpec(bits=3, group_size=32), rounding=RoundingSpec(method, _options(method)))
    with pytest.raises(DQError) as caught:
        _quantize(overflowing, tiny_text, tmp_path / "out", spec)
    said = str(caught.value)
    assert "\n" not in said
    assert "NaN or infinity" in said or "the KL became nan" in said or "is not finite" in said
    assert not (tmp_path / "out").exists()


def test_choosing_bits_by_activations_that_overflow_is_one_sentence(
    overflowing: Path, tiny_text: Path, tmp_path: Path
) -> None:
    spec = QuantSpec(GridSpec(group_size=32), rounding=RoundingSpec("nearest"), target=Target(3.1))
    with pytest.raises(DQError, match=r"q_proj at 2 bits the model gives NaN or infinity; [^\n]+$"):
        _quantize(overflowing, tiny_text, tmp_path / "out", spec)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        (QuantSpec(GridSpec(group_size=128)), r"q_proj: in_features 64 is not a multiple of group size 128"),
        (QuantSpec(overrides=(Override("*.down_proj", 3, 128),)), r"down_proj: in_features 192 .* group size 128"),
        (QuantSpec(target=Target(1.9)), r"--target-bpw 1.9 cannot be reached .* 2.250 to 4.250"),
        (QuantSpec(target=Target(4.26)), r"--target-bpw 4.26 cannot be reached .* 2.250 to 4.250"),
        (QuantSpec(GridSpec(group_size=128), target=Target(3)), r"q_proj: in_features 64 is not a multiple"),
    ],
    ids=["group", "override's group", "target too low", "target too high", "group and target"],
)
def test_a_request_that_does_not_fit_the_model_is_one_sentence(
    tiny_model: Path, tiny_text: Path, tmp_path: Path, spec: QuantSpec, named: str
) -> None:
    with pytest.raises(SpecError, match=named) as caught:
        _quantize(tiny_model, tiny_text, tmp_path / "out", spec)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


class TwoExperts(nn.Module):
    """A mixture whose router sends every token to the first expert; the second is skipped, or called with no rows."""

    def __init__(self, mlp: nn.Module, skips: bool) -> None:
        super().__init__()
        self.experts = nn.ModuleList([mlp, copy.deepcopy(mlp)])
        self.skips = skips

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        chosen = torch.zeros(len(flat), dtype=torch.int64)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            rows = torch.nonzero(chosen == i)[:, 0]
            if len(rows) or not self.skips:
                out = out.index_add(0, rows, expert(flat[rows]).to(out.dtype))
        return out.view(x.shape)


def _rounded(directory: Path, method: str, skips: bool) -> tuple[StudentModel, Rounded]:
    model = load_dense(str(directory)).model
    model.model.layers[1].mlp = TwoExperts(model.model.layers[1].mlp, skips)
    layers = {}
    for name, module in linears(model).items():
        layers[name] = student_linear(module.weight, None, bits=3, group_size=32)
        replace_module(model, name, layers[name])
    windows = torch.randint(3, 260, (4, 16), generator=torch.Generator().manual_seed(0))
    student = StudentModel(model, layers, windows, torch.float32)
    rounding = ROUNDINGS.get(method)(_options(method))
    if Needs.STUDENT in rounding.needs:
        student.begin(relaxed=Needs.RELAXED in rounding.needs)
    job = Job(
        layers,
        student,
        0,
        MemoryStore(),
        lambda *a, **k: None,
        ModelBlocks(student) if Needs.BLOCKS in rounding.needs else None,
        lambda: kronecker_fisher(student, 0),
    )
    return student, rounding.round(job)


@pytest.mark.parametrize(
    ("method", "skips"),
    # Skipped experts leave no gradient, and experts called with no rows one of zeros: one method of each kind has both.
    [
        *((m, True) for m in ROUNDINGS),
        *((m, False) for m in ("discquant", "discquant-paper", "gptq", "autoround", "yaqa", "qat")),
    ],
)
def test_an_expert_without_calibration_tokens_is_rounded_to_nearest(smallest: Path, method: str, skips: bool) -> None:
    """Except where the method itself says what else: the paper starts at random, and two steps of c* end nowhere."""
    student, rounded = _rounded(smallest, method, skips)
    idle = [name for name in student.layers if "experts.1" in name]
    assert len(idle) == 3
    for name in idle:
        layer, choice = student.layers[name], rounded.choices[name]
        nearest = layer.grid.nearest(layer.weight(), layer.scales)
        if ROUNDINGS.get(method)({}).between_neighbours:
            up = choice.codes.int() - layer.lo.int()
            assert bool(((up == 0) | (up == 1)).all())
        elif choice.scales is None or torch.equal(choice.scales.scale, layer.scales.scale):
            assert torch.equal(choice.codes, nearest), name
        else:
            assert torch.equal(choice.codes, layer.grid.nearest(layer.weight(), choice.scales)), name
    busy = [name for name in student.layers if "experts.0" in name]
    assert all(int(rounded.codes[name].max()) < 8 for name in busy)
    if Needs.FISHER in ROUNDINGS.get(method)({}).needs:
        assert sum("uncalibrated" in row for row in rounded.history) == len(idle)
