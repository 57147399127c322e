"""``quantization_config`` of config.json: from grids to compressed-tensors groups, and back for any reader's sake."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dq_runtime.errors import CheckpointError
from dq_runtime.packing.shown import shown
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


def from_config(config: Mapping[str, Any], where: str) -> dict[str, Scheme]:
    """Target -> scheme of a ``quantization_config``; raises :class:`CheckpointError` for what we do not read."""
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError(f"{where}: quantization_config has no config_groups")
    if config.get("kv_cache_scheme"):
        raise CheckpointError(f"{where}: a quantized key-value cache is not read here")
    sparsity = config.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise CheckpointError(f"{where}: sparse weights ({shown(sparsity['format'])}) are not read here")
    if any(place not in _FOLDED for place in _transform_places(config.get("transform_config"))):
        raise CheckpointError(f"{where}: transforms of activations (transform_config) are not read here")
    schemes: dict[str, Scheme] = {}
    for label, group in groups.items():
        scheme, targets = _group(group, config.get("format"), f"{where}, {shown(label)}")
        for target in targets:
            if not isinstance(target, str):
                raise CheckpointError(f"{where}, {shown(label)}: target {shown(target)} is not a string")
            schemes.setdefault(target, scheme)  # as the library: the first group that names a layer has it
    return schemes


# Where compressed-tensors applies a transform once and for all; anywhere else it acts on activations at run time.
_FOLDED = ("weight_input", "weight_output")


def _transform_places(config: Any) -> Iterator[Any]:
    """Every "location" of a transform_config, however deep."""
    left = [config]
    while left:
        value = left.pop()
        if isinstance(value, Mapping):
            if "location" in value:
                yield value["location"]
            left += value.values()
        elif isinstance(value, list):
            left += value


def _group(group: Any, default_format: Any, where: str) -> tuple[Scheme, list[Any]]:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{where}: no weights are described")
    stored = group.get("format") or default_format  # a group's own where the whole is "mixed-precision"
    if stored != "pack-quantized":
        raise CheckpointError(f"{where}: format {shown(stored)} is not read here, only pack-quantized")
    if group.get("input_activations") or group.get("output_activations"):
        raise CheckpointError(f"{where}: quantized activations are not read here, only weight-only checkpoints")
    bits, kind, strategy = weights.get("num_bits"), weights.get("type"), weights.get("strategy")
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8 or kind != "int":
        raise CheckpointError(
            f"{where}: {shown(bits)}-bit {shown(kind)} weights are not read here, only int of 2 to 8 bits"
        )
    if weights.get("dynamic"):
        raise CheckpointError(f"{where}: dynamic scales are not read here")
    group_size = PER_ROW if strategy == "channel" else weights.get("group_size")
    if strategy not in ("group", "channel") or isinstance(group_size, bool) or not isinstance(group_size, int):
        raise CheckpointError(
            f"{where}: strategy {shown(strategy)} with group size {shown(group_size)} is not read here"
        )
    targets = group.get("targets")
    if not isinstance(targets, list) or not targets:
        raise CheckpointError(f"{where}: no targets")
    return Scheme(bits, group_size, weights.get("symmetric", True) is True), targets


def orders_columns(config: Mapping[str, Any]) -> bool:
    """Whether a config that :func:`from_config` accepts has groups of columns that are not neighbours, which only
    ``weight_g_idx`` tells (``actorder: group``, or its older name; ``weight`` and ``static`` leave no trace)."""
    return any(group["weights"].get("actorder") in ("group", "dynamic") for group in config["config_groups"].values())


class Targets:
    """Finds the scheme of a layer: an exact or ``re:`` target first, then the class target ``Linear``."""

    def __init__(self, schemes: Mapping[str, Scheme], where: str) -> None:
        self._schemes = schemes
        self._where = where
        self._spent = 0.0

    def match(self, layer: str) -> Scheme:
        """The scheme of one packed layer."""
        for target, scheme in self._schemes.items():
            if target == layer or (target.startswith("re:") and self._matches(target, layer)):
                return scheme
        if "Linear" in self._schemes:
            return self._schemes["Linear"]
        raise CheckpointError(f"{self._where}: {layer} is packed, but no config group targets it")

    def _matches(self, target: str, layer: str) -> bool:
        """Expressions come from whoever published the checkpoint, and some take longer than the universe has: one that
        could try exponentially often is refused, and so are those that took 2 s altogether."""
        if _NESTED.search(target) or len(_REPEATS.findall(target)) > _MOST_REPEATS or len(layer) > _LONGEST_NAME:
            raise CheckpointError(
                f"{self._where}: target {shown(target)} repeats what repeats, or more than {_MOST_REPEATS} times, or "
                f"meets a name beyond {_LONGEST_NAME} characters; simplify it"
            )
        started = time.perf_counter()
        try:
            found = re.match(target[3:], layer) is not None
        except (re.error, OverflowError, RecursionError) as e:
            raise CheckpointError(f"{self._where}: target {shown(target)} is not a regular expression ({e})") from None
        self._spent += time.perf_counter() - started
        if self._spent > _MOST_SECONDS:
            raise CheckpointError(f"{self._where}: its targets take too long to match; simplify {shown(target)}")
        return found


_NESTED = re.compile(r"\)\s*[*+{]")  # a repeated group; published ones choose among names and repeat nothing
_REPEATS = re.compile(r"(?<!\\)[*+{]")
_MOST_REPEATS = 4  # n of them try up to L^n / n! places in a name of L characters: 0.7 s at the limits
_LONGEST_NAME = 200
_MOST_SECONDS = 2.0
