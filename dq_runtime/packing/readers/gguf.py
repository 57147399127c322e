"""GGUF (llama.cpp): Q4_0, Q8_0 and MXFP4 linears kept packed, everything else dequantized. Llama, Qwen2 and Qwen3.

A Q4_0 block of 32 weights is d float16 and 32 codes of 4 bits, the first 16 in the low nibbles: d * (code - 8). A Q8_0
block is d and 32 signed bytes: d * byte, which is d * (code - 128). Both are our symmetric grid with groups of 32,
whose scales may be negative. An MXFP4 block is e8m0 and the same nibbles, of e2m1. Q4_1 is not: its d * code + m has a
minimum of its own, where our zero points are codes.

llama.cpp's converter interleaves the two halves of every head of q and k in files of the architecture "llama", for its
own order of the rotary embedding; here the rows are put back. Other files are refused with a reason: transformers may
know them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dq_runtime.errors import CheckpointError, DQError
from dq_runtime.levels import INT
from dq_runtime.packing.checkpoint import Checkpoint, NotPackedError
from dq_runtime.packing.gguf_file import GgufFile
from dq_runtime.packing.host import HostTensor, HostWeight
from dq_runtime.packing.quant_config import Scheme
from dq_runtime.packing.readers.float4 import StoredFloat4
from dq_runtime.packing.readers.gguf_model import GgufModel, read_model
from dq_runtime.packing.readers.values import notes_on

BLOCK = 32
F32, F16, Q4_0, Q8_0, BF16, MXFP4 = 0, 1, 2, 8, 30, 39
BITS = {Q4_0: 4, Q8_0: 8, MXFP4: 4}
_PLAIN = {F32: ("float32", np.float32), F16: ("float16", np.float16), BF16: ("bfloat16", np.uint16)}


def gguf_file(path: Path) -> GgufFile:
    """The file, checked; :class:`DQError` where the gguf package, which knows the types of tensors, is missing."""
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError:
        raise DQError(f"reading {path.name} needs the gguf package: pip install 'dq_runtime[gguf]'") from None
    return GgufFile(path, {int(kind): size for kind, size in GGML_QUANT_SIZES.items()})


def open_gguf(path: Path) -> Checkpoint:
    """See :func:`dq_runtime.packing.checkpoint.open_checkpoint`."""
    file = gguf_file(path)
    from gguf import GGMLQuantizationType

    model = read_model(file)
    if isinstance(model, str):
        raise NotPackedError(f"{path}: {model}")
    layers, dense, spread = {}, [], []
    for name, stored in model.tensors.items():
        kind = file.tensors[stored].kind
        linear = name.endswith("_proj.weight") or name == "lm_head.weight"
        if linear and kind in BITS:
            form = "mxfp4" if kind == MXFP4 else INT
            layers[name.removesuffix(".weight")] = Scheme(BITS[kind], BLOCK, True, form)
            continue
        dense.append(name)
        if kind not in _PLAIN and kind not in BITS:
            spread.append((name.removesuffix(".weight"), _reason(GGMLQuantizationType(kind).name)))
    return Gguf(path, model.config, layers, tuple(dense), notes_on(spread), file, model)


def _reason(kind: str) -> str:
    has = "a minimum of floats" if kind in ("Q4_1", "Q5_1") else "a form"
    return f"{kind} has {has} that no grid here holds exactly"


@dataclass(frozen=True)
class Gguf(Checkpoint):
    """``file`` as it is, ``model`` what it means."""

    file: GgufFile
    model: GgufModel

    def array(self, name: str) -> HostTensor:
        stored = self.model.tensors[name]
        tensor, raw = self.file.tensors[stored], self.file.raw(stored)
        if tensor.kind in _PLAIN:
            dtype, storage = _PLAIN[tensor.kind]
            plain = raw.view(storage) if raw.ctypes.data % np.dtype(storage).itemsize == 0 else raw.copy().view(storage)
            values = HostTensor(plain.reshape(tensor.shape), dtype)
        else:
            values = HostTensor(_dequantized(raw, tensor.kind).reshape(tensor.shape), "float32")
        rows = self.model.row_order(name)
        return values if rows is None else replace(values, values=values.values[rows])

    def weight(self, layer: str) -> HostWeight:
        name = f"{layer}.weight"
        stored = self.model.tensors[name]
        tensor = self.file.tensors[stored]
        n, k = tensor.shape
        blocks = self.file.raw(stored).reshape(n, k // BLOCK, -1)
        rows = self.model.row_order(name)
        if rows is not None:
            blocks = blocks[rows]
        if tensor.kind == MXFP4:
            stored_as = {"weight_packed": _nibbles(blocks[:, :, 1:]).reshape(n, -1), "weight_scale": blocks[:, :, 0]}
            tensors = {suffix: HostTensor(np.ascontiguousarray(v), "uint8") for suffix, v in stored_as.items()}
            return StoredFloat4(f"{self.path}: {stored}", "mxfp4", tensors).weight()
        scale = HostTensor(np.ascontiguousarray(blocks[:, :, :2]).view(np.float16)[:, :, 0], "float16")
        if not scale.is_finite():
            raise CheckpointError(f"{self.path}: {stored} holds a scale that is not finite")
        packed = _CODES[tensor.kind](blocks[:, :, 2:]).reshape(n, -1).view(np.int32)
        return HostWeight(packed, scale, None, BITS[tensor.kind], k)

    def release(self) -> None:
        self.file.release()


def _dequantized(raw: NDArray[np.uint8], kind: int) -> NDArray[np.float32]:
    """float32 values, by the gguf package."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):  # scales of a damaged file overflow; whoever uses the values checks them
        values: NDArray[np.float32] = dequantize(raw, GGMLQuantizationType(kind))
    return values


def _nibbles(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bytes [N, G, 16] with code i low and i + 16 high -> with 2i low and 2i + 1 high; two bytes at a time."""
    pairs = np.ascontiguousarray(codes).view("<u2")
    packed = np.empty(codes.shape, np.uint8)
    packed[:, :, :8] = pairs & 15 | pairs >> 4 & 0xF0
    packed[:, :, 8:] = pairs >> 4 & 15 | pairs >> 8 & 0xF0
    return packed


def _q8_0(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Signed bytes [N, G, 32] -> with 128 added."""
    return codes ^ np.uint8(0x80)


_CODES: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {Q4_0: _nibbles, Q8_0: _q8_0}
