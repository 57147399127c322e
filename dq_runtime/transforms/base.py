"""The contract of a transform: rounding happens on ``fold(W)``, and at run time
``apply_output(apply_input(x) @ fold(W).T)`` must reproduce ``x @ W.T``."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Transform(Protocol):
    """A change of basis around one linear layer (N = out_features, K = in_features, M tokens)."""

    def fold(self, w: Tensor) -> Tensor:
        """The weight [N, K] in the basis that is rounded."""
        ...

    def apply_input(self, x: Tensor) -> Tensor:
        """Activations [M, K] into that basis."""
        ...

    def apply_output(self, y: Tensor) -> Tensor:
        """Results [M, N] back out of it."""
        ...
