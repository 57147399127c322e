"""What the GPU benchmarks share: the reason not to run, the device they ran on, and a result file that is never half.

Each benchmark is a process of its own (one that crashes the GPU's context takes nothing else with it) and writes one
part; gpu_report.py puts the parts together.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # runs from a bare clone too


def unusable() -> str | None:
    """Why no benchmark can run here, in one clause; None if it can."""
    from dq_runtime.backends.triton_cuda import TritonCuda

    reason = TritonCuda().available()
    if reason is not None:
        return reason
    from dq_kernels import timing

    return timing.unusable()


def driver_version() -> str:
    """The NVIDIA driver's version, or "unknown" where nvidia-smi is missing."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.check_output(command, text=True).splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def environment() -> dict[str, Any]:
    """Device, capability, driver, versions, date and command of this process."""
    import torch
    import triton

    from dq_runtime.environment import versions

    return {
        "device": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "driver": driver_version(),
        "versions": {**versions(), "cuda": torch.version.cuda, "triton": triton.__version__},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """``result`` as JSON; a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
