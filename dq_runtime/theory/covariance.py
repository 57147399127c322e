"""Gradients with a chosen spectrum: g = Q diag(sqrt(lambda)) z, z standard Gaussian, covariance Q diag(lambda) Q^T.

Q is a random rotation. With Q = 1 each weight would have its own eigenvalue, errors would not mix, and rounding to
nearest would be optimal: it is because gradients do not point along single weights that there is anything to gain.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dq_runtime.errors import SpecError
from dq_runtime.theory.arrays import Floats


def power_law(n: int, alpha: float) -> Floats:
    """Eigenvalues k^-alpha, k = 1 .. n, scaled to sum to n (a mean of 1); alpha 0 is the flat spectrum."""
    if n < 1 or not alpha >= 0:
        raise SpecError(f"power_law: n must be positive and alpha not negative, got {n} and {alpha}")
    eigenvalues = np.arange(1, n + 1, dtype=np.float64) ** -alpha
    scaled: Floats = eigenvalues * (n / eigenvalues.sum())
    return scaled


@dataclass(frozen=True)
class Gradients:
    """A distribution of gradients: ``eigenvalues`` [n] and ``rotation`` [n, n], whose columns are the eigenvectors."""

    eigenvalues: Floats
    rotation: Floats

    @classmethod
    def with_spectrum(cls, eigenvalues: Floats, seed: int) -> Gradients:
        """In a random basis (the Q of a Gaussian matrix, signs fixed: uniform over rotations and reflections)."""
        n = len(eigenvalues)
        q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
        return cls(eigenvalues, q * np.sign(np.diagonal(r)))

    def sample(self, m: int, seed: int) -> Floats:
        """``m`` gradients, [m, n]."""
        z = np.random.default_rng(seed).standard_normal((m, len(self.eigenvalues)))
        gradients: Floats = z * np.sqrt(self.eigenvalues) @ self.rotation.T
        return gradients

    def error(self, difference: Floats) -> float:
        """d^T Sigma d = E <g, d>^2 of a ``difference`` d [n]: the mean squared first-order change of the loss."""
        turned = difference @ self.rotation
        return float((turned**2 * self.eigenvalues).sum())
