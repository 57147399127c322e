"""The contract of a rounding method. Shapes: N = out_features, K = in_features, G = K / group_size.

A method declares what it needs and receives it in a :class:`Job`; it never imports the modules that provide it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Flag, auto
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from dq_runtime import spec
from dq_runtime.grids import Grid, Scales
from dq_runtime.ranks import ALONE, Ranks, is_shared, whole


class Needs(Flag):
    """What the pipeline must build before a method can run."""

    WEIGHTS = auto()  # the weights, grids and scales alone
    BLOCKS = auto()  # the transformer blocks in order, each with what enters it once those before it are rounded
    STUDENT = auto()  # the running model, differentiable in whatever its weights are made of
    RELAXED = auto()  # the student's own relaxed choices x, 4 bytes a weight: for methods that learn those
    FISHER = auto()  # Kronecker factors of the Hessian of the full-model KL


class LayerProblem(Protocol):
    """One linear layer to round."""

    @property
    def grid(self) -> Grid: ...

    @property
    def scales(self) -> Scales: ...

    def weight(self) -> Tensor:
        """The weight in the basis of the transform, float32 [N, K]."""
        ...


@dataclass(frozen=True)
class Choice:
    """What a method decided for one layer: uint8 ``codes`` [N, K], and the ``scales`` they are meant with where the
    method moved those (None: the layer's own). Scales are in the serving dtype already. Where several processes round
    one model, all are shared out among them by rows (:func:`shared_choice`)."""

    codes: Tensor
    scales: Scales | None = None


def shared(scales: Scales, ranks: Ranks) -> Scales:
    """The rows of this process."""
    if ranks.mesh is None:
        return scales
    return Scales(ranks.share(scales.scale), None if scales.zero is None else ranks.share(scales.zero))


def shared_choice(choice: Choice, ranks: Ranks) -> Choice:
    """The rows of this process, of a choice that all have."""
    return Choice(ranks.share(choice.codes), None if choice.scales is None else shared(choice.scales, ranks))


def whole_scales(scales: Scales) -> Scales:
    """All rows, gathered."""
    if not is_shared(scales.scale):
        return scales
    return Scales(whole(scales.scale), None if scales.zero is None else whole(scales.zero))


def whole_choice(choice: Choice) -> Choice:
    """All rows, gathered."""
    return Choice(whole(choice.codes), None if choice.scales is None else whole_scales(choice.scales))


@dataclass(frozen=True)
class Gram:
    """Second moments of one layer's inputs over all calibration tokens, in the basis in which its weight is rounded.

    With x~ what enters the layer once everything before it is rounded and x what enters it in the original model:
    ``inputs`` = E[x~ x~^T] float32 [K, K], ``cross`` = E[x x~^T] float32 [K, K] or None where it was not asked for, and
    ``mismatch`` = E||x - x~||^2 beside it, else 0. ``tokens``: how many were seen; 0 for an expert that no token
    reached, and both matrices are 0 then.
    """

    inputs: Tensor
    cross: Tensor | None
    tokens: int
    mismatch: float = 0.0


@dataclass(frozen=True)
class Fisher:
    """Kronecker factors of one layer's Hessian of the full-model KL, float32: with G [N, K] the gradient of one
    window's log-likelihood, labels drawn from the model, ``inputs`` = E[G^T G] / N [K, K] and ``outputs`` =
    E[G G^T] / K [N, N] (YAQA, arXiv 2505.22988, sketch B)."""

    inputs: Tensor
    outputs: Tensor


Weights = Mapping[str, Callable[[], Tensor]]  # layer -> its weight [N, K] in the rounding basis, differentiable or not


def fixed(weight: Tensor) -> Callable[[], Tensor]:
    """A weight that is there already, as :data:`Weights` has them."""
    return lambda: weight


class Block(Protocol):
    """Layers that are rounded together: those of one transformer block, or one layer that is part of none.

    Two streams run through the model: the original one, and the rounded one, whose layers are the originals until
    :meth:`install` replaces them.
    """

    @property
    def layers(self) -> Mapping[str, LayerProblem]:
        """By qualified name, in the order in which they run."""
        ...

    @property
    def stages(self) -> Sequence[Sequence[str]]:
        """The same names; those of one stage see the same input, which the stages before it determine."""
        ...

    @property
    def windows(self) -> int: ...

    def grams(self, stage: Sequence[str], cross: bool = False) -> Mapping[str, Gram]:
        """One pass over all windows through what is installed so far; raises :class:`DQError` on NaN or infinity. With
        ``cross`` before any :meth:`target`, which takes the place of the original stream."""
        ...

    def second_moments(self) -> Mapping[str, Tensor]:
        """The diagonals of what :meth:`grams` would give for all layers at once, float32 [K] each: one pass over all
        windows through what is installed so far, and a thousandth of the arithmetic."""
        ...

    def target(self, windows: Sequence[int]) -> Tensor:
        """What the original block makes of the original stream, float32 [B, T, H], for these calibration windows."""
        ...

    def output(self, windows: Sequence[int], weights: Weights) -> Tensor:
        """What the block makes of the rounded stream with ``weights`` in place (other layers as they are now), float32
        [B, T, H]; differentiable in whatever the weights depend on."""
        ...

    def install(self, name: str, choice: Choice) -> None:
        """From now on the rounded stream runs through this choice."""
        ...


class Blocks(Protocol):
    """The whole model, block by block."""

    def __iter__(self) -> Iterator[Block]:
        """In the order in which they run. Asking for the next carries both streams through the one before it."""
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
    """The model being rounded: teacher and student are one set of stored weights. ``compute_dtype``: of its matrix
    products."""

    windows: int
    compute_dtype: torch.dtype

    @property
    def layers(self) -> Mapping[str, Relaxation]: ...

    def kl_backward(self, window: int, weights: Weights | None = None) -> Tensor:
        """Mean KL(teacher || student) in nats per token on one calibration window, a scalar on the model's device
        without history; its gradient has been added to every ``x.grad``. With ``weights`` (for every layer) the
        student runs on those instead of the relaxed choices, and the gradient goes to what they depend on; each weight
        is built twice, for the forward and for the backward pass, and must be the same both times."""
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
    """Everything a rounding method may use. ``student``, ``blocks`` and ``fisher`` are set only for methods that need
    STUDENT, BLOCKS and FISHER; ``fisher()`` makes one pass over the calibration windows. ``ranks``: the processes that
    round together; a method that has no ``check_processes`` is run by one alone.

    A run that streams blocks from disk gives methods without STUDENT and FISHER one job a block. ``order`` is then the
    place of each layer among all of the model's, for random numbers that do not depend on it (:meth:`place`)."""

    layers: Mapping[str, LayerProblem]
    student: Student | None
    seed: int
    store: StateStore
    monitor: Monitor
    blocks: Blocks | None = None
    fisher: Callable[[], Mapping[str, Fisher]] | None = None
    ranks: Ranks = ALONE
    order: Mapping[str, int] | None = None

    def place(self, name: str) -> int:
        """Where a layer comes among all layers of the model that are rounded, from 0."""
        return list(self.layers).index(name) if self.order is None else self.order[name]


@dataclass(frozen=True)
class Rounded:
    """The choice for every layer, and the figures of every step (for the report)."""

    choices: Mapping[str, Choice]
    history: list[dict[str, float]]

    @property
    def codes(self) -> dict[str, Tensor]:
        """uint8 [N, K] per layer."""
        return {name: choice.codes for name, choice in self.choices.items()}


def choices_to_tensors(choices: Mapping[str, Choice]) -> dict[str, Tensor]:
    """Flat, as a :class:`StateStore` keeps tensors."""
    tensors = {}
    for name, choice in choices.items():
        tensors[f"{name}.codes"] = choice.codes
        if choice.scales is not None:
            tensors[f"{name}.scale"] = choice.scales.scale
            if choice.scales.zero is not None:
                tensors[f"{name}.zero"] = choice.scales.zero
    return tensors


def choices_from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Choice]:
    """The inverse of :func:`choices_to_tensors`."""
    choices = {}
    for name in (key.removesuffix(".codes") for key in tensors if key.endswith(".codes")):
        scale = tensors.get(f"{name}.scale")
        scales = None if scale is None else Scales(scale, tensors.get(f"{name}.zero"))
        choices[name] = Choice(tensors[f"{name}.codes"], scales)
    return choices


class Rounding(Protocol):
    """A method is built from its options; unknown options raise :class:`SpecError`. One that several processes can run
    together also has ``check_processes(world)``, which raises it where its options do not allow so many."""

    needs: Needs
    between_neighbours: bool  # True if every code is one of the weight's two neighbours
    any_grid: bool  # False for a method whose arithmetic is that of evenly spaced levels: the int grid alone
    adjustable: frozenset[str]  # options that a resumed run may change: what its saved state and its steps do not fix

    def __init__(self, options: Mapping[str, Any]) -> None: ...

    def options(self) -> dict[str, Any]:
        """All options with their defaults filled in: what is written into the checkpoint."""
        ...

    def round(self, job: Job) -> Rounded: ...


T = TypeVar("T")


def options_from(cls: type[T], method: str, options: Mapping[str, Any]) -> T:
    """The options of a rounding method; see :func:`dq_runtime.spec.options_from`."""
    return spec.options_from(cls, f"rounding {method!r}", options)
