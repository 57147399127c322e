"""Builds ``dq_runtime/_cuda_pack.so`` from the kernels beside this file; no GPU, no driver, no torch needed.

    python csrc/cuda/build.py [OUTPUT]

setup.py calls it too. The CUDA runtime is linked in statically, so the library loads on machines without CUDA.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = [HERE / "pack.cu", HERE / "fit.cu"]
LIBRARY = HERE.parents[1] / "dq_runtime" / "_cuda_pack.so"
# A100 and H100; cubins of sm_80 run on every sm_8x. Later chips compile compute_90's PTX when they first load it.
ARCHITECTURES = ("80", "90")
# -fmad=false: products and sums round twice, as PyTorch's separate operations do; scales must be its bits.
FLAGS = ["-std=c++17", "-O3", "-fmad=false"]


class BuildError(Exception):
    """Why the library was not built, in one line."""


def find_nvcc() -> str | None:
    """The path of nvcc: on PATH, or under CUDA_HOME or CUDA_PATH; None if there is none."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = [shutil.which(place) for place in ("nvcc", *(f"{home}/bin/nvcc" for home in homes))]
    return next(filter(None, found), None)


def run_nvcc(arguments: list[str]) -> str:
    """Runs nvcc; returns what it printed. Raises :class:`BuildError` with its first complaint."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("nvcc not found on PATH or under CUDA_HOME")
    done = subprocess.run(
        [nvcc, *FLAGS, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        complaint = next((line for line in lines if "error" in line or "fatal" in line), lines[-1] if lines else "")
        raise BuildError(f"nvcc failed with exit status {done.returncode}: {complaint}")
    return done.stdout


def build(output: Path = LIBRARY) -> None:
    """Compiles the library to ``output``, which it replaces whole; raises :class:`BuildError`."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    targets.append(f"-gencode=arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}")
    link = ["--shared", "--cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    fresh = output.with_suffix(".so.new")  # a process that has the old file loaded keeps it
    try:
        run_nvcc([*targets, *link, "-o", str(fresh), *map(str, SOURCES)])
        os.replace(fresh, output)
    finally:
        fresh.unlink(missing_ok=True)


def main() -> int:
    """Builds; returns the exit code."""
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else LIBRARY
    try:
        build(output)
    except BuildError as error:
        print(f"build.py: {output.name} was not built: {error}", file=sys.stderr)
        return 1
    print(f"built {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
