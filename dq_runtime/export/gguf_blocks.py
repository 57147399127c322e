"""Packed linears as GGUF blocks of 32 weights, byte by byte from our codes: Q4_0, Q4_1, Q8_0 and MXFP4 of ggml.

    Q4_0  18 bytes  float16 d, then 16 bytes: byte i holds weight i (low nibble) and i + 16 (high);  w = d * (q - 8)
    Q4_1  20 bytes  float16 d and m, then the same 16 bytes;                                         w = d * q + m
    Q8_0  34 bytes  float16 d, then 32 int8;                                                          w = d * q
    MXFP4 17 bytes  e8m0 d, then 16 bytes of nibbles as in Q4_0, sign and magnitude of e2m1;          w = d * e2m1(q)

The gguf library quantizes floats and would derive scales of its own from the largest weight; here none is derived.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dq_runtime.errors import SpecError
from dq_runtime.export.exact import cast, held_by, regroup, require_int, widen, zeros_of
from dq_runtime.levels import sign_magnitude
from dq_runtime.packing import PackedWeight
from dq_runtime.packing.float4 import e8m0_of

BLOCK = 32
Rows = NDArray[np.int64] | None  # the order of a matrix's rows in the file; None: as they are


def _mxfp4(w: PackedWeight, rows: Rows) -> NDArray[np.uint8]:
    head = e8m0_of(w.scale).unsqueeze(-1).numpy()
    body = sign_magnitude(w.codes()).reshape(w.n, -1, BLOCK).numpy()
    blocks = np.concatenate([head, body[..., :16] | body[..., 16:] << 4], -1).reshape(w.n, -1)
    return np.ascontiguousarray(blocks if rows is None else blocks[rows])


def blocks_of(name: str, w: PackedWeight, rows: Rows = None) -> tuple[str, NDArray[np.uint8]]:
    """(ggml type, bytes [N, K/32 * block bytes]) of a linear: the smallest type that holds it exactly. ``rows`` is the
    order of its rows in the file. Raises :class:`SpecError` naming the options of a grid that fits."""
    if w.form == "mxfp4":
        return "MXFP4", _mxfp4(w, rows)
    require_int(name, w, "gguf")
    if w.group_size % BLOCK:
        raise SpecError(
            f"gguf scales blocks of 32 weights, and {name} has groups of {w.group_size}; quantize with --group-size "
            "32, 64 or 128"
        )
    w = regroup(w, BLOCK)
    remedy = "quantize with --scale-dtype float16"
    scale = cast(w.scale, torch.float16, f"the scale of {name}", remedy)
    low = None if w.zero is None else -w.scale.double() * w.zero.double()
    if w.zero is None and w.bits <= 4:
        kind, codes, parameters = "Q4_0", widen(w, 4).codes(), [scale]
    elif low is not None and w.bits <= 4 and held_by(low, torch.float16):
        kind, codes, parameters = "Q4_1", w.codes(), [scale, low.to(torch.float16)]
    else:
        signed = w.codes().view(w.n, -1, BLOCK).to(torch.int16) - zeros_of(w).unsqueeze(-1).to(torch.int16)
        if int(signed.min()) < -128 or int(signed.max()) > 127:
            raise SpecError(
                f"gguf has no 8-bit type with zero points, and {name} needs one; quantize without --asymmetric, or "
                "with --bits 7"
            )
        kind, codes, parameters = "Q8_0", signed.to(torch.int8), [scale]
    head = torch.stack(parameters, -1).numpy().view(np.uint8).reshape(w.n, -1, 2 * len(parameters))
    body = codes.reshape(w.n, -1, BLOCK).numpy()
    packed = body.view(np.uint8) if kind == "Q8_0" else body[..., :16] | body[..., 16:] << 4
    blocks = np.concatenate([head, packed], -1).reshape(w.n, -1)
    return kind, np.ascontiguousarray(blocks if rows is None else blocks[rows])
