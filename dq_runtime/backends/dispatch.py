"""Ask the backends in order; an explicitly requested one never falls back silently.

``DQ_BACKEND=name`` in the environment requests one backend for every call of the process.
"""

from __future__ import annotations

import os
from functools import cache, lru_cache
from typing import Any

from torch import Tensor

from dq_runtime.backends import BACKENDS
from dq_runtime.backends.base import Backend, Call
from dq_runtime.errors import BackendError
from dq_runtime.packing import PackedWeight


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
    if requested is not None:
        if requested not in BACKENDS:
            raise BackendError(f"DQ_BACKEND={requested!r} is not a backend; known: {', '.join(BACKENDS)}")
        reason = refusal(requested, call)
        if reason is not None:
            raise BackendError(f"DQ_BACKEND={requested} cannot run {call}: {reason}")
        return backend(requested)
    reasons = []
    for name in BACKENDS:
        reason = refusal(name, call)
        if reason is None:
            return backend(name)
        reasons.append(f"{name}: {reason}")
    raise BackendError(f"no backend can run {call}: {'; '.join(reasons)}")


def choose(call: Call) -> Backend:
    """The backend that will run ``call``; raises :class:`BackendError` with every reason when none can."""
    return _choose(call, os.environ.get("DQ_BACKEND") or None)


def qmm(x: Tensor, w: PackedWeight) -> Tensor:
    """x [..., K] @ decode(w).T -> [..., N] in x's dtype, on the preferred backend."""
    flat = x.reshape(-1, w.k)
    y = choose(Call.qmm(flat, w)).qmm(flat, w)
    return y.view(*x.shape[:-1], w.n)


def describe() -> list[dict[str, Any]]:
    """One row a backend: name, ops, and None or the reason it is unavailable (what ``dq backends`` prints)."""
    rows = []
    for name in BACKENDS:
        candidate = backend(name)
        rows.append({"name": name, "ops": sorted(candidate.ops), "unavailable": candidate.available()})
    return rows
