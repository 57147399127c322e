"""Rounding by a linear programme: a vertex of { x in [0, 1]^n : <g_j, x> = <g_j, y> for j = 1 .. m }.

A vertex has at most m coordinates that are neither 0 nor 1, since n constraints are tight there and only m of them are
not bounds. Which vertex, the objective says. An arbitrary one keeps the m products and nothing else. DiscQuant's
(arXiv 2501.06417, section 3) is c* = 1 - 2y: where x is 0 or 1, x^2 = x, so <c*, x> = ||x - y||^2 - ||y||^2, and the
vertex of smallest <c*, x> is, but for the fractional coordinates, the one nearest to y.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from dq_runtime.errors import SpecError
from dq_runtime.theory.arrays import Floats, problem


def discquant_objective(y: ArrayLike) -> Floats:
    """c* = 1 - 2y, [n]."""
    return 1 - 2 * np.asarray(y, np.float64)


def linear_vertex(vectors: ArrayLike, y: ArrayLike, objective: ArrayLike) -> Floats:
    """The vertex minimising <objective, x>: ``vectors`` [m, n], ``y`` and ``objective`` [n] -> x [n] in [0, 1].

    Dual simplex of HiGHS through scipy (which ends on a vertex, as interior points do not); exponential in the worst
    case, in practice some m pivots of O(m n) each.
    """
    from scipy.optimize import linprog  # only the toy needs scipy

    g, start = problem("linear_vertex", vectors, y, 0)
    c = np.asarray(objective, np.float64)
    if c.shape != start.shape:
        raise SpecError(f"linear_vertex: the objective must have one number for each of {len(start)} coordinates")
    found = linprog(c, A_eq=g, b_eq=g @ start, bounds=(0, 1), method="highs-ds")
    if found.x is None:
        raise SpecError(f"linear_vertex: HiGHS found no vertex ({found.message}); scale the vectors to similar lengths")
    return np.clip(np.asarray(found.x, np.float64), 0, 1)
