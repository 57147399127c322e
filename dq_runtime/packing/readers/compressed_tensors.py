"""compressed-tensors ``pack-quantized``: our own checkpoints, and those of llm-compressor, AutoRound and GSQ.

Per packed linear ``weight_packed`` int32 [N, W], ``weight_scale`` float [N, G], ``weight_shape`` int [2] and, where the
scheme is asymmetric, ``weight_zero_point`` int32 [V, G] packed along out_features. W = ceil(K*b/32) words; before 0.18
the library put 32 // b whole codes in a word, so that 3, 5, 6 and 7 bits took W = ceil(K / (32 // b)); that is read
too. ``weight_g_idx`` int [K] of the deprecated ``actorder: group`` names the group of each column. mxfp4 and nvfp4 have
tensors of their own (float4.py); our tables (``quant_method: dq``) those of a symmetric layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dq_runtime.errors import CheckpointError
from dq_runtime.levels import INT, LEVELS
from dq_runtime.packing.directory import DirectoryCheckpoint, tensor_files
from dq_runtime.packing.host import HostTensor, HostWeight, pack_rows, unpack_rows, words_per_row
from dq_runtime.packing.quant_config import FLOAT_FORMATS, FOREIGN_PREFIX, Scheme, Targets, from_config, orders_columns
from dq_runtime.packing.readers.float4 import FLOAT4_SUFFIXES, StoredFloat4
from dq_runtime.packing.readers.values import dequantize, notes_on, serving_scale
from dq_runtime.packing.tensor_file import TensorFile

SUFFIXES = (
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
    "weight_global_scale",
)
_FLOATS = ("float16", "bfloat16", "float32", "float64")


def open_compressed_tensors(directory: Path, config: dict[str, Any], scheme: dict[str, Any]) -> DirectoryCheckpoint:
    """See :func:`dq_runtime.packing.checkpoint.open_checkpoint`."""
    where = str(directory / "config.json")
    targets = Targets(from_config(scheme, where), where)
    files = tensor_files(directory)
    ordered = orders_columns(scheme)
    layers: dict[str, Scheme] = {}
    dense = []
    for name in files:
        layer, _, kind = name.rpartition(".")
        if kind == "weight_packed":
            layers[layer] = targets.match(layer)
        elif kind in SUFFIXES:
            if f"{layer}.weight_packed" not in files:
                raise CheckpointError(f"{directory}: {name} is present but {layer}.weight_packed is missing")
        else:
            dense.append(name)
    if not layers:
        raise CheckpointError(f"{directory} holds no packed weights, although its config says it is quantized")
    for layer, stored in layers.items():
        verify_names(layer, stored, ordered, files, directory)
    reasons = {}
    for layer, stored in layers.items():
        reason = stored_layer(layer, stored, files, directory).reason()
        if reason is not None:
            reasons[layer] = reason
    packed = {layer: s for layer, s in layers.items() if layer not in reasons}
    dense += [f"{layer}.weight" for layer in reasons]
    spread = {layer: layers[layer] for layer in reasons}
    if any(s.form != INT for s in layers.values()) and not scheme.get("transposed"):
        config = config | {"model_type": str(config.get("model_type", "")).removeprefix(FOREIGN_PREFIX)}
    return CompressedTensors(directory, config, packed, tuple(dense), notes_on(reasons.items()), files, spread)


def verify_names(layer: str, scheme: Scheme, ordered: bool, files: dict[str, TensorFile], directory: Path) -> None:
    """A packed layer has the tensors its scheme calls for, and no others (groups of columns, which ``ordered`` calls
    for, are named at will)."""
    wanted = _suffixes(scheme, ordered)
    for suffix in SUFFIXES:
        present = f"{layer}.{suffix}" in files
        if present != (suffix in wanted) and not (present and suffix == "weight_g_idx"):
            state = "missing" if suffix in wanted else "present, although the layer is symmetric"
            raise CheckpointError(f"{directory}: {layer}.{suffix} is {state}")
    if f"{layer}.weight" in files:
        raise CheckpointError(f"{directory}: {layer}.weight and {layer}.weight_packed are both present")


@dataclass(frozen=True)
class CompressedTensors(DirectoryCheckpoint):
    """``spread``: the layers whose scales no kernel of ours can use as they are, given as dense float32."""

    spread: dict[str, Scheme]

    def array(self, name: str) -> HostTensor:
        layer = name.removesuffix(".weight")
        if layer in self.spread and name != layer:
            return stored_layer(layer, self.spread[layer], self.files, self.path).values()
        return super().array(name)

    def weight(self, layer: str) -> HostWeight:
        return stored_layer(layer, self.layers[layer], self.files, self.path).weight()


def packed_layer(layer: str, scheme: Scheme, file: TensorFile) -> HostWeight:
    """One layer of which all tensors lie in ``file``."""
    return stored_layer(layer, scheme, dict.fromkeys(file.names(), file), file.path).weight()


def _suffixes(scheme: Scheme, ordered: bool) -> tuple[str, ...]:
    """The tensors that a layer of this scheme has."""
    if scheme.form in FLOAT_FORMATS:
        return FLOAT4_SUFFIXES[scheme.form]
    wanted = (*SUFFIXES[:3], "weight_g_idx") if ordered else SUFFIXES[:3]
    return wanted if scheme.symmetric else (*wanted, "weight_zero_point")


def stored_layer(layer: str, scheme: Scheme, files: dict[str, TensorFile], path: Path) -> _Stored | StoredFloat4:
    """The tensors of one packed layer, checked: ``n``, ``k``, and its ``weight()`` unless there is a ``reason()``."""
    if scheme.form in FLOAT_FORMATS:
        tensors = {s: files[f"{layer}.{s}"].tensor(f"{layer}.{s}") for s in FLOAT4_SUFFIXES[scheme.form]}
        return StoredFloat4(f"{path}: {layer}", scheme.form, tensors)
    return _Stored(layer, scheme, files, path)


class _Stored:
    """The tensors of one layer, their dtypes and shapes checked."""

    def __init__(self, layer: str, scheme: Scheme, files: dict[str, TensorFile], path: Path) -> None:
        self.scheme = scheme
        self._where = f"{path}: {layer}"
        self._tensors = {s: files[f"{layer}.{s}"].tensor(f"{layer}.{s}") for s in SUFFIXES if f"{layer}.{s}" in files}
        shape = self._tensors["weight_shape"]
        if shape.dtype not in ("int64", "int32") or shape.shape != [2] or (shape.values <= 0).any():
            raise self._bad(f"weight_shape is {_few(shape.values)}, expected two positive integers")
        self.n, self.k = (int(v) for v in shape.values)
        packed = self._tensors["weight_packed"]
        # Of the sizes stated, one must be backed by bytes before anything is allocated by the other.
        if packed.dtype != "int32" or packed.shape not in ([self.n, w] for w in _words(self.k, scheme.bits)):
            raise self._is_not("weight_packed", f"int32 {[self.n, words_per_row(self.k, scheme.bits)]}")
        group_size = self.k if scheme.group_size == -1 else scheme.group_size
        if group_size <= 0 or self.k % group_size:
            raise self._bad(f"has {self.k} in_features, not a multiple of group size {group_size}")
        self.groups = self.k // group_size
        scale = self._tensors["weight_scale"]
        if scale.dtype not in _FLOATS or scale.shape != [self.n, self.groups]:
            raise self._is_not("weight_scale", f"float {[self.n, self.groups]}")
        self._group_of = self._columns()

    def _columns(self) -> NDArray[np.intp] | None:
        """The group of each column [K] where they are not in order."""
        stored = self._tensors.get("weight_g_idx")
        if stored is None:
            return None
        if stored.dtype not in ("int32", "int64") or stored.shape != [self.k]:
            raise self._is_not("weight_g_idx", f"int32 {[self.k]}")
        if ((stored.values < 0) | (stored.values >= self.groups)).any():
            raise self._bad(f"weight_g_idx names a group beyond the {self.groups} there are")
        return None if (stored.values == _in_order(self.k, self.groups)).all() else stored.values.astype(np.intp)

    def reason(self) -> str | None:
        """Why no kernel can use this layer as it is; None if they can."""
        if self._group_of is not None:
            return "groups that are not of neighbouring columns (actorder) suit no kernel here"
        if serving_scale(self._tensors["weight_scale"]) is None:
            return "scales that need more than 16 bits suit no kernel here"
        return None

    def weight(self) -> HostWeight:
        scale = serving_scale(self._scale())
        if scale is None:  # only if the file changed since it was opened
            raise self._bad("weight_scale needs more than 16 bits")
        return HostWeight(self._packed(), scale, self._zero(), self.scheme.bits, self.k, self.scheme.form)

    def values(self) -> HostTensor:
        codes = unpack_rows(self._packed(), self.scheme.bits, self.k)
        if self.scheme.form != INT:
            levels = np.array(LEVELS[self.scheme.form], np.float32)[codes]
            return HostTensor(levels * self._scale().float32()[:, _in_order(self.k, self.groups)], "float32")
        zero = self._zero()
        middle = 2 ** (self.scheme.bits - 1)
        group_of = _in_order(self.k, self.groups) if self._group_of is None else self._group_of
        return dequantize(codes, self._scale().float32(), middle if zero is None else zero, group_of)

    def _scale(self) -> HostTensor:
        scale = self._tensors["weight_scale"]
        if not scale.is_finite():
            raise self._bad("weight_scale holds a value that is not finite")
        return scale

    def _packed(self) -> NDArray[np.int32]:
        return self._dense_rows("weight_packed", self._tensors["weight_packed"].values, self.k)

    def _zero(self) -> NDArray[np.uint8] | None:
        """uint8 [N, G] of what is packed along out_features."""
        if self.scheme.symmetric:
            return None
        stored = self._tensors["weight_zero_point"]
        if stored.dtype != "int32" or stored.shape not in ([w, self.groups] for w in _words(self.n, self.scheme.bits)):
            words = words_per_row(self.n, self.scheme.bits)
            raise self._is_not("weight_zero_point", f"int32 {[words, self.groups]}")
        rows = self._dense_rows("weight_zero_point", stored.values.T, self.n)
        return np.ascontiguousarray(unpack_rows(rows, self.scheme.bits, self.n).T)

    def _dense_rows(self, name: str, words: NDArray[np.int32], count: int) -> NDArray[np.int32]:
        """Rows of ``count`` codes as one bitstream each, whichever way they were packed; padding bits must be zero."""
        bits = self.scheme.bits
        dense, padded = _words(count, bits)
        if words.shape[1] == padded != dense:
            return pack_rows(_unpack_padded(words, bits, count), bits)
        spare = dense * 32 - count * bits
        if spare and (words[:, -1].view(np.uint32) >> np.uint32(32 - spare)).any():
            raise self._bad(f"{name} has bits set in the padding of its last word")
        return words

    def _bad(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._where} {what}")

    def _is_not(self, suffix: str, wanted: str) -> CheckpointError:
        found = self._tensors[suffix]
        return self._bad(f"{suffix} is {found.dtype} {found.shape}, expected {wanted}")


def _words(count: int, bits: int) -> tuple[int, int]:
    """Words of ``count`` codes as one bitstream, and with whole codes in every word."""
    return words_per_row(count, bits), -(-count // (32 // bits))


def _unpack_padded(words: NDArray[np.int32], bits: int, count: int) -> NDArray[np.uint8]:
    """uint8 [N, count] of int32 [N, W] with 32 // bits codes in every word, from its low end."""
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    fields = np.ascontiguousarray(words).view(np.uint32)[:, :, None] >> shifts & np.uint32(2**bits - 1)
    return fields.astype(np.uint8).reshape(len(words), -1)[:, :count]


def _in_order(k: int, groups: int) -> NDArray[np.intp]:
    return np.arange(k, dtype=np.intp) // (k // groups)


def _few(values: NDArray[Any]) -> list[Any]:
    """The first values, for a message."""
    few: list[Any] = values.reshape(-1)[:4].tolist()
    return few
