"""llama.cpp's own server and quantizer, built from source for this machine.

The source is the copy that llama-cpp-python's sdist carries: one version for all benchmarks against llama.cpp (see
cpu.py), and nothing is fetched from anywhere but the package index.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "llama-cpp-python==0.3.36"
# A release build with -march=native; no browser page, no TLS, nothing that is not measured.
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
)


@dataclass(frozen=True)
class Rival:
    """Where the two programs are."""

    server: Path
    quantizer: Path

    def version(self) -> str:
        """As the server states it, with the package it was taken from."""
        done = subprocess.run([str(self.server), "--version"], capture_output=True, text=True, check=True)
        stated = next(line for line in (done.stderr + done.stdout).splitlines() if line.startswith("version"))
        return f"{stated} ({PACKAGE})"


def rival(folder: Path) -> Rival:
    """The programs in ``folder``, built if they are not there (10 minutes on two cores, once)."""
    programs = Rival(folder / "bin" / "llama-server", folder / "bin" / "llama-quantize")
    if programs.server.exists() and programs.quantizer.exists():
        return programs
    cmake = shutil.which("cmake")
    if cmake is None:
        sys.exit("serve.py: building llama.cpp needs cmake; install it, for instance with `pip install cmake`")
    print(f"building llama.cpp's server of {PACKAGE} in {folder} (10 minutes, once)", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "source"
    if not source.exists():
        partial = folder / "partial-source"
        shutil.rmtree(partial, ignore_errors=True)
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", PACKAGE]
        subprocess.run([*download, "-d", str(folder)], check=True)
        with tarfile.open(next(folder.glob("llama_cpp_python-*.tar.gz"))) as archive:
            archive.extractall(partial, filter="data")
        partial.rename(source)
    vendored = next(source.glob("llama_cpp_python-*/vendor/llama.cpp"))
    build = folder / "build"
    subprocess.run([cmake, "-S", str(vendored), "-B", str(build), *OPTIONS], check=True, stdout=subprocess.DEVNULL)
    jobs = str(os.cpu_count() or 1)
    targets = ["--target", "llama-server", "llama-quantize", "-j", jobs]
    subprocess.run([cmake, "--build", str(build), *targets], check=True, stdout=subprocess.DEVNULL)
    (folder / "bin").mkdir(exist_ok=True)
    for program in (programs.server, programs.quantizer):
        shutil.copy2(build / "bin" / program.name, program)
    return programs
