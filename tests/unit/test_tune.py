"""Tuning and the GPU benchmarks, as far as they go without a GPU: what they check, choose, write, draw and refuse.

The kernels run on triton's interpreter in one subprocess (this file as a script), as in tests/gpu/test_qmm_triton.py.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import types
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
PROCESSORS = 132  # of an H100
SOURCES = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}


def expected(m: int = 3, n: int = 40, k: int = 96) -> tuple[Any, Tensor]:
    """What x @ w.T must be, and a y that is right: rounded to bf16 once, from float64."""
    from dq_kernels.timing import Expected

    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(m, k, generator=g).bfloat16(), torch.randn(n, k, generator=g)
    made = Expected.of(x, w)
    assert torch.equal(made.exact, x.double() @ w.double().t())
    return made, made.exact.bfloat16()


def test_a_fault_is_told_from_rounding() -> None:
    from dq_kernels.timing import fault

    made, y = expected()
    assert fault(lambda out: out.copy_(y), made, y.dtype, 3) is None
    for error in (2.0**-4, math.nan, math.inf):  # 8 roundings of bf16 at once
        wrong = y.clone()
        wrong[1, 7] += error * made.magnitude[1, 7]
        assert "times the bound" in (fault(lambda out, wrong=wrong: out.copy_(wrong), made, y.dtype, 3) or "")


def test_an_element_that_is_not_written_is_a_fault() -> None:
    from dq_kernels.timing import fault

    made, y = expected()
    assert "its error is inf" in (fault(lambda out: out[:, 1:].copy_(y[:, 1:]), made, y.dtype, 2) or "")


def test_a_bit_that_changes_in_the_last_of_five_runs_is_a_fault() -> None:
    from dq_kernels.timing import fault

    made, y = expected()
    runs = 0

    def run(out: Tensor) -> None:
        nonlocal runs
        runs += 1
        out.copy_(y)
        if runs == 5:
            out.view(torch.int16)[2, 3] ^= 1

    assert fault(run, made, y.dtype, 5) == "5 runs gave different bits"


def test_copies_exceed_the_cache_three_times() -> None:
    from dq_kernels.timing import copies_for

    h100 = 50 * 2**20
    for nbytes in (124_416, 7_340_032, 117_440_512):
        assert copies_for(nbytes, h100) * nbytes >= 3 * h100
        assert copies_for(nbytes, h100) == 2 or (copies_for(nbytes, h100) - 1) * nbytes < 3 * h100


@pytest.mark.parametrize("capturable", [True, False])
def test_launches_rotate_over_the_copies(capturable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of 10 us a launch: a graph too short to time is made longer; no graph is said, and timed eagerly."""
    from dq_kernels import timing

    launched: list[int] = []

    class Graph:
        def __init__(self) -> None:
            self.launches = 0

        def replay(self) -> None:
            launched.extend([-1] * self.launches)

    class Capture:
        def __init__(self, graph: Graph, **_: Any) -> None:
            self.graph, self.before = graph, len(launched)

        def __enter__(self) -> None:
            if not capturable:
                raise RuntimeError("operation not permitted\nwhile capturing")

        def __exit__(self, *_: object) -> None:
            self.graph.launches = len(launched) - self.before

    def elapsed(run: Any) -> float:
        before = len(launched)
        run()
        return 10.0 * (len(launched) - before)

    stream = types.SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    monkeypatch.setattr(timing, "_side_stream", lambda device: stream)
    monkeypatch.setattr(timing, "_elapsed_us", elapsed)
    for name, fake in {
        "current_device": lambda: 0,
        "current_stream": lambda: None,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": Graph,
        "graph": Capture,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    got = timing.time_launches(launched.append, 3)
    assert (got.median_us, got.min_us, got.max_us, got.copies) == (10.0, 10.0, 10.0, 3)
    assert launched[:8] == [0, 0, 0, 1, 2, 0, 1, 2]
    if capturable:
        assert got.launches * 10.0 >= timing.MIN_GRAPH_US
        assert got.not_captured is None
    else:
        assert (got.launches, got.not_captured) == (6, "RuntimeError: operation not permitted")
        assert set(launched) == {0, 1, 2}


def test_candidates_are_distinct_and_stay_in_their_bucket() -> None:
    from dq_kernels.stream import MAX_SPLIT_TILES
    from dq_kernels.tune import BUCKETS, LARGE_N, SMALL_N, K, candidates

    for bucket in BUCKETS:
        for n in (LARGE_N, SMALL_N):
            rows = candidates(bucket, n, PROCESSORS)
            tiles = [row.tile(bucket, n, K, 4) for row in rows]
            assert len(set(tiles)) == len(tiles) >= 5
            for row, tile in zip(rows, tiles, strict=True):
                assert row.max_m == bucket
                assert bucket >= tile.BM
                assert tile.BM * tile.BN // (32 * tile.num_warps) <= 128, "accumulators would spill"
                assert tile.split == 1 or row.tiles(bucket, n) <= MAX_SPLIT_TILES


def test_launches_compile_without_a_gpu_in_processes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tile that every table begins with, and what prepares a weight; a tile no compiler takes is an answer."""
    from dq_kernels.precompile import Launch, compile_all
    from dq_kernels.stream import Tile
    from dq_kernels.stream_layout import ORDERS
    from dq_kernels.tune import launches

    made = launches(ORDERS, PROCESSORS)
    tile = Tile(16, 64, 4, 3)
    good = [Launch(4096, 4, 64, tile), Launch(4096, 4, 64)]
    assert set(good) <= set(made)
    bad = Launch(4096, 4, 64, replace(tile, BN=48))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", SOURCES["PYTHONPATH"])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    steps: list[tuple[int, int]] = []
    refused = compile_all([*good, bad, good[0]], 90, lambda step, total: steps.append((step, total)))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert list(refused) == [bad]
    names = {path.stem for path in tmp_path.rglob("*.cubin")}
    assert names == {"stream_kernel", "decode_kernel", "repack_kernel", "dequant_kernel"}


def measured(gains: dict[int, tuple[float, float]]) -> list[Any]:
    """Bucket -> (gain at the large N, gain at the small); 0: every candidate failed."""
    from dq_kernels.table import Row
    from dq_kernels.tune import LARGE_N, SMALL_N, Measured

    return [
        Measured(bucket, n, Row(bucket, 16, 64, 4, 3, 132) if gain else None, 1.0, gain)
        for bucket, pair in gains.items()
        for n, gain in zip((LARGE_N, SMALL_N), pair, strict=True)
    ]


@pytest.mark.parametrize(
    ("gains", "rows"),
    [
        ({16: (3, 2), 32: (2, 1.5)}, [(16, 128), (16, 0), (32, 256), (32, 0)]),
        ({16: (3, 2), 32: (0.9, 0.9), 64: (2, 2)}, [(16, 128), (16, 0)]),
        ({16: (3, 0.9), 32: (2, 2)}, [(16, 128), (32, 256)]),  # a small row at 32 would catch M = 16, too
        ({16: (0.9, 1.5), 32: (0.8, 1.1)}, [(16, 128), (16, 0)]),
        ({16: (0, 2)}, []),
        ({16: (2, 0)}, [(16, 128)]),
    ],
)
def test_the_table_ends_where_decoding_wins(gains: dict[int, tuple[float, float]], rows: list[tuple[int, int]]) -> None:
    from dq_kernels.tune import select

    assert [(row.max_m, row.min_tiles) for row in select(measured(gains))] == rows


def test_a_table_is_written_as_it_is_read(tmp_path: Path) -> None:
    from dq_kernels.stream_layout import ORDERS
    from dq_kernels.table import read
    from dq_kernels.tune import select, write

    table = {bits: select(measured({16: (3, 2), 32: (2, 1.5)})) for bits in ORDERS} | {8: ()}
    path = tmp_path / "tiles.json"
    write(path, table, 'an "H100"')
    assert read(path.read_text()) == table
    assert json.loads(path.read_text())["measured_on"] == 'an "H100"'
    assert [p.name for p in tmp_path.iterdir()] == ["tiles.json"]
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "nowhere" / "tiles.json", table, "H100")


def interpret() -> None:
    """measure() on the interpreter, with time_launches replaced: of three candidates one is wrong, one the faster."""
    from dq_kernels import timing, tune
    from dq_kernels.stream import qmm_stream
    from dq_kernels.table import Row

    torch.set_num_threads(1)
    torch.manual_seed(0)
    w, decoded = tune.random_weight(96, 128, 3, 64, "cpu")
    weights = [w, replace(w, words=w.words.clone())]
    x = torch.randn(5, 128).bfloat16()

    def broken(x: Tensor, w: Any, tile: Any, out: Tensor | None = None) -> Tensor:
        y = qmm_stream(x, w, tile, out)
        return y.neg_() if tile.num_stages == 2 else y

    calls = iter((5.0, 4.0, 6.0))

    def timed(launch: Any, copies: int) -> timing.Timing:
        for i in range(copies):
            launch(i)
        return timing.Timing(next(calls), 0.0, 0.0, 2 * copies, copies, None)

    tune.qmm_stream, timing.time_launches = broken, timed
    rows = [Row(16, 16, 64, 4, stages, programs) for stages, programs in ((2, 0), (3, 0), (3, 4))]
    found = tune.measure(x, weights, timing.Expected.of(x, decoded), rows)
    assert (found.best, found.best_us, found.decoded_us) == (rows[2], 4.0, 6.0), found
    assert found.gain == 1.5
    assert list(found.rejected) == ["BM 16, BN 64, 4 warps, 2 stages, split 1"], found.rejected
    assert len(list(tune.summary({3: [found]}))) == 2


def test_the_fastest_right_candidate_wins() -> None:
    environment = {**os.environ, **SOURCES, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_dq_bench_says_in_one_sentence_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dq_runtime.backends.triton_cuda import TritonCuda
    from dq_runtime.cli import main

    def said(*arguments: str) -> str:
        assert main(["bench", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert len(captured.err.splitlines()) == 1
        return captured.err

    assert "Missing command" in said()
    assert "--bogus" in said("tune", "--bogus")
    monkeypatch.setattr(TritonCuda, "available", lambda self: "no CUDA device")
    out = tmp_path / "tiles.json"
    assert said("tune", "--out", str(out)) == (
        "dq: nothing was tuned, there is no usable NVIDIA GPU here: no CUDA device\n"
    )
    monkeypatch.setattr(TritonCuda, "available", lambda self: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no CUDA device" in said("tune", "--out", str(out))
    monkeypatch.setattr("dq_kernels.timing.unusable", lambda: None)
    assert "must be a file in a folder that exists" in said("tune", "--out", str(tmp_path / "nowhere" / "t.json"))
    assert "must be a file in a folder that exists" in said("tune", "--out", str(tmp_path))
    assert not out.exists()


def head(**more: Any) -> dict[str, Any]:
    """The start of a part, as gpu_part.environment makes it."""
    versions = {"torch": "2.11"}
    fixed = {"device": "NVIDIA H100 80GB", "capability": [9, 0], "driver": "580", "versions": versions}
    return {**fixed, "date": "2026-01-02T03:04:05+00:00", "command": "python x.py", **more}


def parts() -> dict[str, dict[str, Any]]:
    """Small invented parts, one row a kind."""
    row = {"n": 14336, "k": 4096, "m": 1, "speedup_over_bf16": 2.0}
    matmul = [
        {**row, "m": m, "method": method, "bits": bits}
        for m in (64, 1)
        for method, bits in (("torch-bf16", 16), ("dq", 3), ("dq", 4), ("torch-int4", 4), ("humming", 3))
    ]
    decode = [
        {"bits": bits, "head_bits": 16, "batch": batch, "tokens_per_second": 9.0, "speedup_over_bf16": 1.0}
        for bits in (16, 3)
        for batch in (1, 16)
    ]
    model = {"num_hidden_layers": 32, "hidden_size": 4096}
    return {
        "matmul": head(matmul=matmul, skipped=[], limits={}, wrong=[], group_size=64, copy_gb_s=2900.0),
        "decode": head(decode=decode, wrong=["x"], model=model, context=512, copy_gb_s=2901.0, cut_short="y"),
        "discquant_step": head(ratios={"speed": 2.0}),
        "tests": head(tests={"tests": {"status": 0}}),
    }


def report(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_report.py"), str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


def test_parts_become_one_report_and_two_plots(tmp_path: Path) -> None:
    for name, part in parts().items():
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    to = tmp_path / "results"
    done = report(tmp_path, "--results", str(to), "--images", str(to))
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in to.iterdir()) == [
        "gpu_decode.png",
        "gpu_matmul.png",
        "gpu_nvidia_h100_80gb_2026-01-02.json",
    ]
    made = json.loads((to / "gpu_nvidia_h100_80gb_2026-01-02.json").read_text())
    assert {"device", "capability", "driver", "versions", "date", "command", "copy_gb_s"} <= set(made)
    assert made["copy_gb_s"] == 2900.0
    assert len(made["matmul"]) == 10
    assert len(made["decode"]) == 4
    assert made["discquant_step"]["ratios"] == {"speed": 2.0}
    assert made["tests"] == {"tests": {"status": 0}}
    assert (made["wrong"], made["cut_short"]) == (["x"], {"decode": "y"})
    for image in to.glob("*.png"):
        assert image.read_bytes().startswith(b"\x89PNG")
        assert image.stat().st_size > 5000


def test_a_report_of_nothing_or_of_two_devices_is_refused(tmp_path: Path) -> None:
    done = report(tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "holds none of tests.json" in done.stderr
    (tmp_path / "tests.json").write_text(json.dumps(parts()["tests"]))
    (tmp_path / "decode.json").write_text(json.dumps({**parts()["decode"], "device": "NVIDIA A100"}))
    done = report(tmp_path, "--results", str(tmp_path / "r"), "--images", str(tmp_path / "r"))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "2 devices (NVIDIA A100, NVIDIA H100 80GB)" in done.stderr
    assert not (tmp_path / "r").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_benchmarks_say_that_there_is_no_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "DQ_RESULTS": str(tmp_path)}
    script = str(ROOT / "benchmarks" / "gpu.sh")
    for arguments, said in ((["nothing"], "tests, time or all, got 'nothing'"), ([], "nothing was tested or timed")):
        command = ["bash", script, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert said in done.stderr
    module = [sys.executable, "-m", "dq_kernels.tune", "--out", str(tmp_path / "t.json")]
    done = subprocess.run(module, env={**os.environ, **SOURCES}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "tune: nothing was tuned: torch sees no CUDA device\n")
    assert list(tmp_path.iterdir()) == []


if __name__ == "__main__":
    interpret()
