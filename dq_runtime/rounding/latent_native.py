"""The passes over a four-byte latent in C++ (csrc/cpu/latent.h), one over memory each where torch takes thirty.

:mod:`latent` and :mod:`byte_moments` define them; the results differ where float32 rounding falls on the other side of
a floor. On one thread of a Zen 4 a step of a weight takes 2 to 3 ns instead of 8 to 17, building it 0.2 instead of 1 to
12.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dq_runtime.errors import SpecError
from dq_runtime.grids import Scales
from dq_runtime.rounding.byte_moments import BETA1, BETA2, REACH, ByteMoments, correction, lowest
from dq_runtime.rounding.dither import Dither
from dq_runtime.rounding.whole_model import LOWER

_native: Any
try:
    _native = import_module("dq_runtime._native")
except ImportError:
    _native = None

DTYPES = (torch.float32, torch.bfloat16)


def runs(u: Tensor, dtype: torch.dtype) -> bool:
    """Whether latents ``u`` and weights or gradients of ``dtype`` are worked on here. ``DQ_TRAINING=reference`` asks
    for PyTorch, as it does for the other passes of a rounding loop."""
    asked = os.environ.get("DQ_TRAINING") or "native"
    return _native is not None and u.device.type == "cpu" and dtype in DTYPES and asked == "native" and u.numel() > 0


def weight(u: Tensor, scales: Scales, bits: int, dtype: torch.dtype) -> Tensor:
    """scale * (code(u) - zero) of u int16 [N, K], in ``dtype``."""
    u, scale = u.contiguous(), scales.scale.contiguous()
    zero = None if scales.zero is None else scales.zero.contiguous()
    out = torch.empty(u.shape, dtype=dtype)
    _native.latent_weight(
        u.data_ptr(),
        scale.data_ptr(),
        scale.dtype == torch.bfloat16,
        0 if zero is None else zero.data_ptr(),
        bits,
        *u.shape,
        u.shape[1] // scale.shape[1],
        out.data_ptr(),
        dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return out


def step(
    u: Tensor,
    moments: ByteMoments,
    gradient: Tensor,
    rate: float,
    dither: Dither,
    over_processes: Callable[[Tensor], Tensor],
) -> None:
    """One step of Adam on u int16 [N, K] and its moments, in place; ``rate`` in units of u. ``over_processes`` makes of
    the largest gradient of these rows, float32 [], that of the layer. :class:`SpecError`, and nothing changed, where a
    number of the gradient [N, K] is not finite."""
    gradient, threads = gradient.contiguous(), torch.get_num_threads()
    assert u.is_contiguous()
    assert moments.m.is_contiguous()
    assert moments.v.is_contiguous()
    addresses = (u.data_ptr(), moments.m.data_ptr(), moments.v.data_ptr(), gradient.data_ptr())
    of_rows, of_columns = dither.of_rows[:, : len(u)].contiguous(), dither.of_columns.contiguous()
    parts = (of_rows.data_ptr(), of_columns.data_ptr())
    state = _native.LatentState(*addresses, gradient.dtype == torch.bfloat16, *parts, *u.shape)
    largest = over_processes(torch.tensor(_native.latent_largest(state, threads)))
    if bool(largest.isinf()):
        raise SpecError(f"a gradient of the KL is not finite; {LOWER}")
    bound = moments.bound_after(largest)
    began = moments.steps > 0 and bool(moments.bound > 0)
    _native.latent_step(
        state,
        BETA1,
        BETA2,
        REACH / 127 / correction(moments.steps) if began else 0.0,
        int(lowest(moments.bound)),
        int(lowest(bound)),
        correction(moments.steps + 1),
        127 / REACH,
        rate,
        threads,
    )
    moments.bound, moments.steps = bound, moments.steps + 1
