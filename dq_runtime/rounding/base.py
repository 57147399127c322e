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


class Relaxation(Protocol):
    """The relaxed choice of one layer: w_hat = scale * (lo - zero + x), x in [0, 1]; all tensors [N, K]."""

    lo: Tensor  # uint8, the code below
    y: Tensor  # float32, where the original weight lies above lo (outside [0, 1) where the grid is exceeded)
    free: Tensor  # bool, False where both neighbours are the same code

    @property
    def x(self) -> Tensor:
        """float32 leaf with requires_grad, kept in [0, 1], and at 0 where not free."""
        ...

    def mean_squared_step(self) -> float:
        """Mean of scale^2 over the weights: delta^2 of the DiscQuant objective."""
        ...

    def codes(self) -> Tensor:
        """The rounded codes lo + round(x), uint8 [N, K]."""
        ...


class Student(Protocol):
    """The model being rounded: teacher and student are one set of stored weights."""

    windows: int

    @property
    def layers(self) -> Mapping[str, Relaxation]: ...

    def kl(self, window: int) -> Tensor:
        """Mean KL(teacher || student) in nats per token on one calibration window; a scalar whose backward()
        accumulates into every ``x.grad``."""
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
