"""The C++ CPU kernels against packing/layout.py (bits), float64 (a tight bound) and the reference backend."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from dq_runtime.backends.base import Call
from dq_runtime.backends.cpu_native import FUSED_TOKENS, TILE_WEIGHTS, CpuNative
from dq_runtime.backends.reference import Reference
from dq_runtime.errors import BackendError
from dq_runtime.packing import PackedWeight, pack_codes, unpack_codes, words_per_row

# Not importorskip: where a compiler exists the extension must be built, or this file fails.
pytestmark = pytest.mark.skipif(os.environ.get("DQ_NATIVE") == "0", reason="DQ_NATIVE=0: built without the extension")

BITS = range(2, 9)
KS = (576, 192, 100, 33, 7)
NS = (192, 5, 1)
MS = (1, 2, 3, FUSED_TOKENS, FUSED_TOKENS + 1, 16, 17, 64, 65)
U = 2.0**-24  # unit roundoff of float32


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """torch.empty returns NaN (floats) or the largest integer, so an element nobody wrote cannot pass.

    One torch thread: with two on a busy 2-core machine, one reference qmm of M=1 took 56 ms instead of 2. Tests of
    threads ask for them.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture
def native() -> CpuNative:
    return CpuNative()


def weight(n: int, k: int, bits: int, group: int, symmetric: bool, scale_dtype: torch.dtype) -> PackedWeight:
    g = torch.Generator().manual_seed(n * 1009 + k * 31 + bits)
    codes = torch.randint(0, 2**bits, (n, k), generator=g, dtype=torch.uint8)
    scale = (torch.rand(n, k // group, generator=g) * 0.1 + 1e-3).to(scale_dtype)
    zero = None if symmetric else torch.randint(0, 2**bits, (n, k // group), generator=g, dtype=torch.uint8)
    return PackedWeight(pack_codes(codes, bits), scale, zero, bits, k)


def tokens(m: int, k: int) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(k))


def fused(x: Tensor, w: PackedWeight, threads: int) -> Tensor:
    """The C++ qmm itself, for any M, between two canaries that it must leave alone."""
    from dq_runtime import _native

    y = torch.full((x.shape[0] * w.n + 16,), float("nan"))
    y[:8] = y[-8:] = 7.0
    _native.qmm(
        x.data_ptr(),
        x.shape[0],
        w.packed.data_ptr(),
        w.scale.data_ptr(),
        w.scale.dtype == torch.bfloat16,
        0 if w.zero is None else w.zero.data_ptr(),
        w.n,
        w.k,
        w.bits,
        w.group_size,
        y[8:].data_ptr(),
        threads,
    )
    assert (y[:8] == 7).all()
    assert (y[-8:] == 7).all()
    return y[8:-8].view(x.shape[0], w.n)


def test_extension_is_built(native: CpuNative) -> None:
    assert native.available() is None


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("bits", BITS)
def test_qmm(native: CpuNative, bits: int, k: int) -> None:
    """Decoded weights are exact, so only sums differ.

    Fused kernel: 16 partial sums of ceil(K/16) terms, a tree of 4 levels and the product's own rounding:
    |y - exact| <= (K/16 + 6) u sum|x||w|. The reference's BLAS may sum in any order: K u sum|x||w|; so the two differ
    by at most 2 K u sum|x||w| = K eps sum|x||w|.
    """
    x = tokens(max(MS), k)
    groups = [g for g in (16, 32, 64) if k % g == 0] + [k] + ([11] if k == 33 else [])
    for group, symmetric, scale_dtype in product(groups, (True, False), (torch.bfloat16, torch.float16)):
        w = weight(max(NS), k, bits, group, symmetric, scale_dtype)
        dense = w.decode().double()
        exact = x.double() @ dense.T
        size = x.double().abs() @ dense.abs().T
        reference = Reference().qmm(x, w)
        assert ((fused(x, w, 1) - exact).abs() <= (k / 16 + 6) * U * size).all()
        for n, m in product(NS, MS):
            part = PackedWeight(w.packed[:n], w.scale[:n], None if w.zero is None else w.zero[:n], bits, k)
            y = native.qmm(x[:m], part)
            assert y.shape == (m, n)
            assert ((y - reference[:m, :n]).abs() <= 2 * k * U * size[:m, :n]).all()


@pytest.mark.parametrize("bits", BITS)
def test_result_depends_on_neither_threads_nor_m(bits: int) -> None:
    # 192 x 576 is 3.4 times the work that earns a thread, so 3 threads really run.
    w = weight(192, 576, bits, 64, False, torch.bfloat16)
    x = tokens(65, 576)
    alone = fused(x, w, 1)
    for m in (1, 2, 17, 65):
        for threads in (1, 2, 3):
            assert torch.equal(fused(x[:m], w, threads), alone[:m])


@pytest.mark.parametrize("bits", BITS)
def test_dequantize_is_exact(bits: int) -> None:
    from dq_runtime import _native

    for k, group in ((576, 64), (576, 576), (100, 100), (33, 11), (7, 7), (1536, 48), (1, 1)):
        for symmetric in (True, False):
            for scale_dtype in (torch.bfloat16, torch.float16):
                w = weight(67, k, bits, group, symmetric, scale_dtype)
                zero = 0 if w.zero is None else w.zero.data_ptr()
                is_bf16 = scale_dtype == torch.bfloat16
                for threads in (1, 3):
                    for start, stop in ((0, 67), (5, 6), (13, 66)):
                        out = torch.empty(stop - start, k)
                        pointers = (w.packed.data_ptr(), w.scale.data_ptr(), is_bf16, zero)
                        _native.dequantize(*pointers, start, stop, k, bits, group, out.data_ptr(), threads)
                        assert torch.equal(out, w.decode(start, stop))


def test_every_half_scale_converts_exactly() -> None:
    from dq_runtime import _native

    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(-1, 1)
    packed = pack_codes(torch.full((2**16, 1), 3, dtype=torch.uint8), 2)  # symmetric zero is 2: the value is the scale
    for dtype in (torch.float16, torch.bfloat16):
        scale = every.view(dtype)
        out = torch.empty(2**16, 1)
        is_bf16 = dtype == torch.bfloat16
        _native.dequantize(packed.data_ptr(), scale.data_ptr(), is_bf16, 0, 0, 2**16, 1, 2, 1, out.data_ptr(), 1)
        torch.testing.assert_close(out, scale.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bits", BITS)
def test_pack_and_unpack_are_bit_equal(native: CpuNative, bits: int) -> None:
    for k in (*range(1, 34), 63, 64, 65, 576, 577, 1025):
        codes = torch.randint(0, 2**bits, (5, k), generator=torch.Generator().manual_seed(k), dtype=torch.uint8)
        packed = native.pack(codes, bits)
        assert torch.equal(packed, pack_codes(codes, bits))
        assert torch.equal(native.unpack(packed, bits, k), codes)
        noise = torch.randint(-(2**31), 2**31 - 1, (5, words_per_row(k, bits)), dtype=torch.int64).to(torch.int32)
        assert torch.equal(native.unpack(noise, bits, k), unpack_codes(noise, bits, k))


def test_tile_path_crosses_tiles(native: CpuNative) -> None:
    k = TILE_WEIGHTS // 4  # 4 rows a tile: 5 rows are one full tile and a partial one
    torch.set_num_threads(2)
    w = weight(5, k, 3, 64, True, torch.bfloat16)
    x = tokens(FUSED_TOKENS + 1, k)
    with torch.inference_mode():
        y = native.qmm(x, w)
    assert torch.equal(native.qmm(x, w), y)  # the buffer made in inference mode serves outside it
    dense = w.decode()
    assert ((y - x @ dense.T).abs() <= 2 * k * U * (x.abs() @ dense.abs().T)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 65])
def test_half_activations(native: CpuNative, dtype: torch.dtype, m: int) -> None:
    w = weight(192, 576, 3, 64, True, torch.bfloat16)
    x = tokens(m, 576).to(dtype)
    y = native.qmm(x, w)
    exact = x.double() @ w.decode().double().T
    size = x.double().abs() @ w.decode().double().abs().T
    assert y.dtype == dtype
    assert ((y - exact).abs() <= 576 * U * size + torch.finfo(dtype).eps * exact.abs()).all()


def test_layout_of_inputs(native: CpuNative) -> None:
    w = weight(48, 192, 4, 32, False, torch.float16)
    x = tokens(FUSED_TOKENS, 192)
    strided = torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(native.qmm(strided, w), native.qmm(x, w))
    assert w.zero is not None
    transposed = PackedWeight(w.packed.T.contiguous().T, w.scale.T.contiguous().T, w.zero.T.contiguous().T, 4, 192)
    assert torch.equal(native.qmm(x, transposed), native.qmm(x, w))
    part = PackedWeight(w.packed[3:9], w.scale[3:9], w.zero[3:9], 4, 192)
    assert torch.equal(native.qmm(x, part), native.qmm(x, w)[:, 3:9])


def test_empty(native: CpuNative) -> None:
    w = weight(5, 64, 3, 32, True, torch.bfloat16)
    y = native.qmm(torch.empty(0, 64, dtype=torch.bfloat16), w)
    assert y.shape == (0, 5)
    assert y.dtype == torch.bfloat16
    none = PackedWeight(w.packed[:0], w.scale[:0], None, 3, 64)
    assert native.qmm(tokens(2, 64), none).shape == (2, 0)
    assert native.pack(torch.empty(0, 64, dtype=torch.uint8), 3).shape == (0, 6)
    assert native.unpack(w.packed[:0], 3, 64).shape == (0, 64)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, 0, "x_ptr is a null pointer"),
        (0, 1, "x_ptr is not aligned to 4 bytes"),
        (1, 0, "M must be positive, got 0"),
        (2, 0, "packed_ptr is a null pointer"),
        (3, 0, "scale_ptr is a null pointer"),
        (6, -1, "N must be positive, got -1"),
        (7, 0, "K must be positive, got 0"),
        (8, 1, "bits must be from 2 to 8, got 1"),
        (8, 9, "bits must be from 2 to 8, got 9"),
        (9, 48, "group_size 48 does not divide K 64"),
        (9, 0, "group_size must be positive, got 0"),
        (10, 0, "y_ptr is a null pointer"),
    ],
)
def test_bad_arguments_raise(position: int, value: int, message: str) -> None:
    from dq_runtime import _native

    arguments: list[int] = [64, 1, 64, 64, 1, 0, 5, 64, 3, 32, 64, 1]  # 64: never read, the check comes first
    arguments[position] = value
    with pytest.raises(ValueError, match=message):
        _native.qmm(*arguments)


def test_other_bad_arguments_raise() -> None:
    from dq_runtime import _native

    with pytest.raises(ValueError, match="rows 3:3 are no range"):
        _native.dequantize(64, 64, True, 0, 3, 3, 64, 3, 32, 64, 1)
    with pytest.raises(ValueError, match="codes_ptr is a null pointer"):
        _native.pack(0, 5, 64, 3, 64)
    with pytest.raises(ValueError, match="bits must be from 2 to 8, got 0"):
        _native.unpack(64, 5, 64, 0, 64)


def test_bad_tensors_raise(native: CpuNative) -> None:
    w = weight(5, 64, 3, 32, False, torch.bfloat16)
    x = tokens(1, 64)
    assert w.zero is not None
    for bad_x in (x[:, :63], x[0], x.double(), x.to("meta")):
        with pytest.raises(BackendError, match="needs x"):
            native.qmm(bad_x, w)
    for bad, message in (
        (PackedWeight(w.packed[:, :5], w.scale, w.zero, 3, 64), "codes of K=64"),
        (PackedWeight(w.packed.long(), w.scale, w.zero, 3, 64), "codes of K=64"),
        (PackedWeight(w.packed, w.scale[:4], w.zero, 3, 64), "scales of an"),
        (PackedWeight(w.packed, w.scale.float(), w.zero, 3, 64), "scales of an"),
        (PackedWeight(w.packed, w.scale, w.zero[:, :1], 3, 64), "zero points must be"),
        (PackedWeight(w.packed, w.scale, w.zero.int(), 3, 64), "zero points must be"),
    ):
        with pytest.raises(BackendError, match=message):
            native.qmm(x, bad)
    with pytest.raises(BackendError, match="native pack needs uint8"):
        native.pack(torch.zeros(2, 8), 3)


def test_can_run_says_why_not(native: CpuNative) -> None:
    def call(**changes: Any) -> Call:
        return replace(Call("qmm", "cpu", 1, 5, 64, 3, 32, True, torch.float32, torch.bfloat16), **changes)

    assert native.can_run(call()) is None
    assert native.can_run(call(op="pack", x_dtype=torch.uint8)) is None
    assert "no lerp_mm" in str(native.can_run(call(op="lerp_mm")))
    assert "cpu tensors only" in str(native.can_run(call(device="cuda")))
    assert "activations must be" in str(native.can_run(call(x_dtype=torch.float64)))
    assert "scales must be" in str(native.can_run(call(scale_dtype=torch.float32)))
    assert "2 to 8 bits" in str(native.can_run(call(bits=1)))


def test_python_threads_share_the_pool() -> None:
    w = weight(192, 576, 3, 64, True, torch.bfloat16)
    x = tokens(3, 576)
    expected = fused(x, w, 1)
    wrong: list[int] = []

    def work(seed: int) -> None:
        for i in range(60):
            if not torch.equal(fused(x, w, 1 + (seed + i) % 4), expected):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


FORK = """
import os, numpy as np
from dq_runtime import _native

x = np.ones((3, 576), np.float32)
packed = np.arange(192 * 54, dtype=np.int32).reshape(192, 54) * 2654435
scale = np.ones((192, 9), np.float16)

def qmm(threads):
    y = np.full((3, 192), np.nan, np.float32)
    weight = packed.ctypes.data, scale.ctypes.data, False, 0, 192, 576, 3, 64
    _native.qmm(x.ctypes.data, 3, *weight, y.ctypes.data, threads)
    return y

expected = qmm(1)
assert (qmm(3) == expected).all()
for _ in range(5):
    child = os.fork()
    if child == 0:
        ok = (qmm(3) == expected).all() and (qmm(2) == expected).all()
        if os.fork() == 0:
            os._exit(0 if (qmm(2) == expected).all() else 1)
        os._exit(0 if ok and os.wait()[1] == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert (qmm(3) == expected).all()
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_and_exit_do_not_hang() -> None:
    """Forked children build their own pool, and the interpreter exits with workers alive (here: 2)."""
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_cpu_features() -> None:
    from dq_runtime import _native

    features = _native.cpu_features()
    assert "scalar" in features.pop("variants")
    assert {"avx2", "avx512f", "avx512_vnni", "amx_int8", "neon"} <= set(features)
    assert all(isinstance(value, bool) for value in features.values())
