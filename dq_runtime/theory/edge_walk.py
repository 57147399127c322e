"""The Edge-Walk of Lovett and Meka ("Constructive discrepancy minimization by walking on the edges", arXiv 1203.5747).

    given   v_1 .. v_m in R^n,  start x_0 in [-1, 1]^n,  widths c_j >= 0 with  sum_j exp(-c_j^2 / 16) <= n / 16
    find    x in [-1, 1]^n with  |<v_j, x - x_0>| <= c_j ||v_j||  for all j,  and |x_i| >= 1 - delta for n/2 of all i

Theorem 4 there: T = 16 / (3 gamma^2) steps of the walk below succeed with probability at least 0.1.

    free = all coordinates; S = all directions
    T times:  x += gamma * u,  u a standard Gaussian in the subspace S
              a coordinate with |x_i| >= 1 - delta is frozen: it leaves S for good
              a constraint with |<v_j, x - x_0>| >= (c_j - delta) ||v_j|| is tight: v_j leaves S for good

So x moves on the faces of the polytope once it has met them (it "sticks"), E[x] = x_0, and the covariance of x - x_0 is
at most gamma^2 T = 16/3 times the identity, whatever was frozen when, since a step adds gamma^2 times a projection.
(But for steps that would leave the polytope, which one walk in a thousand meets: those are drawn again.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dq_runtime.errors import SpecError
from dq_runtime.theory.arrays import Flags, Floats, norms, problem, shares
from dq_runtime.theory.subspace import Subspace

VARIANCE = 16 / 3  # gamma^2 T, the K_1 of the paper
# Probability, over a whole walk, that any step would leave the polytope; such a step is drawn again.
OVERSHOOT = 1e-3
# Steps drawn at once: between two events all steps are alike, so that one matrix product makes many of them.
CHUNKS = (8, 512)


@dataclass(frozen=True)
class Colouring:
    """``x`` float64 [n] in [-1, 1]; ``frozen`` bool [n], where |x_i| >= 1 - delta; ``tight`` bool [m]; ``steps``."""

    x: Floats
    frozen: Flags
    tight: Flags
    steps: int


def widths_allowed(widths: ArrayLike, n: int) -> bool:
    """Whether the condition of the theorem holds: sum_j exp(-c_j^2 / 16) <= n / 16."""
    return float(np.exp(-(np.asarray(widths, np.float64) ** 2) / 16).sum()) <= n / 16


def step_size(n: int, m: int, delta: float) -> tuple[float, int]:
    """(gamma, T) so that with probability 1 - OVERSHOOT none of the T (n + m) increments, each Gaussian with standard
    deviation at most gamma, exceeds delta: 2 T (n + m) exp(-delta^2 / (2 gamma^2)) = OVERSHOOT."""
    gamma = delta
    for _ in range(30):  # a fixed point of a logarithm: the error shrinks tenfold a turn
        steps = VARIANCE / gamma**2
        gamma = delta / math.sqrt(2 * math.log(2 * steps * (n + m) / OVERSHOOT))
    return gamma, math.ceil(VARIANCE / gamma**2)


def edge_walk(vectors: ArrayLike, start: ArrayLike, widths: ArrayLike, seed: int, delta: float = 0.1) -> Colouring:
    """One partial colouring. ``vectors`` [m, n], ``start`` [n] in [-1, 1], ``widths`` [m] the c_j.

    The polytope is kept for certain, half of the coordinates only with the theorem's probability: look at ``frozen``
    and take another seed, or walk again from ``x``. Time O(T n d / chunk) matrix products of d <= n dimensions plus
    O(n d) per event, memory O(n^2 + m n). :class:`SpecError` where the widths break the theorem's condition.
    """
    v, x0 = problem("edge_walk", vectors, start, -1)
    shares("edge_walk", delta, "delta")
    m, n = v.shape
    c = np.asarray(widths, np.float64)
    if c.shape != (m,) or not (c >= 0).all():
        raise SpecError(f"edge_walk: widths must be {m} numbers that are not negative, one for each vector")
    if not widths_allowed(c, n):
        total = float(np.exp(-(c**2) / 16).sum())
        raise SpecError(
            f"edge_walk: sum of exp(-c^2 / 16) is {total:.3g}, more than n / 16 = {n / 16:.3g}; widen constraints or "
            "drop some"
        )
    return _Walk(v / norms(v)[:, None], x0, c, delta, np.random.default_rng(seed)).run()


class _Walk:
    """The state of one walk; vectors have length 1 here."""

    def __init__(self, v: Floats, x0: Floats, c: Floats, delta: float, rng: np.random.Generator) -> None:
        self.v, self.x0, self.c, self.delta, self.rng = v, x0, c, delta, rng
        self.x = x0.copy()
        self.frozen: Flags = np.abs(x0) >= 1 - delta
        self.tight: Flags = c <= delta
        self.space = Subspace(~self.frozen, v[self.tight])
        self.gamma, self.total = step_size(len(x0), len(v), delta)

    def run(self) -> Colouring:
        done, chunk = 0, CHUNKS[0]
        while done < self.total and self.space.dimension:
            taken = self._advance(min(chunk, self.total - done))
            done += taken
            chunk = min(CHUNKS[1], max(CHUNKS[0], 2 * taken))
        return Colouring(self.x, self.frozen, self.tight, done)

    def _advance(self, count: int) -> int:
        """Up to ``count`` steps, to the first that meets a face; returns how many were taken (0: one was redrawn)."""
        free, space = self.space.free, self.space
        u = self.rng.standard_normal((count, space.dimension)) @ space.basis.T
        paths = self.x[free] + self.gamma * np.cumsum(u, axis=0)  # [count, F]
        loose = np.flatnonzero(~self.tight)
        moved = self.v[loose][:, free]
        base = self.v[loose] @ (self.x - self.x0) - moved @ self.x[free]
        products = np.abs(paths @ moved.T + base)  # [count, loose]
        met = (np.abs(paths) >= 1 - self.delta).any(1) | (products >= self.c[loose] - self.delta).any(1)
        last = int(met.argmax()) if met.any() else count - 1
        if (np.abs(paths[last]) > 1).any() or (products[last] > self.c[loose]).any():
            if last:
                self.x[free] = paths[last - 1]  # as far as nothing was met; the step after it is drawn again
            return last
        self.x[free] = paths[last]
        if met.any():
            self._stick(loose[products[last] >= self.c[loose] - self.delta])
        return last + 1

    def _stick(self, tight: NDArray[np.int64]) -> None:
        rows = np.flatnonzero(np.abs(self.x[self.space.free]) >= 1 - self.delta)
        self.frozen[self.space.free[rows]] = True
        self.space.freeze(rows)
        for j in tight:
            self.space.forbid(self.v[j, self.space.free])
        self.tight[tight] = True


def edge_round(vectors: ArrayLike, start: ArrayLike, seed: int, delta: float = 0.1) -> Floats:
    """Round as the proof of DiscQuant's theorem 3.3 does (arXiv 2501.06417): partial colourings with widths 0, so that
    <v_j, x> never changes, each on the coordinates that the last one left, while m <= (how many are left) / 16.

    ``vectors`` [m, n], ``start`` [n] in [-1, 1] -> [n]; what is frozen is -1 or 1, at most delta away from where the
    walk left it, and at most 16 m coordinates are still free. A colouring that froze less than half is walked on from.
    """
    v, x = problem("edge_round", vectors, start, -1)
    x = x.copy()
    free: Flags = np.abs(x) < 1
    phase = 0
    while 16 * len(v) <= int(free.sum()) and free.any():
        where = np.flatnonzero(free)
        walked = edge_walk(v[:, where], x[where], np.zeros(len(v)), seed + phase, delta)
        x[where] = np.where(walked.frozen, np.sign(walked.x), walked.x)
        free[where[walked.frozen]] = False
        phase += 1
    return x
