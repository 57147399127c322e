"""Bits per layer for a given mean: more where the output distribution feels it, fewer where it does not.

Sensitivity is measured, not modelled: KL(original || model with only this layer rounded to nearest), in nats per token,
for every bit width allowed. Errors of different layers nearly add up, so the best allocation solves

    minimise  sum_l KL_l(b_l)   subject to   sum_l bits_l(b_l) <= target * weights

whose relaxation is a waterfilling: on the lower convex hull of every layer's (bits, KL), the upgrades that save the
most KL per bit are bought first, and the price of the last one is the Lagrange multiplier. (WaterSIC, arXiv 2603.04956,
does this for the columns of one layer, whose integers it codes by their entropy; the grids here have whole bits.)

Nearest stands for every rounding method: a better one lowers all curves, and it is their ratios that decide.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dq_runtime.errors import DQError, SpecError
from dq_runtime.grids import GRIDS
from dq_runtime.levels import SCALE_BITS
from dq_runtime.modules.kl import kl_per_token
from dq_runtime.modules.surgery import weight_of
from dq_runtime.packing.host import words_per_row
from dq_runtime.packing.run_state import RunState
from dq_runtime.spec import GridSpec, Override, QuantSpec

# Projections that vLLM loads as one matrix, which has one bit width (its ``packed_modules_mapping``).
FUSED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
EXPERT = re.compile(r"\.experts\.\d+\..*")

Curves = dict[str, dict[int, float]]  # group -> bits -> KL


@dataclass(frozen=True)
class Allocation:
    """``spec`` with overrides instead of the target, and ``figures`` for the report."""

    spec: QuantSpec
    figures: dict[str, Any]


def group_layers(names: Sequence[str], fused: bool) -> dict[str, list[str]]:
    """Layers that must share their bits, under the name of the first: q, k, v and gate, up of one parent, and all
    experts of a layer (vLLM runs them as one kernel). Without ``fused`` every layer is alone."""
    groups: dict[str, list[str]] = {}
    first: dict[str, str] = {}
    for name in names:
        key = name
        if fused:
            parent, _, leaf = name.rpartition(".")
            siblings = next((s for s in FUSED if leaf in s), None)
            key = name if siblings is None else f"{parent}.{min(siblings)}"
            key = EXPERT.sub(".experts", key)
        groups.setdefault(first.setdefault(key, name), []).append(name)
    return groups


def stored_bits(n: int, k: int, grid: GridSpec) -> int:
    """Bits that a packed weight [N, K] takes on disk with its scales and zero points."""
    groups = grid.groups(k)
    zeros = 0 if grid.symmetric else 32 * words_per_row(n, grid.bits) * groups
    return 32 * words_per_row(k, grid.bits) * n + SCALE_BITS.get(grid.name, 16) * n * groups + zeros


class Planner:
    """What is to be allocated: the groups of ``grids`` that no override fixes, and what each bit width costs."""

    def __init__(self, modules: Mapping[str, Any], grids: Mapping[str, GridSpec], spec: QuantSpec) -> None:
        assert spec.target is not None
        self.spec, self.target = spec, spec.target
        self._grids = grids
        self._shapes: dict[str, tuple[int, int]] = {}
        for name in grids:
            n, k = weight_of(modules[name]).shape
            self._shapes[name] = n, k
        patterns = [override.pattern for override in spec.overrides]
        open_names = [name for name in grids if not any(fnmatchcase(name, p) for p in patterns)]
        if not open_names:
            raise SpecError("--target-bpw has no layer left to choose bits for: every one is named by an --override")
        self.groups = group_layers(open_names, self.target.fused)
        self.weights = sum(n * k for n, k in self._shapes.values())
        self._fixed = sum(stored_bits(*self._shapes[n], g) for n, g in grids.items() if n not in set(open_names))
        self._check()

    def grid(self, name: str, bits: int) -> GridSpec:
        return replace(self._grids[name], bits=bits)

    def costs(self, group: str) -> dict[int, int]:
        """Bits on disk of a group at each choice."""
        names = self.groups[group]
        return {b: sum(stored_bits(*self._shapes[n], self.grid(n, b)) for n in names) for b in self.target.choices}

    def bits_per_weight(self, chosen: Mapping[str, int]) -> float:
        return (self._fixed + sum(self.costs(group)[bits] for group, bits in chosen.items())) / self.weights

    def choose(self, curves: Curves) -> dict[str, int]:
        """The bits of every group."""
        budget = self.target.bits_per_weight * self.weights - self._fixed
        return waterfill({group: self.costs(group) for group in self.groups}, curves, budget)

    def _check(self) -> None:
        low, high = (
            self.bits_per_weight(dict.fromkeys(self.groups, bits))
            for bits in (self.target.choices[0], self.target.choices[-1])
        )
        if not low <= self.target.bits_per_weight <= high:
            choices = ", ".join(map(str, self.target.choices))
            raise SpecError(
                f"--target-bpw {self.target.bits_per_weight:g} cannot be reached with bits {choices} and these groups: "
                f"what can is {low:.3f} to {high:.3f}, scales included; change it, --bits-choices or --group-size"
            )


def waterfill(
    costs: Mapping[str, Mapping[int, int]], curves: Mapping[str, Mapping[int, float]], budget: float
) -> dict[str, int]:
    """The bits of each group: from the cheapest, upgrades along the lower convex hulls in the order of KL saved per bit
    spent, as long as they fit ``budget`` (bits in all). One that does not fit closes its group; smaller ones of other
    groups still come, so that less is left than the cheapest upgrade of any group still open costs."""
    chosen = {group: min(cost) for group, cost in costs.items()}
    left = budget - sum(costs[group][bits] for group, bits in chosen.items())
    upgrades = []
    for group, cost in costs.items():
        for number, (low, high) in enumerate(_hull(cost, curves[group])):
            gain = (curves[group][low] - curves[group][high]) / (cost[high] - cost[low])
            upgrades.append((-gain, number, group, low, high))
    for _, _, group, low, high in sorted(upgrades):
        price = costs[group][high] - costs[group][low]
        if chosen[group] == low and price <= left:
            chosen[group] = high
            left -= price
    return chosen


def _hull(cost: Mapping[int, int], loss: Mapping[int, float]) -> list[tuple[int, int]]:
    """Consecutive vertices (bits, bits) of the lower convex hull of (cost, loss) as far as the loss falls."""
    vertices: list[int] = []
    for bits in sorted(cost):
        if vertices and loss[bits] >= loss[vertices[-1]]:
            continue  # more bits and no better: noise, of weights that hardly matter
        while len(vertices) > 1 and _slope(vertices[-2], vertices[-1], cost, loss) >= _slope(
            vertices[-1], bits, cost, loss
        ):
            vertices.pop()
        vertices.append(bits)
    return list(pairwise(vertices))


def _slope(low: int, high: int, cost: Mapping[int, int], loss: Mapping[int, float]) -> float:
    return (loss[high] - loss[low]) / (cost[high] - cost[low])


@torch.no_grad()
def measure(
    model: Any,
    modules: Mapping[str, Any],
    planner: Planner,
    windows: Tensor,
    state: RunState,
    progress: Callable[[int, int], object],
) -> Curves:
    """KL in nats per token over ``windows`` int64 [count, T] with one group rounded to nearest, the rest original; in
    the model's float32 (the KL of one layer at 4 bits, 1e-4, drowns in bfloat16's rounding). The original's logits are
    kept, 4 bytes x count x T x vocabulary."""
    device = model.get_input_embeddings().weight.device
    tokens = [window.to(device).unsqueeze(0) for window in windows]
    original = [_logits(model, t) for t in tokens]
    measured = state.sensitivity()
    for done, (group, names) in enumerate(planner.groups.items()):
        progress(done, len(planner.groups))
        if group in measured:
            continue
        if state.stop_requested():
            state.stop(done, len(planner.groups))
        measured[group] = {}
        for bits in planner.target.choices:
            with _Rounded(modules, {name: planner.grid(name, bits) for name in names}):
                kl = sum(
                    float(kl_per_token(o, _logits(model, t)).mean()) for o, t in zip(original, tokens, strict=True)
                )
            if not kl < float("inf"):
                raise DQError(
                    f"with {group} at {bits} bits the model gives NaN or infinity; leave it out with --ignore"
                )
            measured[group][str(bits)] = max(0.0, kl / len(tokens))
        state.save_sensitivity(measured)
    progress(len(planner.groups), len(planner.groups))
    return {group: {int(bits): kl for bits, kl in measured[group].items()} for group in planner.groups}


def _logits(model: Any, tokens: Tensor) -> Tensor:
    out = model(input_ids=tokens, use_cache=False).logits
    assert isinstance(out, Tensor)
    return out[0]


class _Rounded:
    """Inside, some layers hold their weights rounded to nearest."""

    def __init__(self, modules: Mapping[str, Any], grids: Mapping[str, GridSpec]) -> None:
        self._weights = {name: weight_of(modules[name]).detach() for name in grids}
        self._grids = grids

    def __enter__(self) -> None:
        self._kept = {name: w.clone() for name, w in self._weights.items()}
        for name, w in self._weights.items():
            grid = GRIDS.get(self._grids[name].name)(self._grids[name])
            scales = grid.fit(w)
            w.copy_(grid.decode(grid.nearest(w, scales), scales))

    def __exit__(self, *error: object) -> None:
        for name, w in self._weights.items():
            w.copy_(self._kept[name])


def allocate(
    model: Any,
    modules: Mapping[str, Any],
    planner: Planner,
    windows: Tensor,
    state: RunState,
    progress: Callable[[int, int], object],
) -> Allocation:
    """Measure on the first windows of ``windows``, choose, and write the choice down as overrides."""
    target = planner.target
    curves = measure(model, modules, planner, windows[: target.windows], state, progress)
    chosen = planner.choose(curves)
    bits = {name: chosen[group] for group, names in planner.groups.items() for name in names}
    overrides = tuple(Override(name, b) for name, b in bits.items())
    reached = planner.bits_per_weight(chosen)
    figures = {
        "target_bits_per_weight": target.bits_per_weight,
        "choices": list(target.choices),
        "fused": target.fused,
        "windows": min(target.windows, len(windows)),
        "bits_per_weight": reached,
        "predicted_kl_nearest": sum(curves[group][b] for group, b in chosen.items()),
        "groups": [
            {"layers": planner.groups[group], "bits": b, "kl": {str(k): v for k, v in curves[group].items()}}
            for group, b in chosen.items()
        ],
    }
    return Allocation(replace(planner.spec, overrides=(*planner.spec.overrides, *overrides), target=None), figures)
