"""The canonical bit order, which is that of compressed-tensors >= 0.18 ``pack-quantized``.

A row of K codes of b bits is one dense little-endian bitstream: code k occupies bits k*b .. k*b+b-1 of the row, bit i
of the row is bit i % 32 of int32 word i // 32, and the last word is padded with zeros. 3 bits therefore cost 3 bits.
Asymmetric zero points are packed the same way, but along out_features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dq_runtime.levels import INT, LEVELS, SCALE_BITS
from dq_runtime.packing.host import words_per_row


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [N, K] (each < 2^bits) -> int32 [N, ceil(K*bits/32)]."""
    n, k = codes.shape
    blocks = (k + 31) // 32
    # 32 codes fill exactly `bits` words, so the pattern of shifts repeats per block of 32 codes.
    padded = torch.zeros(n, blocks * 32, dtype=torch.int64, device=codes.device)
    padded[:, :k] = codes
    padded = padded.view(n, blocks, 32)
    words = torch.zeros(n, blocks, bits, dtype=torch.int64, device=codes.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[..., word] |= padded[..., i] << shift
        if shift + bits > 32:
            words[..., word + 1] |= padded[..., i] >> (32 - shift)
    words = words.view(n, -1)[:, : words_per_row(k, bits)] & 0xFFFFFFFF
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_codes(packed: Tensor, bits: int, k: int) -> Tensor:
    """int32 [N, ceil(k*bits/32)] -> uint8 codes [N, k]."""
    n, have = packed.shape
    blocks = (k + 31) // 32
    words = torch.zeros(n, blocks * bits, dtype=torch.int64, device=packed.device)
    words[:, :have] = packed.to(torch.int64) & 0xFFFFFFFF
    words = words.view(n, blocks, bits)
    codes = torch.empty(n, blocks, 32, dtype=torch.uint8, device=packed.device)
    mask = 2**bits - 1
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        value = words[..., word] >> shift
        if shift + bits > 32:
            value = value | (words[..., word + 1] << (32 - shift))
        codes[..., i] = value & mask
    return codes.view(n, -1)[:, :k]


@dataclass(frozen=True)
class PackedWeight:
    """One linear's weight as it lies on disk.

    ``packed`` int32 [N, ceil(K*bits/32)], ``scale`` fp16/bf16 [N, G], ``zero`` uint8 [N, G] (unpacked; None: the middle
    code 2^(bits-1)), ``k`` = in_features. The value of a code is ``scale * (code - zero)``, or, where ``form`` is the
    name of a table (:mod:`dq_runtime.levels`), ``scale * level of the code``.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    k: int
    form: str = INT

    @property
    def n(self) -> int:
        """out_features."""
        return self.packed.shape[0]

    @property
    def group_size(self) -> int:
        """Weights per scale along a row (K itself when the whole row shares one)."""
        return self.k // self.scale.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes on disk: codes, scales and packed zero points."""
        bits = SCALE_BITS.get(self.form, 8 * self.scale.element_size())
        total = self.packed.nbytes + self.scale.numel() * bits // 8
        if self.zero is not None:
            total += 4 * words_per_row(self.n, self.bits) * self.scale.shape[1]
        return total

    def codes(self, start: int = 0, stop: int | None = None) -> Tensor:
        """uint8 codes of rows ``start:stop``, [rows, K]."""
        return unpack_codes(self.packed[start:stop], self.bits, self.k)

    def decode(self, start: int = 0, stop: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values of rows ``start:stop``, [rows, K]: the definition every kernel is tested against."""
        codes = self.codes(start, stop)
        scale = self.scale[start:stop].float()
        if self.form != INT:
            levels = torch.tensor(LEVELS[self.form], device=codes.device)[codes.long()]
            return levels.view(codes.shape[0], scale.shape[1], -1).mul_(scale.unsqueeze(-1)).view(codes.shape).to(dtype)
        zero = float(2 ** (self.bits - 1)) if self.zero is None else self.zero[start:stop].float().unsqueeze(-1)
        grouped = codes.view(codes.shape[0], scale.shape[1], -1).float()
        return grouped.sub_(zero).mul_(scale.unsqueeze(-1)).view(codes.shape).to(dtype)
