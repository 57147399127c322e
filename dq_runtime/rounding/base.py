"""The contract of a rounding method. Shapes: N = out_features, K = in_features, G = K / group_size.

A method declares what it needs and receives it in a :class:`Job`; it never imports the modules that provide it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Flag, auto
from typing import Any, Protocol, TypeVar

from torch import Tensor

from dq_runtime.errors import SpecError
from dq_runtime.grids import Grid, Scales


class Needs(Flag):
    """What the pipeline must build before a method can run."""

    WEIGHTS = auto()  # the weights, grids and scales alone
    HESSIAN = auto()  # E[x x^T] of each layer's input
    STUDENT = auto()  # the running model, differentiable in every relaxed choice
    FISHER = auto()  # Kronecker factors of the Hessian of the full-model KL


class LayerProblem(Protocol):
    """One linear layer to round."""

    @property
    def grid(self) -> Grid: ...

    @property
    def scales(self) -> Scales: ...

    def weight(self) -> Tensor:
        """The (transformed) weight, float32 [N, K]."""
        ...


@dataclass(frozen=True)
class AdamStep:
    """One projected AdamW step (arXiv 1711.05101, then clamped to [0, 1]) on the DiscQuant gradient

        g = clamp(kl_weight * grad, -clamp, clamp) + (1 - 2y)   where free, 0 elsewhere

    ``step`` counts from 1 (for the bias corrections); all rates are already those of this step.
    """

    step: int
    lr: float
    kl_weight: float  # rho / delta^2
    clamp: float
    beta1: float
    beta2: float
    weight_decay: float
    epsilon: float = 1e-8


@dataclass(frozen=True)
class Moments:
    """Adam's running mean and mean square of one layer's gradient, [N, K] each, in the layer's choice of dtype."""

    m: Tensor
    v: Tensor


class Relaxation(Protocol):
    """The relaxed choice of one layer: w_hat = scale * (lo - zero + x), x in [0, 1]; all tensors [N, K].

    The method never touches the state's bytes: the layer may hold lo, y and free packed, and it makes the step.
    """

    @property
    def lo(self) -> Tensor:
        """uint8, the code below."""
        ...

    @property
    def y(self) -> Tensor:
        """float32, where the original weight lies above lo (outside [0, 1) where the grid is exceeded)."""
        ...

    @property
    def free(self) -> Tensor:
        """bool, False where both neighbours are the same code."""
        ...

    @property
    def x(self) -> Tensor:
        """Leaf with requires_grad, float32 or (a state held in half) float16; kept in [0, 1], at 0 where not free."""
        ...

    def mean_squared_step(self) -> float:
        """Mean of scale^2 over the weights: delta^2 of the DiscQuant objective."""
        ...

    def moments(self) -> Moments:
        """Zeros to begin with."""
        ...

    def step(self, moments: Moments, hyper: AdamStep) -> Tensor:
        """One projected AdamW step on ``x`` and ``moments``, in place; clears ``x.grad``. Returns how many x are still
        undecided, 0.01 < x < 0.99: an int64 scalar on x's device, so that no layer waits for another."""
        ...

    def codes(self) -> Tensor:
        """The rounded codes lo + round(x), uint8 [N, K]."""
        ...


class Student(Protocol):
    """The model being rounded: teacher and student are one set of stored weights."""

    windows: int

    @property
    def layers(self) -> Mapping[str, Relaxation]: ...

    def kl_backward(self, window: int) -> Tensor:
        """Mean KL(teacher || student) in nats per token on one calibration window, a scalar on the model's device
        without history; its gradient has been added to every ``x.grad``."""
        ...


class StateStore(Protocol):
    """Where a long method keeps its state, so that a killed run continues bit for bit."""

    def due(self) -> bool:
        """Whether enough time has passed since the last save."""
        ...

    def save(self, step: int, tensors: Mapping[str, Tensor], extra: Mapping[str, Any]) -> None:
        """Replace the saved state atomically."""
        ...

    def load(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """The last saved state, or None to start from the beginning."""
        ...

    def stop_requested(self) -> bool:
        """Whether the user asked to stop; the method saves and calls :meth:`stop`."""
        ...

    def stop(self, step: int, total: int) -> None:
        """Raise :class:`dq_runtime.errors.Interrupted`."""
        ...


class Monitor(Protocol):
    """Shows progress; a method calls it once per step with its current figures."""

    def __call__(self, step: int, total: int, **figures: float) -> None: ...


@dataclass(frozen=True)
class Job:
    """Everything a rounding method may use. ``student`` is set only for methods that need STUDENT."""

    layers: Mapping[str, LayerProblem]
    student: Student | None
    seed: int
    store: StateStore
    monitor: Monitor


@dataclass(frozen=True)
class Rounded:
    """uint8 codes [N, K] per layer, and the figures of every step (for the report)."""

    codes: Mapping[str, Tensor]
    history: list[dict[str, float]]


class Rounding(Protocol):
    """A method is built from its options; unknown options raise :class:`SpecError`."""

    needs: Needs
    between_neighbours: bool  # True if every code is one of the weight's two neighbours

    def __init__(self, options: Mapping[str, Any]) -> None: ...

    def options(self) -> dict[str, Any]:
        """All options with their defaults filled in: what is written into the checkpoint."""
        ...

    def round(self, job: Job) -> Rounded: ...


T = TypeVar("T")


def options_from(cls: type[T], method: str, options: Mapping[str, Any]) -> T:
    """Build a frozen options dataclass, converting strings from the command line; an unknown key is one sentence."""
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in options.items():
        if key not in known:
            raise SpecError(f"rounding {method!r} has no option {key!r}; known: {', '.join(known) or 'none'}")
        kind: Any = type(known[key].default)
        try:
            if kind is bool and isinstance(value, str):
                values[key] = {"true": True, "false": False}[value.lower()]
            elif (kind is not bool and isinstance(value, bool)) or (kind is int and int(value) != float(value)):
                raise TypeError  # True is not a rate, and 2.5 steps are not 2
            else:
                values[key] = kind(value)
        except (ValueError, TypeError, KeyError):
            raise SpecError(f"rounding {method!r}: option {key} takes a {kind.__name__}, got {value!r}") from None
    return cls(**values)
