"""The order the streaming kernel reads weights in, made once at load from the canonical checkpoint bitstream.

A row is cut into K-blocks of V * P columns; a K-block of a row is PLANES * P 16-bit words, and word p holds the codes
of columns p, P + p, 2P + p, ... of its block ("planar": one shift or mask yields P neighbouring columns, so nothing is
ever interleaved in registers). Memory order [K-block, plane, N, P]: the words of a tile of rows are contiguous.

    bits  P   V  planes  fields of a word, low bit first
    2     16  8  1       8 x 2 bits
    3     8   16 3       5 x 3 bits, and bit 15 of the three words together the 16th code: exactly 3 bits a weight
    4     32  4  1       4 x 4 bits
    8     32  2  1       2 x 8 bits, stored with the top bit flipped (see decode.py)

5, 6 and 7 bits are stored as 8. Columns past K hold code 0. Scales lie as int32 [ceil(G/2), N], two neighbouring groups
a word (a 4-byte asynchronous copy, where 2 bytes have none), zero points as int32 [ceil(G/4), N], four groups a word;
G counts the groups of the padded row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dq_kernels.case import Case
from dq_kernels.dequant import check_weight, codes_tile, group_arg

ROWS = 64  # of a program of the repack kernel


@dataclass(frozen=True)
class Order:
    """The table of the module docstring for one width."""

    P: int
    V: int
    planes: int

    @property
    def block(self) -> int:
        """Columns of a K-block."""
        return self.P * self.V


ORDERS = {2: Order(16, 8, 1), 3: Order(8, 16, 3), 4: Order(32, 4, 1), 8: Order(32, 2, 1)}


def stream_bits(bits: int) -> int:
    """Width in which codes of ``bits`` bits are streamed."""
    return bits if bits in ORDERS else 8


@dataclass(frozen=True)
class StreamWeight:
    """A weight [N, K] for the streaming kernel.

    ``words`` int16 [blocks, planes, N, P]; ``scale`` int32 [ceil(G/2), N], pairs of bf16 or fp16 (``dtype``); ``zero``
    int32 [ceil(G/4), N] or None for the middle code of ``bits``, the width of the codes themselves; ``form`` "int", or
    the name of what else codes mean (levels.py).
    """

    words: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    k: int
    group: int
    dtype: torch.dtype
    form: str = "int"

    @property
    def n(self) -> int:
        return self.words.shape[2]

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.scale.nbytes + (0 if self.zero is None else self.zero.nbytes)


@triton.jit
def repack_kernel(
    packed_ptr, words_ptr, N,
    K: tl.constexpr, BITS: tl.constexpr, P: tl.constexpr, V: tl.constexpr, PLANES: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """words[K-block, :, rows, :] of BN rows. Grid: (ceil(N / BN), K-blocks)."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(n, N - 1).to(tl.int64)
    block = tl.program_id(1)
    p = tl.arange(0, P)
    first_plane = block.to(tl.int64) * PLANES
    at = words_ptr + row[:, None] * P + p[None, :]
    keep = (n < N)[:, None] & (p >= 0)[None, :]
    if PLANES == 1:
        word = tl.zeros((BN, P), tl.int32)
        for j in tl.static_range(V):
            code = column_codes(packed_ptr, row, block * (V * P) + j * P, K, BITS, BN, P)
            if V == 2:
                code = code ^ 128
            word |= code << (j * (16 // V))
        tl.store(at + first_plane * N * P, word.to(tl.int16), mask=keep)
    else:
        # Quarter i of the block (32 columns): field i of the three words, then one code that is field 4 of word i, or,
        # in the last quarter, the three spare bits.
        spare = column_codes(packed_ptr, row, block * (V * P) + 15 * P, K, BITS, BN, P)
        for plane in tl.static_range(3):
            word = ((spare >> plane) & 1) << 15
            for i in tl.static_range(4):
                code = column_codes(packed_ptr, row, block * (V * P) + (4 * i + plane) * P, K, BITS, BN, P)
                word |= code << (3 * i)
            code = column_codes(packed_ptr, row, block * (V * P) + (4 * plane + 3) * P, K, BITS, BN, P)
            word |= code << 12
            tl.store(at + (first_plane + plane) * N * P, word.to(tl.int16), mask=keep)


@triton.jit
def column_codes(packed_ptr, row, k0, K: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, P: tl.constexpr):
    """Codes [BN, P] of columns k0 .. k0+P-1, 0 past K: the last word of a row may hold bits of nothing else, but the
    next block's columns must not read it either."""
    codes = codes_tile(packed_ptr, row, k0, K, BITS, BN, P)
    return tl.where((k0 + tl.arange(0, P) < K)[None, :], codes, 0)


def stream_weight(
    packed: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int, k: int, form: str = "int"
) -> StreamWeight:
    """int32 [N, W], bf16/fp16 [N, G], uint8 [N, G] or None -> the same weight in streaming order."""
    check_weight(packed, scale, zero, bits, k)
    if k % 32:
        raise ValueError(f"the streaming order needs K to be a multiple of 32, got {k}")
    n, groups = scale.shape
    group = group_arg(k, groups)
    if group and group < 32:
        raise ValueError(f"the streaming order needs groups of at least 32 weights, got {group}")
    order = ORDERS[stream_bits(bits)]
    blocks = triton.cdiv(k, order.block)
    words = torch.empty(blocks, order.planes, n, order.P, dtype=torch.int16, device=packed.device)
    repack_kernel[(triton.cdiv(n, ROWS), blocks)](
        packed, words, n, K=k, BITS=bits, P=order.P, V=order.V, PLANES=order.planes, BN=ROWS, num_warps=4
    )
    groups = blocks * order.block // group if group else 1  # the padding's too: a NaN read there times 0 is NaN
    halves = scale.view(torch.int16).to(torch.int32) & 0xFFFF
    zeros = None if zero is None else _side_by_side(zero.to(torch.int32), 4, groups)
    return StreamWeight(words, _side_by_side(halves, 2, groups), zeros, bits, k, group, scale.dtype, form)


def _side_by_side(values: Tensor, count: int, at_least: int) -> Tensor:
    """int32 [N, G] of 32/count bits each -> int32 [ceil(G/count), N], group g in place g % count of its word; zeros up
    to ``at_least`` groups."""
    n, groups = values.shape
    padded = torch.zeros(n, triton.cdiv(max(groups, at_least), count) * count, dtype=torch.int32, device=values.device)
    padded[:, :groups] = values
    words = torch.zeros(n, padded.shape[1] // count, dtype=torch.int32, device=values.device)
    for i in range(count):
        words |= padded[:, i::count] << (i * (32 // count))
    return words.t().contiguous()


def offline_cases() -> list[Case]:
    """The repack kernel at every width."""
    return [
        Case(
            label=f"repack {bits}-bit K={k}",
            kernel=repack_kernel,
            types={"packed_ptr": "*i32", "words_ptr": "*i16", "N": "i32"},
            constants={
                "K": k, "BITS": bits, "P": ORDERS[stream_bits(bits)].P, "V": ORDERS[stream_bits(bits)].V,
                "PLANES": ORDERS[stream_bits(bits)].planes, "BN": ROWS,
            },
            options={"num_warps": 4},
            aligned=("N",),
        )
        for bits, k in ((2, 4096), (3, 4096), (3, 576), (4, 4096), (5, 4096), (8, 4096))
    ]  # fmt: skip
