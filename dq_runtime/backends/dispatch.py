"""Ask the backends in order; an explicitly requested one never falls back silently.

``DQ_BACKEND=name`` in the environment requests one backend for every call of the process.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from dq_runtime.backends import BACKENDS, reference
from dq_runtime.backends.base import Backend, Call, GroupedBackend, PreparedWeight
from dq_runtime.backends.choice import first_willing
from dq_runtime.packing import PackedWeight, pack_codes


@cache
def backend(name: str) -> Backend:
    """The backend of that name, built once."""
    built: Backend = BACKENDS.get(name)()
    return built


def refusal(name: str, call: Call) -> str | None:
    """Why backend ``name`` cannot run ``call``; None if it can."""
    candidate = backend(name)
    if call.op not in candidate.ops:
        return f"has no {call.op}"
    return candidate.available() or candidate.can_run(call)


@lru_cache(maxsize=4096)
def _choose(call: Call, requested: str | None) -> Backend:
    return backend(first_willing(BACKENDS, lambda name: refusal(name, call), call, requested, "DQ_BACKEND"))


def choose(call: Call) -> Backend:
    """The backend that will run ``call``; raises :class:`BackendError` with every reason when none can."""
    return _choose(call, os.environ.get("DQ_BACKEND") or None)


def qmm(x: Tensor, w: PackedWeight) -> Tensor:
    """x [..., K] @ decode(w).T -> [..., N] in x's dtype, on the preferred backend."""
    flat = x.reshape(-1, w.k)
    y = choose(Call.qmm(flat, w)).qmm(flat, w)
    return y.view(*x.shape[:-1], w.n)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [N, K] -> int32 [N, ceil(K*bits/32)], by whichever backend packs on their device; all give the same
    bits. The definition, ``pack_codes``, needs 8 bytes a weight on the way."""
    n, k = codes.shape
    call = Call("pack", codes.device.type, 0, n, k, bits, k, True, codes.dtype, torch.bfloat16)
    for name in BACKENDS:
        if refusal(name, call) is None:
            packed: Tensor = backend(name).pack(codes, bits)
            return packed
    return pack_codes(codes, bits)


def prepare(w: PackedWeight, x_dtype: torch.dtype) -> PreparedWeight | None:
    """``w`` in the order of the backend that would serve it for activations of ``x_dtype`` on w's device; None where
    that backend reads the canonical order."""
    x = torch.empty(1, w.k, dtype=x_dtype, device=w.packed.device)
    return choose(Call.qmm(x, w)).prepare(w, x_dtype)


def qmm_prepared(x: Tensor, w: PreparedWeight) -> Tensor:
    """x [..., K] @ decode(w).T -> [..., N] in x's dtype, on the backend that prepared ``w``."""
    y = backend(w.backend).qmm_prepared(x.reshape(-1, w.k), w)
    return y.view(*x.shape[:-1], w.n)


def qmm_grouped(x: Tensor, experts: Sequence[PackedWeight], expert_of: Tensor) -> Tensor:
    """x [T, K] or [P, K], one weight [N, K] an expert, expert_of integer [P] -> [P, N] in x's dtype: row p with the
    weight of expert ``expert_of[p]``, expert by expert on the preferred backend (see reference.qmm_grouped)."""
    return reference.qmm_grouped(x, expert_of, len(experts), experts[0].n, lambda e, rows: qmm(rows, experts[e]))


def prepare_experts(experts: Sequence[PackedWeight], x_dtype: torch.dtype) -> PreparedWeight | None:
    """The experts of one layer in the order of the backend that serves them; None where it reads the canonical order.

    The tensors of a backend without a grouped product are those of each expert, one expert after the other.
    """
    x = torch.empty(1, experts[0].k, dtype=x_dtype, device=experts[0].packed.device)
    chosen = choose(Call.qmm(x, experts[0]))
    if isinstance(chosen, GroupedBackend):
        return chosen.prepare_experts(experts, x_dtype)
    ready = [one for w in experts if (one := chosen.prepare(w, x_dtype)) is not None]
    if len(ready) < len(experts):
        return None
    return replace(ready[0], tensors=tuple(t for one in ready for t in one.tensors))


def qmm_grouped_prepared(x: Tensor, w: PreparedWeight, experts: int, expert_of: Tensor) -> Tensor:
    """As :func:`qmm_grouped`, of ``experts`` weights that :func:`prepare_experts` made."""
    serving = backend(w.backend)
    if isinstance(serving, GroupedBackend):
        return serving.qmm_grouped(x, w, expert_of)
    each = len(w.tensors) // experts

    def multiply(e: int, rows: Tensor) -> Tensor:
        return serving.qmm_prepared(rows, replace(w, tensors=w.tensors[e * each : (e + 1) * each]))

    return reference.qmm_grouped(x, expert_of, experts, w.n, multiply)


def describe() -> list[dict[str, Any]]:
    """One row a backend: name, ops, and None or the reason it is unavailable (what ``dq backends`` prints)."""
    rows = []
    for name in BACKENDS:
        candidate = backend(name)
        rows.append({"name": name, "ops": sorted(candidate.ops), "unavailable": candidate.available()})
    return rows
