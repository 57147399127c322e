"""Students for the tests of modules and rounding: a real one around a small model, and fakes with known answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dq_runtime.backends import training
from dq_runtime.errors import Interrupted
from dq_runtime.grids import GRIDS
from dq_runtime.modules.student import StudentModel
from dq_runtime.modules.student_linear import StudentLinear
from dq_runtime.modules.surgery import bias_of, linears, replace_module, weight_of
from dq_runtime.rounding import Job
from dq_runtime.rounding.base import AdamStep, Moments, Weights
from dq_runtime.runtime.dense import load_dense
from dq_runtime.spec import GridSpec


def student_linear(w: Tensor, bias: Tensor | None = None, **grid: Any) -> StudentLinear:
    spec = GridSpec(**grid)
    return StudentLinear(w, bias, GRIDS.get(spec.name)(spec))


def student_model(directory: Path, windows: Tensor, **grid: Any) -> StudentModel:
    """Every linear of the model (whose lm_head is tied) as a StudentLinear; float32."""
    model = load_dense(str(directory)).model
    layers = {}
    for name, module in linears(model).items():
        layers[name] = student_linear(weight_of(module), bias_of(module), **grid)
        replace_module(model, name, layers[name])
    return StudentModel(model, layers, windows, torch.float32)


class FakeLayer:
    """A ``Relaxation`` made of bare tensors."""

    def __init__(self, y: Tensor, free: Tensor | None = None) -> None:
        self.y = y
        self.free = torch.ones_like(y, dtype=torch.bool) if free is None else free
        self.lo = torch.full_like(y, 3, dtype=torch.uint8)
        self.x = torch.nn.Parameter(torch.zeros_like(y))

    def mean_squared_step(self) -> float:
        return 0.01

    def moments(self) -> Moments:
        return Moments(torch.zeros_like(self.y), torch.zeros_like(self.y))

    def step(self, moments: Moments, hyper: AdamStep) -> Tensor:
        assert self.x.grad is not None
        x, grad = self.x.detach(), self.x.grad
        undecided = training.projected_adam(x, grad, moments.m, moments.v, self.y, self.free, hyper)
        self.x.grad = None
        return undecided

    def codes(self) -> Tensor:
        return self.lo + self.x.detach().round().to(torch.uint8)


class FakeStudent:
    """A ``Student`` of one layer whose KL is any function of (x, window)."""

    def __init__(self, layer: FakeLayer, kl: Callable[[Tensor, int], Tensor], windows: int = 4) -> None:
        self.layers: Mapping[str, FakeLayer] = {"layer": layer}
        self.windows = windows
        self.asked: list[int] = []
        self._kl = kl

    def kl_backward(self, window: int, weights: Weights | None = None) -> Tensor:
        assert weights is None, "its KL is a function of x"
        self.asked.append(window)
        loss = self._kl(self.layers["layer"].x, window)
        loss.backward()
        return loss.detach()


class MemoryStore:
    """A ``StateStore`` in memory; ``stop_after`` is the number of steps after which the user asks to stop."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.saved: tuple[int, dict[str, Tensor], dict[str, Any]] | None = None
        self.steps = 0

    def due(self) -> bool:
        return False

    def save(self, step: int, tensors: Mapping[str, Tensor], extra: Mapping[str, Any]) -> None:
        self.saved = step, {n: t.clone() for n, t in tensors.items()}, {**extra, "history": list(extra["history"])}

    def load(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        return self.saved

    def stop_requested(self) -> bool:
        self.steps += 1
        return self.steps == self.stop_after

    def stop(self, step: int, total: int) -> None:
        raise Interrupted(f"stopped after step {step} of {total}")


def job(student: Any, seed: int = 0, store: MemoryStore | None = None, monitor: Any = None) -> Job:
    return Job(student.layers, student, seed, store or MemoryStore(), monitor or (lambda *a, **k: None))
