"""A small run of benchmarks/fuzz.py, whose full run is committed; and that it would notice."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A reader that needs a package of its own, where there is one.
GGUF = "compressed-tensors-mixed" if find_spec("gguf") is None else "gguf-q4_0"
RESULT = ROOT / "benchmarks" / "results" / "fuzz.json"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory and time need Linux")


def fuzz(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "fuzz.py"), *map(str, arguments)]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


def test_mutated_files_are_read_or_refused() -> None:
    done = fuzz("--inputs", 800, "--seed", 99, "--only", "gptq-v1-4bit", "awq-4bit", GGUF, "dq-1")
    assert done.returncode == 0, done.stderr
    assert "{'inputs': 800, 'crashes': 0, 'hangs': 0" in done.stdout


def test_it_notices_a_reader_that_fails_hangs_or_dies(tmp_path: Path) -> None:
    """The same worker, with readers that go wrong on some inputs."""
    code = f"""
import os, sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "benchmarks")!r}]
import fuzz
fuzz.SECONDS = 1
calls = iter([lambda: None, lambda: 1 / 0, lambda: time.sleep(9), lambda: bytearray(2**33), lambda: os._exit(7)])
fuzz.read_everything = lambda path: next(calls)()
fuzz.work("awq-4bit", 0, 4)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 7
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    failures = [line["what"] for line in lines if "what" in line]
    assert "ZeroDivisionError" in failures[0]
    assert failures[1] == "hang"
    assert "MemoryError" in failures[2]
    assert lines[-1] == {"at": 3}


def test_the_committed_run_was_clean() -> None:
    report = json.loads(RESULT.read_text())
    assert report["total"]["inputs"] == sum(row["inputs"] for row in report["rows"]) >= 100_000
    assert report["total"]["crashes"] == report["total"]["hangs"] == 0
    golden = {path.parent.name for path in (ROOT / "tests" / "golden").glob("*/expected.json")}
    assert {row["reader"] for row in report["rows"]} == golden
