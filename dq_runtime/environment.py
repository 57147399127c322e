"""What a figure must name to mean anything: the device, the versions, the memory."""

from __future__ import annotations

import ctypes
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from dq_runtime._version import __version__
from dq_runtime.errors import SpecError


def resolve_device(requested: str) -> str:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` -> the device to use; anything else, or none there, is refused."""
    if requested == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = requested.partition(":")
    if requested != "cpu" and (kind != "cuda" or (requested != "cuda" and not index.isdecimal())):
        raise SpecError(f"device must be auto, cpu, cuda or cuda:N, got {requested!r}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise SpecError(f"device {requested} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return requested


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Numbers too small for float32's exponent count as 0 inside, on the CPU. torch has no way to ask for the mode that
    was set before; a number of that size, made anew, tells."""
    before = torch.full((1,), 2.0**-130).item() == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def give_back_memory(freed: int | None = None) -> None:
    """Return freed memory to the system, where the C library is glibc; nothing below a megabyte of ``freed`` bytes.

    glibc keeps freed tensors of less than 32 MB for the next ones, as it should inside a loop. From one layer or stage
    to the next that is memory which nobody uses: 400 to 900 of 2700 MB when SmolLM2-135M was rounded, more or less by
    chance. It takes 0.4 ms, 40 where there is much to return."""
    if sys.platform == "linux" and (freed is None or freed >= 1 << 20):
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak_memory(device: str) -> int:
    """Highest resident memory of this process in bytes (device memory on a GPU)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_status(field: str) -> int | None:
    """``VmRSS`` (resident now) or ``VmHWM`` (at most so far) of this process in bytes; None where the system does not
    tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
    except (OSError, StopIteration):
        return None


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    import safetensors
    import transformers

    return {
        "dq_runtime": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "python": platform.python_version(),
    }
