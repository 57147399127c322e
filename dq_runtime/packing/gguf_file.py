"""A GGUF file (ggml, versions 2 and 3, little-endian), mapped into memory and never trusted.

Magic, version, counts; metadata, key -> typed value; tensors, name -> dimensions (fastest first), type, offset; then
the values, from the next multiple of ``general.alignment`` on. Everything is checked before any tensor is looked at.
The gguf package reads the same, but trusts what it reads: a count of 2^60 keeps it busy for ever.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dq_runtime.errors import CheckpointError
from dq_runtime.packing.shown import shown

MOST_NAME_BYTES = 256
MOST_KEY_BYTES = 2**16 - 1  # the format's own limit
MOST_KEPT = 2**16  # numbers of an array that are kept; longer ones, and strings, are the tokenizer's
# Type of a metadata value -> how struct reads it.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """``shape`` as numpy has it, slowest dimension first; ``kind`` the number of its type in ggml; ``begin`` and
    ``end`` its bytes in the file."""

    shape: tuple[int, ...]
    kind: int
    begin: int
    end: int


class GgufFile:
    """Metadata and tensors of one file. Raises :class:`CheckpointError` for a file that is not one, or not all of one.

    ``sizes``: number of a type -> (weights in a block, bytes of a block). ``metadata`` holds numbers, truth values,
    strings, and arrays of numbers that are not too long.
    """

    def __init__(self, path: Path, sizes: dict[int, tuple[int, int]]) -> None:
        self.path = path
        try:
            with path.open("rb") as f:
                # Copy on write, as in tensor_file.py.
                self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as e:  # ValueError: an empty file
            raise CheckpointError(f"{path} could not be read: {getattr(e, 'strerror', None) or e}") from None
        self._at = 0
        try:
            if self._take(4) != b"GGUF":
                raise _Bad("it does not begin with GGUF")
            version = self._scalar("I")
            if version not in (2, 3):
                raise _Bad(f"version {version} is not read here, only 2 and 3 in little-endian order")
            tensors, values = self._scalar("Q"), self._scalar("Q")
            self._bounded(tensors, 4 * 8, "tensors")
            self._bounded(values, 8 + 4 + 1, "metadata values")
            self.metadata = self._metadata(values)
            self.tensors = self._tensors(tensors, sizes)
        except _Bad as e:
            raise CheckpointError(f"{path} is truncated or not a GGUF file that can be read here ({e})") from None

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The bytes of one tensor, mapped from the file."""
        tensor = self.tensors[name]
        return np.frombuffer(self._map, np.uint8, tensor.end - tensor.begin, tensor.begin)

    def release(self) -> None:
        """Give back the memory of the pages read so far."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def _metadata(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self._string(MOST_KEY_BYTES, "a key")
            if key in found:
                raise _Bad(f"its metadata has {shown(key)} twice")
            found[key] = self._value(self._scalar("I"), key)
        return found

    def _value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string(len(self._map), f"the value of {shown(key)}")
        if kind != _ARRAY:
            raise _Bad(f"{shown(key)} has the unknown type {kind}")
        member, count = self._scalar("I"), self._scalar("Q")
        if member == _STRING:
            self._bounded(count, 8, f"strings in {shown(key)}")
            for _ in range(count):
                self._take(self._scalar("Q"))
            return None
        if member not in _SCALARS:  # arrays of arrays are allowed, but nobody has a use for them
            raise _Bad(f"{shown(key)} is an array of the type {member}, which is not read here")
        size = struct.calcsize("<" + _SCALARS[member])
        self._bounded(count, size, f"numbers in {shown(key)}")
        content = self._take(count * size)
        return list(struct.unpack(f"<{count}{_SCALARS[member]}", content)) if count <= MOST_KEPT else None

    def _tensors(self, count: int, sizes: dict[int, tuple[int, int]]) -> dict[str, GgufTensor]:
        stated = {}
        for _ in range(count):
            name = self._string(MOST_NAME_BYTES, "the name of a tensor")
            if not name.isprintable():
                raise _Bad(f"{shown(name)} is no name of a tensor")
            if name in stated:
                raise _Bad(f"it names the tensor {shown(name)} twice")
            dimensions = self._scalar("I")
            if not 1 <= dimensions <= 4:
                raise _Bad(f"{shown(name)} has {dimensions} dimensions")
            shape = tuple(self._scalar("Q") for _ in range(dimensions))[::-1]
            stated[name] = shape, self._scalar("I"), self._scalar("Q")
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 2**16 or alignment & (alignment - 1):
            raise _Bad(f"its alignment is {shown(alignment)}")
        start = -(-self._at // alignment) * alignment
        found = {}
        for name, (shape, kind, offset) in stated.items():
            if kind not in sizes:
                raise _Bad(f"{shown(name)} has the unknown type {kind}")
            block, nbytes = sizes[kind]
            weights = math.prod(shape)
            if weights == 0 or shape[-1] % block or offset % alignment:
                raise _Bad(f"{shown(name)} of {shape} at {offset} is not made of whole blocks, or not aligned")
            found[name] = GgufTensor(shape, kind, start + offset, start + offset + weights // block * nbytes)
        reached = start
        for name, tensor in sorted(found.items(), key=lambda item: item[1].begin):
            if tensor.begin < reached:
                raise _Bad(f"{shown(name)} overlaps the tensor before it")
            reached = tensor.end
        if reached > len(self._map):
            raise _Bad(f"its tensors reach to byte {reached}, but it has {len(self._map)}")
        return found

    def _bounded(self, count: int, least: int, what: str) -> None:
        """Counts are believed only as far as the file is long: ``least`` bytes each."""
        if count * least > len(self._map) - self._at:
            raise _Bad(f"it claims {count} {what}")

    def _string(self, most: int, what: str) -> str:
        length = self._scalar("Q")
        if length > most:
            raise _Bad(f"{what} is {length} bytes long")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise _Bad(f"{what} is not UTF-8") from None

    def _scalar(self, form: str) -> Any:
        value = struct.unpack("<" + form, self._take(struct.calcsize("<" + form)))[0]
        return value

    def _take(self, count: int) -> bytes:
        content = self._map[self._at : self._at + count]
        if len(content) < count:
            raise _Bad("it ends in the middle of its header")
        self._at += count
        return content


class _Bad(Exception):  # noqa: N818 (a reason on its way out)
    """What is wrong with the file."""
