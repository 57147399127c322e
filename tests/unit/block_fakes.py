"""A block of one linear layer with known inputs, for the tests of methods that reconstruct blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from students import MemoryStore
from torch import Tensor

from dq_runtime.grids import GRIDS, Grid, Scales
from dq_runtime.rounding import ROUNDINGS, Job
from dq_runtime.rounding.base import Choice, Gram, Rounded, Weights
from dq_runtime.spec import GridSpec

# Every width with every kind of grid; K is a multiple of 16 where groups are, and not where a row is one group.
GRID_CASES = [
    (GridSpec(bits=bits, group_size=group, symmetric=symmetric), 48 if group > 0 else 37)
    for bits, group, symmetric in product(range(2, 9), (16, -1), (True, False))
]


class FakeLayer:
    """A ``LayerProblem``."""

    def __init__(self, w: Tensor, spec: GridSpec) -> None:
        self.grid: Grid = GRIDS.get("int")(spec)
        self.scales: Scales = self.grid.fit(w)
        self._w = w

    def weight(self) -> Tensor:
        return self._w

    def decode(self, choice: Choice) -> Tensor:
        return self.grid.decode(choice.codes, choice.scales or self.scales)


class OneLayer:
    """A ``Block`` that computes x w^T for inputs [windows, T, K], and the ``Blocks`` that hold it alone."""

    def __init__(self, layer: FakeLayer, inputs: Tensor) -> None:
        self.layer, self.inputs = layer, inputs
        self.layers = {"layer": layer}
        self.stages = [["layer"]]
        self.windows = len(inputs)
        self.installed: dict[str, Choice] = {}
        self.asked: list[list[int]] = []  # the minibatches whose gradient was wanted

    def __iter__(self) -> Iterator[OneLayer]:
        yield self

    def second_moments(self) -> Mapping[str, Tensor]:
        return {"layer": self.inputs.flatten(0, 1).square().mean(0)}

    def grams(self, stage: Sequence[str], cross: bool = False) -> Mapping[str, Gram]:
        x = self.inputs.flatten(0, 1)
        return {"layer": Gram(x.T @ x / len(x), None, len(x))}

    def target(self, windows: Sequence[int]) -> Tensor:
        return self.inputs[list(windows)] @ self.layer.weight().T

    def output(self, windows: Sequence[int], weights: Weights) -> Tensor:
        if torch.is_grad_enabled():
            self.asked.append(list(windows))
        return self.inputs[list(windows)] @ weights["layer"]().T

    def install(self, name: str, choice: Choice) -> None:
        self.installed[name] = choice

    def error(self, choice: Choice) -> float:
        """Mean squared error over all windows."""
        with torch.no_grad():
            difference = self.inputs @ (self.layer.decode(choice) - self.layer.weight()).T
        return float(difference.square().mean())


def correlated_block(spec: GridSpec, n: int, k: int, windows: int = 6, seed: int = 0) -> OneLayer:
    """Inputs whose directions differ in size, so that rounding errors can cancel, which nearest does not know."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=g)
    mix = torch.randn(8, k, generator=g)
    inputs = torch.randn(windows, 16, 8, generator=g) @ mix + 0.1 * torch.randn(windows, 16, k, generator=g)
    return OneLayer(FakeLayer(w, spec), inputs)


def hand_layer() -> FakeLayer:
    """3 bits, symmetric, a row a group, so that scale = 2 * absmax / 7 and the zero point is 4:

    row 0   scale 1      w / s =  3.5  0.4 -1.2     + 4 =  7.5  4.4  2.8    nearest  7  4  3  (7.5 -> 8 -> 7)
    row 1   scale 0.25   w / s = -3.5  1.2  0.4     + 4 =  0.5  5.2  4.4    nearest  0  5  4  (ties go to even)
    """
    return FakeLayer(torch.tensor([[3.5, 0.4, -1.2], [-0.875, 0.3, 0.1]]), GridSpec(bits=3, group_size=-1))


def run(block: OneLayer, method: str, options: Mapping[str, Any], seed: int = 0) -> Rounded:
    def silent(step: int, total: int, **figures: float) -> None:
        pass

    rounding = ROUNDINGS.get(method)(options)
    job = Job(block.layers, None, seed, MemoryStore(), silent, blocks=block)
    rounded: Rounded = rounding.round(job)
    return rounded


def check_on_every_grid(method: str, options: Mapping[str, Any], least: float = 0.9) -> None:
    """Codes and scales are servable, the history tells the truth, and rounding errors cancel better than nearest's
    (by 5%) on at least this share of the grids."""
    better = 0
    for spec, k in GRID_CASES:
        block = correlated_block(spec, 5, k)
        rounded = run(block, method, options)
        choice, (row,) = rounded.choices["layer"], rounded.history
        assert block.installed["layer"] is choice
        assert choice.codes.dtype is torch.uint8
        assert int(choice.codes.max()) < 2**spec.bits
        if choice.scales is not None:
            assert choice.scales.scale.dtype is block.layer.scales.scale.dtype
            assert bool((choice.scales.scale != 0).all() and choice.scales.scale.isfinite().all())
            assert (choice.scales.zero is None) == spec.symmetric
        nearest = Choice(block.layer.grid.nearest(block.layer.weight(), block.layer.scales))
        if not options.get("outliers"):
            torch.testing.assert_close(row["loss"], block.error(choice), rtol=1e-4, atol=1e-9)
            torch.testing.assert_close(row["loss_nearest"], block.error(nearest), rtol=1e-4, atol=1e-9)
        assert row["loss"] <= row["loss_nearest"]
        better += row["loss"] < 0.95 * row["loss_nearest"]
    assert better >= least * len(GRID_CASES), f"{method} was better than nearest on {better} of {len(GRID_CASES)} grids"


def leaf_gradient(weight: Callable[[], Tensor], gradient: Tensor, leaf: Tensor) -> Tensor:
    """What arrives at a leaf when ``gradient`` [N, K] arrives at the weight."""
    (result,) = torch.autograd.grad(weight(), leaf, gradient)
    return result
