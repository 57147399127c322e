"""Our bytes are those of compressed-tensors >= 0.18, bit for bit, and those written down by hand."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from dq_runtime.packing import PackedWeight, pack_codes, unpack_codes, words_per_row
from dq_runtime.packing.checkpoint import packed_tensors

every_width = pytest.mark.parametrize("bits", range(2, 9))


def random_codes(n: int, k: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * bits + k)
    return torch.randint(0, 2**bits, (n, k), generator=generator).to(torch.uint8)


def signed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """compressed-tensors holds codes as int8 around zero and adds 2^(b-1) when it packs."""
    return (codes.int() - 2 ** (bits - 1)).to(torch.int8)


@every_width
@pytest.mark.parametrize("k", [1, 2, 10, 11, 31, 32, 33, 64, 77, 576])
def test_packed_bytes_equal_those_of_compressed_tensors(bits: int, k: int) -> None:
    codes = random_codes(5, k, bits)
    ours, theirs = pack_codes(codes, bits), pack_to_int32(signed(codes, bits), bits)
    assert ours.dtype is torch.int32
    assert ours.shape == (5, words_per_row(k, bits))
    # From the second row on theirs leaves the padding bits of the last word zero as well.
    assert ours.numpy().tobytes() == _without_padding(theirs, bits, k).numpy().tobytes()
    assert torch.equal(unpack_codes(theirs, bits, k), codes)
    assert torch.equal(unpack_from_int32(ours, bits, codes.shape), signed(codes, bits))


def _without_padding(packed: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """Nothing is to be removed if the padding is zero already; the assertion says so."""
    spare = packed.shape[1] * 32 - k * bits
    if spare:
        assert not bool(((packed[:, -1].to(torch.int64) & 0xFFFFFFFF) >> (32 - spare)).any())
    return packed


@every_width
@pytest.mark.parametrize("n", [1, 12, 32, 45])
def test_zero_points_are_packed_along_out_features_like_theirs(bits: int, n: int) -> None:
    groups, k = 3, 48
    zero = random_codes(n, groups, bits)
    w = PackedWeight(pack_codes(random_codes(n, k, bits), bits), torch.ones(n, groups), zero, bits, k)
    ours = packed_tensors("layer", w)["layer.weight_zero_point"]
    theirs = pack_to_int32(signed(zero, bits), bits, packed_dim=0)
    assert ours.shape == (words_per_row(n, bits), groups)
    assert torch.equal(ours, theirs)
    assert w.nbytes == sum(
        t.nbytes for name, t in packed_tensors("layer", w).items() if not name.endswith("weight_shape")
    )


def test_three_bit_codes_written_down_by_hand() -> None:
    # Codes 0..7, the first in the lowest bits: 0b111_110_101_100_011_010_001_000 = 0xFAC688.
    # Eight codes are 24 bits, so the ninth (5 = 0b101) fills bits 24-26, and the tenth and eleventh (7, 6) bits 27-32:
    # the top bit of 6 = 0b110 crosses into bit 0 of the second word.
    codes = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 5, 7, 6]], dtype=torch.uint8)
    first = 0xFAC688 | 0b101 << 24 | 0b111 << 27 | (0b110 & 0b11) << 30
    packed = pack_codes(codes, 3)
    assert [int(word) & 0xFFFFFFFF for word in packed[0]] == [first, 0b1]
    assert packed.numpy().astype("<i4").tobytes() == bytes([0x88, 0xC6, 0xFA, 0xBD, 0x01, 0x00, 0x00, 0x00])


def test_thirty_two_three_bit_codes_are_exactly_three_words() -> None:
    packed = pack_codes(torch.full((1, 32), 0b101, dtype=torch.uint8), 3)
    assert packed.numpy().astype("<i4").tobytes() == bytes([0x6D, 0xDB, 0xB6] * 4)  # 101101101... read from bit 0


@every_width
def test_all_ones_and_all_zeros_survive(bits: int) -> None:
    for code in (0, 2**bits - 1):
        codes = torch.full((3, 37), code, dtype=torch.uint8)
        assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, 37), codes)


@every_width
def test_decode_is_scale_times_code_minus_zero(bits: int) -> None:
    codes = random_codes(6, 64, bits)
    scale = torch.rand(6, 4).to(torch.bfloat16)
    for zero in (None, random_codes(6, 4, bits)):
        w = PackedWeight(pack_codes(codes, bits), scale, zero, bits, 64)
        offset = torch.full((6, 4), 2 ** (bits - 1)) if zero is None else zero
        want = (codes.view(6, 4, 16).float() - offset.float().unsqueeze(-1)) * scale.float().unsqueeze(-1)
        assert torch.equal(w.decode(), want.view(6, 64))
        assert torch.equal(w.decode(2, 5), want.view(6, 64)[2:5])
        assert torch.equal(w.codes(1, 3), codes[1:3])
        assert w.group_size == 16
