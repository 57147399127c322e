"""llama.cpp's own server and quantizer, built from source for this machine.

Its source: rival_source.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rival_source import PACKAGE, source

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
    vendored = source(folder) / "vendor" / "llama.cpp"
    build = folder / "build"
    subprocess.run([cmake, "-S", str(vendored), "-B", str(build), *OPTIONS], check=True, stdout=subprocess.DEVNULL)
    jobs = str(os.cpu_count() or 1)
    targets = ["--target", "llama-server", "llama-quantize", "-j", jobs]
    subprocess.run([cmake, "--build", str(build), *targets], check=True, stdout=subprocess.DEVNULL)
    (folder / "bin").mkdir(exist_ok=True)
    for program in (programs.server, programs.quantizer):
        shutil.copy2(build / "bin" / program.name, program)
    return programs
