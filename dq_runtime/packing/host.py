"""Tensors of a checkpoint as numpy arrays on the host, so that what computes without torch never imports it.

numpy has no bfloat16, nor 8-bit floats: of those the values here are the bits, unsigned integers of the same width, and
``dtype`` says what they mean. :mod:`dq_runtime.packing.bridge` makes torch tensors of them, and back, without a copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dq_runtime.levels import INT

# torch's name of a dtype -> what its values are stored as here.
STORAGE: dict[str, type[np.generic]] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "float8_e4m3fn": np.uint8,
    "float8_e5m2": np.uint8,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint64": np.uint64,
    "uint32": np.uint32,
    "uint16": np.uint16,
    "uint8": np.uint8,
    "bool": np.bool_,
}
# The bits of infinity: a 16-bit float is finite if its bits without the sign are below.
INFINITY_BITS = {"float16": 0x7C00, "bfloat16": 0x7F80}


def words_per_row(k: int, bits: int) -> int:
    """int32 words that hold ``k`` codes of ``bits`` bits."""
    return (k * bits + 31) // 32


def unpack_rows(packed: NDArray[np.int32], bits: int, k: int) -> NDArray[np.uint8]:
    """int32 [N, ceil(k*bits/32)] -> uint8 codes [N, k]: the bitstream of :mod:`dq_runtime.packing.layout`."""
    n, have = packed.shape
    blocks = -(-k // 32)
    flat = np.zeros((n, blocks * bits), np.uint32)
    flat[:, :have] = np.ascontiguousarray(packed).view(np.uint32)
    words = flat.reshape(n, blocks, bits)
    codes = np.empty((n, blocks, 32), np.uint8)
    for i, (word, shift) in enumerate(_places(bits)):
        value = words[..., word] >> np.uint32(shift)
        if shift + bits > 32:
            value |= words[..., word + 1] << np.uint32(32 - shift)
        codes[..., i] = value & np.uint32(2**bits - 1)
    return codes.reshape(n, -1)[:, :k]


def pack_rows(codes: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """uint8 codes [N, k] (each < 2^bits) -> int32 [N, ceil(k*bits/32)], the inverse of :func:`unpack_rows`."""
    n, k = codes.shape
    blocks = -(-k // 32)
    flat = np.zeros((n, blocks * 32), np.uint8)
    flat[:, :k] = codes
    padded = flat.reshape(n, blocks, 32)
    words = np.zeros((n, blocks, bits), np.uint32)
    for i, (word, shift) in enumerate(_places(bits)):
        value = padded[..., i].astype(np.uint32)
        words[..., word] |= value << np.uint32(shift)
        if shift + bits > 32:
            words[..., word + 1] |= value >> np.uint32(32 - shift)
    return np.ascontiguousarray(words.reshape(n, -1)[:, : words_per_row(k, bits)]).view(np.int32)


def _places(bits: int) -> Iterator[tuple[int, int]]:
    """Word and first bit of each of 32 codes, which fill exactly ``bits`` words."""
    return (divmod(i * bits, 32) for i in range(32))


@dataclass(frozen=True)
class HostTensor:
    """``values``, any shape, stored as :data:`STORAGE` says for ``dtype`` (torch's name of it)."""

    values: NDArray[Any]
    dtype: str

    @property
    def shape(self) -> list[int]:
        return list(self.values.shape)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def rows(self, start: int, stop: int) -> HostTensor:
        """Rows ``start:stop`` of the first dimension, the same memory."""
        return HostTensor(self.values[start:stop], self.dtype)

    def contiguous(self) -> HostTensor:
        """Itself, or a copy whose values lie in order."""
        return HostTensor(np.ascontiguousarray(self.values), self.dtype)

    def pieces(self, size: int) -> Iterator[HostTensor]:
        """All values, in order, at most ``size`` at a time."""
        flat = self.values.reshape(-1)
        for start in range(0, flat.size, size):
            yield HostTensor(flat[start : start + size], self.dtype)

    def float32(self) -> NDArray[np.float32]:
        """The values of a tensor of floats of 16 bits or more as float32, a copy; float64 is rounded."""
        if self.dtype == "bfloat16":
            return (self.values.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return self.values.astype(np.float32)

    def is_finite(self) -> bool:
        """Whether a tensor of floats of 16 bits or more holds neither NaN nor infinity."""
        limit = INFINITY_BITS.get(self.dtype)
        if limit is None:
            return bool(np.isfinite(self.values).all())
        # On the bits: 20 ms for 28 M values, where numpy's own isfinite of float16 takes 5 times as long.
        return bool(((self.values.view(np.uint16) & np.uint16(0x7FFF)) < limit).all())


@dataclass(frozen=True)
class HostWeight:
    """One linear's weight as it lies on disk; a :class:`dq_runtime.packing.PackedWeight` in numpy.

    ``packed`` int32 [N, ceil(K*bits/32)], ``scale`` float16 or bfloat16 [N, G], ``zero`` uint8 [N, G] (unpacked; None:
    the middle code 2^(bits-1)), ``k`` = in_features. The value of a code is ``scale * (code - zero)``, or, where
    ``form`` is the name of a table (:mod:`dq_runtime.levels`), ``scale * level of the code``.
    """

    packed: NDArray[np.int32]
    scale: HostTensor
    zero: NDArray[np.uint8] | None
    bits: int
    k: int
    form: str = INT

    @property
    def n(self) -> int:
        """out_features."""
        return len(self.packed)

    @property
    def group_size(self) -> int:
        """Weights per scale along a row (K itself when the whole row shares one)."""
        return self.k // self.scale.shape[1]

    def rows(self, start: int, stop: int) -> HostWeight:
        """Rows ``start:stop``, the same memory."""
        zero = None if self.zero is None else self.zero[start:stop]
        return replace(self, packed=self.packed[start:stop], scale=self.scale.rows(start, stop), zero=zero)
