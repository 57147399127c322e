"""The simpler walk: along random lines inside the null space of the constraints, from face to face of the cube.

    x = start; S = { directions orthogonal to every v_j }
    while S has a dimension:
        u = a standard Gaussian in S;  a, b > 0 = how far x can go along u and along -u before a coordinate meets +-1
        x += a u  with probability b / (a + b),  else  x -= b u
        the coordinates that met +-1 leave S for good

Every turn freezes a coordinate, so it ends after at most n turns with at most m coordinates left (a vertex of the
polytope { x in [-1, 1]^n : <v_j, x> = <v_j, start> }), and E[x] = start: E[a b / (a + b) - b a / (a + b)] = 0. There is
no step size; what is lost against the Edge-Walk is the bound on the covariance, since a long step in one direction is
not small compared with the cube.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from dq_runtime.theory.arrays import Floats, problem
from dq_runtime.theory.subspace import Subspace

# Coordinates this close to +-1 have met it: a step is computed to about 1e-15 of the distance it covers.
MET = 1e-10


def null_space_walk(vectors: ArrayLike, start: ArrayLike, seed: int) -> Floats:
    """``vectors`` [m, n], ``start`` [n] in [-1, 1] -> x [n], at most m of its coordinates neither -1 nor 1 (those are
    still exact), with <v_j, x> = <v_j, start> to rounding. Time O(n^3), memory O(n^2)."""
    v, x = problem("null_space_walk", vectors, start, -1)
    x = x.copy()
    rng = np.random.default_rng(seed)
    met = np.abs(x) >= 1 - MET
    x[met] = np.sign(x[met])
    space = Subspace(~met, v)
    while space.dimension:
        u = space.basis @ rng.standard_normal(space.dimension)
        here = x[space.free]
        ahead, behind = _reach(here, u), _reach(here, -u)
        length = ahead if rng.random() * (ahead + behind) < behind else -behind
        here = here + length * u
        x[space.free] = here
        rows = np.flatnonzero(np.abs(here) >= 1 - MET)
        if not len(rows):  # the nearest face was missed by rounding: it is the coordinate that came closest
            rows = np.array([np.abs(here).argmax()])
        x[space.free[rows]] = np.sign(here[rows])
        space.freeze(rows)
    return x


def _reach(x: Floats, u: Floats) -> float:
    """The largest t with x + t u in the cube."""
    with np.errstate(divide="ignore"):
        return float(((1 - x * np.sign(u)) / np.abs(u)).min())
