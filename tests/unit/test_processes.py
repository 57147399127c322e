"""Several processes round one model together: each holds its rows, and what comes out is what one process makes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_model
from processes import together
from students import student_linear

import dq_runtime
from dq_runtime import pipeline
from dq_runtime.errors import DQError, SpecError
from dq_runtime.evaluate import report
from dq_runtime.modules.student import StudentModel
from dq_runtime.packing.checkpoint import open_checkpoint
from dq_runtime.ranks import ALONE, Ranks, join, local, whole
from dq_runtime.rounding import discquant
from dq_runtime.rounding.base import Choice, whole_choice
from dq_runtime.rounding.dither import Dither
from dq_runtime.rounding.latent import Latent
from dq_runtime.spec import GridSpec, QuantSpec, RoundingSpec, Target

ROOT = Path(__file__).parents[2]
OPTIONS: dict[str, Any] = {"iters": 6, "batch": 4, "epochs": 2, "model_batch": 2, "lr": 0.02}


def _spec(**options: Any) -> QuantSpec:
    return QuantSpec(GridSpec(bits=3, group_size=32), rounding=RoundingSpec("discquant", OPTIONS | options))


def _quantize(model: Path, text: Path, output: Path, spec: QuantSpec | None = None, **changes: Any) -> Any:
    settings: dict[str, Any] = {"windows": 6, "window_length": 32, "held_out_windows": 2, "compute_dtype": "float32"}
    settings |= {"calibration": str(text), "device": "cpu", **changes}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "_plot", lambda report: b"")  # three quarters of the time of a run of this size
        return dq_runtime.quantize(str(model), output, spec or _spec(), **settings)


def _watched(model: Path, text: Path, output: Path, *rest: Any) -> tuple[Any, dict[str, Any]]:
    """The report, and what the second stage held in this process and which windows it ran."""
    seen: dict[str, Any] = {"windows": []}
    distil, backward = discquant.distil, StudentModel.kl_backward

    def watch(job: Any, saved: Any, latents: Any, recipe: Any, before: Any) -> Any:
        held = [(la.u, la.moments.m, la.moments.v) for la in latents.values()]
        seen["state"] = sum(tensor.nbytes for tensors in held for tensor in tensors)
        stored = [tensor for layer in job.layers.values() for tensor in layer.buffers()]
        seen["original"] = sum(local(tensor).nbytes for tensor in stored)
        ends = (job.student.model.get_input_embeddings(), job.student.model.get_output_embeddings())
        seen["dense"] = sum(local(module.weight).nbytes for module in ends)
        return distil(job, saved, latents, recipe, before)

    def count(self: StudentModel, window: int, weights: Any = None) -> Any:
        seen["windows"].append(window)
        return backward(self, window, weights)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(discquant, "distil", watch)
        patch.setattr(StudentModel, "kl_backward", count)
        return _quantize(model, text, output, *rest), seen


def _codes(output: Path) -> dict[str, torch.Tensor]:
    return {name: weight.codes().int() for name, weight in open_checkpoint(output).packed()}


@pytest.fixture(scope="module")
def untied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_model`` with a head of its own, as large models have."""
    return build_tiny_model(tmp_path_factory.mktemp("models") / "untied", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def both(untied_model: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """The output of two processes, and what each saw."""
    output = tmp_path_factory.mktemp("both") / "out"
    return output, together(2, _watched, untied_model, tiny_text, output)


def test_two_processes_choose_the_codes_that_one_does(
    untied_model: Path, tiny_text: Path, tmp_path: Path, both: tuple[Path, list[Any]]
) -> None:
    """Two numbers have one sum in either order, so that the second stage is the same bit for bit; in the first stage a
    block's gradient is a sum over tokens in another order, which turns the sign of a gradient that is almost 0 and so
    moves a weight by 1/iters: a code of a few weights."""
    output, ((made, first), (same, second)) = both
    alone, seen = _watched(untied_model, tiny_text, tmp_path / "alone")
    ours, theirs = _codes(tmp_path / "alone"), _codes(output)
    differ = sum(int((ours[name] != theirs[name]).sum()) for name in ours)
    assert differ <= 1e-3 * sum(codes.numel() for codes in ours.values())
    assert all(int((ours[name] - theirs[name]).abs().max()) <= 1 for name in ours)
    for row, expected in zip(made["history"], alone["history"], strict=True):
        assert row == pytest.approx(expected, rel=1e-3)
    assert made["held_out"]["kl"] == pytest.approx(alone["held_out"]["kl"], rel=1e-2)
    # Either process has the whole report; each made every other window, and together those of the one.
    assert (made["processes"], alone["processes"]) == (2, 1)
    assert same["history"] == made["history"]
    assert [w for pair in zip(first["windows"], second["windows"], strict=True) for w in pair] == seen["windows"]
    assert sorted(p.name for p in output.parent.iterdir()) == ["out"]
    # Every layer of the model has an even number of rows.
    weights = sum(codes.numel() for codes in ours.values())
    assert seen["state"] == 4 * weights
    assert first["state"] == second["state"] == 2 * weights
    assert first["original"] == second["original"] == seen["original"] / 2
    assert first["dense"] == second["dense"] == seen["dense"] / 2


def _children(pid: int) -> list[int]:
    """Processes that this one started."""
    statuses = {int(file.parent.name): file for file in Path("/proc").glob("[0-9]*/status")}
    found = []
    for child, file in statuses.items():
        with suppress(OSError):  # gone meanwhile
            if f"\nPPid:\t{pid}\n" in file.read_text():
                found.append(child)
    return sorted(found)


@pytest.fixture(scope="module")
def after_a_kill(untied_model: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what torchrun's two processes left when one of them was killed in the second stage."""
    directory = tmp_path_factory.mktemp("killed")
    options = {"windows": 6, "window-length": 32, "held-out-windows": 2, "compute-dtype": "float32", "device": "cpu"}
    options |= {"bits": 3, "group-size": 32, "calibration": tiny_text, "checkpoint-every": 0}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "dq_runtime", "quantize", untied_model, "-o", directory / "out"]
    command += [text for name, value in options.items() for text in (f"--{name}", value)]
    command += [text for name, value in OPTIONS.items() for text in ("--set", f"{name}={value}")]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    torchrun = subprocess.Popen([str(c) for c in command], env=environment, stderr=subprocess.PIPE, text=True)
    try:
        state, begun = directory / "out.partial" / "state.json", time.monotonic()
        while not (state.exists() and json.loads(state.read_text())["extra"]["part"] == "model"):
            assert torchrun.poll() is None, torchrun.stderr and torchrun.stderr.read()
            assert time.monotonic() - begun < 240
            time.sleep(0.01)
        processes = _children(torchrun.pid)
        assert len(processes) == 2
        os.kill(processes[1], signal.SIGKILL)
        _, said = torchrun.communicate(timeout=60)
    finally:
        torchrun.kill()
    assert torchrun.returncode == 1
    assert "Signal 9 (SIGKILL)" in said
    assert said.count("Loading: 1/1") == 1  # the first process alone shows progress
    assert not any(Path(f"/proc/{process}").exists() for process in processes)
    assert [p.name for p in directory.iterdir()] == ["out.partial"]
    return directory


def _resumed(model: Path, text: Path, output: Path) -> Any:
    return _quantize(model, text, output, resume=True)


@pytest.mark.parametrize("world", [2, 1])
def test_after_a_kill_they_continue_and_another_number_of_them_does(
    untied_model: Path, tiny_text: Path, tmp_path: Path, both: tuple[Path, list[Any]], after_a_kill: Path, world: int
) -> None:
    """Bit for bit, with one process too, because two numbers have one sum. A write that was cut off does not count."""
    shutil.copytree(after_a_kill / "out.partial", tmp_path / "out.partial")
    number = json.loads((tmp_path / "out.partial" / "state.json").read_text())["number"]
    (tmp_path / "out.partial" / f"state-{number + 1}").mkdir()
    (tmp_path / "out.partial" / f"state-{number + 1}" / "__0_0.distcp").write_bytes(b"half")
    reports = together(world, _resumed, untied_model, tiny_text, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (both[0] / weights).read_bytes()
    assert [made["history"] for made in reports] == world * [both[1][0][0]["history"]]


def test_one_process_without_torchrun_says_who_can_continue(
    untied_model: Path, tiny_text: Path, tmp_path: Path, after_a_kill: Path
) -> None:
    shutil.copytree(after_a_kill / "out.partial", tmp_path / "out.partial")
    with pytest.raises(SpecError, match=r"was made under torchrun; continue it there \(torchrun --nproc-per-node 1"):
        _resumed(untied_model, tiny_text, tmp_path / "out")


def _interrupted(model: Path, text: Path, output: Path) -> str:
    """The second process alone is asked to stop, at the end of the third step of the second stage (the first stage asks
    twice, once a block); all of them say after which step they did."""
    asked = 0

    @contextmanager
    def interruptible() -> Iterator[Any]:
        def stop() -> bool:
            nonlocal asked
            asked += 1
            return os.environ["RANK"] == "1" and asked >= 5

        yield stop

    pipeline.interruptible = interruptible  # type: ignore[assignment]
    with pytest.raises(DQError) as stopped:
        _quantize(model, text, output)
    return str(stopped.value)


def test_one_that_is_asked_to_stop_stops_all_after_the_same_step(
    untied_model: Path, tiny_text: Path, tmp_path: Path, both: tuple[Path, list[Any]]
) -> None:
    first, second = together(2, _interrupted, untied_model, tiny_text, tmp_path / "out")
    assert first == second
    assert "--resume" in first
    assert json.loads((tmp_path / "out.partial" / "state.json").read_text())["step"] == 3
    together(2, _resumed, untied_model, tiny_text, tmp_path / "out")
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (both[0] / weights).read_bytes()


def _refused(model: Path, text: Path, output: Path) -> list[str]:
    """What is said of requests that several processes cannot serve."""
    requests = [
        {"spec": QuantSpec(rounding=RoundingSpec("gptq"))},
        {"spec": QuantSpec(target=Target(3.0))},
        {"spec": QuantSpec(transform="spinquant")},
        {"spec": _spec(model_batch=1)},
        {"spec": _spec(batch=1)},
        {"windows": 1},
        {"device": "cuda:0"},
    ]
    said = []
    for request in requests:
        with pytest.raises(DQError) as refusal:
            _quantize(model, text, output, **request)
        said.append(str(refusal.value))
    return said


def test_what_they_cannot_do_is_one_sentence(untied_model: Path, tiny_text: Path, tmp_path: Path) -> None:
    first, second = together(2, _refused, untied_model, tiny_text, tmp_path / "out")
    assert first == second
    expected = [
        "rounding 'gptq' runs in one process: leave torchrun away (of all methods discquant",
        "bits per layer are measured in one process: leave torchrun away",
        "transform 'spinquant' learns in one process: leave torchrun away",
        "model_batch must be a multiple of 2, got 1; use --set model_batch=2",
        "batch must be at least 2, got 1",
        "2 processes need a window each, and there are 1",
        "device cuda:0 is not there",
    ]
    for said, wanted in zip(first, expected, strict=True):
        assert wanted in said
        assert "\n" not in said
    assert list(tmp_path.iterdir()) == []


def _collectives() -> dict[str, Any]:
    """Every one of them on this process's own numbers; ragged rows, more processes than rows."""
    ranks, device = join("cpu")
    assert device == "cpu"
    rank, found = ranks.rank, dict[str, Any]()
    for n, dtype in ((1, torch.uint8), (2, torch.float32), (7, torch.bfloat16), (9, torch.int8)):
        tensor = torch.arange(n * 5).view(n, 5).to(dtype)
        shared = ranks.share(tensor)
        assert ranks.share(shared) is shared
        assert (shared.shape, shared.dtype) == (tensor.shape, dtype)
        begin = ranks.begin(n)
        assert torch.equal(local(shared), tensor[begin : begin + len(local(shared))])
        assert torch.equal(whole(shared), tensor)
        assert torch.equal(whole(ranks.rows_of(local(shared), tensor.shape)), tensor)
        assert ranks.empty(tensor.shape, dtype).to_local().shape == local(shared).shape  # type: ignore[attr-defined]
        mine = torch.arange(n * 5.0).view(n, 5) * (rank + 1)
        assert torch.equal(ranks.sum_rows(mine), local(ranks.share(torch.arange(n * 5.0).view(n, 5) * 6)))
        dither = Dither(tensor.shape, 2, 3, torch.device("cpu"), begin)
        rows = slice(0, len(local(shared)))
        everyone = Dither(tensor.shape, 2, 3, torch.device("cpu"))
        assert torch.equal(dither.of(1, rows), everyone.of(1, slice(0, n))[begin : begin + rows.stop])
    assert ranks.largest(torch.tensor([rank, -rank])).tolist() == [2, 0]
    assert ranks.total(rank + 0.5) == 4.5
    assert [ranks.any(rank == 1), ranks.any(False)] == [True, False]
    # 5, 4, 3 come from three processes, one of which has less than three values.
    values = torch.tensor([[5.0, 0.0, 1.0], [4.0, 2.0, -1.0], [3.0, 3.0, 3.0]])[rank][: 3 - (rank == 1)]
    assert [ranks.lowest_of_top(values, count).item() for count in (1, 2, 3, 6)] == [5, 4, 3, 2]
    assert ranks.spread(lambda item: item * 10.0, [1, 2, 3, 4]) == [10, 20, 30, 40]
    assert ranks.mine([0, 1, 2, 3, 4]) == [0, 1, 2, 3, 4][rank::3]
    assert ranks.told(("a", rank)) == ("a", 0)
    p, q = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    if rank:
        (p * rank).sum().backward()
    ranks.sum_gradients([p, q])
    assert p.grad is not None
    assert q.grad is not None
    assert (p.grad.tolist(), q.grad.tolist()) == ([3, 3], [0, 0])
    done: list[int] = []
    ranks.once(done.append, 1)
    found["done"] = done

    def refuse() -> None:
        raise SpecError("no")

    with pytest.raises(SpecError, match=r"^no$"):
        ranks.once(refuse)
    return found


def test_collectives_on_ragged_rows() -> None:
    assert together(3, _collectives) == [{"done": [1]}, {"done": []}, {"done": []}]


def _latents() -> list[int]:
    """A layer of three processes against one of this alone: gradients are whole numbers, whose sums are exact. Each
    process has two windows a step. Returns the rows it held."""
    ranks, _ = join("cpu")
    held = []
    for n in (2, 7):  # the last process has no row of two
        numbers = torch.Generator().manual_seed(n)
        layer = student_linear(torch.randn(n, 32, generator=numbers), bits=3, group_size=16, symmetric=False)
        choice = Choice(layer.grid.nearest(layer.weight(), layer.scales))
        alone, shared = Latent.start(layer, choice, 0.45, 5), Latent.start(layer, choice, 0.45, 5, ranks=ranks)
        held.append(len(shared.u))
        for step in range(4):
            if step == 2:
                shared = Latent.resumed(layer, "layer", shared.tensors("layer"), 5, ranks=ranks)
                alone = Latent.resumed(layer, "layer", alone.tensors("layer"), 5)
            gradients = torch.randint(-50, 50, (6, n, 32), generator=numbers).float()
            alone.lr = shared.lr = 0.2
            alone.step(gradients.sum(0))
            for window in range(2):
                shared.awaited = 1 - window
                (gradients[ranks.rank + 3 * window] * shared.weight()).sum().backward()
        rows = shared.tensors("layer")
        for name, tensor in alone.tensors("layer").items():
            assert torch.equal(local(rows[name]), local(ranks.share(tensor)) if tensor.dim() else tensor), name
        assert torch.equal(shared.decoded(), alone.decoded())
        assert torch.equal(whole_choice(shared.choice()).codes, alone.codes())
        assert not torch.equal(alone.codes(), choice.codes)
    return held


def test_the_rows_of_a_latent_move_as_in_one_process() -> None:
    assert together(3, _latents) == [[1, 3], [1, 3], [0, 1]]


def test_alone_nothing_is_shared_out() -> None:
    tensor = torch.arange(6.0).view(3, 2)
    assert ALONE.share(tensor) is tensor
    assert whole(tensor) is local(tensor) is ALONE.sum_rows(tensor) is ALONE.rows_of(tensor, tensor.shape) is tensor
    assert ALONE.lowest_of_top(tensor.flatten(), 2) == 4
    assert ALONE.spread(float, [1, 2]) == [1, 2]
    assert ALONE.told(3) == 3
    assert isinstance(join("cpu")[0], Ranks)
    assert join("cuda:3") == (ALONE, "cuda:3")
