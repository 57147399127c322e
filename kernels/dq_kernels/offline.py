"""Compile the shipped kernels for sm_80 and sm_90 with no GPU and no driver, and refuse what a chip could not run well.

    python -m dq_kernels.offline [--all] [--jobs 2]

One line a kernel: registers, stack and local-memory instructions (spills), shared memory, the matrix instruction used.
Exit code 1: a kernel failed to compile, spills, or wants more shared memory than the chip has. 2: cannot compile here.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

# Shared memory one block may have: 163 KB of an A100's 164, 227 KB of an H100's 228 (CUDA keeps 1 KB for itself).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}

BITS = (2, 3, 4, 5, 6, 7, 8)
GROUPS = (16, 32, 64, 128, 0)  # 0: one scale a row
DTYPES = ("bf16", "fp16", "fp32")  # of the activations
SERVED = {("bf16", 2), ("bf16", 3), ("bf16", 4), ("bf16", 8), ("fp16", 3), ("fp16", 4)}


@dataclass(frozen=True)
class Config:
    """One kernel to compile. ``tile``: index into qmm.TILES, or -1 for the dequantise kernel."""

    arch: int
    tile: int
    bits: int
    symmetric: bool
    group: int
    dtype: str
    k: int

    def __str__(self) -> str:
        kernel = "dequant" if self.tile < 0 else f"qmm{self.tile}   "
        group = f"g{self.group}" if self.group else "row"
        zero = "sym " if self.symmetric else "asym"
        return f"sm_{self.arch} {kernel} {self.bits}-bit {zero} {group:4} {self.dtype} K={self.k:<4}"


@dataclass(frozen=True)
class Result:
    """What ptxas made of one Config; ``error`` is empty where it compiled."""

    config: Config
    error: str = ""
    registers: int = 0
    stack: int = 0
    local: int = 0
    shared: int = 0
    mma: str = ""

    @property
    def verdict(self) -> str:
        if self.error:
            return f"FAILED: {self.error}"
        if self.stack or self.local:
            return "SPILLS"
        return "TOO MUCH SHARED MEMORY" if self.shared > SHARED_LIMIT[self.config.arch] else "ok"

    def __str__(self) -> str:
        numbers = f"{self.registers:3} regs, stack {self.stack}, LDL/STL {self.local}, shared {self.shared:6} B"
        return f"{self.config}  {numbers}, {self.mma:5}  {self.verdict}"


def every_config() -> list[Config]:
    """The full product at K = 4096: arch x tile x bits x sym/asym x group x dtype (fp32 in the tiles it uses)."""
    import torch

    from dq_kernels.qmm import TILES, tiles_for

    axes = product(SHARED_LIMIT, range(-1, len(TILES)), BITS, (True, False), GROUPS, DTYPES)
    configs = [Config(arch, tile, bits, sym, group, dtype, 4096) for arch, tile, bits, sym, group, dtype in axes]
    return [c for c in configs if c.dtype != "fp32" or c.tile < len(tiles_for(torch.float32))]


def subset() -> list[Config]:
    """What is compiled by default: most values of every axis, not every combination, on every arch and tile.

    At group 64 (the default): 2, 3, 4 and 8 bits in bf16, 3 and 4 also in fp16, symmetric and not. Then what strains
    the compiler most, asymmetric 3 bits (a window of two words, zero points): each other group size, fp32 activations,
    and the masked tail of K = 576 with one scale a row. 5 bits once; 6 and 7, left out, take the same path as 5.
    """
    keep, tiles = [], set()
    for c in every_config():
        tiles.add((c.arch, c.tile))
        served = c.group == 64 and (c.dtype, c.bits) in SERVED
        strained = not c.symmetric and c.bits == 3 and (c.dtype == "bf16" or (c.dtype == "fp32" and c.group == 64))
        once = not c.symmetric and c.bits == 5 and c.group == 64 and c.dtype == "bf16"
        if served or strained or once:
            keep.append(c)
    return keep + [Config(arch, tile, 3, False, 0, "bf16", 576) for arch, tile in sorted(tiles)]


def source(config: Config) -> tuple[Any, dict[str, int]]:
    """The triton ASTSource of a config and its compile options."""
    import triton.language as tl
    from triton.compiler import ASTSource

    from dq_kernels.dequant import DENSE_TILE, dequant_kernel
    from dq_kernels.qmm import TILES, qmm_kernel

    dtype = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[config.dtype]
    scale = "*fp16" if config.dtype == "fp16" else "*bf16"
    constants: dict[str, Any] = {
        "K": config.k, "BITS": config.bits, "GROUP": config.group, "HAS_ZERO": not config.symmetric,
    }  # fmt: skip
    # Without zero points the launch passes the scales in their place, unread.
    pointers = {"packed_ptr": "*i32", "scale_ptr": scale, "zero_ptr": scale if config.symmetric else "*u8"}
    if config.tile < 0:
        kernel, bk = dequant_kernel, DENSE_TILE["BK"]
        constants["BN"] = DENSE_TILE["BN"]
        options = {"num_warps": DENSE_TILE["num_warps"], "num_stages": DENSE_TILE["num_stages"]}
        types = {**pointers, "out_ptr": f"*{config.dtype}", "N": "i32"}
    else:
        tile = TILES[config.tile]
        kernel, bk = qmm_kernel, tile.BK
        constants |= {"COMPUTE": dtype, "BM": tile.BM, "BN": tile.BN}
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        types = {**pointers, "x_ptr": f"*{config.dtype}", "y_ptr": f"*{config.dtype}", "M": "i32", "N": "i32"}
    constants["BK"] = min(bk, config.group) if config.group else bk
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    # What a launch would find: torch's pointers are 16-byte aligned, N is a multiple of 16, M is not specialised.
    aligned = [i for i, name in enumerate(kernel.arg_names) if name.endswith("_ptr") or name == "N"]
    attrs = {(i,): [["tt.divisibility", 16]] for i in aligned}
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs), options


def compile_one(config: Config) -> Result:
    """Compile one config to SASS and read off what it needs."""
    import triton
    from triton.backends.compiler import GPUTarget

    try:
        src, options = source(config)
        kernel = triton.compile(src, target=GPUTarget("cuda", config.arch, 32), options=options)
    except Exception as error:  # whatever the compiler raises is this config's verdict, not the command's end
        return Result(config, error=f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tools = triton.knobs.nvidia
        command = [tools.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.check_output(command, text=True, stderr=subprocess.STDOUT)
        sass = subprocess.check_output([tools.nvdisasm.path, "-c", file.name], text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        return Result(config, error=f"cuobjdump printed no REG/STACK: {usage.strip()[-200:]}")
    return Result(
        config,
        registers=int(found[1]),
        stack=int(found[2]),
        local=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        shared=kernel.metadata.shared,
        mma=next((name for name in ("HGMMA", "HMMA") if name in sass), "-"),
    )


def missing() -> str | None:
    """Why nothing can be compiled here, in one sentence; None if it can."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported here ({error}); its wheels exist for Linux on x86-64 and aarch64"
    for tool in ("ptxas", "cuobjdump", "nvdisasm"):
        try:
            getattr(triton.knobs.nvidia, tool)
        except RuntimeError:
            where = Path(triton.__file__).parent / "backends/nvidia/bin"
            return f"triton {triton.__version__} has no working {tool} on this machine (looked in {where})"
    return None


def main(argv: list[str] | None = None) -> int:
    """Compile, print, judge; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m dq_kernels.offline", description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="the full product of configurations, not the subset")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: every core)")
    args = parser.parse_args(argv)
    # The interpreter replaces @triton.jit functions at import by ones that cannot be compiled.
    os.environ.pop("TRITON_INTERPRET", None)
    reason = missing()
    if reason is not None:
        print(f"dq_kernels.offline: {reason}", file=sys.stderr)
        return 2

    import triton

    configs = every_config() if args.all else subset()
    start = time.monotonic()
    results = []
    # spawn: triton and torch hold threads that a fork would leave in an unknown state.
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for result in pool.map(compile_one, configs, chunksize=4):
            results.append(result)
            print(result, flush=True)
    bad = [r for r in results if r.verdict != "ok"]
    worst = max(results, key=lambda r: r.shared)
    print(
        f"most registers {max(r.registers for r in results)}, most shared memory {worst.shared} B "
        f"(limits {SHARED_LIMIT[80]} and {SHARED_LIMIT[90]} B)"
    )
    extent = "the full product" if args.all else "a subset; --all compiles the full product"
    print(
        f"{len(results) - len(bad)} of {len(results)} kernels compiled cleanly for sm_80 and sm_90 ({extent}) in "
        f"{time.monotonic() - start:.0f} s with triton {triton.__version__}; "
        "nothing has been run on a GPU by this command"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
