"""DiscQuant as published (arXiv 2501.06417): round the whole model at once, guided by its output distribution.

    w_hat(x) = scale * (lo - zero + x),   x in [0, 1]^n,   y = the x that gives the original weight

    minimise  lambda <c*, x> + E_token KL(p_w || p_w_hat(x)),   c* = 1 - 2y,   by projected gradient, then round x.

c* pulls x to a vertex: at a vertex x^2 = x, so <1 - 2y, x> = ||x - y||^2 + const. The gradient used is the one of the
authors' released code, in which the KL part is scaled by rho / delta^2 (delta^2 = mean squared grid step) and clamped:

    g = clamp(rho / delta^2 * dKL/dx, -clamp, clamp) + (1 - 2y)

The clamp decides who may leave its nearest value: where |1 - 2y| > clamp the sign of g never changes. With clamp 0.5
that is half of all weights, those farther than a quarter step from the middle of their interval.
AdamW on x (weight decay 0.01 as released), linear warm-up, cosine decay, x clamped to [0, 1] after every step.

Kept as it is, to compare with; what this project makes of the idea is ``discquant``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dq_runtime.errors import SpecError
from dq_runtime.rounding.base import AdamStep, Choice, Job, Moments, Needs, Rounded, Student, options_from
from dq_runtime.rounding.whole_model import batch_backward, run_steps, warmup_cosine


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters, defaults of the released code for 3 bits, group 64. ``steps`` 0: one pass over the windows.

    ``start``: ``random`` (x uniform in [0, 1], as released) or ``original`` (x = y). ``batch``: windows per step.
    """

    steps: int = 0
    batch: int = 1
    lr: float = 0.1
    clamp: float = 0.5
    rho: float = 200.0
    warmup: float = 0.125
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.01
    start: str = "random"

    def __post_init__(self) -> None:
        positive = {"batch": self.batch, "lr": self.lr, "clamp": self.clamp, "rho": self.rho}
        for name, value in positive.items():
            if not 0 < value < math.inf:
                raise SpecError(f"rounding 'discquant-paper': {name} must be positive, got {value}")
        for name, value in {"warmup": self.warmup, "beta1": self.beta1, "beta2": self.beta2}.items():
            if not 0 <= value < 1:
                raise SpecError(f"rounding 'discquant-paper': {name} must be in [0, 1), got {value}")
        if self.steps < 0 or not self.weight_decay >= 0:  # not: NaN is refused too
            raise SpecError("rounding 'discquant-paper': steps and weight_decay cannot be negative")
        if self.start not in ("random", "original"):
            raise SpecError(f"rounding 'discquant-paper': start must be 'random' or 'original', got {self.start!r}")


class DiscQuantPaper:
    """All layers at once, by gradients through the running student."""

    needs = Needs.WEIGHTS | Needs.STUDENT | Needs.RELAXED
    between_neighbours = True
    any_grid = True
    adjustable = frozenset({"lr"})

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.recipe = options_from(Recipe, "discquant-paper", options)

    def options(self) -> dict[str, Any]:
        return asdict(self.recipe)

    def round(self, job: Job) -> Rounded:
        """Codes of every layer; bit-identical for a seed, a device and a thread count, interrupted or not."""
        student = job.student
        assert student is not None, "the pipeline builds the student that `needs` declares"
        recipe = self.recipe
        total = recipe.steps or max(1, student.windows // recipe.batch)
        delta2 = sum(layer.mean_squared_step() for layer in student.layers.values()) / len(student.layers)
        moments = {name: layer.moments() for name, layer in student.layers.items()}
        weights = sum(layer.x.numel() for layer in student.layers.values())
        saved = job.store.load()
        if saved is None:
            self._start(student, job.seed)
        else:
            _restore(student, moments, saved[1])

        def step(i: int) -> dict[str, float]:
            kl = batch_backward(student, i, recipe.batch)
            lr = recipe.lr * warmup_cosine(i, total, recipe.warmup)
            hyper = self._hyper(i + 1, lr, delta2)
            counts = [layer.step(moments[name], hyper) for name, layer in student.layers.items()]
            undecided = int(torch.stack(counts).sum())  # the step's one wait for the device after the loss
            return {"kl": kl, "rounded": 1 - undecided / weights, "lr": lr}

        history = run_steps(job, saved, total, step, lambda: _collect(student, moments))
        return Rounded({name: Choice(layer.codes()) for name, layer in student.layers.items()}, history)

    def _start(self, student: Student, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in student.layers.values():
                if self.recipe.start == "random":
                    x = torch.rand(layer.x.shape, generator=generator).to(layer.x.device)
                else:
                    x = layer.y
                layer.x.copy_(x * layer.free)

    def _hyper(self, step: int, lr: float, delta2: float) -> AdamStep:
        recipe = self.recipe
        return AdamStep(
            step, lr, recipe.rho / delta2 / recipe.batch, recipe.clamp, recipe.beta1, recipe.beta2, recipe.weight_decay
        )  # fmt: skip


def _collect(student: Student, state: Mapping[str, Moments]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, layer in student.layers.items():
        tensors |= {f"{name}.x": layer.x.detach(), f"{name}.m": state[name].m, f"{name}.v": state[name].v}
    return tensors


def _restore(student: Student, state: Mapping[str, Moments], tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, layer in student.layers.items():
            layer.x.copy_(tensors[f"{name}.x"])
            state[name].m.copy_(tensors[f"{name}.m"])
            state[name].v.copy_(tensors[f"{name}.v"])
