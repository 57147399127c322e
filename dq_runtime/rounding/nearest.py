"""Round each weight to the nearest grid value (RTN): no data, no model, the baseline of everything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dq_runtime.environment import give_back_memory
from dq_runtime.rounding.base import Choice, Job, Needs, Rounded, options_from, shared_choice


@dataclass(frozen=True)
class _Options:
    pass


class Nearest:
    """code = round(w / scale + zero), ties to even, clipped to the grid."""

    needs = Needs.WEIGHTS
    between_neighbours = True
    any_grid = True
    adjustable = frozenset[str]()

    def __init__(self, options: Mapping[str, Any]) -> None:
        options_from(_Options, "nearest", options)

    def options(self) -> dict[str, Any]:
        return {}

    def round(self, job: Job) -> Rounded:
        choices = {}
        for step, (name, layer) in enumerate(job.layers.items(), 1):
            choices[name] = shared_choice(Choice(layer.grid.nearest(layer.weight(), layer.scales)), job.ranks)
            give_back_memory(4 * choices[name].codes.numel())
            job.monitor(step, len(job.layers))
        return Rounded(choices, [])
