"""`dq compare`: intervals, the perplexity protocol, cells from flags and files, a comparison that is interrupted."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import dq_runtime
from dq_runtime.cli import main
from dq_runtime.compare import runner, worker
from dq_runtime.compare.cells import REFERENCE, Cell, checkpoint_cell, grid_cells, read_cells
from dq_runtime.compare.protocol import Protocol, protocol_from
from dq_runtime.compare.results import markdown, table_of
from dq_runtime.compare.runner import compare
from dq_runtime.compare.worker import run_cell
from dq_runtime.errors import DataError, Interrupted, SpecError
from dq_runtime.evaluate.intervals import ci95, paired_ci95, t_quantile
from dq_runtime.evaluate.perplexity import RunningText, joined_rows, perplexity, running_text
from dq_runtime.evaluate.tasks import check_tasks
from dq_runtime.request import Silent
from dq_runtime.rounding import ROUNDINGS
from dq_runtime.spec import PER_ROW


class Quiet:
    """A listener that remembers what it was told."""

    def __init__(self) -> None:
        self.cells: list[tuple[str, float | None]] = []
        self.stages: set[str] = set()
        self.ended: list[Mapping[str, Any]] = []

    def cell(self, number: int, total: int, label: str, seconds_left: float | None) -> None:
        self.cells.append((label, seconds_left))

    def stage(self, title: str, step: int, total: int, figures: Mapping[str, float]) -> None:
        self.stages.add(title)

    def finished(self, cell: Mapping[str, Any]) -> None:
        self.ended.append(cell)


def settings_for(model: Path, text: Path, **changes: Any) -> Protocol:
    small: dict[str, Any] = {"windows": 2, "window_length": 32, "held_out_windows": 3, "compute_dtype": "float32"}
    return Protocol(str(model), str(text), **(small | changes))


# --- intervals ---


# Student's t, two-sided 95%, as every table prints it.
@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (23, 2.0687), (127, 1.9788), (499, 1.9647)],
)
def test_t_quantile_is_the_table_s(degrees: int, expected: float) -> None:
    assert t_quantile(degrees) == pytest.approx(expected, abs=5e-5)


def test_an_interval_by_hand() -> None:
    """1, 2, 3: mean 2, standard deviation 1, standard error 1/sqrt(3); t of 2 degrees is 4.3027."""
    low, high = ci95([1.0, 2.0, 3.0]) or (0, 0)
    assert low == pytest.approx(2 - 4.3027 / math.sqrt(3), abs=1e-4)
    assert high == pytest.approx(2 + 4.3027 / math.sqrt(3), abs=1e-4)
    assert ci95([1.0]) is None


def test_a_paired_interval_sees_a_difference_that_the_windows_hide() -> None:
    """Windows that differ by whole nats, and a model that is 0.1 to 0.12 worse on each of them."""
    windows = [0.5, 2.5, 1.0, 3.0]
    worse = [w + d for w, d in zip(windows, (0.1, 0.12, 0.1, 0.12), strict=True)]
    low, high = paired_ci95(worse, windows) or (0, 0)
    assert 0.09 < low < 0.11 < high < 0.13
    alone = ci95(windows) or (0, 0)
    assert alone[0] < ci95(worse)[0] < alone[1], "unpaired, the two intervals overlap"  # type: ignore[index]


def test_ninety_five_of_a_hundred_intervals_hold_the_mean() -> None:
    samples = torch.randn(2000, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    held = sum(low <= 3 <= high for low, high in (ci95(s.tolist()) or (0, 0) for s in samples))
    # A binomial of 2000 at 0.95 has a standard deviation of 9.7: four of them.
    assert abs(held - 1900) < 39


# --- perplexity ---


def test_rows_are_joined_as_readers_of_the_data_set_do() -> None:
    raw = " \n = Title = \n \n One line . \n Another . \n"
    assert joined_rows(raw) == "\n\n = Title = \n\n\n\n\n One line . \n\n\n Another . \n"


def test_each_token_is_scored_at_most_once_and_never_the_first() -> None:
    text = RunningText(torch.arange(23), 8, 5)
    windows = text.windows()
    assert [ids[0].item() for ids, _ in windows] == [0, 5, 10, 15]
    assert torch.cat([ids[-n:] for ids, n in windows]).tolist() == list(range(1, 23))
    # stride = length, the protocol of the papers: nothing before a window's first token, so it is not scored
    scored = torch.cat([ids[-n:] for ids, n in RunningText(torch.arange(23), 8, 8).windows()])
    assert scored.tolist() == [*range(1, 8), *range(9, 16)]
    assert len(text.windows(at_most=3)) == 3


def test_perplexity_by_hand() -> None:
    """Logits that give every next token probability 1/4 or 1/2: the perplexity is their geometric mean."""

    def logits(ids: torch.Tensor) -> torch.Tensor:
        rows = torch.zeros(len(ids), 4)
        if ids[0] == 0:
            rows[torch.arange(3), ids[1:]] = math.log(3)  # e^l / (e^l + 3) = 1/2
        return rows

    windows = [(torch.tensor([0, 1, 2, 3]), 3), (torch.tensor([1, 2, 3, 0]), 1)]
    measured = perplexity(windows, logits)
    assert measured.value == pytest.approx((2**3 * 4) ** (1 / 4), rel=1e-6)
    assert measured.tokens == [3, 1]
    low, high = measured.ci95 or (0, 0)
    assert low < measured.value < high


def test_a_text_too_short_or_missing_is_one_sentence(tmp_path: Path, tiny_model: Path) -> None:
    from dq_runtime.runtime.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tiny_model)
    assert tokenizer is not None
    (tmp_path / "a.raw").write_text("short")
    with pytest.raises(DataError, match="fewer than one window of 32"):
        running_text(tmp_path / "a.raw", tokenizer, 32, 32)
    with pytest.raises(DataError, match=r"nothing\.raw is not a file"):
        running_text(tmp_path / "nothing.raw", tokenizer, 32, 32)
    with pytest.raises(SpecError, match="from 1 to their length 32, got 33"):
        running_text(tmp_path / "a.raw", tokenizer, 32, 33)


# --- cells ---


def test_flags_and_file_make_the_same_cells(tmp_path: Path) -> None:
    file = tmp_path / "cells.toml"
    file.write_text(
        """
[protocol]
windows = 7
[[cells]]
methods = ["nearest", "discquant-paper"]
bits = [2, 3]
group_sizes = [64, "row"]
options.discquant-paper.clamp = 1.0
[[cells]]
methods = "nearest"
bits = 3
tasks = false
"""
    )
    protocol, cells = read_cells(file)
    assert protocol == {"windows": 7}
    flags = grid_cells(
        ["nearest", "discquant-paper"], [2, 3], [64, PER_ROW], ["identity"], options={"discquant-paper": {"clamp": 1.0}}
    )
    assert [c.file_name for c in cells] == [c.file_name for c in flags]
    assert all(cell.tasks for cell in cells), "a cell that two blocks want is measured for the one that wants more"
    assert len({cell.file_name for cell in cells}) == 8


def test_all_means_every_registered_method() -> None:
    assert {cell.method for cell in grid_cells(["all"], [3], [64], ["identity"])} == set(ROUNDINGS)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[[cells]]\nmethods = 'magic'\nbits = 3", "magic"),
        ("[[cells]]\nmethods = 'nearest'\nbits = 9", "bits must be"),
        ("[[cells]]\nmethods = 'nearest'\nbits = 3\ngroup_sizes = 48", "group_size must be"),
        ("[[cells]]\nmethods = 'nearest'\nbits = 3\ngroup_sizes = true", "group size must be"),
        ("[[cells]]\nmethods = 'nearest'\nbits = 3\ntransforms = 'magic'", "magic"),
        ("[[cells]]\nmethods = 'nearest'\nbits = 3\noptions.nearest.lr = 1", "no option 'lr'"),
        ("[[cells]]\nmethods = 'nearest'\nbits = 3\noptions.discquant-paper.lr = 1", "not among the methods"),
        ("[[cells]]\nmethods = 'nearest'\nbit = 3", "no key 'bit'"),
        ("[[cells]]\nmethods = 'nearest'", "needs methods and bits"),
        ("[[checkpoints]]\nname = 'x'", "needs name and path"),
        ("[[checkpoints]]\nname = 'x'\npath = '/nowhere'", "not a model directory"),
        ("rows = 1", "no key 'rows'"),
        ("[[cells", "is not TOML"),
    ],
)
def test_a_mistake_in_a_cells_file_is_one_sentence(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "cells.toml").write_text(content)
    with pytest.raises(SpecError, match=said.replace("(", r"\(")):
        read_cells(tmp_path / "cells.toml")


@pytest.mark.parametrize("text", ["x", "=d", "x=", "x=/nowhere"])
def test_a_checkpoint_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="checkpoint"):
        checkpoint_cell(text)


def test_settings_of_the_file_give_way_to_flags() -> None:
    given = {"model": "m", "calibration": "c", "windows": 5, "tasks": None}
    protocol = protocol_from({"windows": 7, "window_length": 64, "row_layers": ["*.a"]}, given)
    assert (protocol.windows, protocol.window_length, protocol.row_layers) == (5, 64, ("*.a",))
    with pytest.raises(SpecError, match="no key 'window'"):
        protocol_from({"window": 7}, given)
    for name, value in {"windows": 0, "held_out_windows": 1, "wikitext_stride": -1, "windows ": 2.5}.items():
        with pytest.raises(SpecError, match=name.strip()):
            protocol_from({name.strip(): value}, {"model": "m", "calibration": "c"})


def test_tasks_without_data_or_without_lm_eval_are_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dq_runtime.evaluate import tasks

    with pytest.raises(SpecError, match="--tasks-data"):
        check_tasks(["piqa"], None)
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(SpecError, match=r"pip install 'dq_runtime\[tasks\]'"):
        check_tasks(["piqa"], tmp_path)
    monkeypatch.setattr(tasks, "find_spec", lambda name: object())
    (tmp_path / "arc.jsonl").write_text('{"query": "Question: a?", "choices": ["b", "c"], "gold": 0}\n')
    (tmp_path / "bad.jsonl").write_text('{"goal": "a"}\n')
    check_tasks(["arc"], tmp_path)
    with pytest.raises(DataError, match=r"piqa\.jsonl is not there; .* has arc, bad"):
        check_tasks(["piqa"], tmp_path)
    with pytest.raises(DataError, match=r'bad\.jsonl: an item must have "query"'):
        check_tasks(["bad"], tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bits", "three"], "--bits takes numbers"),
        (["--group-size", "48"], "group_size must be"),
        (["--methods", "nearest,magic"], "unknown rounding 'magic'"),
        (["--transforms", "magic"], "unknown transform 'magic'"),
        (["--set", "lr=1"], "is not METHOD.NAME=VALUE"),
        (["--set", "nearest.lr=1"], "no option 'lr'"),
        (["--cells", "{tmp}/cells.toml"], "is not there"),
        (["--cells", "{tmp}/cells.toml", "--bits", "3"], "contradict"),
        (["--tasks", "piqa"], "--tasks-data"),
        (["--tasks-data", "{tmp}"], "name them"),
        (["--windows", "0"], "windows must be an integer of at least 1"),
        (["--calibration", "{tmp}/nothing.txt"], "nothing.txt"),
    ],
    ids=lambda v: " ".join(v).replace("{tmp}/", "") if isinstance(v, list) else "",
)
def test_a_mistake_on_the_command_line_is_one_sentence(
    arguments: list[str], said: str, tiny_model: Path, tiny_text: Path, tmp_path: Path, capsys: Any
) -> None:
    filled = [a.format(tmp=tmp_path) for a in arguments]
    out = tmp_path / "out"
    assert main(["compare", str(tiny_model), "-o", str(out), "--calibration", str(tiny_text), *filled]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("dq: ")
    assert said in line
    assert not out.exists()


# --- the table ---


def measured(method: str, kl: list[float], **changes: Any) -> dict[str, Any]:
    """The file of a finished cell, as the worker fills it."""
    cell = Cell(method, 3, 64)
    empty = dict.fromkeys(
        ["kl_nearest", "learned_scales", "seconds", "total_seconds", "peak_memory_bytes", "moved_fraction"]
    )
    return {
        "label": cell.label,
        **cell.to_json(),
        **empty,
        "kind": "done",
        "bpw": 3.25,
        "resumed": False,
        "compute_dtype": "float32",
        "all_options": {},
        "per_window": {"kl": kl, "nll": [1.0] * len(kl), "top1": [0.5] * len(kl)},
        "device": "cpu",
        "threads": 1,
        "versions": {},
        "date": "2026-01-01",
        **changes,
    }


def test_rows_are_sorted_and_differences_are_paired_within_a_grid() -> None:
    cells = [
        measured("nearest", [1.0, 3.0, 2.0]),
        measured("gptq", [0.5, 2.5, 1.5], tasks={"arc": [1, 0, 1, 1]}),
        measured("discquant-paper", [0.6, 2.4, 1.8], tasks={"arc": [1, 0, 0, 1]}),
        measured("nearest", [0.1, 0.2, 0.3], bits=4, bpw=4.25),
        {**measured("obc", []), "kind": "refused", "reason": "too large"},
    ]
    result = table_of(cells, {"protocol": {}, "command": ""})
    rows = result["rows"]
    assert [(r["method"], r["bits"]) for r in rows] == [
        ("nearest", 4),
        ("gptq", 3),
        ("discquant-paper", 3),
        ("nearest", 3),
    ]
    assert rows[0]["kl_minus_best"]["ci95"] is None
    assert rows[1]["kl_minus_best"]["difference"] == 0
    nearest = rows[3]["kl_minus_best"]
    assert nearest["best"] == "gptq, 3 bits, group 64"
    assert nearest["difference"] == pytest.approx(0.5)
    assert nearest["ci95"] == pytest.approx((0.5, 0.5)), "exactly half a nat on every window"
    low, high = rows[2]["kl_minus_best"]["ci95"]
    assert low < 0 < high, "0.1, -0.1 and 0.3 on three windows may be chance"
    assert rows[2]["tasks"]["arc"]["accuracy"] == 0.5
    assert rows[2]["tasks"]["arc"]["minus_best_ci95"] == pytest.approx(ci95([0, 0, -1, 0]))
    assert [(c["method"], c["kind"], c["reason"]) for c in result["excluded"]] == [("obc", "refused", "too large")]


# --- the whole thing ---


@pytest.fixture(scope="module")
def comparison(
    tiny_model: Path, tiny_text: Path, packed_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], Quiet]:
    """(directory, result, listener) of two methods, one of them twice, and two checkpoints, without processes."""
    directory = tmp_path_factory.mktemp("compare")
    raw = directory / "wiki.raw"
    raw.write_text(tiny_text.read_text())
    settings = settings_for(tiny_model, tiny_text, wikitext=str(raw), wikitext_windows=3)
    cells = grid_cells(
        ["nearest", "discquant-paper"], [3], [64], ["identity"], options={"discquant-paper": {"steps": 4}}
    )
    cells += [checkpoint_cell(f"packed={packed_model}"), checkpoint_cell(f"itself={tiny_model}@4:row")]
    listener = Quiet()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_run", in_this_process)
        result = compare(settings, cells, directory / "out", listener)
    return directory / "out", result, listener


def in_this_process(cell: Cell, settings: Protocol, checkpoint: Path, listener: Any) -> Any:
    class Stages(Silent):
        def stage(self, title: str) -> Any:
            return lambda step, total, **figures: listener.stage(title, step, total, figures)

    return runner._Ended("done", run_cell(cell, settings, checkpoint, Stages()))


def test_the_result_file_has_what_the_schema_promises(comparison: tuple[Path, dict[str, Any], Quiet]) -> None:
    directory, result, listener = comparison
    text = (directory / "compare.json").read_text()
    assert json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is not JSON")) == json.loads(json.dumps(result))
    assert {"protocol", "rows", "excluded", "device", "versions", "date", "command"} <= set(result)
    assert len(result["protocol"]["calibration"]["sha256"]) == 64
    rows = {row["method"]: row for row in result["rows"]}
    assert set(rows) == {REFERENCE, "nearest", "discquant-paper", "packed", "itself"}
    for row in result["rows"]:
        assert row["kl_ci95"][0] <= row["kl"] <= row["kl_ci95"][1]
        assert row["perplexity_ci95"][0] < row["perplexity"] < row["perplexity_ci95"][1]
        assert 0 <= row["top1"] <= 1
    for name in ("nearest", "discquant-paper"):
        assert (rows[name]["bits"], rows[name]["group_size"], rows[name]["bpw"]) == (3, 64, 3.25)
        assert rows[name]["seconds"] > 0
        assert rows[name]["peak_memory_bytes"] > 10**7
    assert rows["nearest"]["moved_fraction"] == 0 < rows["discquant-paper"]["moved_fraction"]
    assert rows["discquant-paper"]["options"] == {"steps": 4}
    assert rows["discquant-paper"]["all_options"]["clamp"] == 0.5
    assert {"Loading", "Evaluating", "Perplexity", "discquant-paper"} <= listener.stages
    for name in ("compare.md", "compare_bpw.png", "compare_seconds.png"):
        assert (directory / name).stat().st_size > 500
    assert not any((directory / "work").iterdir()), "checkpoints are kept only while they are needed"


def test_a_checkpoint_is_scored_by_the_evaluator_of_the_methods(
    comparison: tuple[Path, dict[str, Any], Quiet],
) -> None:
    """The packed checkpoint *is* nearest at 3 bits, and the dense directory the model itself."""
    rows = {row["method"]: row for row in comparison[1]["rows"]}
    # quantize forms the teacher from scale * (lo + y), here it is the original: float32 rounding apart
    assert rows["packed"]["kl_windows"] == pytest.approx(rows["nearest"]["kl_windows"], rel=1e-4)
    assert rows["packed"]["perplexity"] == pytest.approx(rows["nearest"]["perplexity"], rel=1e-6)
    assert (rows["packed"]["bits"], rows["packed"]["group_size"], rows["packed"]["bpw"]) == (3, 64, 3.25)
    assert rows["itself"]["kl"] == 0
    assert rows["itself"]["perplexity"] == rows[REFERENCE]["perplexity"] < rows["nearest"]["perplexity"]
    assert (rows["itself"]["bits"], rows["itself"]["group_size"]) == (4, "row")


def test_the_markdown_names_the_best_of_each_grid(comparison: tuple[Path, dict[str, Any], Quiet]) -> None:
    text = markdown(comparison[1])
    part = text.split("## 3 bits, group 64")[1].split("##")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")][2:]
    assert len(lines) == 3
    assert lines[0].split("|")[4].strip() == "best"
    assert "tiny.txt" in text


def test_a_finished_cell_is_not_measured_again_and_cells_can_be_added(
    comparison: tuple[Path, dict[str, Any], Quiet], tiny_model: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = comparison[0]
    monkeypatch.setattr(runner, "_run", in_this_process)
    settings = settings_for(tiny_model, tiny_text, wikitext=str(directory.parent / "wiki.raw"), wikitext_windows=3)
    listener = Quiet()
    added = grid_cells(["nearest"], [3, 4], [64], ["identity"])
    result = compare(settings, added, directory, listener)
    assert [label for label, _ in listener.cells] == ["nearest, 4 bits, group 64"]
    assert listener.cells[0][1] is not None, "finished cells give an estimate"
    assert len(result["rows"]) == 6
    with pytest.raises(SpecError, match="measured with a different held_out"):
        compare(settings_for(tiny_model, tiny_text, held_out_windows=2), added, directory, listener)
    with pytest.raises(SpecError, match="is not a comparison"):
        compare(settings, added, tiny_model, listener)
    with runner._alone(directory), pytest.raises(SpecError, match="another dq compare is at work"):
        compare(settings, added, directory, listener)


def test_a_cell_measured_on_other_windows_is_refused(
    tiny_model: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(cell: Cell, settings: Protocol, checkpoint: Path, listener: Any) -> Any:
        content = measured(cell.method, [0.1, 0.2], held_out_sha256=cell.method)
        return runner._Ended("done", content)

    monkeypatch.setattr(runner, "_run", run)
    result = compare(settings_for(tiny_model, tiny_text), [Cell("nearest", 3, 64)], tmp_path / "out", Quiet())
    assert [row["method"] for row in result["rows"]] == [REFERENCE]
    assert "other held-out windows than reference" in result["excluded"][0]["reason"]


class Messages:
    """The parent's end of a pipe, as a list."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, message: Any) -> None:
        self.sent.append(message)


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> Messages:
    """`work` in this process: it must not leave the group of its tests, nor watch for their parent."""
    monkeypatch.setattr(os, "setpgrp", lambda: None)
    monkeypatch.setattr(worker, "_die_with", lambda parent: None)
    return Messages()


def test_a_refusal_and_a_defect_reach_the_parent_as_sentences(
    tiny_model: Path, tiny_text: Path, tmp_path: Path, messages: Messages, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(tiny_model, tiny_text)
    worker.work(messages, Cell("nearest", 3, 128), settings, tmp_path / "a", 1, 0)
    kind, content = messages.sent[-1]
    assert kind == "refused"
    assert "group size 128" in content["reason"]
    monkeypatch.setattr(worker, "quantize", lambda *a, **k: 1 // 0)
    worker.work(messages, Cell("nearest", 3, 64), settings, tmp_path / "b", 1, 0)
    kind, content = messages.sent[-1]
    assert kind == "failed"
    assert content["reason"].startswith("ZeroDivisionError: ")
    assert "Traceback" in content["traceback"]


def test_a_cell_that_refuses_is_recorded_and_the_others_go_on(
    tiny_model: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(cell: Cell, settings: Protocol, checkpoint: Path, listener: Any) -> Any:
        if cell.group_size == 128:
            return runner._Ended("refused", {"reason": "group size 128 does not fit"})
        return in_this_process(cell, settings, checkpoint, listener)

    monkeypatch.setattr(runner, "_run", run)
    cells = grid_cells(["nearest"], [3], [128, 64], ["identity"])
    listener = Quiet()
    result = compare(settings_for(tiny_model, tiny_text), cells, tmp_path / "out", listener, keep=True)
    assert [row["method"] for row in result["rows"]] == [REFERENCE, "nearest"]
    assert [c["reason"] for c in result["excluded"]] == ["group size 128 does not fit"]
    assert [c["kind"] for c in listener.ended] == ["done", "refused", "done"]
    (kept,) = (tmp_path / "out" / "work").iterdir()
    assert dq_runtime.load(kept, "cpu").vocabulary > 0
    again = Quiet()
    compare(settings_for(tiny_model, tiny_text), cells, tmp_path / "out", again)
    assert [label for label, _ in again.cells] == ["nearest, 3 bits, group 128"], "it is tried again, the others not"


class PressesCtrlC(Quiet):
    """A user who has seen the second step of the rounding."""

    def stage(self, title: str, step: int, total: int, figures: Mapping[str, float]) -> None:
        super().stage(title, step, total, figures)
        if title == "discquant-paper" and step >= 2 and not self.pressed:
            self.pressed = True
            os.kill(os.getpid(), signal.SIGINT)

    pressed = False


def test_ctrl_c_saves_the_cell_and_the_same_call_continues_it(
    tiny_model: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in a process of its own, as ever; continued in this one, which costs no imports."""
    out = tmp_path / "out"
    settings = settings_for(tiny_model, tiny_text, held_out_windows=2)
    cells = grid_cells(["discquant-paper"], [3], [64], ["identity"], options={"discquant-paper": {"steps": "100"}})
    with monkeypatch.context() as patch:
        patch.setattr(runner, "_run", in_this_process)
        compare(settings, [], out, Quiet())
    user = PressesCtrlC()
    with pytest.raises(
        Interrupted, match=r"^stopped in cell 1 of 1 \(discquant-paper, 3 bits, group 64, steps=100\); run the"
    ):
        compare(settings, cells, out, user)
    assert user.ended == []
    assert [row["method"] for row in json.loads((out / "compare.json").read_text())["rows"]] == [REFERENCE]
    (state,) = out.glob("work/*.partial")
    assert (state / "state.safetensors").exists()
    before = json.loads((state / "seconds.json").read_text())
    monkeypatch.setattr(runner, "_run", in_this_process)
    rows = {row["method"]: row for row in compare(settings, cells, out, Quiet())["rows"]}
    assert rows["discquant-paper"]["resumed"]
    assert rows["discquant-paper"]["seconds"] > before > 0, "the seconds of both tries"
    assert not state.exists()


def test_a_process_that_is_killed_is_a_sentence(
    tiny_model: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "work", die)
    result = compare(settings_for(tiny_model, tiny_text), [], tmp_path / "out", Quiet())
    assert result["rows"] == []
    assert result["excluded"][0]["kind"] == "failed"
    assert "signal 9 (9 is what the system sends when memory runs out)" in result["excluded"][0]["reason"]


def die(*_: Any) -> None:
    """What the system does to a process that takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_tasks_are_answered_by_the_packed_model_as_its_log_likelihoods_say(
    packed_model: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Both shapes of an item, on packed linears, against sums of log-probabilities of the decoded weights."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'dq_runtime[tasks]'")
    from dq_runtime.packing.checkpoint import open_checkpoint
    from dq_runtime.runtime.dense import load_dense

    endings = [("Question: who found it?", ["Anna", "a sailor", "the mayor"], i % 3) for i in range(4)]
    endings += [("The baker sold", ["bread at noon.", "a map twice."], i % 2) for i in range(3)]
    beginnings = [(["Tom hid", "Her sister hid"], "two letters.", 0), (["Then", "Later"], "the mayor sold a lamp.", 1)]
    query = [{"query": q, "choices": c, "gold": g} for q, c, g in endings]
    context = [{"context_options": c, "continuation": t, "gold": g} for c, t, g in beginnings]
    (tmp_path / "ends.jsonl").write_text("\n".join(map(json.dumps, query)) + "\n")
    (tmp_path / "starts.jsonl").write_text("\n".join(map(json.dumps, context)) + "\n")
    settings = settings_for(tiny_model, tmp_path, tasks=("ends", "starts"), tasks_data=str(tmp_path), task_items=6)
    answers = worker._tasks(str(packed_model), settings, "cpu", Silent())["tasks"]
    assert [len(answers[name]) for name in ("ends", "starts")] == [6, 2], "the first task_items of each"

    dense = load_dense(str(tiny_model))
    for name, weight in open_checkpoint(packed_model).packed():
        dense.model.get_submodule(name).weight.data = weight.decode()

    def score(before: str, after: str) -> float:
        ids = [dense.tokenizer.encode(text, add_special_tokens=False) for text in (before, before + " " + after)]
        with torch.no_grad():
            log_p = dense.model(input_ids=torch.tensor([ids[1]])).logits[0].log_softmax(-1)
        return sum(log_p[i - 1, ids[1][i]].item() for i in range(len(ids[0]), len(ids[1])))

    def right(scores: list[float], gold: int) -> int:
        return int(scores.index(max(scores)) == gold)

    asked = [(q + ("\nAnswer:" if q.startswith("Question:") else ""), c, g) for q, c, g in endings[:6]]
    assert answers["ends"] == [right([score(q, e) for e in c], g) for q, c, g in asked]
    assert answers["starts"] == [right([score(b, t) for b in c], g) for c, t, g in beginnings]
