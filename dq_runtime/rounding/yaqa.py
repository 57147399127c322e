"""YAQA (arXiv 2505.22988, section 3, "sketch B"): adaptive rounding against the Hessian of the KL of the whole model.

Near the original weight W* [N, K], one window's KL of the model with W_hat in this layer is vec(D)^T H vec(D) / 2, with
D = W* - W_hat and H the Fisher information, approximated by H_O (x) H_I (H_O [N, N] over outputs, H_I [K, K] over
inputs; modules/fisher.py estimates both):

    KL ~ tr(H_O D H_I D^T) / 2,    H_O = L_O D_O L_O^T,    H_I = L_I D_I L_I^T,    L unit lower triangular, D diagonal
       = sum_ij (D_O)_i (D_I)_j (L_O^T D L_I)_ij^2 / 2

    W_hat = Q(W* + L_O'^T D L_I' + L_O'^T D + D L_I'),    L' = L - I,    Q: nearest grid value

Entry (i, j) of the argument of Q needs D only at (p >= i, q >= j): rounded from the last row and column backwards,
every entry of L_O^T D L_I is the error of one rounding, at most half a step where the grid is not exceeded. With H_O =
I this is LDLQ, row by row.

Entries on one anti-diagonal do not need each other. They are rounded together, in tiles: what finished tiles contribute
comes by matrix products, N K (N + K) / 2 multiply-adds in all, and what is left is 2 (N + K) small vector steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dq_runtime.errors import SpecError
from dq_runtime.grids import Grid, Scales
from dq_runtime.rounding.base import Choice, Fisher, Job, LayerProblem, Needs, Rounded, options_from
from dq_runtime.rounding.sequential import Outcome, nearest_choice, round_independently

# Rows and columns of a tile. The vector steps inside tiles do 4 x TILE multiply-adds a weight, the matrix products
# (N + K) / 2 at ten times the speed: at 32 the two take about the same time on a layer of 576 x 1536.
TILE = 32


@dataclass(frozen=True)
class Options:
    """``damping``: added to the diagonal of both factors, as a share of its mean. ``order``: ``index`` goes from the
    last row and column to the first, ``curvature`` from those with the largest diagonal to those with the smallest."""

    damping: float = 0.01
    order: str = "curvature"

    def __post_init__(self) -> None:
        if not 0 < self.damping < math.inf:
            raise SpecError(f"rounding 'yaqa': damping must be positive, got {self.damping}")
        if self.order not in ("index", "curvature"):
            raise SpecError(f"rounding 'yaqa': order must be 'index' or 'curvature', got {self.order!r}")


class Yaqa:
    """Layer by layer in any order: the factors are those of the original model. A resumed run estimates them again."""

    needs = Needs.WEIGHTS | Needs.FISHER
    between_neighbours = False
    any_grid = True
    adjustable = frozenset[str]()

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.settings = options_from(Options, "yaqa", options)

    def options(self) -> dict[str, Any]:
        return asdict(self.settings)

    def round(self, job: Job) -> Rounded:
        """Deterministic given the factors. ``loss`` in the history: nats of one window, by the formula above."""
        assert job.fisher is not None, "the pipeline makes the factors that `needs` declares"
        factors = job.fisher()
        return round_independently(job, lambda name, layer: self.round_layer(layer, factors[name]))

    def round_layer(self, layer: LayerProblem, fisher: Fisher) -> Outcome:
        """The better, by the formula above, of this rounding and nearest; nearest where no gradient ever came."""
        nearest = nearest_choice(layer)
        scale = float(fisher.inputs.diagonal().double().mean())
        if scale == 0:
            return Outcome(nearest, {"uncalibrated": 1.0})
        w = layer.weight()
        codes = kronecker_ldlq(w, layer.grid, layer.scales, fisher, self.settings.damping, self.settings.order)

        def loss(codes: Tensor) -> float:
            # With the conventions of Fisher, E[vec(G) vec(G)^T] is outputs (x) inputs / mean(diag(inputs)).
            return kronecker_error(w - layer.grid.decode(codes, layer.scales), fisher) / (2 * scale)

        reached, before = loss(codes), loss(nearest.codes)
        better = reached < before
        figures = {"loss": min(reached, before), "loss_nearest": before}
        return Outcome(Choice(codes) if better else nearest, figures)


def kronecker_error(delta: Tensor, fisher: Fisher) -> float:
    """tr(H_O D H_I D^T) for a weight error D [N, K], summed in float64."""
    delta = delta.double()
    return max(0.0, float(((fisher.outputs.double() @ delta) * (delta @ fisher.inputs.double())).sum()))


def kronecker_ldlq(w: Tensor, grid: Grid, scales: Scales, fisher: Fisher, damping: float, order: str) -> Tensor:
    """Codes uint8 [N, K] of a float32 weight [N, K] by the rule of the module docstring; ``scales`` [N, G]."""
    rows = _order(fisher.outputs, order)
    columns = _order(fisher.inputs, order)
    wide = scales.wide(w.shape[1])
    zero = None if wide.zero is None else wide.zero[rows][:, columns]
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    codes[rows[:, None], columns] = round_backwards(
        w[rows][:, columns],
        unit_lower(fisher.outputs[rows][:, rows], damping),
        unit_lower(fisher.inputs[columns][:, columns], damping),
        grid,
        Scales(wide.scale[rows][:, columns], zero),
    )
    return codes


def _order(factor: Tensor, order: str) -> Tensor:
    """Index [n] from the one rounded last to the one rounded first."""
    if order == "index":
        return torch.arange(factor.shape[0], device=factor.device)
    return factor.diagonal().argsort(stable=True)


def unit_lower(h: Tensor, damping: float) -> Tensor:
    """L, float32 unit lower triangular, of h + damping * mean(diag(h)) I = L D L^T. Damped tenfold again until it is
    numerically positive definite, which roundoff can make necessary where the damping is below 1e-14."""
    h = h.double()
    eye = torch.eye(h.shape[0], dtype=h.dtype, device=h.device) * h.diagonal().mean()
    while True:
        c, failed = torch.linalg.cholesky_ex(h + damping * eye)
        if not bool(failed):
            lower: Tensor = c / c.diagonal()
            return lower.float()
        damping *= 10


def round_backwards(w: Tensor, lower_o: Tensor, lower_i: Tensor, grid: Grid, wide: Scales) -> Tensor:
    """Codes uint8 [N, K] by the rule of the module docstring, for unit lower triangular factors [N, N] and [K, K] and
    ``wide`` scales [N, K]."""
    n, k = w.shape
    down, across = -(-n // TILE), -(-k // TILE)
    # Padded to whole tiles, with rows and columns that nothing feeds back to and whose error is therefore 0.
    target, scale = _padded(w, down, across), _padded(wide.scale.float(), down, across, 1)
    zero = None if wide.zero is None else _padded(wide.zero.float(), down, across)
    lower_o, lower_i = _padded(lower_o, down, down), _padded(lower_i, across, across)
    codes = torch.zeros_like(target, dtype=torch.uint8)
    delta, fed = torch.zeros_like(target), torch.zeros_like(target)  # D, and D L_I of the finished tiles
    for diagonal in reversed(range(down + across - 1)):
        spans = [
            (slice(i * TILE, (i + 1) * TILE), slice(j * TILE, (j + 1) * TILE))
            for i in range(max(0, diagonal - across + 1), min(down, diagonal + 1))
            for j in (diagonal - i,)
        ]
        tiles = _Tiles(
            target=_stack([target[r, c] for r, c in spans]),
            base=_stack([target[r, c] + lower_o[r.stop :, r].T @ fed[r.stop :, c] for r, c in spans]),
            fed=_stack([delta[r, c.stop :] @ lower_i[c.stop :, c] for r, c in spans]),
            lower_o=torch.stack([lower_o[r, r] for r, _ in spans]),
            lower_i=_stack([lower_i[c, c] for _, c in spans]).flip(1),
            scale=_stack([scale[r, c] for r, c in spans]),
            zero=None if zero is None else _stack([zero[r, c] for r, c in spans]),
        )
        chosen, errors = tiles.round(grid)
        for i, (r, c) in enumerate(spans):
            codes[r, c], delta[r, c], fed[r, c] = chosen[i].flip(1), errors[i].flip(1), tiles.fed[i].flip(1)
    return codes[:n, :k]


@dataclass(frozen=True)
class _Tiles:
    """The tiles of one anti-diagonal, [B, TILE, TILE] each, with their columns in reverse, which makes anti-diagonals
    diagonals and runs of a row or column along them plain slices.

    ``base`` is the target with what the tiles below feed back, ``fed`` is D L_I so far (completed here), ``lower_o``
    and ``lower_i`` are the blocks on the diagonals of the factors (the latter in reverse both ways).
    """

    target: Tensor
    base: Tensor
    fed: Tensor
    lower_o: Tensor
    lower_i: Tensor
    scale: Tensor
    zero: Tensor | None

    def round(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """Codes and D of the tiles."""
        codes, errors = torch.zeros_like(self.target, dtype=torch.uint8), torch.zeros_like(self.target)
        for offset in range(1 - TILE, TILE):  # rows r, and columns r + offset in reverse
            rows = slice(max(0, -offset), min(TILE, TILE - offset))
            columns = slice(rows.start + offset, rows.stop + offset)
            wanted = _along(self.base, offset) + (self.lower_o[:, :, rows] * self.fed[:, :, columns]).sum(1)
            zero = None if self.zero is None else _along(self.zero, offset).reshape(-1, 1)
            scales = Scales(_along(self.scale, offset).reshape(-1, 1), zero)
            chosen = grid.nearest(wanted.reshape(-1, 1), scales)
            error = _along(self.target, offset) - grid.decode(chosen, scales).view(wanted.shape)
            _along(codes, offset).copy_(chosen.view(wanted.shape))
            _along(errors, offset).copy_(error)
            self.fed[:, rows] += error.unsqueeze(2) * self.lower_i[:, columns]
        return codes, errors


def _along(tiles: Tensor, offset: int) -> Tensor:
    """A view of one diagonal of every tile, [B, m]."""
    return tiles.diagonal(offset, 1, 2)


def _stack(tiles: list[Tensor]) -> Tensor:
    return torch.stack(tiles).flip(2)


def _padded(t: Tensor, down: int, across: int, value: float = 0) -> Tensor:
    """With ``value`` below and to the right, [down * TILE, across * TILE]."""
    return nn.functional.pad(t, (0, across * TILE - t.shape[1], 0, down * TILE - t.shape[0]), value=value)
