"""The C++ kernels for aarch64 on a machine that is none: they compile, and on an emulator they equal the scalar ones.

Compilers that will do: aarch64-linux-gnu-g++, clang++ with its headers for aarch64, or the package ``ziglang`` of the
``dev`` extra. Emulators: qemu-aarch64-static, qemu-aarch64. What is missing is named in the reason of a skip.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

ROOT = Path(__file__).resolve().parents[2]
CPU = ROOT / "csrc" / "cpu"
CHECK = ROOT / "tests" / "native" / "isa_check.cpp"
# As in setup.py: the kernels' own flags beside those of every file. Clang's loop analysis does not see that a lambda
# changes what it captured (attention_impl.h).
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-for-loop-analysis"]
FLAGS = ["-std=c++17", "-ffp-contract=off", *WARNINGS, f"-I{ROOT / 'csrc'}", "-DDQ_HAVE_SCALAR"]
NEON = ["-DDQ_HAVE_NEON"]
NEON_FILE = ["-march=armv8.2-a+dotprod"]
NEON_FILE_ZIG = ["-mcpu=generic+v8_2a+dotprod"]  # zig takes no -march

pytestmark = pytest.mark.skipif(
    platform.machine() in ("aarch64", "arm64"), reason="this machine is aarch64: every other test runs its kernels"
)


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)


@cache
def compiler() -> tuple[str, ...] | None:
    """The command of a C++ compiler for aarch64 Linux that finds its headers; None if there is none."""
    commands: list[tuple[str, ...]] = [("aarch64-linux-gnu-g++",), ("clang++", "--target=aarch64-linux-gnu")]
    if find_spec("ziglang") is not None:
        commands.append((sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-musl"))
    for command in commands:
        if shutil.which(command[0]) is None:
            continue
        with TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text("#include <vector>\n#include <arm_neon.h>\n")
            if run([*command, "-std=c++17", "-c", str(source), "-o", f"{folder}/probe.o"]).returncode == 0:
                return command
    return None


def _compiler() -> tuple[str, ...]:
    found = compiler()
    if found is None:
        pytest.skip("no C++ compiler for aarch64 (aarch64-linux-gnu-g++, clang++ with headers, pip install ziglang)")
    return found


def _flags(source: Path) -> list[str]:
    if source.name != "kernels_neon.cpp":
        return [*FLAGS, *NEON]
    return [*FLAGS, *NEON, *(NEON_FILE_ZIG if "ziglang" in _compiler() else NEON_FILE)]


X86_ONLY = ("kernels_avx2", "kernels_avx512", "kernels_amx")
SOURCES = sorted(path for path in CPU.glob("*.cpp") if path.stem not in X86_ONLY)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_every_source_compiles_for_aarch64_without_a_warning(source: Path, tmp_path: Path) -> None:
    done = run([*_compiler(), *_flags(source), "-O0", "-c", str(source), "-o", str(tmp_path / "object.o")])
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_program_for_the_emulator_is_valid_here() -> None:
    """Where no emulator is, nothing else would notice that the kernels' interface has moved away from under it."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    done = run([compiler, *FLAGS, "-DISA=dq::kScalarKernels", "-fsyntax-only", str(CHECK)])
    assert done.returncode == 0, done.stderr[-4000:]


def test_neon_equals_scalar_on_an_emulator(tmp_path: Path) -> None:
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if emulator is None:
        pytest.skip("no emulator of aarch64 (qemu-aarch64-static, qemu-aarch64)")
    objects = []
    for source in (CHECK, *(CPU / f"{name}.cpp" for name in ("kernels_neon", "kernels_scalar", "repack", "pool"))):
        objects.append(str(tmp_path / f"{source.stem}.o"))
        isa = ["-DISA=dq::kNeonKernels"] if source == CHECK else []
        done = run([*_compiler(), *_flags(source), *isa, "-O1", "-c", str(source), "-o", objects[-1]])
        assert done.returncode == 0, done.stderr[-4000:]
    program = str(tmp_path / "isa_check")
    done = run([*_compiler(), "-static", "-pthread", *objects, "-o", program])
    assert done.returncode == 0, done.stderr[-4000:]
    done = run([emulator, program])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "neon: " in done.stdout
    assert " 0 failures" in done.stdout
