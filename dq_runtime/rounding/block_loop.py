"""Block reconstruction: tune all layers of a block until its output is that of the original block.

    minimise   mean over tokens and hidden units of (block(x~; w_hat) - block_0(x))^2

with x~ what enters the block once everything before it is rounded, and x what entered the original block_0: the
objective of BRECQ (arXiv 2102.05426). Methods differ in how w_hat depends on what they learn. Minibatches of windows
are drawn without replacement, epoch after epoch. What a block ends with is the best of its snapshots, judged with hard
codes on a fixed set of windows, plain nearest among them: no block ends worse than that.

Where several processes round one model, each runs its own windows of a minibatch and its own of the judged ones; the
gradients are added up, so that all learn the same. Every process holds the activations of all windows, and carries them
itself from block to block: three forward passes, against 200 steps of 8 windows.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from dq_runtime.errors import DQError, SpecError
from dq_runtime.ranks import ALONE, Ranks
from dq_runtime.rounding.base import Block, Choice, Job, LayerProblem, Needs, Rounded, fixed
from dq_runtime.rounding.sequential import Outcome, nearest_choice, round_blocks

# Windows on which snapshots are judged, evenly spread: one forward pass over 16 windows of 512 tokens of a SmolLM2
# block costs 0.3 s, two thirds of a step with its batch of 8.
JUDGED = 16
# Snapshots are taken this many times, over the second half of the steps (the first half only explores).
SNAPSHOTS = 4


@dataclass(frozen=True)
class Loop:
    """``iters`` steps of ``batch`` windows each; ``outliers``: the share of the largest squared errors left out of the
    mean (a handful of hidden units of the first token can hold most of a block's squared error)."""

    iters: int
    batch: int
    outliers: float = 0.0

    def check(self, method: str) -> None:
        """Raise :class:`SpecError` naming the option that is out of range."""
        for name, value in {"iters": self.iters, "batch": self.batch}.items():
            if value < 1:
                raise SpecError(f"rounding {method!r}: {name} must be at least 1, got {value}")
        if not 0 <= self.outliers < 1:
            raise SpecError(f"rounding {method!r}: outliers must be in [0, 1), got {self.outliers}")


def check_positive(method: str, **options: float) -> None:
    """Raise :class:`SpecError` naming the first option that is not a finite number above 0 (NaN is not)."""
    for name, value in options.items():
        if not 0 < value < math.inf:
            raise SpecError(f"rounding {method!r}: {name} must be positive, got {value}")


class Recipe(Protocol):
    """The options of a method: a frozen dataclass."""

    @property
    def loop(self) -> Loop: ...

    __dataclass_fields__: ClassVar[dict[str, Any]]


class Search(ABC):
    """What a method learns for one layer."""

    @abstractmethod
    def learned(self) -> list[tuple[list[Tensor], float]]:
        """Leaf tensors, each list with its rate at the first step."""

    @abstractmethod
    def weight(self) -> Tensor:
        """float32 [N, K], differentiable in what is learned."""

    @abstractmethod
    def choice(self) -> Choice:
        """The hard codes (and scales) at the present values."""

    def start(self) -> Choice:
        """The choice to begin from, judged like every later one."""
        return self.choice()

    def begin(self, share: float) -> None:  # noqa: B027 (most methods anneal nothing)
        """Called before each step; ``share`` of the steps are done, from 0 to below 1."""

    def end(self) -> None:  # noqa: B027 (most methods have no bounds)
        """Called after each step of the optimiser, to bring what is learned back into its bounds."""

    def penalty(self) -> Tensor | None:
        """Added to the loss, which is in units of plain nearest's; a scalar."""
        return None


class SignSGD(torch.optim.Optimizer):
    """theta <- theta - lr * sign(gradient)."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad.sign_(), alpha=group["lr"])


class Lion(torch.optim.Optimizer):
    """arXiv 2302.06675, no weight decay: with m the running mean of the gradients g,
    theta <- theta - lr * sign(beta1 m + (1 - beta1) g), then m <- beta2 m + (1 - beta2) g."""

    def __init__(self, groups: list[dict[str, Any]], beta1: float = 0.9, beta2: float = 0.95) -> None:
        super().__init__(groups, {"lr": 1.0, "beta1": beta1, "beta2": beta2})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p]["m"] = torch.zeros_like(p)
                m = self.state[p]["m"]
                p.sub_(torch.lerp(p.grad, m, group["beta1"]).sign_(), alpha=group["lr"])
                m.lerp_(p.grad, 1 - group["beta2"])


def constant(share: float) -> float:
    """No decay."""
    return 1.0


def linear_decay(share: float) -> float:
    """The factor on every rate after ``share`` of the steps: from 1 to 0 in a straight line."""
    return 1 - share


def cosine_decay(share: float) -> float:
    """Half a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * share))


def batches(windows: int, batch: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Endless minibatches of ``min(batch, windows)``: a random order, used up before a new one is drawn."""
    size, queue = min(batch, windows), list[int]()
    while True:
        while len(queue) < size:
            fresh = torch.randperm(windows, generator=generator).tolist()
            fresh.sort(key=queue.__contains__)  # stable; what is still queued comes last: no window twice in a batch
            queue += fresh
        yield queue[:size]
        queue = queue[size:]


def block_loss(output: Tensor, target: Tensor, outliers: float = 0.0, ranks: Ranks = ALONE) -> Tensor:
    """Mean squared error [B, T, H] over all but the share ``outliers`` of the largest errors; a scalar, float32. With
    ``ranks``: the part of it that comes from the windows of this process (maybe none), of those of all."""
    squared = (output - target).square()
    count = int(ranks.total(squared.numel()))
    dropped = min(math.ceil(outliers * count), count - 1)
    if dropped:
        largest = ranks.lowest_of_top(squared.detach().flatten(), dropped)
        squared = torch.where(squared < largest, squared, 0)
    if ranks.world > 1:
        return squared.sum() / count
    return squared.mean()


class BlockMethod(ABC):
    """A method that differs from the others only in what it learns for a layer, and by which optimiser."""

    needs = Needs.WEIGHTS | Needs.BLOCKS
    between_neighbours = False
    any_grid = False
    adjustable = frozenset({"lr", "scale_lr", "batch"})  # of the blocks to come
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] = torch.optim.Adam
    decay: Callable[[float], float] = staticmethod(cosine_decay)
    recipe: Recipe

    def options(self) -> dict[str, Any]:
        return asdict(self.recipe)

    def round(self, job: Job) -> Rounded:
        return round_blocks(job, partial(self._block, job.ranks))

    @abstractmethod
    def searches(self, block: Block, generator: torch.Generator) -> Mapping[str, Search]:
        """For every layer of the block."""

    def _block(
        self, ranks: Ranks, block: Block, generator: torch.Generator, progress: Callable[[float], None]
    ) -> Mapping[str, Outcome]:
        searches = self.searches(block, generator)
        groups = [{"params": p, "lr": rate} for search in searches.values() for p, rate in search.learned()]
        return reconstruct(
            block, searches, self.optimizer(groups), self.recipe.loop, generator, progress, self.decay, ranks
        )  # fmt: skip


def reconstruct(
    block: Block,
    searches: Mapping[str, Search],
    optimizer: torch.optim.Optimizer,
    loop: Loop,
    generator: torch.Generator,
    progress: Callable[[float], None],
    decay: Callable[[float], float],
    ranks: Ranks = ALONE,
) -> dict[str, Outcome]:
    """Run the loop; every layer's outcome carries the block's ``loss`` and ``loss_nearest`` (mean squared error, see
    :func:`block_loss`), on the judged windows. ``searches`` are for all layers of the block. A loss that is not finite
    raises :class:`DQError`."""
    judge = _Judge(block, loop, ranks)
    nearest = judge.consider({name: nearest_choice(layer) for name, layer in block.layers.items()})
    judge.consider({name: search.start() for name, search in searches.items()})
    unit = nearest or 1.0
    rates = [group["lr"] for group in optimizer.param_groups]
    order = batches(block.windows, loop.batch, generator)
    first, every = loop.iters // 2, max(1, math.ceil(loop.iters / 2 / SNAPSHOTS))
    for i in range(loop.iters):
        share = i / loop.iters
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * decay(share)
        for search in searches.values():
            search.begin(share)
        windows = ranks.mine(next(order))
        output = block.output(windows, {name: search.weight for name, search in searches.items()})
        loss = block_loss(output, block.target(windows), loop.outliers, ranks) / unit
        loss = sum((p / ranks.world for s in searches.values() if (p := s.penalty()) is not None), loss)
        if ranks.any(not bool(torch.isfinite(loss))):
            raise _not_finite(block, f"step {i + 1}")
        optimizer.zero_grad()
        if loss.requires_grad:  # not where all layers are experts to which the router sent none of these tokens
            loss.backward()  # type: ignore[no-untyped-call]
        ranks.sum_gradients([p for group in optimizer.param_groups for p in group["params"]])
        optimizer.step()
        for search in searches.values():
            search.end()
        done = i + 1
        if done == loop.iters or (done > first and (loop.iters - done) % every == 0):
            judge.consider({name: search.choice() for name, search in searches.items()})
        progress(done / loop.iters)
    figures = {"loss": judge.best, "loss_nearest": nearest}
    return {name: Outcome(choice, figures) for name, choice in judge.choices.items()}


class _Judge:
    """Keeps the best choices seen."""

    def __init__(self, block: Block, loop: Loop, ranks: Ranks) -> None:
        self._block, self._loop, self._ranks = block, loop, ranks
        count = min(JUDGED, block.windows)
        windows = [i * block.windows // count for i in range(count)]
        self._batches = [windows[i : i + loop.batch] for i in range(0, count, loop.batch)]
        self.best = math.inf
        self.choices: Mapping[str, Choice] = {}

    @torch.no_grad()
    def consider(self, choices: Mapping[str, Choice]) -> float:
        """The loss of these choices; they are kept if it is the lowest so far."""
        weights = {name: _decoded(self._block.layers[name], choice) for name, choice in choices.items()}
        loss = self._loss(weights)
        if not math.isfinite(loss):
            raise _not_finite(self._block, "the judged windows")
        if loss < self.best:
            self.best, self.choices = loss, choices
        return loss

    def _loss(self, weights: Mapping[str, Tensor]) -> float:
        def loss(windows: list[int]) -> float:
            output = self._block.output(windows, {name: fixed(w) for name, w in weights.items()})
            return float(block_loss(output, self._block.target(windows), self._loop.outliers)) * len(windows)

        return sum(self._ranks.spread(loss, self._batches)) / sum(len(windows) for windows in self._batches)


def _decoded(layer: LayerProblem, choice: Choice) -> Tensor:
    return layer.grid.decode(choice.codes, choice.scales or layer.scales)


def _not_finite(block: Block, where: str) -> DQError:
    names: Sequence[str] = list(block.layers)
    return DQError(
        f"the reconstruction error of the block of {names[0]} is not finite at {where}; use --compute-dtype float32 or "
        "a lower lr, and --resume to go on from the last saved block, or look for damaged weights before it"
    )
