"""The mathematics that rounding by discrepancy rests on, as small algorithms in numpy; docs/theory.md explains them.

Shapes: n unknowns (weights), m constraints (gradients of m samples). Walks live in the cube [-1, 1]^n, where a
rounded coordinate is -1 or 1; DiscQuant's x in [0, 1] is (1 + coordinate) / 2.
"""

from dq_runtime.theory.edge_walk import Colouring, edge_round, edge_walk
from dq_runtime.theory.kernel_walk import Halving, coreset, discrepancy, gaussian_kernel, kernel_halving, refine
from dq_runtime.theory.null_space_walk import null_space_walk

__all__ = [
    "Colouring",
    "Halving",
    "coreset",
    "discrepancy",
    "edge_round",
    "edge_walk",
    "gaussian_kernel",
    "kernel_halving",
    "null_space_walk",
    "refine",
]
