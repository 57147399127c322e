"""What the walks are given, checked once: one sentence says what is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dq_runtime.errors import SpecError

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


def problem(name: str, vectors: ArrayLike, start: ArrayLike, low: float) -> tuple[Floats, Floats]:
    """(vectors float64 [m, n], start float64 [n] in [low, 1]) of the function ``name``; else :class:`SpecError`."""
    v, x = np.asarray(vectors, np.float64), np.asarray(start, np.float64)
    if v.ndim != 2 or x.ndim != 1 or v.shape[1] != len(x) or len(x) == 0:
        raise SpecError(f"{name}: vectors must be [m, n] for a start [n], got {list(v.shape)} and {list(x.shape)}")
    if not (np.isfinite(v).all() and np.isfinite(x).all()):
        raise SpecError(f"{name}: vectors and start must be finite numbers; look for NaN in what made them")
    if x.min() < low or x.max() > 1:
        raise SpecError(f"{name}: start must lie in [{low:g}, 1], got {x.min():g} to {x.max():g}")
    return v, x


def norms(vectors: Floats) -> Floats:
    """Euclidean norm of each row, 1 for a row of zeros (which constrains nothing)."""
    lengths: Floats = np.linalg.norm(vectors, axis=1)
    return np.where(lengths > 0, lengths, 1.0)


def shares(name: str, value: float, what: str) -> float:
    """``value`` if it lies strictly between 0 and 1."""
    if not 0 < value < 1:
        raise SpecError(f"{name}: {what} must lie between 0 and 1, got {value}")
    return value


def kernel_matrix(name: str, gram: Any) -> Floats:
    """A square, symmetric, finite Gram matrix float64 [n, n]."""
    k = np.asarray(gram, np.float64)
    if k.ndim != 2 or k.shape[0] != k.shape[1] or not np.isfinite(k).all() or not np.allclose(k, k.T):
        raise SpecError(f"{name}: the kernel matrix must be square, symmetric and finite, got shape {list(k.shape)}")
    return k
