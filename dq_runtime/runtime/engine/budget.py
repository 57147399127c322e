"""How many blocks the memory of keys and values gets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dq_runtime.errors import SpecError
from dq_runtime.runtime.decoder.paged import BLOCK
from dq_runtime.runtime.engine.request import EngineSettings

UNSTATED_CONTEXT = 32768  # tokens, where neither the model nor the settings say
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def longest(settings: EngineSettings, context: int | None) -> int:
    """Most tokens of a text, by the model's context and the settings; raises :class:`SpecError` where these ask for
    more than the model has."""
    asked = settings.max_model_len
    if asked is not None and context is not None and asked > context:
        raise SpecError(f"max_model_len is {asked}, but the model's context is {context}")
    return asked or context or UNSTATED_CONTEXT


def block_count(settings: EngineSettings, block_bytes: int, limit: int, device: Any) -> int:
    """Blocks of ``block_bytes`` for texts of at most ``limit`` tokens; raises :class:`SpecError` if not even one
    fits."""
    wanted = settings.max_running * -(-limit // BLOCK)
    nbytes = settings.kv_bytes
    blocks = min(wanted, free_bytes(device) // 2 // block_bytes) if nbytes is None else nbytes // block_bytes
    if blocks < 1:
        have = "half of the free memory" if nbytes is None else f"kv_bytes = {nbytes}"
        raise SpecError(f"keys and values of {BLOCK} tokens take {block_bytes} bytes, more than {have}")
    return blocks


def free_bytes(device: Any) -> int:
    """Memory of ``device`` that can be had without harm to other processes."""
    if str(device).startswith("cuda"):
        import torch

        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    if not MEMINFO.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    try:  # a container may have less than its machine
        left = int((CGROUP / "memory.max").read_text()) - int((CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return available
    return max(0, min(available, left))
