"""Compile the shipped kernels for sm_80, sm_90 and newer, with no GPU and no driver, and judge the machine code.

    python -m dq_kernels.offline [--jobs 2] [--only stream]

One line a kernel and chip: registers, stack, local-memory instructions (spills), shared memory, the matrix instruction,
and integer instructions per weight in the loop around it. Exit code 1: a kernel failed to compile, or its machine code
breaks what its module promises (case.py). 2: cannot compile here.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from dq_kernels.case import Case

# Shared memory one block may have: 163 KB of an A100's 164, 227 KB of an H100's 228 (CUDA keeps 1 KB for itself).
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
MODULES = (
    "dequant",
    "stream_layout",
    "stream",
    "grouped",
    "lerp",
    "adam",
    "kl",
    "hadamard",
    "norm",
    "rope",
    "gated",
    "attention",
)


@dataclass(frozen=True)
class Result:
    """What the compiler made of one Case on one arch; ``problems`` is empty where it keeps every promise."""

    label: str
    arch: int
    problems: tuple[str, ...]
    registers: int = 0
    stack: int = 0
    local: int = 0
    shared: int = 0
    matrix: str = "-"
    int_ops: float = 0.0

    def __str__(self) -> str:
        work = f"{self.int_ops:4.2f} int/weight" if self.int_ops else " " * 15
        return (
            f"sm_{self.arch} {self.label:52} {self.registers:3} regs, stack {self.stack}, LDL/STL {self.local}, shared "
            f"{self.shared:6} B, {self.matrix:5} {work}  {'; '.join(self.problems) or 'ok'}"
        )


def cases_of(module: str) -> list[Case]:
    """The cases of dq_kernels.<module>."""
    cases: list[Case] = import_module(f"dq_kernels.{module}").offline_cases()
    return cases


def source(case: Case) -> Any:
    """The triton ASTSource of a case."""
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    types = {name: "constexpr" if name in case.constants else case.types[name] for name in names}
    # What a launch would find: torch's pointers are 16-byte aligned.
    aligned = [i for i, name in enumerate(names) if types[name].startswith("*") or name in case.aligned]
    attrs = {(i,): [["tt.divisibility", 16]] for i in aligned}
    return ASTSource(fn=case.kernel, signature=types, constexprs=dict(case.constants), attrs=attrs)


def compile_one(module: str, index: int, arch: int) -> Result:
    """Case ``index`` of a module, by number because kernels do not pickle."""
    return judge(cases_of(module)[index], arch)


def judge(case: Case, arch: int) -> Result:
    """Compile a case for ``arch`` and compare the machine code with what the case promises."""
    import triton
    from triton.backends.compiler import GPUTarget

    from dq_kernels.sass import INTEGER, read_code

    try:
        kernel = triton.compile(source(case), target=GPUTarget("cuda", arch, 32), options=dict(case.options))
    except Exception as error:  # whatever the compiler raises is this case's verdict, not the command's end
        while error.__cause__ is not None:
            error = error.__cause__  # type: ignore[assignment]
        last = (str(error).strip().splitlines() or [""])[-1]
        return Result(case.label, arch, (f"FAILED: {type(error).__name__}: {last}",))
    tools = triton.knobs.nvidia
    code = read_code(kernel.asm["cubin"], tools.cuobjdump.path, tools.nvdisasm.path)
    local, loop = code.count("LDL", "STL"), code.inner_loop()
    int_ops = sum(loop[name] for name in INTEGER) / case.weights_per_thread if case.weights_per_thread else 0.0
    problems = []
    if code.stack or local:
        problems.append("SPILLS")
    if kernel.metadata.shared > SHARED_LIMIT[arch]:
        problems.append(f"MORE THAN {SHARED_LIMIT[arch]} B OF SHARED MEMORY")
    if arch in case.mma and code.matrix() != case.mma[arch]:
        problems.append(f"NO {case.mma[arch]}")
    if case.async_copies and not code.wide_async_copies():
        problems.append("NO 16-BYTE ASYNCHRONOUS COPY")
    if case.no_i2f and code.count("I2F"):
        problems.append("I2F")
    if arch in case.max_int_ops and not 0 < int_ops <= case.max_int_ops[arch]:
        problems.append(f"MORE THAN {case.max_int_ops[arch]} INTEGER INSTRUCTIONS A WEIGHT")
    return Result(
        case.label,
        arch,
        tuple(problems),
        code.registers,
        code.stack,
        local,
        kernel.metadata.shared,
        code.matrix(),
        int_ops,
    )


def missing() -> str | None:
    """Why nothing can be compiled here, in one sentence; None if it can."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported here ({error}); its wheels exist for Linux on x86-64 and aarch64"
    for tool in ("ptxas", "cuobjdump", "nvdisasm"):
        try:
            getattr(triton.knobs.nvidia, tool)
        except RuntimeError:
            where = Path(triton.__file__).parent / "backends/nvidia/bin"
            return f"triton {triton.__version__} has no working {tool} on this machine (looked in {where})"
    return None


def main(argv: list[str] | None = None) -> int:
    """Compile, print, judge; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m dq_kernels.offline", description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: every core)")
    parser.add_argument("--only", choices=MODULES, help="the kernels of one module")
    args = parser.parse_args(argv)
    # The interpreter replaces @triton.jit functions at import by ones that cannot be compiled.
    os.environ.pop("TRITON_INTERPRET", None)
    reason = missing()
    if reason is not None:
        print(f"dq_kernels.offline: {reason}", file=sys.stderr)
        return 2

    import triton

    modules = [args.only] if args.only else MODULES
    todo = [(m, i, arch) for m in modules for i, case in enumerate(cases_of(m)) for arch in case.archs]
    start = time.monotonic()
    results = []
    # spawn: triton and torch hold threads that a fork would leave in an unknown state.
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for result in pool.map(compile_one, *zip(*todo, strict=True), chunksize=4):
            results.append(result)
            print(result, flush=True)
    bad = [r for r in results if r.problems]
    worst = max(results, key=lambda r: r.shared)
    print(
        f"most registers {max(r.registers for r in results)}, most shared memory {worst.shared} B of "
        f"{SHARED_LIMIT[worst.arch]}"
    )
    print(
        f"{len(results) - len(bad)} of {len(results)} kernels keep their promises, compiled in "
        f"{time.monotonic() - start:.0f} s with triton {triton.__version__}; nothing was run on a GPU by this command"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
