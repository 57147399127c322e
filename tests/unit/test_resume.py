"""A run that is stopped, interrupted or killed continues to the same bytes, and never leaves anything half-made."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import dq_runtime
from dq_runtime import pipeline
from dq_runtime.cli import main
from dq_runtime.errors import CheckpointError, DataError, DQError, Interrupted, SpecError
from dq_runtime.spec import GridSpec, QuantSpec, RoundingSpec

STEPS = 12


def _spec(**changes: Any) -> QuantSpec:
    settings = {"rounding": RoundingSpec("discquant-paper", {"steps": STEPS})}
    return QuantSpec(**(settings | changes))


def _quantize(model: Path, text: Path | None, output: Path, spec: QuantSpec | None = None, **changes: Any) -> Any:
    settings: dict[str, Any] = {"windows": 4, "window_length": 32, "held_out_windows": 2, "compute_dtype": "float32"}
    calibration = None if text is None else str(text)
    settings |= {"calibration": calibration, **changes}
    return dq_runtime.quantize(str(model), output, spec or _spec(), **settings)


def _stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """The user presses Ctrl-C during that step."""
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked >= steps

    @contextmanager
    def interruptible() -> Iterator[Any]:
        yield stop

    monkeypatch.setattr(pipeline, "interruptible", interruptible)


def _unloadable(directory: Path) -> None:
    """Nothing below ``directory`` passes for a checkpoint, hidden or not."""
    for path in [directory, *directory.rglob("*")]:
        if path.is_dir():
            with pytest.raises(CheckpointError):
                dq_runtime.load(path)


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of an uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "out"
    _quantize(tiny_model, tiny_text, output)
    assert not output.with_name("out.partial").exists()
    return (output / "model.safetensors").read_bytes()


@pytest.fixture
def unfinished(tiny_model: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output path of a run that was stopped after 5 steps."""
    with monkeypatch.context() as patch:
        _stop_after(patch, 5)
        with pytest.raises(Interrupted):
            _quantize(tiny_model, tiny_text, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("step", [1, 7, STEPS - 1])
def test_stopping_and_resuming_gives_the_same_bytes(
    tiny_model: Path, tiny_text: Path, tmp_path: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        _stop_after(patch, step)
        with pytest.raises(Interrupted, match=f"^stopped after step {step} of {STEPS}; .*--resume"):
            _quantize(tiny_model, tiny_text, output)
    assert not output.exists()
    assert (tmp_path / "out.partial" / "state.safetensors").exists()
    _unloadable(tmp_path)
    report = _quantize(tiny_model, tiny_text, output, resume=True)
    assert (output / "model.safetensors").read_bytes() == whole
    assert [h["step"] for h in report["history"]] == list(range(1, STEPS + 1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_being_stopped_after_every_step_gives_the_same_bytes(
    tiny_model: Path, tiny_text: Path, tmp_path: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, tries = tmp_path / "out", 0
    with monkeypatch.context() as patch:
        _stop_after(patch, 1)
        while not output.exists():
            tries += 1
            try:
                _quantize(tiny_model, tiny_text, output, resume=True)
            except Interrupted:
                assert tries < STEPS
    assert tries == STEPS
    assert (output / "model.safetensors").read_bytes() == whole


def test_self_sampled_text_is_sampled_once(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _quantize(tiny_model, None, tmp_path / "whole")
    with monkeypatch.context() as patch:
        _stop_after(patch, 4)
        with pytest.raises(Interrupted):
            _quantize(tiny_model, None, tmp_path / "out")
    monkeypatch.setattr("dq_runtime.calibration.sample_windows", None)  # sampling again would fail
    with pytest.raises(SpecError, match="was begun with 6 sampled windows, not 7"):
        _quantize(tiny_model, None, tmp_path / "out", held_out_windows=3, resume=True)
    _quantize(tiny_model, None, tmp_path / "out", resume=True)
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def test_text_that_goes_on_from_the_given_one_is_sampled_once(
    tiny_model: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = _quantize(tiny_model, tiny_text, tmp_path / "without")
    whole = _quantize(tiny_model, tiny_text, tmp_path / "whole", continued_windows=3)
    assert (whole["calibration"]["windows"], whole["calibration"]["continued_windows"]) == (4, 3)
    assert whole["calibration"]["source"] == f"{tiny_text}, and 3 windows that the model wrote on"
    assert whole["calibration"]["sha256"] != without["calibration"]["sha256"]
    assert whole["held_out"]["sha256"] == without["held_out"]["sha256"]
    with monkeypatch.context() as patch:
        _stop_after(patch, 4)
        with pytest.raises(Interrupted):
            _quantize(tiny_model, tiny_text, tmp_path / "out", continued_windows=3)
    with pytest.raises(SpecError, match="was begun with 3 continued windows, not 2"):
        _quantize(tiny_model, tiny_text, tmp_path / "out", continued_windows=2, resume=True)
    monkeypatch.setattr("dq_runtime.calibration.continue_windows", None)  # sampling again would fail
    with pytest.raises(SpecError, match="count of calibration"):
        _quantize(tiny_model, tiny_text, tmp_path / "out", resume=True)
    _quantize(tiny_model, tiny_text, tmp_path / "out", continued_windows=3, resume=True)
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"continued_windows": -1}, "continued_windows must be 0 or more, got -1"),
        ({"continued_windows": 1, "calibration": None}, "add calibration text"),
        ({"continued_windows": 1, "blockwise": True}, "leave out --continued-windows"),
    ],
)
def test_windows_that_the_model_cannot_add_are_refused(
    tiny_model: Path, tiny_text: Path, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    spec = _spec(rounding=RoundingSpec("gptq"))
    with pytest.raises(SpecError, match=sentence):
        _quantize(tiny_model, tiny_text, tmp_path / "out", spec, **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"spec": _spec(seed=1)}, "spec"),
        ({"spec": _spec(grid=GridSpec(bits=4))}, "spec"),
        ({"spec": _spec(rounding=RoundingSpec("discquant-paper", {"steps": STEPS, "clamp": 0.2}))}, "spec"),
        ({"windows": 5}, "calibration"),
        ({"windows": 2, "window_length": 64}, "calibration"),
        ({"held_out_windows": 3}, "held-out"),
        ({"window_length": 64}, r"window_length \(it may be lowered"),
    ],
    ids=["seed", "bits", "option", "windows", "same tokens cut otherwise", "held-out windows", "longer windows"],
)
def test_a_different_request_is_refused_in_one_sentence_and_changes_nothing(
    tiny_model: Path, tiny_text: Path, unfinished: Path, whole: bytes, changes: dict[str, Any], named: str
) -> None:
    before = {p.name: p.read_bytes() for p in unfinished.with_name("out.partial").iterdir()}
    with pytest.raises(SpecError, match=f"was made with a different [^\n]*{named}") as caught:
        _quantize(tiny_model, tiny_text, unfinished, resume=True, **changes)
    assert "\n" not in str(caught.value)
    assert {p.name: p.read_bytes() for p in unfinished.with_name("out.partial").iterdir()} == before


def test_different_text_is_refused(tiny_model: Path, tiny_text: Path, unfinished: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(tiny_text.read_text().replace("a", "o"))
    with pytest.raises(SpecError, match=r"different .*calibration text"):
        _quantize(tiny_model, other, unfinished, resume=True)


def test_a_different_model_is_refused(tiny_model: Path, tiny_text: Path, unfinished: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(tiny_model, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= 1.01
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SpecError, match=r"different .*model"):
        _quantize(other, tiny_text, unfinished, resume=True)
    assert torch.isfinite(weights["model.layers.0.mlp.up_proj.weight"]).all()


def test_sampled_windows_of_another_length_are_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _stop_after(patch, 2)
        with pytest.raises(Interrupted):
            _quantize(tiny_model, None, tmp_path / "out")
    with pytest.raises(SpecError, match="was made with a different"):
        _quantize(tiny_model, None, tmp_path / "out", resume=True, window_length=40)
    with pytest.raises(SpecError, match="was made with a different"):
        _quantize(tiny_model, None, tmp_path / "out", _spec(seed=3), resume=True)


def test_an_unfinished_run_is_not_overwritten_without_resume(
    tiny_model: Path, tiny_text: Path, unfinished: Path
) -> None:
    with pytest.raises(SpecError, match=r"holds an unfinished run; add --resume to continue it, or delete it"):
        _quantize(tiny_model, tiny_text, unfinished)
    assert (unfinished.with_name("out.partial") / "state.safetensors").exists()


def test_resume_without_an_unfinished_run_starts_one(
    tiny_model: Path, tiny_text: Path, tmp_path: Path, whole: bytes
) -> None:
    _quantize(tiny_model, tiny_text, tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.999])
def test_a_truncated_state_is_refused_in_one_sentence(
    tiny_model: Path, tiny_text: Path, unfinished: Path, keep: float
) -> None:
    state = unfinished.with_name("out.partial") / "state.safetensors"
    data = state.read_bytes()
    state.write_bytes(data[: int(keep * len(data)) if keep < 1 else int(keep)])
    with pytest.raises(CheckpointError, match=r"state\.safetensors is damaged") as caught:
        _quantize(tiny_model, tiny_text, unfinished, resume=True)
    assert "\n" not in str(caught.value)
    assert not unfinished.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_a_damaged_request_is_refused_in_one_sentence(
    tiny_model: Path, tiny_text: Path, unfinished: Path, content: bytes
) -> None:
    (unfinished.with_name("out.partial") / "request.json").write_bytes(content)
    with pytest.raises(DQError, match=r"request\.json is damaged|was made with a different") as caught:
        _quantize(tiny_model, tiny_text, unfinished, resume=True)
    assert "\n" not in str(caught.value)


def test_codes_of_a_finished_rounding_are_not_computed_again(
    tiny_model: Path, tiny_text: Path, tmp_path: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted while the output is written: what a kill leaves then is neither loadable nor in the way."""
    output = tmp_path / "out"
    left = tmp_path / ".out.tmp-4194999"  # as of a process of that number; above the kernel's largest

    def killed(student: Any, nearest: Any, request: Any, directory: Path, *rest: Any) -> Any:
        shutil.copytree(directory, left)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            _quantize(tiny_model, tiny_text, output)
    assert not output.exists()
    assert (left / "model.safetensors").exists()
    _unloadable(tmp_path)
    monkeypatch.setattr("dq_runtime.rounding.discquant_paper.DiscQuantPaper.round", None)  # rounding again would fail
    _quantize(tiny_model, tiny_text, output, resume=True)
    assert (output / "model.safetensors").read_bytes() == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_request_that_is_refused_leaves_nothing_behind(tiny_model: Path, tiny_text: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(DataError):
        _quantize(tiny_model, tmp_path / "missing.txt", output)
    with pytest.raises(DataError):
        _quantize(tiny_model, tiny_text, output, windows=10_000)
    with pytest.raises(SpecError):
        _quantize(tiny_model, tiny_text, output, _spec(grid=GridSpec(group_size=128)))
    with pytest.raises(SpecError, match="unknown transform"):
        _quantize(tiny_model, tiny_text, output, _spec(transform="none"))
    with pytest.raises(SpecError, match="unknown grid"):
        _quantize(tiny_model, tiny_text, output, _spec(grid=GridSpec(name="float")))
    assert list(tmp_path.iterdir()) == []


def test_a_mistyped_resume_does_not_throw_sampled_text_away(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the first state: the directory holds only the windows, which took minutes to sample."""
    partial = tmp_path / "out.partial"
    with monkeypatch.context() as patch:
        _stop_after(patch, 1)
        with pytest.raises(Interrupted):
            _quantize(tiny_model, None, tmp_path / "out")
    (partial / "state.safetensors").unlink()
    with pytest.raises(SpecError):
        _quantize(tiny_model, None, tmp_path / "out", _spec(seed=9), resume=True)
    assert (partial / "sampled.safetensors").exists()


# The command line, in processes of its own.

LONG = 200  # steps: about two seconds on one core, long enough to be killed in


def _command(model: Path, text: Path, output: Path, *more: str) -> list[str]:
    sizes = ["--windows", "4", "--window-length", "32", "--held-out-windows", "2", "--compute-dtype", "float32"]
    often = ["--rounding", "discquant-paper", "--set", f"steps={LONG}", "--checkpoint-every", "0.1"]
    base = [sys.executable, "-m", "dq_runtime", "quantize", str(model), "-o", str(output)]
    return [*base, "--calibration", str(text), *sizes, *often, *more]


def _start(command: list[str]) -> subprocess.Popen[str]:
    # One thread a process: these runs overlap with whatever else uses the machine.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=Path.cwd(), env=environment
    )


def _finish(command: list[str]) -> None:
    """Run the command in this process, which saves seven seconds of imports, with the threads of the others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main(command[3:]) == 0
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def baseline(tiny_model: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights that the command writes when nobody disturbs it."""
    output = tmp_path_factory.mktemp("baseline") / "out"
    _finish(_command(tiny_model, tiny_text, output))
    return (output / "model.safetensors").read_bytes()


def test_killed_at_random_moments_and_resumed_gives_the_same_bytes(
    tiny_model: Path, tiny_text: Path, tmp_path: Path, baseline: bytes
) -> None:
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    choose = random.Random(2)

    def saves() -> int:
        try:
            return (partial / "state.safetensors").stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    # Counted in saved states and not in seconds, so that a busy machine shifts nothing: the first kill comes as soon as
    # the run has begun, before any state, the others some states later, anywhere between two of them.
    for wanted in (0, choose.randint(1, 3), choose.randint(1, 3)):
        process = _start(_command(tiny_model, tiny_text, output, "--resume"))
        counted, last = 0, saves()
        while process.poll() is None and (counted < wanted or not partial.exists()):
            time.sleep(0.005)
            if saves() != last:
                counted, last = counted + 1, saves()
        time.sleep(choose.uniform(0, 0.1))
        assert process.poll() is None, "the run ended before it could be killed"
        process.kill()
        process.communicate()
        assert not output.exists()
        _unloadable(tmp_path)
    _finish(_command(tiny_model, tiny_text, output, "--resume"))
    assert (output / "model.safetensors").read_bytes() == baseline
    dq_runtime.load(output)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_ctrl_c_saves_says_how_to_resume_and_exits_130(
    tiny_model: Path, tiny_text: Path, tmp_path: Path, baseline: bytes
) -> None:
    output = tmp_path / "out"
    state = tmp_path / "out.partial" / "state.safetensors"
    process = _start(_command(tiny_model, tiny_text, output))
    deadline = time.monotonic() + 60
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("dq: stopped after step ")
    assert "--resume" in last
    assert not output.exists()
    _unloadable(tmp_path)
    _finish(_command(tiny_model, tiny_text, output, "--resume"))
    assert (output / "model.safetensors").read_bytes() == baseline
    history = json.loads((output / "report.json").read_text())["history"]
    assert [h["step"] for h in history] == list(range(1, LONG + 1))


def test_ctrl_c_outside_the_loop_is_one_line_and_leaves_nothing(
    tiny_model: Path,
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "load_dense", interrupted)
    assert main(_command(tiny_model, tiny_text, tmp_path / "out")[3:]) == 130
    assert capsys.readouterr().err.strip() == "dq: interrupted"
    assert list(tmp_path.iterdir()) == []
