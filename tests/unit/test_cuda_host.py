"""The CUDA extension without a GPU: what each thread does (compiled for the host), what ptxas says of the kernels, what
the library, its build and its backend answer. tests/gpu/test_cuda_pack.py runs the kernels."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dq_runtime.backends import cuda_pack
from dq_runtime.backends.base import Call
from dq_runtime.backends.cuda_pack import LIBRARY, NOT_FINITE, OVERFLOW, WEIGHT_DTYPES, CudaPack, launch, library
from dq_runtime.errors import BackendError, SpecError
from dq_runtime.grids import Scales
from dq_runtime.grids.int_grid import IntGrid
from dq_runtime.packing import pack_codes, unpack_codes, words_per_row
from dq_runtime.spec import GridSpec

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
BITS = range(2, 9)
KS = (*range(1, 66), 96, 100, 191, 192, 576, 577)
POISON = 0x5A
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """csrc/cuda/host.cpp: the kernels' per-thread functions, looped over on the CPU."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    target = tmp_path_factory.mktemp("host") / "host.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
    semantics = ["-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-shared"]
    subprocess.run([*compiler.split(), *flags, *semantics, str(CUDA / "host.cpp"), "-o", str(target)], check=True)
    loaded = ctypes.CDLL(str(target))
    p, i32, i64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    loaded.host_pack.argtypes = loaded.host_unpack.argtypes = (p, i64, i64, i32, p)
    loaded.host_count_different.argtypes, loaded.host_count_different.restype = (p, p, i64, i64, i32), i64
    loaded.host_fit.argtypes = (p, i32, i64, i64, i32, i32, i32, i32, p, p, p)
    return loaded


def guarded(shape: tuple[int, int], dtype: torch.dtype, offset: int) -> tuple[Tensor, Tensor]:
    """A tensor ``offset`` elements into a buffer of poison, and the buffer."""
    size = shape[0] * shape[1]
    buffer = torch.full((size + offset + 64,), POISON, dtype=dtype)
    return buffer[offset : offset + size].view(shape), buffer


def assert_guards(tensor: Tensor, buffer: Tensor, offset: int) -> None:
    assert (buffer[:offset] == POISON).all()
    assert (buffer[offset + tensor.numel() :] == POISON).all(), "wrote past the end"


def random_codes(n: int, k: int, bits: int) -> Tensor:
    return torch.randint(0, 2**bits, (n, k), generator=torch.Generator().manual_seed(k), dtype=torch.uint8)


@pytest.mark.parametrize("bits", BITS)
def test_threads_pack_and_unpack_the_canonical_bits(host: ctypes.CDLL, bits: int) -> None:
    for k, offset in product(KS, (0, 1)):  # offset 1: no access may be wide
        codes = random_codes(5, k, bits)
        there, _ = guarded((5, k), torch.uint8, offset)
        there.copy_(codes)
        packed, buffer = guarded((5, words_per_row(k, bits)), torch.int32, offset)
        host.host_pack(there.data_ptr(), 5, k, bits, packed.data_ptr())
        assert torch.equal(packed, pack_codes(codes, bits)), k
        assert_guards(packed, buffer, offset)

        noise = torch.randint(-(2**31), 2**31, packed.shape, dtype=torch.int64).to(torch.int32)
        packed.copy_(noise)  # set padding bits must not reach a code
        back, buffer = guarded((5, k), torch.uint8, offset)
        host.host_unpack(packed.data_ptr(), 5, k, bits, back.data_ptr())
        assert torch.equal(back, unpack_codes(noise, bits, k)), k
        assert_guards(back, buffer, offset)


@pytest.mark.parametrize("bits", BITS)
def test_threads_place_every_code_at_every_position(host: ctypes.CDLL, bits: int) -> None:
    top = 2**bits - 1
    values, at = torch.arange(2**bits, dtype=torch.uint8), torch.arange(32)
    for background in (0, top):
        codes = torch.full((32, 2**bits, 32), background, dtype=torch.uint8)
        codes[at[:, None], values.long()[None], at[:, None]] = values
        codes = codes.view(-1, 32)
        packed = torch.empty(codes.shape[0], bits, dtype=torch.int32)
        host.host_pack(codes.data_ptr(), codes.shape[0], 32, bits, packed.data_ptr())
        assert torch.equal(packed, pack_codes(codes, bits))
        back = torch.empty_like(codes)
        host.host_unpack(packed.data_ptr(), codes.shape[0], 32, bits, back.data_ptr())
        assert torch.equal(back, codes)
        if bits < 8:  # what a byte holds above its code is dropped
            dirty, again = codes | (0xFF & ~top), torch.empty_like(packed)
            host.host_pack(dirty.data_ptr(), codes.shape[0], 32, bits, again.data_ptr())
            assert torch.equal(again, packed)


@pytest.mark.parametrize("bits", BITS)
def test_threads_count_codes_that_differ_and_no_padding(host: ctypes.CDLL, bits: int) -> None:
    for k in KS:
        a = random_codes(5, k, bits)
        b = torch.where(torch.rand(5, k, generator=torch.Generator().manual_seed(k)) < 0.1, 2**bits - 1 - a, a)
        left, right = pack_codes(a, bits), pack_codes(b, bits)
        want = int((a != b).sum())
        assert host.host_count_different(left.data_ptr(), right.data_ptr(), 5, k, bits) == want
        if spare := 32 * left.shape[1] - k * bits:
            right[:, -1] ^= -(2 ** (32 - spare)) if spare < 32 else 0  # flip every padding bit
            assert host.host_count_different(left.data_ptr(), right.data_ptr(), 5, k, bits) == want


def host_fit(host: ctypes.CDLL, w: Tensor, spec: GridSpec, lanes: int) -> tuple[int, Scales, Tensor]:
    n, k = w.shape
    groups = spec.groups(k)
    dtype: torch.dtype = getattr(torch, spec.scale_dtype)
    scale, zero = torch.full((n, groups), float("nan"), dtype=dtype), torch.full((n, groups), 255, dtype=torch.uint8)
    codes = torch.full((n, k), 255, dtype=torch.uint8)
    grid = (spec.bits, int(spec.symmetric), WEIGHT_DTYPES[dtype])
    outputs = (scale.data_ptr(), zero.data_ptr(), codes.data_ptr())
    problem = host.host_fit(w.data_ptr(), WEIGHT_DTYPES[w.dtype], n * groups, k // groups, lanes, *grid, *outputs)
    return problem, Scales(scale, None if spec.symmetric else zero), codes


def assert_is_the_grid(host: ctypes.CDLL, w: Tensor, spec: GridSpec, lanes: int = 4) -> None:
    grid = IntGrid(spec)
    problem, scales, codes = host_fit(host, w, spec, lanes)
    want = grid.fit(w)
    assert problem == 0
    assert torch.equal(scales.scale, want.scale), spec
    assert (scales.zero is None) == (want.zero is None)
    assert scales.zero is None or want.zero is None or torch.equal(scales.zero, want.zero), spec
    assert torch.equal(codes, grid.nearest(w, want)), spec


def specs(group_size: int) -> list[GridSpec]:
    every = product(BITS, (True, False), ("bfloat16", "float16"))
    return [GridSpec(bits=b, group_size=group_size, symmetric=s, scale_dtype=d) for b, s, d in every]


def varied_weights(n: int, k: int) -> Tensor:
    """Rows of very different sizes; groups of zeros, of one sign, with an outlier, and too small for a scale."""
    g = torch.Generator().manual_seed(n + k)
    w = torch.randn(n, k, generator=g) * torch.logspace(-9, 3, n)[:, None]
    w[0], w[1], w[2] = 0, w[1].abs(), -w[2].abs()
    w[3, :: k // 3] *= 50
    w[4] *= 1e-30
    w[5] = -0.0
    return w


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
@pytest.mark.parametrize(("group", "k"), [(16, 576), (64, 576), (128, 384), (-1, 100), (-1, 33), (-1, 576)])
def test_threads_fit_the_grid_of_int_grid(host: ctypes.CDLL, dtype: torch.dtype, group: int, k: int) -> None:
    w = varied_weights(24, k).clamp(-6e4, 6e4).to(dtype)
    for lanes, spec in zip([1, 2, 4, 8, 16, 32] * 5, specs(group), strict=False):
        assert_is_the_grid(host, w, spec, lanes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_threads_fit_every_finite_half(host: ctypes.CDLL, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    # 2 * 1e38 still fits float32; 3 levels of 65504 hold 2 * 65504.
    for scale_dtype, limit in (("bfloat16", 1e38), ("float16", 65504.0)):
        w = every[every.float().abs() <= limit].view(-1, 1)
        for bits, symmetric in product((2, 3, 8), (True, False)):
            spec = GridSpec(bits=bits, group_size=-1, symmetric=symmetric, scale_dtype=scale_dtype)
            assert_is_the_grid(host, w, spec)


@pytest.mark.parametrize(("scale_dtype", "significand"), [("bfloat16", 8), ("float16", 11)])
@pytest.mark.parametrize("bits", BITS)
def test_scales_halfway_between_two_values_round_to_even(
    host: ctypes.CDLL, bits: int, scale_dtype: str, significand: int
) -> None:
    odd = torch.arange(2**significand + 1, 2 ** (significand + 1), 2, dtype=torch.float32)  # one bit too many
    ties = odd * 2.0**-16  # 1/256 .. 1/16: normal numbers of both dtypes
    w = (ties * (2**bits - 1)).view(-1, 1)  # exact: 12 + 8 bits
    assert_is_the_grid(host, w, GridSpec(bits=bits, group_size=-1, symmetric=False, scale_dtype=scale_dtype))
    assert_is_the_grid(host, w / 2, GridSpec(bits=bits, group_size=-1, scale_dtype=scale_dtype))


@pytest.mark.parametrize("symmetric", [True, False])
def test_threads_flag_what_int_grid_refuses(host: ctypes.CDLL, symmetric: bool) -> None:
    for scale_dtype, bits in product(("float16", "bfloat16"), BITS):
        spec = GridSpec(bits=bits, group_size=-1, symmetric=symmetric, scale_dtype=scale_dtype)
        limit = torch.finfo(getattr(torch, scale_dtype)).max
        largest = min(
            torch.tensor(limit * (2**bits - 1) / (2 if symmetric else 1)).item(), torch.finfo(torch.float32).max
        )
        for magnitude in (largest * (1 - 2**-20), largest, min(largest * (1 + 2**-20), torch.finfo(torch.float32).max)):
            w = torch.tensor([[0.0, magnitude]])
            problem, _, _ = host_fit(host, w, spec, 1)
            try:
                IntGrid(spec).fit(w)
            except SpecError:
                assert problem == OVERFLOW
            else:
                assert problem == 0
    for dtype, bad in product(WEIGHT_DTYPES, (float("inf"), -float("inf"), float("nan"))):
        w = torch.ones(2, 33, dtype=dtype)
        w[1, 32] = bad
        assert host_fit(host, w, GridSpec(bits=3, group_size=-1, symmetric=symmetric), 4)[0] == NOT_FINITE


@needs_nvcc
def test_every_kernel_compiles_without_local_memory() -> None:
    done = subprocess.run([sys.executable, str(CUDA / "offline.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for arch, kernel in product(("sm_80", "sm_90"), ("pack", "unpack", "count_different")):
        for bits in BITS:
            assert f"{arch}  {kernel}<{bits}> " in done.stdout
    assert done.stdout.count("fit<") == 6
    assert done.stdout.count("stack 0  spills 0  shared 0") == len(done.stdout.splitlines()) == 48


@needs_nvcc
def test_the_compile_check_can_fail(tmp_path: Path) -> None:
    body = "float a[64]; for (int j = 0; j < 64; ++j) a[j * i % 64] = x[j]; x[0] = a[i];"
    spilling = f"__global__ void f(float* x, int i) {{ {body} }}"
    (tmp_path / "spilling.cu").write_text(spilling)
    (tmp_path / "broken.cu").write_text("__global__ void f() { no_such_function(); }")
    code = """
import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import offline
offline.SOURCES[:] = [Path(path) for path in sys.argv[2:]]; offline.ARCHITECTURES = ("90",); sys.exit(offline.main())
"""
    command = [sys.executable, "-c", code, str(CUDA), str(tmp_path / "spilling.cu"), str(tmp_path / "broken.cu")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    first, second = done.stdout.splitlines()
    assert "spilling.cu" in first
    assert "ocal memory" in first
    assert "no_such_function" in second


def run_without_nvcc(script: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {"PATH": str(tmp_path), **environment}
    command = [sys.executable, str(CUDA / script), *([str(tmp_path / "out.so")] if script == "build.py" else [])]
    return subprocess.run(command, capture_output=True, text=True, env=settings, check=False)


def test_building_without_nvcc_gives_a_reason(tmp_path: Path) -> None:
    done = run_without_nvcc("offline.py", tmp_path)
    assert (done.returncode, done.stdout) == (0, "nvcc not found: skipped\n")
    done = run_without_nvcc("build.py", tmp_path)
    assert done.returncode == 1
    assert done.stderr == "build.py: out.so was not built: nvcc not found on PATH or under CUDA_HOME\n"


def test_a_failing_nvcc_gives_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    nvcc = tmp_path / "home" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho some noise\necho 'nvcc fatal   : Unsupported gpu architecture'\nexit 2\n")
    nvcc.chmod(0o755)
    done = run_without_nvcc("build.py", tmp_path, CUDA_HOME=str(tmp_path / "home"))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("nvcc failed with exit status 2: nvcc fatal   : Unsupported gpu architecture\n")
    assert not list(tmp_path.glob("*.so*"))


@needs_nvcc
@pytest.mark.skipif(os.environ.get("DQ_CUDA") == "0", reason="DQ_CUDA=0: built without the library")
def test_the_library_is_built_and_loads() -> None:
    assert isinstance(library(LIBRARY), ctypes.CDLL), library(LIBRARY)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.skipif(not LIBRARY.exists(), reason="the CUDA library is not built")
def test_a_launch_without_a_gpu_is_one_clear_sentence() -> None:
    assert CudaPack().available() == "no CUDA device"
    with pytest.raises(BackendError, match=r"dq_cuda_pack was not launched: .* \(cudaError \d+\); is there a usable"):
        launch("dq_cuda_pack", 0, 1, 32, 3, 0, 0, 0)
    with pytest.raises(BackendError, match="dq_cuda_unpack was not launched: invalid argument"):
        launch("dq_cuda_unpack", 0, 1, 32, 9, 0, 0, 0)


def test_a_missing_or_foreign_library_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = tmp_path / "foreign.so"
    foreign.write_text("not a library")
    for path, reason in ((tmp_path / "none.so", "none.so is not built; .*nvcc"), (foreign, "does not load .*build.py")):
        monkeypatch.setattr(cuda_pack, "LIBRARY", path)
        with pytest.raises(BackendError, match=reason):
            launch("dq_cuda_pack", 0, 1, 32, 3, 0, 0, 0)
        assert CudaPack().available() == library(path)


@pytest.fixture(autouse=True)
def _forget_libraries() -> Iterator[None]:
    yield
    library.cache_clear()


def test_can_run_says_why_not() -> None:
    def call(op: str = "pack", device: str = "cuda", bits: int = 3) -> Call:
        return Call(op, device, 0, 5, 64, bits, 32, True, torch.uint8, torch.bfloat16)

    backend = CudaPack()
    assert backend.can_run(call()) is None
    assert backend.can_run(call("unpack")) is None
    assert "cuda has no qmm" in str(backend.can_run(call("qmm")))
    assert "got cpu" in str(backend.can_run(call(device="cpu")))
    assert "got 9" in str(backend.can_run(call(bits=9)))


def test_bad_tensors_raise() -> None:
    backend, codes, packed = CudaPack(), torch.zeros(2, 64, dtype=torch.uint8), torch.zeros(2, 6, dtype=torch.int32)
    for bad in (codes, codes[0], codes.int(), codes.to("meta")):
        with pytest.raises(BackendError, match="cuda pack needs uint8 codes"):
            backend.pack(bad, 3)
    for bad in (packed, packed[:, :5], packed.long(), packed.to("meta")):
        with pytest.raises(BackendError, match=r"3-bit codes of K=64 are int32 \[N, 6\] on a GPU"):
            backend.unpack(bad, 3, 64)
        with pytest.raises(BackendError, match="3-bit codes of K=64"):
            backend.count_different(packed, bad, 3, 64)
    for bits in (1, 9):
        with pytest.raises(BackendError, match=f"2 to 8 bits, got {bits}"):
            backend.pack(codes, bits)
        with pytest.raises(BackendError, match=f"2 to 8 bits, got {bits}"):
            backend.unpack(packed, bits, 64)
    for w in (torch.zeros(2, 64), torch.zeros(64), torch.zeros(2, 64, dtype=torch.float64)):
        with pytest.raises(BackendError, match="cuda fit needs weights"):
            backend.fit_nearest(w, GridSpec())
    with pytest.raises(SpecError, match="by absmax, got grid int and scale rule mse"):
        backend.fit_nearest(torch.zeros(2, 64), GridSpec(scale="mse"))
