"""Builds ``dq_runtime._native`` (csrc/) and ``dq_runtime/_cuda_pack.so`` (csrc/cuda/), and says what it found.

Both are optional: without a C++17 compiler, or without nvcc, the package installs without them, on PyTorch and Triton
alone. ``DQ_NATIVE=0`` and ``DQ_CUDA=0`` skip them. No torch is needed to build, because nothing under csrc/ includes a
torch header. Everything else about the package is in pyproject.toml.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# No -ffast-math: a result must not depend on the compiler. -ffp-contract=off for the same reason: aarch64 compilers
# otherwise fuse a*b+c and round once instead of twice.
# A level of one's own in CXXFLAGS counts: what stands here comes after it.
LEVEL = [] if "-O" in os.environ.get("CXXFLAGS", "") else ["-O3"]
FLAGS = [*LEVEL, "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra", "-g0", "-pthread"]


@dataclass(frozen=True)
class Variant:
    """The kernels for one instruction set: one file, its own flags, the machines (platform.machine()) it is for.

    A compiled variant defines DQ_HAVE_<NAME> for bindings.cpp; one whose flags the compiler refuses is left out.
    """

    name: str
    source: str
    flags: tuple[str, ...] = ()
    machines: tuple[str, ...] | None = None


X86 = ("x86_64", "AMD64")
ARM = ("aarch64", "arm64")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
# GCC 12's own AVX-512 header trips -Wuninitialized and -Wmaybe-uninitialized.
AVX512 = (
    *(*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"),
    *("-mprefer-vector-width=512", "-Wno-maybe-uninitialized", "-Wno-uninitialized"),
)
AMX = ("-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16")
VARIANTS = [
    Variant("scalar", "csrc/cpu/kernels_scalar.cpp"),
    Variant("avx2", "csrc/cpu/kernels_avx2.cpp", AVX2, X86),
    Variant("avx512", "csrc/cpu/kernels_avx512.cpp", AVX512, X86),
    Variant("amx", "csrc/cpu/kernels_amx.cpp", (*AVX512, *AMX), X86),
    Variant("neon", "csrc/cpu/kernels_neon.cpp", ("-march=armv8.2-a+dotprod",), ARM),
]
SHARED_SOURCES = [
    *("csrc/bindings.cpp", "csrc/bind_prepared.cpp", "csrc/bind_decoder.cpp", "csrc/bind_training.cpp"),
    *("csrc/bind_layers.cpp", "csrc/bind_rounding.cpp", "csrc/cpu/gptq.cpp", "csrc/cpu/latent.cpp"),
    *("csrc/cpu/pool.cpp", "csrc/cpu/qmm_scalar.cpp", "csrc/cpu/repack.cpp", "csrc/cpu/dispatch.cpp"),
    *("csrc/cpu/decoder.cpp", "csrc/cpu/decoder_memory.cpp", "csrc/cpu/training.cpp"),
    *("csrc/cpu/training_attention.cpp", "csrc/cpu/training_rows.cpp"),
]
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.h"))
NATIVE = "dq_runtime._native"
CUDA = "dq_runtime._cuda_pack"
CUDA_FILES = sorted(str(path) for path in Path("csrc/cuda").iterdir() if path.is_file())


def load(path: str) -> ModuleType:
    """The module in the file ``path`` (a build backend runs this script without its folder on sys.path)."""
    found = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


cuda_build = load("csrc/cuda/build.py")  # which also runs by itself


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
    say(f"nvcc: {version_of(cuda_build.find_nvcc()) or 'not found'}")
    for name, switch in skipped().items():
        absent(name, f"skipped ({switch}=0)")


def skipped() -> dict[str, str]:
    """The extensions that the environment switches off, and by which variable."""
    return {name: switch for name, (switch, _) in EXTENSIONS.items() if os.environ.get(switch) == "0"}


def absent(name: str, reason: str) -> None:
    """Says in one line that extension ``name`` was not built, why, and what that costs."""
    if name == CUDA:
        say(f"CUDA: {reason}: packing on the GPU will be absent; everything else works")
    else:
        say(f"C++: {reason}: the native CPU backend will be absent; everything else works")


class NativeBuild(build_ext):
    """build_ext with flags per source file, two files at a time, and an install that survives a missing compiler."""

    def run(self) -> None:
        summary()
        super().run()

    def build_extensions(self) -> None:
        built = []
        for ext in self.extensions:
            reason = self.build_cuda() if ext.name == CUDA else self.obstacle()
            if reason is not None:
                absent(ext.name, reason)
                continue
            if ext.name == NATIVE:
                self.build_extension(ext)
            built.append(ext)
        self.extensions = built  # what is installed

    def get_ext_filename(self, fullname: str) -> str:
        # The CUDA library is loaded with ctypes and knows nothing of Python: its name carries no ABI.
        if fullname.split(".")[-1] == CUDA.split(".")[-1]:
            return str(Path(*fullname.split("."))) + ".so"
        return str(super().get_ext_filename(fullname))

    def build_cuda(self) -> str | None:
        """Builds the CUDA library; returns why it could not, or None."""
        target = Path(self.get_ext_fullpath(CUDA))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            cuda_build.build(target)
        except cuda_build.BuildError as error:
            return str(error)
        say(f"CUDA: sm_{', sm_'.join(cuda_build.ARCHITECTURES)} and PTX for later chips")
        return None

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


EXTENSIONS = {
    NATIVE: ("DQ_NATIVE", Extension(NATIVE, [*SHARED_SOURCES, *(v.source for v in VARIANTS)], depends=HEADERS)),
    CUDA: ("DQ_CUDA", Extension(CUDA, [], depends=CUDA_FILES)),
}
wanted = [extension for name, (_, extension) in EXTENSIONS.items() if name not in skipped()]
if not wanted:  # said here, because setuptools does not run build_ext for a package without extensions
    summary()

setup(ext_modules=wanted, cmdclass={"build_ext": NativeBuild})
