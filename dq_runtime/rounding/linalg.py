"""The second moments of a layer's inputs as layerwise methods use them: damped, ordered, factored.

With E [N, K] the error of a weight and H [K, K] the second moments of its inputs, the mean squared error of the layer's
output is tr(E H E^T). All of these methods minimise

    loss(E) = tr(E (H + lambda I) E^T) = ||E R||^2,   lambda = damp * mean(diag H),   R R^T = H + lambda I

with R upper triangular. The damping (1% in OPTQ, arXiv 2210.17323) keeps an error small where the calibration text says
nothing. An input that is never active has lambda alone on its diagonal and 0 beside it, so its column is rounded to
nearest and disturbs no other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dq_runtime.errors import DQError, SpecError
from dq_runtime.grids import Scales
from dq_runtime.rounding.base import Choice, LayerProblem
from dq_runtime.rounding.sequential import Outcome

# Where the Cholesky factorisation fails it is tried again with ten times the damping, up to this many mean(diag H).
# float32 factors a rank-one H [1536, 1536] with 1e-3, so what fails with 10 is not a matrix of second moments.
MOST_DAMPING = 10.0
# Weights that are decoded and judged at once: what passes over them stays in a 1 MB cache. [1536, 576] on two cores.
CHUNK = 2**17
ORDERS = ("activation", "natural")


def check_damp(method: str, damp: float) -> None:
    """Raises :class:`SpecError` unless 0 < damp <= 1."""
    if not 0 < damp <= 1:  # not: NaN is refused too
        raise SpecError(f"rounding {method!r}: damp must be above 0 and at most 1, got {damp}")


def check_choice(method: str, name: str, value: str, known: tuple[str, ...]) -> None:
    """Raises :class:`SpecError` unless ``value`` is one of ``known``."""
    if value not in known:
        raise SpecError(f"rounding {method!r}: {name} must be {' or '.join(map(repr, known))}, got {value!r}")


@dataclass(frozen=True)
class Curvature:
    """H + lambda I and its factor, in the order in which columns are rounded.

    ``order`` int64 [K]: the column that is i-th; ``hessian`` and ``factor`` float32 [K, K] in that order, the factor
    upper triangular with factor @ factor.T = hessian. ``backwards`` is the hessian with its last row and column first.
    """

    order: Tensor
    backwards: Tensor
    factor: Tensor

    @cached_property
    def hessian(self) -> Tensor:
        """H + lambda I, float32 [K, K]; GPTQ does without it and saves a pass over K x K numbers."""
        return self.backwards.flip(0, 1)

    def row_losses(self, error: Tensor) -> Tensor:
        """loss of each row of ``error`` float32 [N, K] (columns in the layer's own order): float32 [N]."""
        return (error @ self._rows_restored).square_().sum(1)

    @cached_property
    def _rows_restored(self) -> Tensor:
        """The factor for errors in the layer's own order: moves K rows once instead of N x K numbers each time."""
        return self.factor.index_select(0, self._places)

    @cached_property
    def _places(self) -> Tensor:
        """Where in ``order`` each column is, int64 [K]."""
        return self.order.argsort()

    def row_losses_in_order(self, error: Tensor) -> Tensor:
        """The same of an error whose columns are in ``order``."""
        return (error @ self.factor).square_().sum(1)

    def feedback(self) -> Tensor:
        """F [K, K] strictly upper triangular, F_ij = R_ij / R_jj: with the error e = w - w_hat of the columns before j,
        w_j + sum_i e_i F_ij is the value to round, because ||e R||^2 = sum_j R_jj^2 (e_j + sum_{i<j} e_i F_ij)^2."""
        feedback = self.factor / self.factor.diagonal()
        feedback.diagonal().zero_()  # all that a strictly upper triangular one has not: no pass of triu over K x K
        return feedback

    def solve(self, right: Tensor) -> Tensor:
        """X [N, K] with X @ hessian = right [N, K], both in the curvature's order."""
        x = torch.linalg.solve_triangular(self.factor.T, right, upper=False, left=False)
        solved: Tensor = torch.linalg.solve_triangular(self.factor, x, upper=True, left=False)
        return solved

    def restored(self, ordered: Tensor) -> Tensor:
        """A tensor [N, K] with its columns back in the layer's own order."""
        return ordered.index_select(1, self._places)


def curvature(inputs: Tensor, damp: float, order: str = "natural") -> Curvature:
    """Of second moments ``inputs`` float32 [K, K]; ``order``: ``natural``, or ``activation``, the largest diagonal
    first (columns with much to say are rounded while many others can still make up for them). Raises
    :class:`DQError`."""
    diagonal = inputs.diagonal()
    columns = torch.arange(len(diagonal), device=inputs.device)
    if order == "activation":
        columns = diagonal.argsort(descending=True, stable=True)
    # Read backwards, R R^T = H with R upper triangular is the ordinary factorisation.
    backwards = columns.flip(0)
    hessian = inputs.index_select(0, backwards).index_select(1, backwards)
    mean = float(diagonal.double().mean()) or 1.0  # inputs that are all 0: any weight is as good
    added = 0.0
    while damp <= MOST_DAMPING:
        hessian.diagonal().add_(damp * mean - added)
        added = damp * mean
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not int(failed):
            return Curvature(columns, hessian, lower.flip(0, 1))
        damp *= 10
    raise DQError(
        f"the second moments of the calibration inputs cannot be factored, even with {added:.3g} on the diagonal; use "
        "--compute-dtype float32 or other calibration text"
    )


def keep_better(
    layer: LayerProblem, w: Tensor, target: Tensor, curve: Curvature, found: Choice, loss: Tensor | None = None
) -> Outcome:
    """``found``, with nearest on the layer's own scales in the rows where that is no worse, and the loss of both.

    ``w`` float32 [N, K] is the layer's weight and ``target`` [N, K] what the error is measured from; ``loss`` [N] that
    of ``found`` where it is known already.
    """
    grid, own = layer.grid, layer.scales
    scales = found.scales or own
    codes, nearest_losses, losses = [], [], []
    step = max(1, CHUNK // w.shape[1])
    for begin in range(0, len(w), step):
        part = slice(begin, begin + step)
        codes.append(grid.nearest(w[part], _rows(own, part)))
        nearest_losses.append(curve.row_losses(grid.decode(codes[-1], _rows(own, part)) - target[part]))
        if loss is None:
            decoded = grid.decode(found.codes[part], _rows(scales, part))
            losses.append(curve.row_losses(decoded - target[part]))
    nearest, loss_nearest = torch.cat(codes), torch.cat(nearest_losses)
    loss = torch.cat(losses) if loss is None else loss
    worse = ~(loss < loss_nearest).unsqueeze(1)
    chosen = torch.where(worse, nearest, found.codes)
    if found.scales is not None:
        scales = _chosen(worse, own, scales)
    figures = {
        "loss": float(torch.minimum(loss, loss_nearest).double().sum()),
        "loss_nearest": float(loss_nearest.double().sum()),
    }
    return Outcome(Choice(chosen, None if found.scales is None else scales), figures)


def _rows(scales: Scales, part: slice) -> Scales:
    return Scales(scales.scale[part], None if scales.zero is None else scales.zero[part])


def _chosen(condition: Tensor, a: Scales, b: Scales) -> Scales:
    """``a`` in the rows where the bool ``condition`` [N, 1] holds, else ``b``."""
    zero = None
    if a.zero is not None and b.zero is not None:
        zero = torch.where(condition, a.zero, b.zero)
    return Scales(torch.where(condition, a.scale, b.scale), zero)
