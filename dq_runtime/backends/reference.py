"""Plain PyTorch: the living definition of every op. Runs anywhere; decodes one tile of rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from dq_runtime.backends.base import Call
from dq_runtime.packing import PackedWeight

# Rows decoded at once: 2^21 weights = 8 MB of float32, so that no dense copy of a layer ever exists.
TILE_WEIGHTS = 2**21


class Reference:
    """Decode a tile of rows, multiply, repeat."""

    name = "reference"
    ops = frozenset({"qmm"})

    def available(self) -> str | None:
        return None

    def can_run(self, call: Call) -> str | None:
        if call.op not in self.ops:
            return f"reference has no {call.op}"
        if not call.x_dtype.is_floating_point:
            return f"activations must be floating point, got {call.x_dtype}"
        return None

    def qmm(self, x: Tensor, w: PackedWeight) -> Tensor:
        rows = max(1, TILE_WEIGHTS // w.k)
        x32 = x.float()
        y = torch.empty(x.shape[0], w.n, dtype=torch.float32, device=x.device)
        for start in range(0, w.n, rows):
            stop = min(start + rows, w.n)
            torch.mm(x32, w.decode(start, stop).t(), out=y[:, start:stop])
        return y.to(x.dtype)
