"""AWQ (arXiv 2306.00978) as AutoAWQ, GPTQModel and AutoRound save it: 4 bits in the GEMM layout.

``qweight`` int32 [K, N/8] holds eight out_features of one column in a word, its i-th nibble that of number ORDER[i];
``qzeros`` int32 [G, N/8] likewise. Zero points are stored as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dq_runtime.errors import CheckpointError
from dq_runtime.packing.directory import DirectoryCheckpoint
from dq_runtime.packing.quant_config import Scheme
from dq_runtime.packing.readers.gptq import refuse_more_than_weights
from dq_runtime.packing.readers.qweight import Sizes, integer, open_qweight
from dq_runtime.packing.shown import shown

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
ROWS = 16  # of 8 columns, repacked while they are in the cache


def open_awq(directory: Path, config: dict[str, Any], scheme: dict[str, Any]) -> DirectoryCheckpoint:
    """See :func:`dq_runtime.packing.checkpoint.open_checkpoint`."""
    where = str(directory / "config.json")
    older = "w_bit" in scheme  # the names of quant_config.json
    bits = integer(scheme, "w_bit" if older else "bits", where)
    group_size = integer(scheme, "q_group_size" if older else "group_size", where)
    version = scheme.get("version") or scheme.get("format") or "gemm"
    if bits != BITS or str(version).lower() != "gemm" or (group_size < 1 and group_size != -1):
        raise CheckpointError(
            f"{where}: AWQ of {shown(bits)} bits and group size {shown(group_size)} in layout {shown(version)} is not "
            "read here, only 4 bits in layout gemm"
        )
    refuse_more_than_weights(scheme, where)
    expected = Scheme(bits, group_size, scheme.get("sym", False) is True)
    return open_qweight(directory, config, AwqLayout(), expected, bool(scheme.get("extra_config")))


class AwqLayout:
    """A :class:`dq_runtime.packing.readers.qweight.Layout`."""

    def sizes(self, qweight: list[int], qzeros: list[int], scales: list[int]) -> Sizes | None:
        n = scales[1]
        if qweight[1] * 8 != n or qzeros[1] * 8 != n or qweight[0] % 8:
            return None
        return Sizes(BITS, n, qweight[0])

    def codes(self, qweight: NDArray[np.int32], sizes: Sizes) -> NDArray[np.int32]:
        """Squares of 8 x 8 nibbles are transposed, 64 operations on an eighth of all words, some rows at a time."""
        words = np.ascontiguousarray(qweight).view(np.uint32).reshape(sizes.k // 8, 8, sizes.n // 8)
        packed = np.empty((sizes.n // 8, 8, sizes.k // 8), np.uint32)
        for start in range(0, len(words), ROWS):
            part = words[start : start + ROWS]
            for i, feature in enumerate(ORDER):
                word = np.zeros((len(part), sizes.n // 8), np.uint32)
                for column in range(8):
                    word |= (part[:, column] >> np.uint32(4 * i) & np.uint32(15)) << np.uint32(4 * column)
                packed[:, feature, start : start + ROWS] = word.T
        return packed.reshape(sizes.n, sizes.k // 8).view(np.int32)

    def zeros(self, qzeros: NDArray[np.int32], sizes: Sizes) -> NDArray[np.uint8]:
        words = np.ascontiguousarray(qzeros).view(np.uint32)
        zeros = np.empty((len(words), sizes.n // 8, 8), np.uint8)
        for i, feature in enumerate(ORDER):
            zeros[:, :, feature] = words >> np.uint32(4 * i) & np.uint32(15)
        return zeros.reshape(len(words), sizes.n)
