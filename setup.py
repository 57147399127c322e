"""Builds ``dq_runtime._native`` (csrc/) and says what it found; everything else about the package is in pyproject.toml.

The extension is optional: without a C++17 compiler the package installs without it, on PyTorch and Triton alone.
``DQ_NATIVE=0`` skips it. No torch is needed to build, because nothing under csrc/ includes a torch header.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# No -ffast-math: a result must not depend on the compiler. -ffp-contract=off for the same reason: aarch64 compilers
# otherwise fuse a*b+c and round once instead of twice.
FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra", "-g0", "-pthread"]


@dataclass(frozen=True)
class Variant:
    """The kernels for one instruction set: one file, its own flags, the machines (platform.machine()) it is for.

    A compiled variant defines DQ_HAVE_<NAME> for bindings.cpp; one whose flags the compiler refuses is left out.
    """

    name: str
    source: str
    flags: tuple[str, ...] = ()
    machines: tuple[str, ...] | None = None


VARIANTS = [
    Variant("scalar", "csrc/cpu/qmm_scalar.cpp"),
]
SHARED_SOURCES = ["csrc/bindings.cpp", "csrc/cpu/pool.cpp"]
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.h"))


def version_of(command: str | None) -> str | None:
    """The line of ``command --version`` that carries the version; None if it does not run."""
    if not command or not shutil.which(command.split()[0]):
        return None
    done = subprocess.run([*command.split(), "--version"], capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return None
    return next((line for line in lines if "release" in line), lines[0])  # nvcc says "release 13.0" on its fourth line


def say(text: str) -> None:
    print(f"dq_runtime: {text}", flush=True)


def summary() -> None:
    say(f"machine: {platform.machine()}")
    cuda_home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc") or (cuda_home and shutil.which(f"{cuda_home}/bin/nvcc"))
    say(f"nvcc: {version_of(nvcc) or 'not found: CUDA packing will be absent'}")


class NativeBuild(build_ext):
    """build_ext with flags per source file, two files at a time, and an install that survives a missing compiler."""

    def run(self) -> None:
        summary()
        super().run()

    def build_extensions(self) -> None:
        reason = self.obstacle()
        if reason is not None:
            say(f"C++: {reason}: the native CPU backend will be absent; everything else works")
            self.extensions = []
            return
        super().build_extensions()

    def obstacle(self) -> str | None:
        """Why no Python extension can be compiled here; None if one can."""
        compiler = self.cxx()
        try:
            import pybind11
        except ImportError:
            return "pybind11 is not installed (pip install pybind11, or leave out --no-build-isolation)"
        self.include_dirs.append(pybind11.get_include())
        version = version_of(compiler)
        if version is None:
            return f"no compiler ({compiler} does not run; install g++ or clang++, or set CXX)"
        error = self.probe("#include <Python.h>\n#include <thread>\n", [])
        if error is not None:
            return f"{compiler} cannot compile a C++17 Python extension ({error}); are the Python headers installed?"
        say(f"C++: {version}")
        return None

    def cxx(self) -> str:
        command = getattr(self.compiler, "compiler_so_cxx", None) or self.compiler.compiler_so
        return str(command[0])

    def probe(self, code: str, flags: list[str]) -> str | None:
        """None if ``code`` compiles with ``flags``, else the compiler's first complaint."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(code)
            includes = [f"-I{path}" for path in self.include_dirs]
            command = [self.cxx(), *FLAGS, *flags, *includes, "-c", str(source), "-o", f"{folder}/probe.o"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return None
        lines = done.stderr.strip().splitlines()
        return next((line.split(": ", 1)[-1] for line in lines if "error" in line), f"exit status {done.returncode}")

    def build_extension(self, ext: Extension) -> None:
        defines: list[tuple[str, str | None]] = []
        jobs: list[tuple[str, list[str]]] = [(source, []) for source in SHARED_SOURCES]
        for variant in VARIANTS:
            if variant.machines is not None and platform.machine() not in variant.machines:
                continue
            error = self.probe("int main() {}\n", list(variant.flags)) if variant.flags else None
            if error is not None:
                say(f"  {variant.name}: left out, {error}")
                continue
            say(f"  {variant.name}: {variant.source} {' '.join(variant.flags)}".rstrip())
            defines.append((f"DQ_HAVE_{variant.name.upper()}", "1"))
            jobs.append((variant.source, list(variant.flags)))

        def compile_one(job: tuple[str, list[str]]) -> list[str]:
            source, flags = job
            objects: list[str] = self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=defines,
                include_dirs=self.include_dirs,
                extra_postargs=[*FLAGS, *flags],
            )
            return objects

        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(2) as pool:
            objects = [path for paths in pool.map(compile_one, jobs) for path in paths]
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=["-pthread"], target_lang="c++"
        )


SKIP = os.environ.get("DQ_NATIVE") == "0"
if SKIP:  # said here, because setuptools does not run build_ext for a package without extensions
    summary()
    say("C++: skipped (DQ_NATIVE=0): the native CPU backend will be absent")

setup(
    ext_modules=[]
    if SKIP
    else [Extension("dq_runtime._native", [*SHARED_SOURCES, *(v.source for v in VARIANTS)], depends=HEADERS)],
    cmdclass={"build_ext": NativeBuild},
)
