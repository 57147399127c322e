"""``quantization_config`` of config.json: from grids to compressed-tensors groups, and back for any reader's sake."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dq_runtime.errors import CheckpointError
from dq_runtime.spec import PER_ROW, GridSpec


@dataclass(frozen=True)
class Scheme:
    """How one layer is stored: all that a reader must know besides the tensors."""

    bits: int
    group_size: int  # -1: per row
    symmetric: bool


def scheme_of(grid: GridSpec) -> Scheme:
    return Scheme(grid.bits, grid.group_size, grid.symmetric)


def to_config(layers: Mapping[str, Scheme], dense: Iterable[str], standard: bool) -> dict[str, Any]:
    """The config of these quantized layers; ``dense`` are the linears left alone.

    ``standard`` False marks a checkpoint that compressed-tensors readers cannot serve (GPT-2's Conv1D); it says
    ``quant_method: dq``.
    """
    by_scheme: dict[Scheme, list[str]] = {}
    for name, scheme in layers.items():
        by_scheme.setdefault(scheme, []).append(name)
    groups = {}
    for i, (scheme, names) in enumerate(by_scheme.items()):
        targets = ["Linear"] if len(by_scheme) == 1 else [f"re:^{re.escape(name)}$" for name in names]
        per_row = scheme.group_size == PER_ROW
        groups[f"group_{i}"] = {
            "targets": targets,
            "weights": {
                "num_bits": scheme.bits,
                "type": "int",
                "symmetric": scheme.symmetric,
                "strategy": "channel" if per_row else "group",
                "group_size": None if per_row else scheme.group_size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors" if standard else "dq",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": sorted(dense),
        "config_groups": groups,
    }


def from_config(config: Any, where: str) -> dict[str, Scheme]:
    """Target -> scheme of a ``quantization_config``; raises :class:`CheckpointError` for what we do not read."""
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{where} has no quantization_config; it is not a packed checkpoint")
    method = config.get("quant_method")
    if method not in ("compressed-tensors", "dq"):
        raise CheckpointError(f"{where}: quant_method {method!r} is not read here, only compressed-tensors and dq")
    if config.get("format") != "pack-quantized":
        raise CheckpointError(f"{where}: format {config.get('format')!r} is not read here, only pack-quantized")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError(f"{where}: quantization_config has no config_groups")
    schemes: dict[str, Scheme] = {}
    for label, group in groups.items():
        scheme, targets = _group(group, f"{where}, {label}")
        for target in targets:
            if not isinstance(target, str):
                raise CheckpointError(f"{where}, {label}: target {target!r} is not a string")
            schemes[target] = scheme
    return schemes


def _group(group: Any, where: str) -> tuple[Scheme, list[Any]]:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{where}: no weights are described")
    if group.get("input_activations"):
        raise CheckpointError(f"{where}: quantized activations are not read here, only weight-only checkpoints")
    bits, kind, strategy = weights.get("num_bits"), weights.get("type"), weights.get("strategy")
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8 or kind != "int":
        raise CheckpointError(f"{where}: {bits!r}-bit {kind!r} weights are not read here, only int of 2 to 8 bits")
    if weights.get("dynamic") or weights.get("actorder"):
        raise CheckpointError(f"{where}: dynamic scales and activation order are not read here")
    group_size = PER_ROW if strategy == "channel" else weights.get("group_size")
    if strategy not in ("group", "channel") or isinstance(group_size, bool) or not isinstance(group_size, int):
        raise CheckpointError(f"{where}: strategy {strategy!r} with group size {group_size!r} is not read here")
    targets = group.get("targets")
    if not isinstance(targets, list) or not targets:
        raise CheckpointError(f"{where}: no targets")
    return Scheme(bits, group_size, weights.get("symmetric", True) is True), targets


def match(schemes: Mapping[str, Scheme], layer: str, where: str) -> Scheme:
    """The scheme of one packed layer: an exact or ``re:`` target first, then the class target ``Linear``."""
    for target, scheme in schemes.items():
        if target == layer:
            return scheme
        if target.startswith("re:"):
            try:
                if re.match(target[3:], layer):
                    return scheme
            except re.error as e:
                raise CheckpointError(f"{where}: target {target!r} is not a regular expression ({e})") from None
    if "Linear" in schemes:
        return schemes["Linear"]
    raise CheckpointError(f"{where}: {layer} is packed, but no config group targets it")
