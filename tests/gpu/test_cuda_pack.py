"""The CUDA kernels on the GPU, bit for bit: packing/layout.py and grids/int_grid.py, both computed on the CPU.

Without an installation, ``python csrc/cuda/build.py`` builds the library. Shapes are small; under the sanitizer, which
sees past a tensor's end only where torch does not pool memory:

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer python -m pytest -m gpu -k "not 2_to_31" tests/gpu/test_cuda_pack.py

tests/unit/test_cuda_host.py needs no GPU.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from dq_runtime.backends.cuda_pack import CudaPack, launch, place
from dq_runtime.errors import BackendError, SpecError
from dq_runtime.grids.int_grid import IntGrid
from dq_runtime.packing import pack_codes, unpack_codes, words_per_row
from dq_runtime.spec import GridSpec

pytestmark = pytest.mark.gpu
BITS = range(2, 9)
KS = (1, 7, 31, 32, 33, 64, 100, 192, 576, 577)
POISON = 0x5A


@pytest.fixture
def cuda() -> CudaPack:
    backend = CudaPack()
    reason = backend.available()
    if reason is not None:
        pytest.skip(f"no CUDA kernels to test: {reason}")
    return backend


def random_codes(n: int, k: int, bits: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * n + k)
    return torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)


def random_words(n: int, k: int, bits: int) -> Tensor:
    """Random padding bits, too."""
    generator = torch.Generator().manual_seed(k)
    return torch.randint(-(2**31), 2**31, (n, words_per_row(k, bits)), generator=generator).to(torch.int32)


def shifted(tensor: Tensor, offset: int) -> Tensor:
    """``tensor`` on the GPU inside a buffer of poison, ``offset`` elements from an address of 512-byte alignment."""
    buffer = torch.full((tensor.numel() + offset + 64,), POISON, dtype=tensor.dtype, device="cuda")
    inner = buffer[offset : offset + tensor.numel()].view(tensor.shape)
    inner.copy_(tensor)
    return inner


@pytest.mark.parametrize("bits", BITS)
def test_pack_and_unpack(cuda: CudaPack, bits: int) -> None:
    for k, n in product(KS, (1, 5)):
        codes, words = random_codes(n, k, bits), random_words(n, k, bits)
        for offset in (0, 1):
            there = shifted(codes, offset)
            packed = cuda.pack(there, bits)
            assert torch.equal(packed.cpu(), pack_codes(codes, bits)), (n, k, offset)
            assert torch.equal(cuda.pack(there, bits), packed), "two runs differ"
            back = cuda.unpack(shifted(words, offset), bits, k)
            assert torch.equal(back.cpu(), unpack_codes(words, bits, k)), (n, k, offset)
            assert torch.equal(cuda.unpack(packed, bits, k).cpu(), codes)


@pytest.mark.parametrize("bits", BITS)
def test_every_byte_of_the_output_and_no_other_is_written(cuda: CudaPack, bits: int) -> None:
    for k, offset in product(KS, (0, 1)):
        codes = random_codes(5, k, bits)
        there = codes.cuda()
        packed = pack_codes(codes, bits)
        for name, source, result in (("pack", there, packed), ("unpack", packed.cuda(), codes)):
            buffer = torch.full((result.numel() + offset + 64,), POISON, dtype=result.dtype, device="cuda")
            out = buffer[offset:].data_ptr()
            launch(f"dq_cuda_{name}", source.data_ptr(), 5, k, bits, out, *place(there))
            assert torch.equal(buffer[offset : offset + result.numel()].view(result.shape).cpu(), result), (name, k)
            assert bool((buffer[:offset] == POISON).all())
            assert bool((buffer[offset + result.numel() :] == POISON).all()), "wrote past the end"


@pytest.mark.parametrize("bits", BITS)
def test_count_different(cuda: CudaPack, bits: int) -> None:
    for n, k in ((1, 1), (5, 33), (67, 577), (192, 576)):
        a = random_codes(n, k, bits)
        moved = torch.rand(n, k, generator=torch.Generator().manual_seed(k)) < 0.05
        b = torch.where(moved, 2**bits - 1 - a, a)
        left, right = cuda.pack(a.cuda(), bits), cuda.pack(b.cuda(), bits)
        if spare := 32 * left.shape[1] - k * bits:
            right[:, -1] ^= -(2 ** (32 - spare))  # padding is not a code
        assert cuda.count_different(left, right, bits, k).item() == int(moved.sum())
        assert cuda.count_different(left, left, bits, k).item() == 0


def varied_weights(n: int, k: int) -> Tensor:
    """Rows of very different sizes; groups of zeros, of one sign, with an outlier, and too small for a scale."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(k)) * torch.logspace(-9, 3, n)[:, None]
    w[0], w[1], w[2], w[4] = 0, w[1].abs(), -w[2].abs(), w[4] * 1e-30
    w[3, :: max(1, k // 3)] *= 50
    return w.clamp(-6e4, 6e4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("group", "k"), [(16, 576), (32, 96), (64, 576), (128, 384), (-1, 33), (-1, 576), (-1, 1)])
def test_fit_is_int_grid(cuda: CudaPack, dtype: torch.dtype, group: int, k: int) -> None:
    w = varied_weights(24, k).to(dtype)
    for bits, symmetric, scale_dtype in product((2, 3, 4, 8), (True, False), ("bfloat16", "float16")):
        spec = GridSpec(bits=bits, group_size=group, symmetric=symmetric, scale_dtype=scale_dtype)
        grid = IntGrid(spec)
        want = grid.fit(w)
        for offset in (0, 1):
            there = shifted(w, offset)
            scales, codes = cuda.fit_nearest(there, spec)
            assert torch.equal(scales.scale.cpu(), want.scale), spec
            assert (scales.zero is None) == symmetric
            if scales.zero is not None and want.zero is not None:
                assert torch.equal(scales.zero.cpu(), want.zero), spec
            assert torch.equal(codes.cpu(), grid.nearest(w, want)), spec
            assert torch.equal(cuda.fit_nearest(there, spec)[1], codes), "two runs differ"


def test_scales_halfway_between_two_values_round_to_even(cuda: CudaPack) -> None:
    for bits, (scale_dtype, width) in product(BITS, (("bfloat16", 8), ("float16", 11))):
        odd = torch.arange(2**width + 1, 2 ** (width + 1), 2, dtype=torch.float32)  # one bit too many
        w = (odd * 2.0**-16 * (2**bits - 1)).view(-1, 1)
        spec = GridSpec(bits=bits, group_size=-1, symmetric=False, scale_dtype=scale_dtype)
        assert torch.equal(cuda.fit_nearest(w.cuda(), spec)[0].scale.cpu(), IntGrid(spec).fit(w).scale)


def test_fit_refuses_what_no_grid_holds(cuda: CudaPack) -> None:
    w = torch.ones(3, 64, device="cuda")
    w[1, 63] = 1e6
    with pytest.raises(SpecError, match=r"magnitude 1e\+06 needs a scale that float16 cannot hold"):
        cuda.fit_nearest(w, GridSpec(scale_dtype="float16"))
    cuda.fit_nearest(w, GridSpec())
    for bad in (float("inf"), float("nan")):
        w[2, 0] = bad
        with pytest.raises(SpecError, match=r"a weight \[3, 64\] holds infinities or NaN"):
            cuda.fit_nearest(w, GridSpec())


def test_empty_and_strided_tensors(cuda: CudaPack) -> None:
    empty = torch.empty(0, 64, dtype=torch.uint8, device="cuda")
    assert cuda.pack(empty, 3).shape == (0, 6)
    assert cuda.unpack(torch.empty(0, 6, dtype=torch.int32, device="cuda"), 3, 64).shape == (0, 64)
    assert cuda.fit_nearest(torch.empty(0, 64, device="cuda"), GridSpec())[1].shape == (0, 64)
    codes = random_codes(64, 33, 3)
    packed = cuda.pack(codes.t().contiguous().cuda().t(), 3)
    assert torch.equal(packed.cpu(), pack_codes(codes, 3))
    assert torch.equal(cuda.unpack(packed.t().contiguous().t(), 3, 33).cpu(), codes)


def test_launches_on_the_current_stream(cuda: CudaPack) -> None:
    """On a side stream behind 100 ms of work, the packed codes are those written there, not those before."""
    codes = torch.zeros(64, 576, dtype=torch.uint8, device="cuda")
    cuda.pack(codes, 3)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        codes.fill_(5)
        packed = cuda.pack(codes, 3)
    stream.synchronize()
    assert torch.equal(packed.cpu(), pack_codes(torch.full((64, 576), 5, dtype=torch.uint8), 3))


def test_offsets_beyond_2_to_31(cuda: CudaPack) -> None:
    """66000 x 32800 codes are 2.16e9 bytes: a 32-bit offset would wrap in the last rows; K % 32 = 0 keeps it quick."""
    n, k = 66000, 32800
    if torch.cuda.mem_get_info()[0] < 6e9:
        pytest.skip("needs 6 GB of free GPU memory")
    codes = torch.randint(0, 4, (n, k), dtype=torch.uint8, device="cuda")
    packed = cuda.pack(codes, 2)
    for rows in (slice(0, 4), slice(65530, 65540), slice(n - 4, n)):
        assert torch.equal(packed[rows].cpu(), pack_codes(codes[rows].cpu(), 2))
    back = cuda.unpack(packed, 2, k)
    assert torch.equal(back, codes)
    back[-1, -1] ^= 1
    assert cuda.count_different(packed, cuda.pack(back, 2), 2, k).item() == 1


def test_launch_errors_are_sentences(cuda: CudaPack) -> None:
    with pytest.raises(BackendError, match="dq_cuda_pack was not launched: invalid argument"):
        launch("dq_cuda_pack", 0, 1, 32, 9, 0, 0, 0)
