"""x @ decode(w).T on one NVIDIA GPU: streamed up to about two thousand tokens, decoded and multiplied by torch beyond.

Shapes: x_MK, packed_NW, scale_NG, zero_NG, y_MN (see dequant.py). Weights are rounded to x's dtype, sums are float32,
and none depends on the order in which programs finish: the same input gives the same bits. Forward only: no autograd.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dq_kernels.dequant import dequantize
from dq_kernels.stream import TABLE_TOKENS, decode_stream, qmm_stream
from dq_kernels.stream_layout import StreamWeight
from dq_kernels.table import choose

# Rows decoded at once for many tokens: 16 MiB at K = 4096, which stay in an H100's L2 (50 MB). M = 4096, N = K = 8192:
# 0.96 of torch bf16; 4096 rows 0.87, all at once 0.83; decoding the next rows on a second stream meanwhile 0.92.
SCRATCH_ROWS = 2048


def qmm(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    *,
    bits: int,
    out: Tensor | None = None,
    form: str = "int",
) -> Tensor:
    """x [M, K] bf16/fp16/fp32, int32 [N, W], bf16/fp16 [N, G], uint8 [N, G] or None -> y [M, N] in x's dtype.

    For weights in the canonical order, which are decoded anew at every call; serve :class:`StreamWeight` instead.
    """

    def decode(start: int, stop: int, scratch: Tensor) -> None:
        zeros = None if zero is None else zero[start:stop]
        part = packed[start:stop], scale[start:stop], zeros
        dequantize(*part, bits=bits, k=x.shape[1], dtype=x.dtype, out=scratch, form=form)

    return _dense(x, packed.shape[0], decode, out)


def qmm_prepared(x: Tensor, w: StreamWeight, out: Tensor | None = None) -> Tensor:
    """x [M, K] bf16/fp16 -> y [M, N] in x's dtype, of a weight in streaming order."""
    tile = choose(x.shape[0], w.n, w.k, w.bits, x.device)
    if tile is not None and (w.form == "int" or tile.BM <= TABLE_TOKENS):
        return qmm_stream(x, w, tile, out)
    return qmm_decoded(x, w, out)


def qmm_decoded(x: Tensor, w: StreamWeight, out: Tensor | None = None) -> Tensor:
    """As :func:`qmm_prepared`, but always by decoding and torch.mm: what a tile must beat to be in the table."""
    return _dense(x, w.n, lambda start, stop, scratch: decode_stream(w, scratch, start, stop), out)


def _dense(x: Tensor, n: int, decode: Callable[[int, int, Tensor], object], out: Tensor | None) -> Tensor:
    """Decode SCRATCH_ROWS at a time into a scratch that stays in L2, and torch.mm."""
    m, k = x.shape
    if out is None:
        out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    rows = min(n, SCRATCH_ROWS)
    scratch = torch.empty(rows, k, dtype=x.dtype, device=x.device)
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        dense = scratch[: stop - start]
        decode(start, stop, dense)
        torch.mm(x, dense.t(), out=out[:, start:stop])
    return out
