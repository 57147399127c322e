"""A safetensors file (huggingface/safetensors, format version 0.x), mapped into memory and never trusted.

8 bytes of header length, little-endian; that many bytes of JSON, name -> {dtype, shape, data_offsets}; then the values,
which the offsets must cover without hole or overlap. The header is checked whole before any tensor is looked at.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dq_runtime.errors import CheckpointError
from dq_runtime.packing.host import STORAGE, HostTensor
from dq_runtime.packing.shown import shown

MOST_HEADER_BYTES = 100_000_000  # the format's own limit
MOST_NAME_CHARACTERS = 512
MOST_DIMENSIONS = 8  # the product of a million sizes of 63 bits would take hours
# The format's names of dtypes.
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


class _Entry(NamedTuple):
    """Where a tensor lies: ``begin`` and ``end`` count from the first byte after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """The tensors of one file. Raises :class:`CheckpointError` for a file that is not one, or not all of one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as f:
                size = f.seek(0, 2)
                f.seek(0)
                length = int.from_bytes(f.read(8), "little")
                if size < 8 or length > min(size - 8, MOST_HEADER_BYTES):
                    raise _Bad("its header is cut short" if size < 8 or length > size - 8 else "its header is too long")
                self._entries = _entries(f.read(length), size - 8 - length)
                # Copy on write: whoever writes into a tensor writes into memory of this process, never into the file.
                self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        except _Bad as e:
            raise CheckpointError(f"{path} is truncated or not a safetensors file ({e})") from None
        except OSError as e:
            raise CheckpointError(f"{path} could not be read: {e.strerror or e}") from None
        self._start = 8 + length

    def names(self) -> Iterable[str]:
        """Of all tensors, as the header lists them."""
        return self._entries.keys()

    def tensor(self, name: str) -> HostTensor:
        """The tensor of that name, its values mapped from the file (copied only where they lie at odd addresses)."""
        entry = self._entries[name]
        storage = np.dtype(STORAGE[entry.dtype])
        count = (entry.end - entry.begin) // storage.itemsize
        values = np.frombuffer(self._map, storage, count, self._start + entry.begin)
        if not values.flags.aligned:
            values = values.copy()
        return HostTensor(values.reshape(entry.shape), entry.dtype)

    def release(self) -> None:
        """Give back the memory of the pages read so far; they are read again from the file when they are needed. What
        was written into a tensor is lost."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


class _Bad(Exception):  # noqa: N818 (a reason on its way out)
    """What is wrong with the header."""


def _entries(header: bytes, payload: int) -> dict[str, _Entry]:
    """The header's tensors, checked against the ``payload`` bytes after it."""
    try:
        parsed = json.loads(header.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as e:
        raise _Bad(f"its header is not valid JSON: {e}") from None
    if not isinstance(parsed, dict):
        raise _Bad("its header is not a JSON object")
    parsed.pop("__metadata__", None)
    entries = {name: _entry(name, fields) for name, fields in parsed.items()}
    reached = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.begin != reached:
            raise _Bad(
                f"{shown(name)} begins at byte {entry.begin} of the values, where {reached} bytes are taken so far"
            )
        reached = entry.end
    if reached != payload:
        raise _Bad(f"its tensors take {reached} bytes, but {payload} follow the header")
    return entries


def _entry(name: str, fields: Any) -> _Entry:
    if len(name) > MOST_NAME_CHARACTERS or not name.isprintable():
        raise _Bad(f"{shown(name)} is no name of a tensor")
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= set(fields):
        raise _Bad(f"{shown(name)} has no dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _Bad(f"{shown(name)} has the unknown dtype {shown(dtype)}")
    if not _sizes(shape) or len(shape) > MOST_DIMENSIONS or not _sizes(offsets) or len(offsets) != 2:
        raise _Bad(f"the shape and data_offsets of {shown(name)} are not lists of sizes")
    begin, end = offsets
    if math.prod(shape) * np.dtype(STORAGE[DTYPES[dtype]]).itemsize != end - begin:
        raise _Bad(f"{shown(name)} is {dtype} {shown(shape)}, but its data_offsets span {end - begin} bytes")
    return _Entry(DTYPES[dtype], tuple(shape), begin, end)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Bad("its header names a tensor twice")
    return found
