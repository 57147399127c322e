"""Stochastic rounding: floor(x + r) with r uniform in [0, 1) is x on average, however small x and its changes are.

A random number a weight would cost more than the update that it rounds. Here r[n, k] = frac(a[n] + b[k]) with a and b
uniform: every r is uniform, and any two of them are independent, so that a sum of rounding errors has the variance that
independent numbers would give it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Weights worked on at once: on a CPU what fits into a core's cache (64 Ki weights x 4 bytes), on a GPU what keeps the
# temporary tensors of a large layer below 100 MB.
CHUNK = {"cpu": 1 << 16, "cuda": 1 << 23}


class Dither:
    """Random r for rows of one layer [N, K], the same for the same ``seed``; ``draws`` independent ones, made of
    ``of_rows`` [draws, N, 1] (a above) and ``of_columns`` [draws, 1, K] (b)."""

    def __init__(self, shape: torch.Size, draws: int, seed: int, device: torch.device) -> None:
        n, k = shape
        generator = torch.Generator(device)
        generator.manual_seed(seed % 2**63)
        self.of_rows = torch.rand(draws, n, 1, generator=generator, device=device)
        self.of_columns = torch.rand(draws, 1, k, generator=generator, device=device)

    def of(self, draw: int, rows: slice) -> Tensor:
        """float32 [rows, K]."""
        return (self.of_rows[draw, rows] + self.of_columns[draw]).frac_()


def chunks(shape: torch.Size, device: torch.device) -> Iterator[slice]:
    """Rows of [N, K], CHUNK weights at a time."""
    n, k = shape
    rows = max(1, CHUNK.get(device.type, 1 << 16) // max(1, k))
    return (slice(i, min(i + rows, n)) for i in range(0, n, rows))
