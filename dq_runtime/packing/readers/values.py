"""What the readers of several formats need: scales that kernels can hold, and weights that they cannot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from dq_runtime.packing.host import INFINITY_BITS, HostTensor


def serving_scale(scale: HostTensor) -> HostTensor | None:
    """Finite scales [*, *] in 16 bits, of the same values; None if that would round one of them."""
    if scale.dtype in INFINITY_BITS:
        return scale
    wide = scale.values.astype(np.float32)
    if scale.dtype == "float64" and (wide != scale.values).any():
        return None
    if not (wide.view(np.uint32) & np.uint32(0xFFFF)).any():
        return HostTensor((wide.view(np.uint32) >> np.uint32(16)).astype(np.uint16), "bfloat16")
    with np.errstate(over="ignore"):
        half = wide.astype(np.float16)
    return HostTensor(half, "float16") if np.array_equal(half.astype(np.float32), wide) else None


def dequantize(
    codes: NDArray[np.uint8], scale: NDArray[np.float32], zero: NDArray[np.uint8] | int, group_of: NDArray[np.intp]
) -> HostTensor:
    """float32 [N, K] = scale * (code - zero): ``codes`` [N, K], ``scale`` and ``zero`` [N, G], the group of each column
    ``group_of`` [K]. As exact as float32 is."""
    values = codes.astype(np.float32)
    values -= zero if isinstance(zero, int) else zero.astype(np.float32)[:, group_of]
    values *= scale[:, group_of]
    return HostTensor(values, "float32")


def notes_on(dequantized: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """One sentence for every reason, of (layer, reason) pairs."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for layer, reason in dequantized:
        by_reason[reason].append(layer)
    return tuple(
        f"{len(layers)} {'weight' if len(layers) == 1 else 'weights'} ({layers[0]}{', ...' * (len(layers) > 1)}) "
        f"will run dequantized: {reason}"
        for reason, layers in by_reason.items()
    )
