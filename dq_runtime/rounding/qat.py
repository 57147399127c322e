"""QAT: quantization-aware distillation with a straight-through estimator, on the tokens of the other methods.

    minimise over W, s, z   E_token KL(p_W* || p_W_hat),    W_hat = s (q - z),   q = clamp(round(W / s + z), 0, 2^b - 1)

W [N, K] starts at the original weight W*; the scales s and, on an asymmetric grid, the zero points z [N, G] follow the
learned ends of each group's range. round is taken for the identity in the backward pass (Bengio et al., arXiv
1308.3432), which gives s the gradient of LSQ (arXiv 1902.08153, equation 3); see straight_through.py.

W is trained in units of the grid, so that one rate fits all layers: with s0 the fitted scale, u = W / s0 moves by about
``lr`` grid steps a step of AdamW, an end of a range by the share ``scale_lr`` of itself. Linear warm-up, cosine decay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dq_runtime.errors import SpecError
from dq_runtime.rounding.base import Choice, Job, LayerProblem, Needs, Rounded, options_from
from dq_runtime.rounding.straight_through import LearnedScales, codes, snap
from dq_runtime.rounding.whole_model import batch_backward, run_steps, warmup_cosine

# Adam's epsilon: the KL's gradient per grid step is about 1e-8 on SmolLM2-135M, which the usual 1e-8 would halve.
EPSILON = 1e-16


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters. ``steps`` 0: one pass over the windows, ``batch`` of them a step, as in discquant-paper."""

    steps: int = 0
    batch: int = 1
    lr: float = 0.03
    scale_lr: float = 0.001
    warmup: float = 0.125
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name, value in {"batch": self.batch, "lr": self.lr}.items():
            if not 0 < value < math.inf:
                raise SpecError(f"rounding 'qat': {name} must be positive, got {value}")
        for name, value in {"warmup": self.warmup, "beta1": self.beta1, "beta2": self.beta2}.items():
            if not 0 <= value < 1:
                raise SpecError(f"rounding 'qat': {name} must be in [0, 1), got {value}")
        for name, value in {
            "steps": self.steps, "scale_lr": self.scale_lr, "weight_decay": self.weight_decay
        }.items():  # fmt: skip
            if not 0 <= value < math.inf:
                raise SpecError(f"rounding 'qat': {name} must be 0 or more, got {value}")


class QAT:
    """All layers at once, by gradients through the rounded weights."""

    needs = Needs.WEIGHTS | Needs.STUDENT
    between_neighbours = False
    any_grid = False
    adjustable = frozenset({"lr", "scale_lr"})

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.recipe = options_from(Recipe, "qat", options)

    def options(self) -> dict[str, Any]:
        return asdict(self.recipe)

    def round(self, job: Job) -> Rounded:
        """Codes and scales of every layer; bit-identical for a device and a thread count, interrupted or not."""
        student = job.student
        assert student is not None, "the pipeline builds the student that `needs` declares"
        recipe = self.recipe
        total = recipe.steps or max(1, student.windows // recipe.batch)
        latents = {name: Latent(layer) for name, layer in job.layers.items()}
        weights = {name: latent.weight for name, latent in latents.items()}
        optimizer = _optimizer(latents, recipe)
        saved = job.store.load()
        if saved is not None:
            _restore(latents, optimizer, saved[1])

        def step(i: int) -> dict[str, float]:
            optimizer.zero_grad()
            kl = batch_backward(student, i, recipe.batch, weights)
            share = warmup_cosine(i, total, recipe.warmup)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
            optimizer.step()
            for latent in latents.values():
                latent.scales.confine()
            return {"kl": kl, "lr": recipe.lr * share}

        history = run_steps(job, saved, total, step, lambda: _collect(latents, optimizer))
        return Rounded({name: latent.choice() for name, latent in latents.items()}, history)


class Latent:
    """The trained state of one layer: ``u`` [N, K] = W / s0, and what its scales follow."""

    def __init__(self, layer: LayerProblem) -> None:
        self._s0 = layer.scales.scale.float().unsqueeze(-1)
        self.scales = LearnedScales(layer.grid, layer.scales)
        w = layer.weight()
        self.u = (w.reshape(*layer.scales.scale.shape, -1) / self._s0).view(w.shape).requires_grad_()

    @property
    def parameters(self) -> list[Tensor]:
        return [self.u, *self.scales.parameters]

    def _w(self) -> Tensor:
        return (self.u.view(*self._s0.shape[:2], -1) * self._s0).view(self.u.shape)

    def weight(self) -> Tensor:
        """W_hat [N, K], differentiable in all parameters."""
        return snap(self._w(), *self.scales.now(), self.scales.top)

    @torch.no_grad()
    def choice(self) -> Choice:
        """What is served: the codes nearest to W on the trained scales."""
        s, z = self.scales.now()
        return Choice(codes(self._w(), s, z, self.scales.top), self.scales.held(s, z))


def _optimizer(latents: Mapping[str, Latent], recipe: Recipe) -> torch.optim.AdamW:
    weights = [latent.u for latent in latents.values()]
    ends = [end for latent in latents.values() for end in latent.scales.parameters]
    groups: list[dict[str, Any]] = [
        {"params": weights, "peak": recipe.lr, "weight_decay": recipe.weight_decay},
        {"params": ends, "peak": recipe.scale_lr, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(recipe.beta1, recipe.beta2), eps=EPSILON, fused=True)


def _collect(latents: Mapping[str, Latent], optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    tensors = {}
    for name, latent in latents.items():
        for i, parameter in enumerate(latent.parameters):
            tensors[f"{name}.{i}"] = parameter.detach()
            # A layer that no token has reached yet (an expert) has no moments.
            tensors |= {f"{name}.{i}.{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
    return tensors


def _restore(latents: Mapping[str, Latent], optimizer: torch.optim.AdamW, tensors: Mapping[str, Tensor]) -> None:
    for name, latent in latents.items():
        for i, parameter in enumerate(latent.parameters):
            with torch.no_grad():
                parameter.copy_(tensors[f"{name}.{i}"])
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if (value := tensors.get(f"{name}.{i}.{key}")) is not None:
                    optimizer.state[parameter][key] = value.to(parameter.device)
