"""llama.cpp's source: the copy that llama-cpp-python's sdist carries, one version for all benchmarks against it.

Nothing is fetched from anywhere but the package index. One line is added, without which a build by GCC 12 crashes
on CPUs with AMX: the compiler does not know that the intrinsic reads the configuration of the tiles, and drops all
but the first byte of it. With AMX llama.cpp is the faster there: 188 against 119 tokens/s of one stream and 267
against 206 of eight, on two cores of a Xeon, SmolLM2-135M.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

PACKAGE = "llama-cpp-python==0.3.36"
_CONFIGURED = "    _tile_loadconfig(&tc);\n"


def source(folder: Path) -> Path:
    """The unpacked sdist below ``folder``, downloaded once."""
    unpacked = folder / "source"
    if not unpacked.exists():
        partial = folder / "partial-source"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", PACKAGE]
        subprocess.run([*download, "-d", str(folder)], check=True)
        with tarfile.open(next(folder.glob("llama_cpp_python-*.tar.gz"))) as archive:
            archive.extractall(partial, filter="data")
        _mend(next(partial.glob("llama_cpp_python-*/vendor/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp")))
        partial.rename(unpacked)
    return next(unpacked.glob("llama_cpp_python-*"))


def _mend(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    if text.count(_CONFIGURED) != 1:
        sys.exit(f"{file} is not the source that is known; compare it with rival_source.py")
    seen = '    asm volatile("" : : "r"(&tc) : "memory");\n'
    file.write_text(text.replace(_CONFIGURED, seen + _CONFIGURED), encoding="utf-8")
