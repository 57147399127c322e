"""Plain PyTorch: the living definition of every op. Runs anywhere; decodes one tile of rows at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dq_runtime.backends.base import Call, PreparedWeight
from dq_runtime.errors import BackendError
from dq_runtime.packing import PackedWeight

# Rows decoded at once: 2^21 weights = 8 MB of float32, so that no dense copy of a layer ever exists.
TILE_WEIGHTS = 2**21


def qmm_grouped(
    x: Tensor, expert_of: Tensor, experts: int, n: int, multiply: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """The definition of a product with a mixture of experts: gather an expert's rows, multiply, scatter.

    x [T, K] or [P, K], ``expert_of`` integer [P] with P = T * top_k: pair p is token p // top_k with its expert.
    ``multiply(e, rows [R, K])`` -> [R, N] is the product with expert e's weight. Returns y [P, N] in x's dtype, row p
    that of pair p. Raises :class:`BackendError` where T does not divide P, or for a number outside 0 .. experts-1.
    """
    pairs, tokens = expert_of.numel(), x.shape[0]
    if pairs != tokens and (tokens == 0 or pairs % tokens):
        raise BackendError(f"{tokens} rows of x do not divide {pairs} pairs of a token and an expert")
    y = torch.empty(pairs, n, dtype=x.dtype, device=x.device)
    for e in torch.unique(expert_of).tolist():
        if not 0 <= e < experts:
            raise BackendError(f"a token was routed to expert {e}, but experts are numbered 0 to {experts - 1}")
        pair = (expert_of == e).nonzero().squeeze(1)
        y[pair] = multiply(e, x[pair // (pairs // tokens)])
    return y


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

    def prepare(self, w: PackedWeight, x_dtype: torch.dtype) -> PreparedWeight | None:
        return None  # reads the canonical order

    def qmm_prepared(self, x: Tensor, w: PreparedWeight) -> Tensor:
        raise BackendError("the reference prepares nothing; use qmm")
