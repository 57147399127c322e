"""GPTQ (arXiv 2210.17323) as AutoGPTQ, GPTQModel and AutoRound save it: 2, 3, 4 and 8 bits.

``qweight`` int32 [K*b/32, N] is, transposed, our bitstream word for word. ``qzeros`` int32 [G, N*b/32] are packed the
same way along out_features; in the first version (``checkpoint_format: gptq``, and all files before there was a second)
they are one too small, in ``gptq_v2`` as they are. ``g_idx`` int32 [K] is the group of each column: in order, unless
the columns were quantized in the order of their activations (``desc_act``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dq_runtime.errors import CheckpointError
from dq_runtime.packing.directory import DirectoryCheckpoint
from dq_runtime.packing.host import unpack_rows
from dq_runtime.packing.quant_config import Scheme
from dq_runtime.packing.readers.qweight import Sizes, integer, open_qweight
from dq_runtime.packing.shown import shown

BITS = (2, 3, 4, 8)  # of 5, 6 and 7 there are two orders, which the files do not tell apart


def open_gptq(directory: Path, config: dict[str, Any], scheme: dict[str, Any]) -> DirectoryCheckpoint:
    """See :func:`dq_runtime.packing.checkpoint.open_checkpoint`."""
    where = str(directory / "config.json")
    bits = integer(scheme, "bits", where)
    group_size = integer(scheme, "group_size", where)
    if bits not in BITS or (group_size < 1 and group_size != -1):
        raise CheckpointError(
            f"{where}: GPTQ of {shown(bits)} bits and group size {shown(group_size)} is not read here"
        )
    refuse_more_than_weights(scheme, where)
    mixed = bool(scheme.get("dynamic") or scheme.get("extra_config"))
    expected = Scheme(bits, group_size, scheme.get("sym", True) is True)
    return open_qweight(directory, config, GptqLayout(_adds_one(scheme, where)), expected, mixed)


def refuse_more_than_weights(scheme: dict[str, Any], where: str) -> None:
    """Raise for a scheme that changes activations, or values that are not integers, which the tensors would not
    show."""
    for key, plain in (("act_bits", (None, 16, 32)), ("data_type", (None, "int")), ("rotation_config", (None, {}))):
        if scheme.get(key) not in plain:
            raise CheckpointError(f"{where}: {key} {shown(scheme[key])} is not read here, only weights of integers")
    if scheme.get("is_marlin_format") or scheme.get("pack_dtype") not in (None, "int32"):
        raise CheckpointError(f"{where}: only the plain layout in words of 32 bits is read here")


def _adds_one(scheme: dict[str, Any], where: str) -> bool:
    """Whether zero points are stored one too small."""
    packing = scheme.get("packing_format")
    if packing is not None:  # AutoRound: its own packing keeps zero points as they are, that of AutoGPTQ does not
        if not isinstance(packing, str) or not packing.startswith("auto_round"):
            raise CheckpointError(f"{where}: packing_format {shown(packing)} is not read here")
        return "gptq" in packing and "gptqmodel" not in packing
    version = scheme.get("checkpoint_format") or scheme.get("format") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        raise CheckpointError(f"{where}: checkpoint_format {shown(version)} is not read here, only gptq and gptq_v2")
    return bool(version == "gptq")


@dataclass(frozen=True)
class GptqLayout:
    """A :class:`dq_runtime.packing.readers.qweight.Layout`; ``adds_one`` of version 1."""

    adds_one: bool

    def sizes(self, qweight: list[int], qzeros: list[int], scales: list[int]) -> Sizes | None:
        n = scales[1]
        bits, uneven = divmod(qzeros[1] * 32, n)
        if uneven or bits not in BITS or qweight[1] != n or qweight[0] * 32 % bits:
            return None
        return Sizes(bits, n, qweight[0] * 32 // bits)

    def codes(self, qweight: NDArray[np.int32], sizes: Sizes) -> NDArray[np.int32]:
        return np.ascontiguousarray(qweight.T)

    def zeros(self, qzeros: NDArray[np.int32], sizes: Sizes) -> NDArray[np.uint8]:
        if not self.adds_one:
            return unpack_rows(qzeros, sizes.bits, sizes.n)
        if sizes.bits == 3:
            return (unpack_rows(qzeros, 3, sizes.n) + np.uint8(1)) & np.uint8(7)
        # GPTQModel subtracts 1 from all fields of a word at once, so that a zero point of 0 borrows from the next
        # field: adding to whole words gives back what it had, where adding field by field would be off by one beside a
        # 0.
        ones = np.uint32((2**32 - 1) // (2**sizes.bits - 1))
        return unpack_rows((np.ascontiguousarray(qzeros).view(np.uint32) + ones).view(np.int32), sizes.bits, sizes.n)
