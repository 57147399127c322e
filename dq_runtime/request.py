"""What a quantization is asked for, resolved as far as can be before a model is loaded, and who watches it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from dq_runtime.ranks import Ranks
from dq_runtime.rounding import Rounding
from dq_runtime.spec import QuantSpec
from dq_runtime.transforms import Transform


class Stage(Protocol):
    """Receives the progress of one stage."""

    def __call__(self, step: int, total: int, **figures: float) -> None: ...


class Listener(Protocol):
    """Shows a run to its user; the command line draws bars, the default is silent."""

    def stage(self, title: str) -> Stage: ...


class Silent:
    """No output."""

    def stage(self, title: str) -> Stage:
        return lambda step, total, **figures: None


@dataclass(frozen=True)
class Request:
    """The arguments of :func:`dq_runtime.pipeline.quantize`, resolved."""

    model: str
    output: Path
    spec: QuantSpec
    rounding: Rounding
    transform: Transform
    counts: tuple[int, int]  # calibration and held-out windows
    continued: int  # windows that the model adds to the calibration windows
    length: int
    select: str  # which calibration windows, see data/selection.py
    dtype: torch.dtype  # of the rounding loop
    device: str
    overwrite: bool
    blockwise: bool
    ranks: Ranks

    @property
    def full_spec(self) -> dict[str, Any]:
        """The spec as JSON, the method's defaults filled in."""
        return {
            **self.spec.to_json(),
            "transform_options": self.transform.options(),
            "rounding": {"name": self.spec.rounding.name, "options": self.rounding.options()},
        }
