"""Run the tests that need a GPU, and the CUDA library's under compute-sanitizer; keep what they said.

    python benchmarks/gpu_tests.py --out FILE

Exit code 1 where anything failed. What cannot run here (no nvcc, no compute-sanitizer) is recorded with its reason.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gpu_part

# -c /dev/null: pyproject.toml's strict configuration names plugins that a bare machine may lack.
PYTEST = [sys.executable, "-m", "pytest", "-c", "/dev/null", "--rootdir=.", "-p", "no:cacheprovider", "-q", "-m", "gpu"]
PYTEST += ["-W", "ignore::pytest.PytestUnknownMarkWarning"]
# Serially the tests take 10 minutes, nearly all of it compiling; with pytest-xdist and 16 cores it takes 2.
PARALLEL = ["-n", str(min(14, os.cpu_count() or 1))] if find_spec("xdist") else []
PACK = "tests/gpu/test_cuda_pack.py"
# Most seconds of each command: all of them must leave time to measure in ten minutes.
BUILD_SECONDS, SANITIZER_SECONDS, TEST_SECONDS = 90, 150, 240
# Addresses are checked, not what CUDA calls return: one test asks for an error on purpose.
SANITIZER = ["--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "99"]


def run(command: list[str], seconds: float, **environment: str) -> dict[str, Any]:
    """Run it in the repository root for at most ``seconds``, its output passed on; exit status (124: stopped), seconds
    and the last line it printed."""
    print(f"$ {' '.join(command)}", flush=True)
    started = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            cwd=gpu_part.ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
        status, text = done.returncode, done.stdout
    except subprocess.TimeoutExpired as late:
        said = late.stdout or b""
        status, text = 124, f"{said.decode() if isinstance(said, bytes) else said}\nstopped after {seconds} s"
    print(text, flush=True)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return {"status": status, "seconds": round(time.perf_counter() - started, 1), "said": lines[-1] if lines else ""}


def missing(program: str) -> str | None:
    """Why ``program`` of the CUDA toolkit cannot be run; None if it can."""
    return None if shutil.which(program) else f"{program} is not on PATH"


def main() -> int:
    """Run, print, write; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="result file")
    args = parser.parse_args()
    reason = gpu_part.unusable()
    if reason is not None:
        print(f"gpu_tests: nothing was tested: {reason}", file=sys.stderr)
        return 2
    result: dict[str, Any] = {}
    no_nvcc = missing("nvcc") if not os.environ.get("CUDA_HOME") else None
    if no_nvcc is None:
        result["build"] = run([sys.executable, "csrc/cuda/build.py"], BUILD_SECONDS)
    else:
        result["build"] = {"skipped": no_nvcc}
    reason = missing("compute-sanitizer") or ("there is no CUDA library to check" if no_nvcc else None)
    if reason is None:
        # torch pools memory, which hides a read past one tensor inside another; without its pool each has its own.
        checked = ["compute-sanitizer", *SANITIZER, *PYTEST, "-k", "not 2_to_31", PACK]
        result["sanitizer"] = run(checked, SANITIZER_SECONDS, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    else:
        result["sanitizer"] = {"skipped": reason}
    result["tests"] = run([*PYTEST, *PARALLEL, "--maxfail=20", "tests/gpu"], TEST_SECONDS)
    gpu_part.write(args.out, {**gpu_part.environment(), "tests": result})
    failed = [name for name, one in result.items() if one.get("status")]
    print(f"failed: {', '.join(failed)}" if failed else "all passed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
