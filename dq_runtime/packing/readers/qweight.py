"""What GPTQ and AWQ have in common: W^T packed column by column. Shapes: N out_features, K in_features, G groups, b
bits.

Per linear ``qweight`` int32, ``qzeros`` int32 [G, N*b/32], ``scales`` float [G, N]; the value of a code is scale *
(code - zero), as ours is. The shapes say b, N, K and G by themselves; what the config says must agree, unless it has
settings of single layers, which are then what the shapes say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dq_runtime.errors import CheckpointError
from dq_runtime.packing.directory import DirectoryCheckpoint, tensor_files
from dq_runtime.packing.host import HostTensor, HostWeight, unpack_rows
from dq_runtime.packing.quant_config import Scheme
from dq_runtime.packing.readers.values import dequantize, notes_on, serving_scale
from dq_runtime.packing.shown import shown
from dq_runtime.packing.tensor_file import TensorFile

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
_FLOATS = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Sizes:
    """``bits``, out_features ``n`` and in_features ``k`` of one packed linear."""

    bits: int
    n: int
    k: int


class Layout(Protocol):
    """One order of the bits."""

    def sizes(self, qweight: list[int], qzeros: list[int], scales: list[int]) -> Sizes | None:
        """From the shapes of the three tensors; None if they contradict each other."""
        ...

    def codes(self, qweight: NDArray[np.int32], sizes: Sizes) -> NDArray[np.int32]:
        """int32 [N, ceil(K*b/32)], the canonical bitstream."""
        ...

    def zeros(self, qzeros: NDArray[np.int32], sizes: Sizes) -> NDArray[np.uint8]:
        """Zero points [G, N], which are codes."""
        ...


def integer(scheme: Mapping[str, Any], key: str, where: str) -> int:
    """A number of a config."""
    value = scheme.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(f"{where}: quantization_config says {key}: {shown(value)} where an integer is needed")
    return value


@dataclass(frozen=True)
class Qweight(DirectoryCheckpoint):
    """``spread``: the layers that are given as dense float32, with their scheme."""

    layout: Layout
    spread: dict[str, Scheme]

    def array(self, name: str) -> HostTensor:
        layer = name.removesuffix(".weight")
        if layer in self.spread and name != layer:
            return _Stored(layer, self.layout, self.files, self.path).values()
        return super().array(name)

    def weight(self, layer: str) -> HostWeight:
        return _Stored(layer, self.layout, self.files, self.path).weight()


def open_qweight(
    directory: Path, config: dict[str, Any], layout: Layout, expected: Scheme, mixed: bool
) -> DirectoryCheckpoint:
    """The checkpoint of a directory: ``expected`` is what its config says of every layer, ``mixed`` that single layers
    may differ."""
    files = tensor_files(directory)
    layers: dict[str, Scheme] = {}
    reasons = {}
    dense = []
    for name in files:
        layer, _, kind = name.rpartition(".")
        if kind not in SUFFIXES:
            dense.append(name)
        elif kind == "qweight":
            stored = _Stored(layer, layout, files, directory)
            layers[layer] = stored.scheme(expected, mixed)
            reason = stored.reason()
            if reason is not None:
                reasons[layer] = reason
        elif f"{layer}.qweight" not in files:
            raise CheckpointError(f"{directory}: {name} is present but {layer}.qweight is missing")
    if not layers:
        raise CheckpointError(f"{directory} holds no packed weights, although its config says it is quantized")
    packed = {layer: scheme for layer, scheme in layers.items() if layer not in reasons}
    spread = {layer: layers[layer] for layer in reasons}
    dense += [f"{layer}.weight" for layer in spread]
    return Qweight(directory, config, packed, tuple(dense), notes_on(reasons.items()), files, layout, spread)


class _Stored:
    """The tensors of one layer, their dtypes and shapes checked."""

    def __init__(self, layer: str, layout: Layout, files: dict[str, TensorFile], path: Path) -> None:
        self._layout = layout
        self._where = f"{path}: {layer}"
        self._tensors = {s: files[f"{layer}.{s}"].tensor(f"{layer}.{s}") for s in SUFFIXES if f"{layer}.{s}" in files}
        if f"{layer}.weight" in files:
            raise self._bad("weight and qweight are both present")
        for suffix in SUFFIXES[:3]:
            if suffix not in self._tensors:
                raise self._bad(f"{suffix} is missing")
            found = self._tensors[suffix]
            allowed = _FLOATS if suffix == "scales" else ("int32",)
            if found.dtype not in allowed or len(found.shape) != 2 or 0 in found.shape:
                raise self._bad(f"{suffix} is {found.dtype} {found.shape}, expected {allowed[0]} of two dimensions")
        qweight, qzeros, scales = (self._tensors[s].shape for s in SUFFIXES[:3])
        sizes = layout.sizes(qweight, qzeros, scales)
        if sizes is None or qzeros[0] != scales[0] or not 1 <= scales[0] <= sizes.k:
            raise self._bad(f"qweight {qweight}, qzeros {qzeros} and scales {scales} do not belong together")
        self.sizes = sizes
        self._groups = scales[0]
        self._group_of = self._columns()

    def _columns(self) -> NDArray[np.intp] | None:
        """The group of each column [K] where they are not runs of K / G columns in order."""
        k, groups = self.sizes.k, self._groups
        in_order = np.arange(k, dtype=np.intp) // -(-k // groups)
        stored = self._tensors.get("g_idx")
        if stored is None or stored.values.size == 0:  # some writers leave an empty one
            return None if k % groups == 0 else in_order
        if stored.dtype not in ("int32", "int64") or stored.shape != [k]:
            raise self._bad(f"g_idx is {stored.dtype} {stored.shape}, expected int32 {[k]}")
        if ((stored.values < 0) | (stored.values >= groups)).any():
            raise self._bad(f"g_idx names a group beyond the {groups} there are")
        return None if k % groups == 0 and (stored.values == in_order).all() else stored.values.astype(np.intp)

    def scheme(self, expected: Scheme, mixed: bool) -> Scheme:
        """How the layer is stored, which must be as expected unless layers are mixed."""
        k, groups = self.sizes.k, self._groups
        size = -1 if groups == 1 else -(-k // groups)
        wanted = k if expected.group_size == -1 else expected.group_size
        if not mixed and (self.sizes.bits != expected.bits or -(-k // wanted) != groups):
            raise self._bad(
                f"has {self.sizes.bits} bits and {groups} groups of {k} in_features, but the config says "
                f"{expected.bits} bits and group size {expected.group_size}"
            )
        return Scheme(self.sizes.bits, size, expected.symmetric)

    def reason(self) -> str | None:
        """Why no kernel can use this layer as it is; None if they can."""
        if self._group_of is not None:
            return "groups that are not equal runs of neighbouring columns (act-order) suit no kernel here"
        if serving_scale(self._tensors["scales"]) is None:
            return "scales that need more than 16 bits suit no kernel here"
        return None

    def weight(self) -> HostWeight:
        scale = serving_scale(self._scales())
        if scale is None:  # only if the file changed since it was opened
            raise self._bad("scales need more than 16 bits")
        scale = HostTensor(np.ascontiguousarray(scale.values.T), scale.dtype)
        zero = np.ascontiguousarray(self._zeros().T)
        symmetric = bool((zero == 2 ** (self.sizes.bits - 1)).all())
        return HostWeight(self._codes(), scale, None if symmetric else zero, self.sizes.bits, self.sizes.k)

    def values(self) -> HostTensor:
        codes = unpack_rows(self._codes(), self.sizes.bits, self.sizes.k)
        k = self.sizes.k
        group_of = np.arange(k, dtype=np.intp) // (k // self._groups) if self._group_of is None else self._group_of
        return dequantize(codes, self._scales().float32().T, self._zeros().T, group_of)

    def _codes(self) -> NDArray[np.int32]:
        return self._layout.codes(self._tensors["qweight"].values, self.sizes)

    def _zeros(self) -> NDArray[np.uint8]:
        return self._layout.zeros(self._tensors["qzeros"].values, self.sizes)

    def _scales(self) -> HostTensor:
        scales = self._tensors["scales"]
        if not scales.is_finite():
            raise self._bad("scales holds a value that is not finite")
        return scales

    def _bad(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._where} {what}")
