"""qmm on the CPU against torch, per layer shape. ``make bench`` writes benchmarks/results/qmm_cpu.json.

Correctness gates speed: each candidate must agree with the reference before it is timed. All of a shape run in
one process, one after another; compare medians within a run, never across runs.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dq_runtime.backends import dispatch
from dq_runtime.grids import GRIDS
from dq_runtime.packing import PackedWeight, pack_codes
from dq_runtime.spec import GridSpec

# N x K of SmolLM2-135M (attention, gate/up, down) and of one 1B-class projection.
SHAPES = [(576, 576), (1536, 576), (576, 1536), (2048, 2048)]


CANDIDATES = ["prepared-3", "prepared-4", "native-3", "native-4", "reference-3", "torch-fp32", "torch-bf16"]


def packed(n: int, k: int, bits: int) -> PackedWeight:
    grid = GRIDS.get("int")(GridSpec(bits=bits, group_size=64))
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    scales = grid.fit(w)
    return PackedWeight(pack_codes(grid.nearest(w, scales), bits), scales.scale, scales.zero, bits, k)


@pytest.mark.parametrize("m", [1, 16, 512])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("candidate", CANDIDATES)
def test_qmm(benchmark: Callable[..., object], candidate: str, n: int, k: int, m: int) -> None:
    kind, _, bits = candidate.partition("-")
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(1))
    w = packed(n, k, int(bits) if bits.isdecimal() else 3)
    expected = dispatch.backend("reference").qmm(x, w)
    if kind == "torch":
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[bits]
        dense, inputs = w.decode(dtype=dtype), x.to(dtype)
        benchmark(torch.nn.functional.linear, inputs, dense)
        moved = dense.nbytes
    elif kind == "prepared":  # what serves: repacked once, activations as they are
        reason = dispatch.backend("native").available()
        if reason is not None:
            pytest.skip(reason)
        ready = dispatch.prepare(w, torch.float32)
        assert ready is not None
        tolerance = k * torch.finfo(torch.float32).eps * (x.abs() @ w.decode().abs().t())
        assert ((dispatch.qmm_prepared(x, ready) - expected).abs() <= tolerance).all()
        benchmark(dispatch.qmm_prepared, x, ready)
        moved = ready.nbytes
    else:
        backend = dispatch.backend(kind)
        reason = backend.available()
        if reason is not None:
            pytest.skip(reason)
        tolerance = k * torch.finfo(torch.float32).eps * (x.abs() @ w.decode().abs().t())
        assert ((backend.qmm(x, w) - expected).abs() <= tolerance).all()
        benchmark(backend.qmm, x, w)
        moved = w.nbytes
    benchmark.extra_info |= {"m": m, "n": n, "k": k, "candidate": candidate, "weight_bytes": moved}  # type: ignore[attr-defined]
