"""A subspace of the free coordinates that only ever shrinks, as both walks need it.

The basis stays orthonormal: to forbid one direction a in it, a Householder reflection turns the basis until a is its
first vector, which is then dropped. That costs 4 F d multiply-adds for F free coordinates and d dimensions, where a new
QR of the constraints would cost 2 F m^2, and it loses no accuracy with condition numbers, since nothing is divided.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dq_runtime.theory.arrays import Flags, Floats

# A direction shorter than this (of a unit vector) lies outside of the subspace but for rounding: nothing to forbid.
NEGLIGIBLE = 1e-9


class Subspace:
    """``basis`` float64 [F, d], orthonormal columns; ``free`` int64 [F]: which coordinate each row is."""

    def __init__(self, free: Flags, forbidden: Floats) -> None:
        """All directions of the coordinates ``free`` (bool [n]) orthogonal to the rows of ``forbidden`` [k, n]."""
        self.free: NDArray[np.int64] = np.flatnonzero(free)
        f = len(self.free)
        self.basis: Floats = np.eye(f)
        rows = forbidden[:, self.free]
        if 0 < len(rows) <= f:  # one QR for all; its trailing columns are orthogonal to every row of full rank
            q, r = np.linalg.qr(rows.T, mode="complete")
            diagonal = np.abs(np.diagonal(r))
            if diagonal.min() > NEGLIGIBLE * np.abs(r).max():
                self.basis = q[:, len(rows) :]
                return
        for row in rows:
            self.forbid(row)

    @property
    def dimension(self) -> int:
        return int(self.basis.shape[1])

    def forbid(self, direction: Floats) -> None:
        """Keep what is orthogonal to ``direction`` [F] (any length)."""
        length = float(np.linalg.norm(direction))
        if length > 0:
            self._drop(direction @ self.basis / length)

    def freeze(self, rows: NDArray[np.int64]) -> None:
        """Coordinates (by row of the basis) that may not move any more leave the subspace."""
        for row in rows:
            self._drop(self.basis[row].copy())
        keep = np.ones(len(self.free), bool)
        keep[rows] = False
        self.free, self.basis = self.free[keep], self.basis[keep]

    def _drop(self, a: Floats) -> None:
        """Drop the direction with coefficients ``a`` [d] in the basis."""
        length = float(np.linalg.norm(a))
        if length < NEGLIGIBLE or self.dimension == 0:
            return
        u = a / length
        u[0] += 1.0 if u[0] >= 0 else -1.0  # the sign that adds up: no cancellation
        reflected = self.basis[:, 1:] - np.outer(self.basis @ u, u[1:] * (2 / (u @ u)))
        self.basis = reflected
