"""One layer of compressed-tensors ``mxfp4-pack-quantized`` or ``nvfp4-pack-quantized``: see packing/float4.py.

Kept packed: mxfp4 always, since a power of two is a bfloat16; nvfp4 where its global scale leaves every scale one, as
that of our own grid does. llm-compressor's is 448 * 6 / the largest weight, any float32, and then a scale needs more
bits than a kernel here takes: such a layer is given as dense float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from dq_runtime.errors import CheckpointError
from dq_runtime.levels import E2M1, GROUP_SIZE, TABLE_BITS, ordered
from dq_runtime.packing.host import HostTensor, HostWeight
from dq_runtime.packing.readers.values import serving_scale

FLOAT4_SUFFIXES = {
    "mxfp4": ("weight_packed", "weight_scale"),
    "nvfp4": ("weight_packed", "weight_scale", "weight_global_scale"),
}
_SCALE_DTYPE = {"mxfp4": "uint8", "nvfp4": "float8_e4m3fn"}


class StoredFloat4:
    """The tensors of one layer, their dtypes and shapes checked. ``where`` begins every message."""

    def __init__(self, where: str, form: str, tensors: Mapping[str, HostTensor]) -> None:
        self._where, self._form, self._tensors = where, form, tensors
        packed, scale = tensors["weight_packed"], tensors["weight_scale"]
        size = GROUP_SIZE[form]
        if packed.dtype != "uint8" or len(packed.shape) != 2 or not packed.values.size or 2 * packed.shape[1] % size:
            raise self._bad(
                f"weight_packed is {packed.dtype} {packed.shape}, expected uint8 [N, a multiple of {size // 2}]"
            )
        self.n, self.k = packed.shape[0], 2 * packed.shape[1]
        self.groups = self.k // size
        if scale.dtype != _SCALE_DTYPE[form] or scale.shape != [self.n, self.groups]:
            wanted = f"{_SCALE_DTYPE[form]} {[self.n, self.groups]}"
            raise self._bad(f"weight_scale is {scale.dtype} {scale.shape}, expected {wanted}")
        if form == "nvfp4":
            whole = tensors["weight_global_scale"]
            if whole.dtype != "float32" or whole.values.size != 1:
                raise self._bad(f"weight_global_scale is {whole.dtype} {whole.shape}, expected one float32")
            if not (np.isfinite(whole.values).all() and (whole.values > 0).all()):
                raise self._bad("weight_global_scale is not a positive finite number")

    def reason(self) -> str | None:
        """Why no kernel can use this layer as it is; None if they can."""
        if self._form == "nvfp4" and serving_scale(HostTensor(self._scales(), "float32")) is None:
            return "scales over a global scale that is no power of two need more than 16 bits"
        return None

    def weight(self) -> HostWeight:
        if self._form == "mxfp4":
            # bfloat16 has the exponent of e8m0 in the same place with the same bias; its 2^-127 is a denormal.
            stored = self._codes_of_scales().astype(np.uint16)
            scale = HostTensor(np.where(stored == 0, np.uint16(0x40), stored << np.uint16(7)), "bfloat16")
        else:
            found = serving_scale(HostTensor(self._scales(), "float32"))
            if found is None:  # only if the file changed since it was opened
                raise self._bad("weight_scale needs more than 16 bits")
            scale = found
        nibbles = self._tensors["weight_packed"].values
        codes = ordered(nibbles & 15) | ordered(nibbles >> 4) << 4
        return HostWeight(_as_words(codes), scale, None, TABLE_BITS, self.k, self._form)

    def values(self) -> HostTensor:
        """float32 [N, K]: level * (scale / global scale), as the library computes it."""
        nibbles = self._tensors["weight_packed"].values
        codes = np.empty((self.n, self.k), np.uint8)
        codes[:, ::2], codes[:, 1::2] = ordered(nibbles & 15), ordered(nibbles >> 4)
        levels = np.array(E2M1, np.float32)[codes].reshape(self.n, self.groups, -1)
        return HostTensor((levels * self._scales()[..., None]).reshape(self.n, self.k), "float32")

    def _scales(self) -> NDArray[np.float32]:
        stored = self._codes_of_scales()
        if self._form == "mxfp4":
            return np.ldexp(np.float32(1), stored.astype(np.int32) - 127).astype(np.float32)
        with np.errstate(over="ignore"):
            found: NDArray[np.float32] = E4M3[stored] / self._tensors["weight_global_scale"].values.reshape(())
        if not np.isfinite(found).all():
            raise self._bad("weight_scale over weight_global_scale is not finite")
        return found

    def _codes_of_scales(self) -> NDArray[np.uint8]:
        """The bits of the scales, none of which is a NaN."""
        stored: NDArray[np.uint8] = self._tensors["weight_scale"].values
        nan = stored == 0xFF if self._form == "mxfp4" else (stored & 0x7F) == 0x7F
        if nan.any():
            raise self._bad("weight_scale holds a value that is not finite")
        return stored

    def _bad(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._where} {what}")


def _as_words(codes: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Bytes [N, K/2] -> int32 [N, ceil(K/8)]: two codes a byte from the low end are the bitstream already."""
    spare = -codes.shape[1] % 4
    return np.ascontiguousarray(np.pad(codes, ((0, 0), (0, spare)))).view(np.int32)


def _e4m3() -> NDArray[np.float32]:
    """The values of float8_e4m3fn by their bits."""
    bits = np.arange(256)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))
    values = np.where(bits & 128, -magnitude, magnitude)
    values[[0x7F, 0xFF]] = np.nan
    return values.astype(np.float32)


E4M3 = _e4m3()
