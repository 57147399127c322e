"""Compile the kernels of many weights and tiles before they are timed, in processes that share Triton's disk cache.

One variant takes 1 to 2 s of one core, a tuning run some three hundred: one after the other that would be minutes of a
GPU's time. The processes need neither a GPU nor a driver, only to be told which chip to compile for.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import torch
import triton

from dq_kernels import dequant, stream, stream_layout
from dq_kernels.stream import Tile

MAX_WORKERS = 16  # each holds 0.4 GB; a container may show every core of its host and have a few
KERNELS = (
    (stream, "stream_kernel"),
    (stream, "decode_kernel"),
    (stream_layout, "repack_kernel"),
    (dequant, "dequant_kernel"),
)


@dataclass(frozen=True)
class Launch:
    """The streaming kernel for x [M, K] in bf16 and a symmetric weight [N, K] with bf16 scales, ``group`` weights a
    scale; without a tile, the kernels that repack and decode such a weight. One N stands for all multiples of 16."""

    k: int
    bits: int
    group: int
    tile: Tile | None = None
    n: int = 4096


class _Chip:
    """A Triton driver that only answers what to compile for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _CompileOnly:
    """A kernel that compiles where it would launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return lambda *arguments, **options: self.kernel.warmup(*arguments, grid=grid, **options)


def compile_one(launch: Launch, capability: int) -> str | None:
    """Compile into the disk cache for the chip sm_``capability``; None, or the compiler's complaint.

    Replaces the process's Triton driver and the kernels themselves: for processes that do nothing else.
    """
    triton.runtime.driver.set_active(_Chip(capability))
    names = {
        stream: ("stream_kernel", "decode_kernel"),
        stream_layout: ("repack_kernel",),
        dequant: ("dequant_kernel",),
    }
    for module, kernels in names.items():
        for name in kernels:
            if not isinstance(getattr(module, name), _CompileOnly):
                setattr(module, name, _CompileOnly(getattr(module, name)))
    try:
        _launch(launch)
    except Exception as error:  # the compiler's; a tile it dislikes is a candidate less, not the end of the tuning
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[-1]}"
    return None


def _launch(launch: Launch) -> None:
    """As for real, on tensors without memory (device "meta"), whose address 0 counts as aligned."""
    n, k, bits, tile = launch.n, launch.k, launch.bits, launch.tile
    words = torch.empty(n, k * bits // 32, dtype=torch.int32, device="meta")
    scale = torch.empty(n, k // launch.group, dtype=torch.bfloat16, device="meta")
    w = stream_layout.stream_weight(words, scale, None, bits=bits, k=k)
    if tile is not None:
        stream.qmm_stream(torch.empty(tile.BM, k, dtype=torch.bfloat16, device="meta"), w, tile)
        return
    stream.decode_stream(w, torch.empty(n, k, dtype=torch.bfloat16, device="meta"))
    dequant.dequantize(words, scale, None, bits=bits, k=k, dtype=torch.float32)


def compile_all(
    launches: Iterable[Launch], capability: int, done: Callable[[int, int], object] = lambda step, total: None
) -> dict[Launch, str]:
    """Compile each on all but two cores, telling ``done(step, total)``; what the compiler refused, and why."""
    todo = list(dict.fromkeys(launches))
    if not todo:
        return {}
    workers = max(1, min(len(todo), len(os.sched_getaffinity(0)) - 2, MAX_WORKERS))
    refused = {}
    # spawn: a forked child of a process that has started CUDA may not use it, and threads' locks are copied locked.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(compile_one, launch, capability): launch for launch in todo}
        for step, future in enumerate(as_completed(running), 1):
            complaint = future.result()
            if complaint is not None:
                refused[running[future]] = complaint
            done(step, len(todo))
    return refused
