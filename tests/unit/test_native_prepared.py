"""The SIMD kernels on prepared weights: against float64, and every instruction set against the scalar contract."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dq_runtime.backends import cpu_prepared, dispatch
from dq_runtime.backends.cpu_native import CpuNative
from dq_runtime.backends.cpu_prepared import Arena, NativeWeight, activation_group, plan, prepare
from dq_runtime.errors import BackendError
from dq_runtime.modules.quant_linear import QuantLinear
from dq_runtime.packing import PackedWeight, pack_codes
from dq_runtime.packing.bridge import host_of, host_weight_of

pytestmark = [
    pytest.mark.skipif(os.environ.get("DQ_NATIVE") == "0", reason="DQ_NATIVE=0: built without the extension"),
    pytest.mark.usefixtures("one_thread"),
]

BITS = range(2, 9)
MS = (1, 2, 3, 4, 5, 6, 7, 8, 15, 16, 17, 64, 65)
EPS = 2.0**-23
FEW_TOKENS = 4  # csrc/cpu/kernels.h, kFineTokens: up to here all activations have 15 bits
# (K, group): whole units, a row, padded units of every storage, odd groups, groups cut into several activation scales
SHAPES = ((576, 64), (576, 576), (192, 32), (96, 16), (100, 100), (33, 11), (7, 7), (192, 48), (384, 192))


def weight(n: int, k: int, bits: int, group: int, symmetric: bool, scale_dtype: torch.dtype) -> PackedWeight:
    g = torch.Generator().manual_seed(n * 1009 + k * 31 + bits)
    codes = torch.randint(0, 2**bits, (n, k), generator=g, dtype=torch.uint8)
    scale = (torch.rand(n, k // group, generator=g) * 0.1 + 1e-3).to(scale_dtype)
    zero = None if symmetric else torch.randint(0, 2**bits, (n, k // group), generator=g, dtype=torch.uint8)
    return PackedWeight(pack_codes(codes, bits), scale, zero, bits, k)


def tokens(m: int, k: int) -> Tensor:
    """Normal, with one outlier in some rows, one row of zeros and one group of zeros."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(k))
    x[::3, k // 2] *= 50
    x[1 % m] *= 1e-30
    x[2 % m] = 0
    return x


def Part(w: PackedWeight | Tensor, first: int = 0, step: int = 1) -> cpu_prepared.Part:
    """A part of torch tensors."""
    return cpu_prepared.Part(host_weight_of(w) if isinstance(w, PackedWeight) else host_of(w), first, step)


def qmm_prepared(x: Tensor, w: NativeWeight, exact: bool, threads: int, prompt: bool = False) -> Tensor:
    return torch.from_numpy(cpu_prepared.qmm_prepared(x.numpy(), w, exact, threads, prompt))


def prepared(*parts: cpu_prepared.Part, n: int, exact: bool = False) -> NativeWeight:
    layout = plan(parts, n, exact)
    return prepare(layout, Arena(layout.nbytes), 1)


def rounding_bound(x: Tensor, dense: Tensor, group: int) -> Tensor:
    """How far integer activations may move x @ dense.T: half a step of a group's scale per value, 1/256 of one for few
    tokens. The scale is that of the group's largest magnitude or, if that is an outlier, of 1.9 times the row's rms."""
    m, k = x.shape
    grouped = x.view(m, -1, group).abs()
    largest = grouped.amax(-1)
    rms = x.square().mean(-1, keepdim=True).sqrt()
    step = torch.where(largest > 2.7501 * rms, 1.9 * rms, largest) / 127 / 2
    fine = (rms < 1e-18) | (m <= FEW_TOKENS)  # the squares of so small a row are lost to float32
    step = torch.where(fine, largest / 127 / 256, step)
    return step.double() @ dense.view(-1, k // group, group).abs().sum(-1).double().T


@pytest.mark.parametrize(("k", "group"), SHAPES)
@pytest.mark.parametrize("bits", BITS)
def test_matmul(bits: int, k: int, group: int) -> None:
    """Integer sums are exact, decoded weights are exact: what is left is float32 rounding, K eps sum |x| |w| at most,
    and in int8 mode that of the activations."""
    x = tokens(max(MS), k)
    for symmetric, dtype, n in product((True, False), (torch.bfloat16, torch.float16), (67, 192, 1)):
        w = weight(n, k, bits, group, symmetric, dtype)
        ready = prepared(Part(w), n=n)
        dense = w.decode()
        exact = x.double() @ dense.T.double()
        size = x.abs().double() @ dense.abs().T.double()
        for m in MS if n == 67 else (1, 17):
            y = qmm_prepared(x[:m], ready, exact=True, threads=1)
            assert y.shape == (m, n)
            assert ((y - exact[:m]).abs() <= k * EPS * size[:m]).all()
            y = qmm_prepared(x[:m], ready, exact=False, threads=1)
            bound = rounding_bound(x[:m], dense, activation_group(group)) + k * EPS * size[:m]
            assert ((y - exact[:m]).abs() <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", BITS)
def test_result_depends_on_neither_threads_nor_other_tokens(bits: int) -> None:
    """Nor on whether a block is unpacked in registers (5 to 16 tokens) or into scratch; outliers and fine rows too."""
    w = weight(200, 576, bits, 64, bits % 2 == 0, torch.float16)
    ready = prepared(Part(w), n=200)
    x = tokens(65, 576)
    alone = qmm_prepared(x, ready, False, 1)
    for threads in (2, 3):
        assert torch.equal(qmm_prepared(x, ready, False, threads), alone)
    for m in (5, 8, 13, 17):
        assert torch.equal(qmm_prepared(x[:m], ready, False, 1), alone[:m])
    few = qmm_prepared(x[:4], ready, False, 1)
    for m in range(4):
        assert torch.equal(qmm_prepared(x[m : m + 1], ready, False, 2), few[m : m + 1])


def rounds_prompts() -> bool:
    """Whether the instruction set in use takes prompts in bfloat16."""
    from dq_runtime import _native

    chosen: str = _native.isa()
    return chosen == "amx"


@pytest.mark.parametrize(("k", "group"), SHAPES)
@pytest.mark.parametrize("bits", BITS)
def test_prompts(bits: int, k: int, group: int) -> None:
    """In bfloat16 a weight and an activation move by u = 2^-8 of themselves at most, a product by 2 u + u^2, and sums
    in float32 round as ever; where there are no tiles of bfloat16 a prompt is held like any other tokens."""
    x = tokens(max(MS), k)
    for symmetric, dtype, n in product((True, False), (torch.bfloat16, torch.float16), (67, 192, 1)):
        w = weight(n, k, bits, group, symmetric, dtype)
        ready = prepared(Part(w), n=n)
        exact = x.double() @ w.decode().double().T
        bound = (2**-7 + 2**-16 + k * EPS) * (x.abs().double() @ w.decode().abs().double().T)
        whole = qmm_prepared(x, ready, False, 1, prompt=True)
        if not rounds_prompts():
            assert torch.equal(whole, qmm_prepared(x, ready, False, 1))
            continue
        bound = bound + 2.0**-126 * k  # tiles take denormal products for zero
        assert ((whole - exact).abs() <= bound).all()
        for m in MS if n == 67 else (1, 17):
            assert torch.equal(qmm_prepared(x[:m], ready, False, 2, prompt=True), whole[:m])
        assert torch.equal(qmm_prepared(x[7:40], ready, False, 1, prompt=True), whole[7:40])


@pytest.mark.parametrize("bits", [*BITS, 16])
def test_an_exact_sum_does_not_depend_on_how_many_tokens_there_are(bits: int) -> None:
    """Few tokens (up to 16, taken 8, 4 and fewer at once) and many: one order of summation."""
    w = weight(100, 192, bits, 64, bits % 2 == 0, torch.bfloat16) if bits < 16 else tokens(100, 192).bfloat16()
    ready = prepared(Part(w), n=100, exact=True)
    x = tokens(40, 192)
    expected = torch.cat([qmm_prepared(x[i : i + 1], ready, True, 1) for i in range(40)])
    for m in (*range(2, 20), 40):
        assert torch.equal(qmm_prepared(x[:m], ready, True, 2), expected[:m])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unquantized_rows(dtype: torch.dtype) -> None:
    w = torch.randn(67, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = tokens(9, 100)
    size = x.abs().double() @ w.abs().double().T
    for m in (1, 9):
        y = qmm_prepared(x[:m], prepared(Part(w), n=67, exact=True), True, 1)
        assert ((y - x[:m].double() @ w.double().T).abs() <= 100 * EPS * size[:m]).all()
    for values, k in ((w, 100), (w.float()[:, :64], 64)):  # 8 bits: half a step of 1/127 of the largest of a group
        ready = prepared(Part(values), n=67)
        y = qmm_prepared(x[:, :k], ready, True, 1)
        group = 32 if k == 64 else 100
        grouped = values.float().reshape(67, -1, group).abs().amax(-1) * (1 + 2**-7) / 127
        step = grouped.repeat_interleave(group, 1).double()
        bound = x[:, :k].abs().double() @ step.T * 0.5 + k * EPS * size
        assert ((y - x[:, :k].double() @ values.double().T).abs() <= bound * 1.001).all()


def test_joined_rows() -> None:
    """Alternating blocks, and parts of different bits, groups and symmetry, are each the same as alone."""
    a = weight(40, 192, 3, 64, True, torch.bfloat16)
    b = weight(40, 192, 4, 32, False, torch.bfloat16)
    x = tokens(5, 192)
    ready = prepared(Part(a, 0, 2), Part(b, 1, 2), n=96)
    y = qmm_prepared(x, ready, True, 1).view(5, 3, 2, 16)
    for index, w in enumerate((a, b)):
        got = y[:, :, index].reshape(5, 48)
        dense = w.decode().double()
        assert ((got[:, :40] - x.double() @ dense.T).abs() <= 192 * EPS * (x.abs().double() @ dense.abs().T)).all()
        assert (got[:, 40:] == 0).all()  # rows that fill up a block


def test_what_cannot_be_joined() -> None:
    w = weight(32, 64, 4, 32, True, torch.bfloat16)
    half = PackedWeight(w.packed, w.scale.half(), None, 4, 64)
    with pytest.raises(BackendError, match="scales of one dtype"):
        plan([Part(w), Part(half, 2)], 64, False)
    with pytest.raises(BackendError, match="quantized and unquantized"):
        plan([Part(w), Part(torch.zeros(32, 64), 2)], 64, False)
    with pytest.raises(BackendError, match="bfloat16 or float16"):
        plan([Part(torch.zeros(32, 64))], 32, True)


@pytest.mark.parametrize("size", [1, 16, 64, 100, 127, 128, 192, 576, 577, 1021, 4096])
def test_activation_group(size: int) -> None:
    group = activation_group(size)
    assert size % group == 0
    assert group <= 128 or all(size % g for g in range(16, 129))


def test_backend_prepares_what_it_serves() -> None:
    native = CpuNative()
    w = weight(67, 192, 5, 48, False, torch.float16)
    ready = native.prepare(w, torch.float32)
    assert ready is not None
    x = tokens(3, 192)
    y = dispatch.qmm_prepared(x.view(3, 1, 192), ready)
    assert y.shape == (3, 1, 67)
    size = x.abs() @ w.decode().abs().T
    assert ((y[:, 0] - x @ w.decode().T).abs() <= 2 * 192 * EPS * size).all()
    assert dispatch.qmm_prepared(x.bfloat16(), ready).dtype == torch.bfloat16
    assert native.qmm_prepared(x[:0], ready).shape == (0, 67)
    for bad in (x[:, :5], x[0], x.double()):
        with pytest.raises(BackendError, match="needs"):
            native.qmm_prepared(bad, ready)
    linear = QuantLinear(w, torch.ones(67))
    before = linear(x)
    linear.prepare(torch.float32)
    assert ((linear(x) - before).abs() <= 2 * 192 * EPS * size).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes_ptr": 0}, "codes_ptr is a null pointer"),
        ({"codes_ptr": 32}, "codes_ptr is not aligned to 64 bytes"),
        ({"N": 0}, "N must be positive"),
        ({"group": 7}, "group 7 does not divide K 64"),
        ({"storage": 5}, "storage must be 2, 3, 4, 6, 8, 16 or 20, got 5"),
        ({"K": 70000, "group": 70000}, "group must be at most 66000"),
        ({"rest_ptr": 64}, "two planes need storage 6"),
    ],
)
def test_bad_arguments_raise(change: dict[str, int], message: str) -> None:
    from dq_runtime import _native

    arguments = {"codes_ptr": 64, "scale_ptr": 64, "zero_ptr": 0, "N": 16, "K": 64, "group": 32, "storage": 4}
    with pytest.raises(ValueError, match=message):
        _native.Prepared(**(arguments | change), middle=8, is_bf16=False)


def test_repacking_checks_its_target() -> None:
    from dq_runtime import _native

    target = _native.Prepared(64, 64, 0, 32, 64, 32, 4, 8, False)  # 64: never read, the checks come first
    for arguments, message in (
        ((0, 1, 64, 64, 0, 48, 4, 32), "blocks 0 to 2 do not fit 2"),
        ((1, 2, 64, 64, 0, 32, 4, 32), "blocks 1 to 3 do not fit 2"),
        ((0, 1, 64, 64, 0, 32, 5, 32), "5 bits do not fit storage 4"),
        ((0, 1, 64, 64, 0, 32, 4, 16), "multiple of the group 32"),
        ((0, 1, 64, 64, 0, 32, 3, 32), "zero points of their own"),
        ((0, 1, 64, 64, 64, 32, 4, 32), "zero points of their own"),
    ):
        with pytest.raises(ValueError, match=message):
            _native.repack_packed(target, *arguments, 1)
    with pytest.raises(ValueError, match="floats go into storage 8"):
        _native.repack_float(target, 0, 1, 64, 0, 32, 1)


# Runs in a process of its own, since an instruction set is chosen once; numpy alone, which starts in 0.1 s.
EVERY_KERNEL = """
import sys, numpy as np
sys.path.insert(0, sys.argv[2])
import _native
rng = np.random.default_rng(0)

def aligned(count, dtype):
    raw = np.zeros(count * np.dtype(dtype).itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count * np.dtype(dtype).itemsize].view(dtype)

results = {"isa": np.array(_native.isa())}
for bits in range(2, 9):
    for k, group in ((576, 64), (192, 192), (96, 16), (100, 100)):
        for asymmetric in (0, 1):
            n, groups = 67, k // group
            codes = rng.integers(0, 2**bits, (n, k), dtype=np.uint8)
            packed = np.zeros((n, (k * bits + 31) // 32), np.int32)
            _native.pack(codes.ctypes.data, n, k, bits, packed.ctypes.data)
            scale = rng.uniform(0.01, 0.1, (n, groups)).astype(np.float16)
            zero = rng.integers(0, 2**bits, (n, groups), dtype=np.uint8)
            cut = 96 if group == 192 else group
            storage = _native.storage_of(bits, cut)
            sizes = _native.prepared_sizes(n, k, cut, storage)
            store, scales = aligned(sizes[0], np.uint8), aligned(sizes[1], np.uint16)
            zeros = aligned(sizes[1], np.uint8)
            w = _native.Prepared(store.ctypes.data, scales.ctypes.data, zeros.ctypes.data if asymmetric else 0, n, k,
                                 cut, storage, 2 ** (bits - 1), False)
            _native.repack_packed(w, 0, 1, packed.ctypes.data, scale.ctypes.data,
                                  zero.ctypes.data if asymmetric else 0, n, bits, group, 1)
            for m in (1, 2, 3, 4, 5, 16, 17, 41):
                x = rng.standard_normal((m, k)).astype(np.float32)
                x[::2, 3] *= 30
                for exact in (False, True):
                    y = np.full((m + 2, n), np.nan, np.float32)
                    _native.qmm_prepared(w, x.ctypes.data, m, y[1:].ctypes.data, 2, exact, False)
                    assert np.isnan(y[0]).all() and np.isnan(y[-1]).all() and np.isfinite(y[1:-1]).all()
                    middle = zero if asymmetric else np.full_like(zero, 2 ** (bits - 1))
                    dense = np.abs(codes - np.repeat(middle, group, 1).astype(np.float32))
                    dense *= np.repeat(scale, group, 1).astype(np.float32)
                    name = f"{bits}-{k}-{group}-{asymmetric}-{m}-{exact}"
                    results[name] = y[1:-1]
                    results["size-" + name] = np.abs(x) @ dense.T
np.savez(sys.argv[1], **results)
"""


def run_every_kernel(isa: str, folder: Path) -> dict[str, np.ndarray]:
    from dq_runtime import _native

    file = folder / f"{isa}.npz"
    command = [sys.executable, "-c", EVERY_KERNEL, str(file), str(Path(_native.__file__).parent)]
    environment = {**os.environ, "DQ_ISA": isa}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return dict(np.load(file))


def runnable() -> list[str]:
    from dq_runtime import _native

    f = _native.cpu_features()
    can = {
        "scalar": True,
        "avx2": f["avx2"] and f["fma"],
        "amx": f["amx_int8"] and f["amx_bf16"],
        "avx512": all(f[name] for name in ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni")),
        "neon": f["neon"] and f["dotprod"],
    }
    return [name for name in f["variants"] if can[name]]


def test_every_instruction_set_computes_the_same(tmp_path: Path) -> None:
    """Integer sums are the same bit for bit; the float32 sums over groups (int8 mode) or columns (exact mode) round
    differently with and without fused multiply-add: a bound on both is 2 (K + 4) u sum |x| |w| = (K + 4) eps ..."""
    results = {isa: run_every_kernel(isa, tmp_path) for isa in runnable()}
    scalar = results["scalar"]
    names = [name for name in scalar if name != "isa" and not name.startswith("size-")]
    assert len(names) == 7 * 4 * 2 * 8 * 2
    for isa, found in results.items():
        assert str(found["isa"]) == isa
        for name in names:
            k = int(name.split("-")[1])
            # 1%: int8 activations may be that much larger than x in sum.
            bound = (k + 4) * EPS * 1.01 * scalar["size-" + name]
            assert (np.abs(found[name] - scalar[name]) <= bound).all(), (isa, name)
    if "amx" in results:  # tiles change where the sums are made, and nothing about them
        assert all((results["amx"][name] == results["avx512"][name]).all() for name in names)


def test_isa_is_refused_clearly() -> None:
    code = "from dq_runtime import _native; _native.isa()"
    for isa, message in (("sse9", "DQ_ISA=sse9 is not an instruction set; known: .*scalar"), ("neon", "DQ_ISA=neon: ")):
        if isa in runnable():
            continue
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "DQ_ISA": isa}, check=False
        )
        assert done.returncode == 1
        assert re.search(message, done.stderr.strip().splitlines()[-1])
