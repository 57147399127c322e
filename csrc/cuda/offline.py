"""Compiles every CUDA kernel for every architecture without a GPU, and refuses local memory.

    python csrc/cuda/offline.py

One line a kernel and architecture: registers, stack, spills, shared memory. Exit code 1 on a warning, a stack frame, a
spill or a failed compilation; 0, with a line that says so, where there is no nvcc.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from build import ARCHITECTURES, SOURCES, BuildError, find_nvcc, run_nvcc  # this folder's, which is first on sys.path

# 2048 threads a multiprocessor, 65536 registers: above 32 not all of them fit, above 64 fewer than half.
MAX_REGISTERS = 64


@dataclass(frozen=True)
class Usage:
    """What ptxas reports of one kernel, in registers a thread and bytes."""

    kernel: str
    registers: int
    stack: int
    spills: int
    shared: int

    @property
    def breach(self) -> str | None:
        """What is wrong with it, or None."""
        if self.stack or self.spills:
            return f"{self.stack} bytes of stack and {self.spills} of spills: local memory is not allowed"
        if self.registers > MAX_REGISTERS:
            return f"{self.registers} registers are more than {MAX_REGISTERS}"
        return None


def readable(symbol: str) -> str:
    """``_ZN2dq..4packILi3EE...`` -> ``pack<3>``; the symbol itself where there is no c++filt."""
    if shutil.which("c++filt") is None:
        return symbol
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\(anonymous namespace\)::|dq::|^void |\(Dtype\)", "", name.replace("(dq::Dtype)", ""))
    return name.split("(")[0]


def parse(log: str) -> list[Usage]:
    """The kernels of a ``ptxas -v`` log."""
    found = []
    for part in log.split("Compiling entry function '")[1:]:

        def number(pattern: str, part: str = part) -> int:
            match = re.search(pattern, part)
            return int(match.group(1)) if match else 0

        spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
        stack, registers = number(r"(\d+) bytes stack frame"), number(r"Used (\d+) registers")
        found.append(Usage(readable(part.split("'")[0]), registers, stack, spills, number(r"(\d+) bytes smem")))
    return found


def compile_one(job: tuple[str, Path]) -> list[Usage]:
    """The kernels of one source for one architecture; any warning is an error."""
    architecture, source = job
    with tempfile.TemporaryDirectory() as folder:
        strict = ["-Xptxas=-v,--warn-on-local-memory-usage,--warn-on-spills", "-Werror=all-warnings"]
        cubin = ["-cubin", f"-arch=sm_{architecture}", "-o", f"{folder}/out.cubin"]
        usages = parse(run_nvcc([*strict, *cubin, str(source)]))
    if not usages:
        raise BuildError(f"ptxas reported no kernel of {source.name}")
    return usages


def main() -> int:
    """Compiles, prints, returns the exit code."""
    if find_nvcc() is None:
        print("nvcc not found: skipped")
        return 0
    jobs = [(architecture, source) for architecture in ARCHITECTURES for source in SOURCES]
    bad = 0
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(compile_one, job) for job in jobs]
        for (architecture, source), future in zip(jobs, futures, strict=True):
            try:
                usages = future.result()
            except BuildError as error:
                print(f"sm_{architecture}  {source.name}  FAILED: {error}")
                bad += 1
                continue
            for u in sorted(usages, key=lambda u: u.kernel):
                verdict = "" if u.breach is None else f"  BREACH: {u.breach}"
                figures = f"{u.registers:3} registers  stack {u.stack}  spills {u.spills}  shared {u.shared}"
                print(f"sm_{architecture}  {u.kernel:20}  {figures}{verdict}")
                bad += u.breach is not None
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
