"""A run that diverges, meets NaN or runs out of memory stops with one sentence, and goes on once that was lowered."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from students import MemoryStore
from torch import Tensor

import dq_runtime
from dq_runtime.errors import DQError, SpecError
from dq_runtime.modules.blocks import TransformerBlock
from dq_runtime.modules.student import StudentModel
from dq_runtime.out_of_memory import is_out_of_memory, raise_out_of_memory
from dq_runtime.rounding import Job
from dq_runtime.rounding.whole_model import check_state, rising, run_steps
from dq_runtime.spec import QuantSpec, RoundingSpec

STEPS = 12  # of the second stage, over 4 windows, after the two blocks of the first
OPTIONS = {"iters": 4, "batch": 2, "epochs": 3, "lr": 0.02}


def _quantize(model: Path, text: Path, output: Path, options: dict[str, Any] | None = None, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "calibration": str(text),
        "windows": 4,
        "window_length": 32,
        "held_out_windows": 2,
        "compute_dtype": "float32",
        "checkpoint_every": 0.0,  # after every step
    }
    spec = QuantSpec(rounding=RoundingSpec("discquant", OPTIONS | (options or {})))
    return dq_runtime.quantize(str(model), output, spec, **(settings | changes))


def _no_memory() -> None:
    """More than the address space of the machine holds: the allocator's own error, whatever its words are."""
    torch.empty(1 << 60)


def _injected(monkeypatch: pytest.MonkeyPatch, at: int, kl: float | None = None) -> None:
    """From step ``at`` on (from 0) the loop sees this KL, or finds no memory left."""
    true, calls = StudentModel.kl_backward, 0

    def kl_backward(self: StudentModel, window: int, weights: Any = None) -> Tensor:
        nonlocal calls
        calls += 1
        value = true(self, window, weights)
        if calls <= at:
            return value
        if kl is None:
            _no_memory()
        assert kl is not None
        return torch.tensor(kl)

    monkeypatch.setattr(StudentModel, "kl_backward", kl_backward)


def _saved_step(output: Path) -> int:
    with safe_open(output.with_name("out.partial") / "state.safetensors", framework="pt") as f:
        return int(f.metadata()["dq"].split('"step": ')[1].split(",")[0])


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of a run that nothing happened to."""
    output = tmp_path_factory.mktemp("whole") / "out"
    _quantize(tiny_model, tiny_text, output, checkpoint_every=1e9)
    return (output / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("kl", "sentence"),
    [
        (float("nan"), r"^the KL became nan at step 6; use a smaller lr "),
        (None, r"^memory ran out \(asked for \d+ bytes\); lower --window-length \(it is 32\) or "),
    ],
    ids=["NaN", "out of memory"],
)
def test_it_stops_says_what_to_lower_and_goes_on_to_the_end(
    tiny_model: Path,
    tiny_text: Path,
    tmp_path: Path,
    whole: bytes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kl: float | None,
    sentence: str,
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        _injected(patch, 5, kl)
        with pytest.raises(DQError, match=sentence) as caught:
            _quantize(tiny_model, tiny_text, output)
    assert "\n" not in str(caught.value)
    assert "--resume" in str(caught.value)
    assert _saved_step(output) == 5
    with caplog.at_level(logging.WARNING, "dq"):
        report = _quantize(tiny_model, tiny_text, output, {"lr": 0.01}, resume=True)
    assert "goes on with lr 0.01 instead of 0.02" in caplog.text
    assert report["adjusted"] == ["lr 0.01 instead of 0.02"]
    assert [row["lr"] for row in report["history"] if "kl" in row][5] < 0.01
    assert len([row for row in report["history"] if "kl" in row]) == STEPS
    assert (output / "model.safetensors").read_bytes() != whole


def test_resumed_without_a_change_it_ends_with_the_same_bytes(
    tiny_model: Path, tiny_text: Path, tmp_path: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that another program had taken. Nothing was saved since the second stage began: it begins again."""
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        _injected(patch, 5, None)
        with pytest.raises(DQError, match="memory ran out"):
            _quantize(tiny_model, tiny_text, output, checkpoint_every=1e9)
    assert _saved_step(output) == 0
    monkeypatch.setattr("dq_runtime.rounding.autoround.AutoRound.round", None)  # the first stage is not made again
    report = _quantize(tiny_model, tiny_text, output, resume=True)
    assert report["adjusted"] == []
    assert (output / "model.safetensors").read_bytes() == whole


def test_what_takes_less_memory_may_be_lowered(
    tiny_model: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory in the second block of the first stage; the first block is not rounded again."""
    output, true, rounded = tmp_path / "out", TransformerBlock.output, set[int]()

    def scarce(self: TransformerBlock, *call: Any) -> Tensor:
        rounded.add(id(self._module))
        if len(rounded) == 2:
            _no_memory()
        return true(self, *call)

    with monkeypatch.context() as patch:
        patch.setattr(TransformerBlock, "output", scarce)
        with pytest.raises(
            DQError, match=r"--window-length \(it is 32\) or --set batch \(it is 2\), or take --compute"
        ):
            _quantize(tiny_model, tiny_text, output)
    assert _saved_step(output) == 7
    lowered: Any = {"window_length": 16, "compute_dtype": "bfloat16", "options": {"batch": 1}}
    report = _quantize(tiny_model, tiny_text, output, **lowered, resume=True)
    assert sorted(report["adjusted"]) == [
        "batch 1 instead of 2",
        "compute dtype bfloat16 instead of float32",
        "window_length 16 instead of 32",
    ]
    assert len(report["history"]) == 14 + STEPS


def test_a_lowered_window_length_reads_the_same_documents(
    tiny_model: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(tiny_text.read_text().replace("a", "o"))
    with monkeypatch.context() as patch:
        _injected(patch, 3)
        with pytest.raises(DQError, match="memory ran out"):
            _quantize(tiny_model, tiny_text, tmp_path / "out")
    with pytest.raises(SpecError, match=r"different .*calibration text"):
        _quantize(tiny_model, other, tmp_path / "out", resume=True, window_length=16)


def test_sampled_windows_are_cut_and_not_sampled_again(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dq_runtime import calibration

    settings: Any = {"calibration": None, "options": {"epochs": 1}}
    with monkeypatch.context() as patch:
        _injected(patch, 1)
        with pytest.raises(DQError, match="memory ran out"):
            _quantize(tiny_model, Path(), tmp_path / "out", **settings)
    monkeypatch.setattr(calibration, "sample_windows", None)
    report = _quantize(tiny_model, Path(), tmp_path / "out", **settings, resume=True, window_length=16)
    assert report["calibration"]["window_length"] == 16


def test_a_divergence_goes_on_from_a_state_of_before_it_rose(
    tiny_model: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The KL is 5 from step 40 on, some 20 times what it was; a divergence is called so after 64 steps at the least."""
    output, longer = tmp_path / "out", {"epochs": 17}
    with monkeypatch.context() as patch:
        _injected(patch, 40, 5.0)
        with pytest.raises(SpecError, match=r"^the KL rose from [\d.]+ to [\d.]+ in 64 steps; use a smaller lr "):
            _quantize(tiny_model, tiny_text, output, longer)
    assert 35 < _saved_step(output) <= 42  # two of 20 windows at 5: a mean of 0.7, and the limit is 0.4
    report = _quantize(tiny_model, tiny_text, output, {"lr": 0.01} | longer, resume=True)
    kls = [row["kl"] for row in report["history"] if "kl" in row]
    assert len(kls) == 68
    assert max(kls) < 1


def test_nothing_is_saved_while_the_kl_rises() -> None:
    """Twice the first KL from step 40 on: states of before that are kept, and the run goes on (it is no divergence)."""
    store, saves = MemoryStore(), list[int]()
    store.due = lambda: True  # type: ignore[method-assign]
    store.save = lambda step, tensors, extra: saves.append(step)  # type: ignore[method-assign]
    job = Job({}, None, 0, store, lambda *a, **k: None)
    history = run_steps(job, None, 100, lambda i: {"kl": 1.0 if i < 40 else 2.0}, dict, may_rise=False)
    assert len(history) == 100
    # The mean of the last half, 20 to 32 steps, has to pass 1.5: half of them, and less than half before 2 x 32 steps.
    assert saves == list(range(1, saves[-1] + 1))
    assert 40 < saves[-1] < 40 + 32 // 2 + 1
    everywhere = run_steps(job, None, 100, lambda i: {"kl": 1.0 if i < 40 else 2.0}, dict)
    assert len(everywhere) == 100
    assert saves[-1] == 99


def test_fifteen_steps_say_nothing() -> None:
    rows = [{"kl": 1.0}] * 7 + [{"kl": 100.0}] * 8
    assert not rising(rows, 15)
    assert rising([*rows, {"kl": 100.0}], 16)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_is_not_saved(value: float) -> None:
    check_state({"codes": torch.zeros(2, dtype=torch.int8), "fine": torch.zeros(2)}, 3)
    with pytest.raises(
        SpecError, match=r"^layer\.bound of the optimiser became NaN or infinite at step 3; use a small"
    ):
        check_state({"layer.bound": torch.tensor([0.0, value])}, 3)


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (MemoryError(), "not even for a tensor"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.25 GiB. GPU 0 has"), "asked for 1.25 GiB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."), "64 bytes"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_allocator_is_understood(error: BaseException, asked: str) -> None:
    options = {"window_length": 8, "compute_dtype": torch.bfloat16, "batch": 1}
    with pytest.raises(DQError, match=asked) as caught:
        raise_out_of_memory(error, options, frozenset({"batch"}))
    assert "batch" not in str(caught.value)  # 1 already
    assert "bfloat16" not in str(caught.value)


def test_other_errors_are_not_mistaken_for_it() -> None:
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("can't allocate memory")):
        assert not is_out_of_memory(error)
        raise_out_of_memory(error, {}, frozenset())
