"""DiscQuant at full strength: block by block to a good start, then the whole model at once on its output distribution.

DiscQuant (arXiv 2501.06417, kept as ``discquant-paper``) rounds every weight up or down by gradients of the whole
model's KL to the original. Its weak side is the start: from a random x between fixed neighbours it spends its few
windows on finding what block reconstruction finds with far fewer, and its scales stay those of nearest. So:

1. AutoRound (autoround.py): codes and scales of each block in turn, by the block's output.
2. minimise over u  E_token KL(p_w || p_w_hat(u)),   w_hat(u) = scale * (code(u) - zero)

with u the weights as 16-bit numbers whose first bits are the codes (latent.py), starting at the original weights, each
within its code's cell, on the scales of the first stage. Gradients pass the rounding straight through: unlike x, u may
go to any code, and the loss is that of the rounded model at every step; there is no gap to close at the end. One window
a step (or a few), in a new random order each epoch; Adam at a rate that warms up in a straight line and falls by half a
cosine.

docs/discquant.md says what was measured for each of these choices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dq_runtime.errors import SpecError
from dq_runtime.rounding.autoround import AutoRound
from dq_runtime.rounding.base import Job, Needs, Rounded, options_from
from dq_runtime.rounding.latent import Latent
from dq_runtime.rounding.stages import Part
from dq_runtime.rounding.whole_model import Saved, check_kl, run_steps, warmup_cosine

# A step of the second stage takes a forward pass of the teacher, and of the student one and a backward pass of twice
# its cost; the first stage takes that of the student alone for every window of a batch. For the progress bar.
SHARE_OF_A_STEP = 0.75


@dataclass(frozen=True)
class Recipe:
    """``iters`` steps of ``batch`` windows a block in the first stage; ``epochs`` passes over the windows in the
    second, ``model_batch`` of them a step, whose highest rate is ``lr`` grid steps a step (0: :func:`usual_rate` of
    each layer's bits), reached after the share ``warmup``; ``room``: how far from the middle of its code's cell a
    weight may start, in grid steps."""

    iters: int = 200
    batch: int = 8
    epochs: int = 8
    model_batch: int = 1
    lr: float = 0.0
    warmup: float = 0.1
    room: float = 0.45

    def __post_init__(self) -> None:
        for name in ("iters", "batch", "epochs", "model_batch"):
            if getattr(self, name) < 1:
                raise SpecError(f"rounding 'discquant': {name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.lr < math.inf:
            raise SpecError(f"rounding 'discquant': lr must be 0 or more, got {self.lr}")
        if not 0 <= self.warmup < 1:
            raise SpecError(f"rounding 'discquant': warmup must be in [0, 1), got {self.warmup}")
        if not 0 <= self.room <= 0.5:
            raise SpecError(f"rounding 'discquant': room must be in [0, 0.5], got {self.room}")


def usual_rate(bits: int) -> float:
    """Grid steps a step: 0.004 at 2 bits, 0.002 at 3, 0.001 at 4. A finer grid leaves less to win, and what is not won
    on the windows at hand is fitted to them."""
    return 0.016 / float(2**bits)


class Trained(Protocol):
    """What the second stage asks of a layer: see :class:`~dq_runtime.rounding.latent.Latent`."""

    bits: int
    lr: float
    awaited: int

    def weight(self) -> Tensor: ...

    def settle(self) -> None: ...

    def tensors(self, name: str) -> dict[str, Tensor]: ...


class DiscQuant:
    """Block by block, then all layers at once; see the module docstring."""

    needs = Needs.WEIGHTS | Needs.BLOCKS | Needs.STUDENT
    between_neighbours = False
    any_grid = False
    adjustable = frozenset({"lr", "batch"})

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.recipe = options_from(Recipe, "discquant", options)

    def options(self) -> dict[str, Any]:
        return asdict(self.recipe)

    def check_processes(self, world: int) -> None:
        """Refuse steps whose windows cannot be shared out, evenly in the second stage."""
        if self.recipe.batch < world:
            raise SpecError(
                f"rounding 'discquant': {world} processes share out the windows of a step, so batch must be at least "
                f"{world}, got {self.recipe.batch}"
            )
        if self.recipe.model_batch % world:
            raise SpecError(
                f"rounding 'discquant': {world} processes share out the windows of a step, so model_batch must be a "
                f"multiple of {world}, got {self.recipe.model_batch}; use --set model_batch={world}"
            )

    def round(self, job: Job) -> Rounded:
        """Codes and scales of every layer; bit-identical for a seed, a device and a thread count, interrupted or
        not."""
        student, recipe = job.student, self.recipe
        assert student is not None, "the pipeline builds the student that `needs` declares"
        dtype = student.compute_dtype
        if student.windows < job.ranks.world:
            raise SpecError(f"{job.ranks.world} processes need a window each, and there are {student.windows}")
        # For the progress bar, whose unit is a window of the second stage.
        steps = len(window_batches(student.windows, recipe, job.seed)) * recipe.model_batch
        before = max(1, round(SHARE_OF_A_STEP * recipe.iters * min(recipe.batch, student.windows)))
        blocks = Part(job, "blocks", 0, before, before + steps)
        model = Part(job, "model", before, steps, before + steps)
        saved, rows = model.load(), list[dict[str, float]]()
        if saved is None:
            start = AutoRound({"iters": recipe.iters, "batch": recipe.batch}).round(blocks.job())
            rows, choices = start.history, dict(start.choices)
            del start  # each layer's codes go as soon as its latent is there
            latents = {
                name: Latent.start(layer, choices.pop(name), recipe.room, _seed(job, i), dtype, job.ranks)
                for i, (name, layer) in enumerate(job.layers.items())
            }
        else:
            latents = {
                name: Latent.resumed(layer, name, saved[1], _seed(job, i), dtype, job.ranks)
                for i, (name, layer) in enumerate(job.layers.items())
            }
        history = distil(model.job(), saved, latents, recipe, rows)
        return Rounded({name: latent.choice() for name, latent in latents.items()}, history)


def distil(
    job: Job, saved: Saved, latents: Mapping[str, Trained], recipe: Recipe, before: Sequence[dict[str, float]]
) -> list[dict[str, float]]:
    """The second stage, on ``latents`` in place (which ``saved``, if any, has been restored to); the history, which
    begins with ``before``."""
    student = job.student
    assert student is not None
    batches = window_batches(student.windows, recipe, job.seed)
    rates = {name: recipe.lr or usual_rate(latent.bits) for name, latent in latents.items()}
    weights = {name: latent.weight for name, latent in latents.items()}

    def step(i: int) -> dict[str, float]:
        share, mine, kl = warmup_cosine(i, len(batches), recipe.warmup), job.ranks.mine(batches[i]), 0.0
        for done, window in enumerate(mine, 1):
            for name, latent in latents.items():
                latent.lr, latent.awaited = share * rates[name], len(mine) - done
            kl += float(student.kl_backward(window, weights))  # each latent moves when its last gradient comes
        if len(mine) > 1:
            for latent in latents.values():
                latent.settle()
        kl = job.ranks.total(kl) / len(batches[i])
        check_kl(kl, i)
        return {"kl": kl, "lr": share * max(rates.values())}

    def state() -> dict[str, Tensor]:
        return {key: tensor for name, latent in latents.items() for key, tensor in latent.tensors(name).items()}

    return run_steps(job, saved, len(batches), step, state, before, may_rise=False)


def window_order(windows: int, epochs: int, seed: int) -> list[int]:
    """Every window once an epoch, in a random order of its own."""
    generator = torch.Generator().manual_seed(seed)
    return [window for _ in range(epochs) for window in torch.randperm(windows, generator=generator).tolist()]


def window_batches(windows: int, recipe: Recipe, seed: int) -> list[list[int]]:
    """The windows of every step: that order cut into steps of ``model_batch``; what is left at its end is not used. A
    step may span two epochs. :class:`SpecError` where it is larger than all of them."""
    order, size = window_order(windows, recipe.epochs, seed), recipe.model_batch
    if size > len(order):
        raise SpecError(
            f"rounding 'discquant': model_batch {size} is more than {recipe.epochs} epochs of {windows} windows have; "
            "lower it"
        )
    return [order[i : i + size] for i in range(0, len(order) - size + 1, size)]


def _seed(job: Job, layer: int) -> int:
    """Of the stochastic rounding of one layer."""
    return job.seed * 1_000_003 + layer
