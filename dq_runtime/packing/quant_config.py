"""``quantization_config`` of config.json: from grids to compressed-tensors groups, and back for any reader's sake."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dq_runtime.errors import CheckpointError, SpecError
from dq_runtime.levels import GROUP_SIZE, INT, LEVELS, TABLE_BITS
from dq_runtime.packing.shown import shown
from dq_runtime.spec import PER_ROW, GridSpec

# model_type of checkpoints that only we can read begins so: transformers 5 merely warns about a quantizer it does not
# know and then runs random weights, so the only safe way to be refused is to be unrecognisable.
FOREIGN_PREFIX = "dq_"
OWN_METHOD = "dq"  # quant_method of those checkpoints
TABLE_FORMAT = "table-pack-quantized"  # ours: pack-quantized, with codes that are places in a table


@dataclass(frozen=True)
class FloatFormat:
    """How compressed-tensors calls a block format of e2m1: its ``format``, ``strategy``, and the dtype of scales."""

    format: str
    strategy: str
    scale: str


FLOAT_FORMATS = {
    "mxfp4": FloatFormat("mxfp4-pack-quantized", "group", "torch.uint8"),
    "nvfp4": FloatFormat("nvfp4-pack-quantized", "tensor_group", "torch.float8_e4m3fn"),
}


@dataclass(frozen=True)
class Scheme:
    """How one layer is stored: all that a reader must know besides the tensors."""

    bits: int
    group_size: int  # -1: per row
    symmetric: bool
    form: str = INT  # or a table of dq_runtime.levels


def scheme_of(grid: GridSpec) -> Scheme:
    return Scheme(grid.bits, grid.group_size, grid.symmetric, grid.name)


def is_standard(layers: Mapping[str, Scheme]) -> bool:
    """Whether compressed-tensors has a format for all of these: for integers, mxfp4 and nvfp4, not for other tables."""
    return all(scheme.form == INT or scheme.form in FLOAT_FORMATS for scheme in layers.values())


def to_config(layers: Mapping[str, Scheme], dense: Iterable[str], transposed: bool = False) -> dict[str, Any]:
    """The config of these quantized layers, of one form; ``dense`` are the linears left alone.

    What compressed-tensors readers cannot serve says ``quant_method: dq``: tables that their format has no name for,
    and ``transposed`` linears (GPT-2's Conv1D).
    """
    forms = {scheme.form for scheme in layers.values()}
    if len(forms) > 1:
        raise SpecError(f"one checkpoint holds grids of one form, got {', '.join(sorted(forms))}")
    form = next(iter(forms), INT)
    by_scheme: dict[Scheme, list[str]] = {}
    for name, scheme in layers.items():
        by_scheme.setdefault(scheme, []).append(name)
    groups = {}
    for i, (scheme, names) in enumerate(by_scheme.items()):
        targets = ["Linear"] if len(by_scheme) == 1 else [f"re:^{re.escape(name)}$" for name in names]
        per_row = scheme.group_size == PER_ROW
        weights = {
            "num_bits": scheme.bits,
            "type": "float" if form in FLOAT_FORMATS else form,
            "symmetric": scheme.symmetric,
            "strategy": "channel" if per_row else "group",
            "group_size": None if per_row else scheme.group_size,
            "dynamic": False,
        }
        if form in FLOAT_FORMATS:
            stored = FLOAT_FORMATS[form]
            weights |= {"strategy": stored.strategy, "scale_dtype": stored.scale, "zp_dtype": stored.scale}
        groups[f"group_{i}"] = {
            "targets": targets,
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }
    stored_as = {INT: "pack-quantized"} | {name: stored.format for name, stored in FLOAT_FORMATS.items()}
    config = {
        "quant_method": "compressed-tensors" if is_standard(layers) and not transposed else OWN_METHOD,
        "format": stored_as.get(form, TABLE_FORMAT),
        "quantization_status": "compressed",
        "ignore": sorted(dense),
        "config_groups": groups,
    }
    return config | {"transposed": True} if transposed else config


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
    float_form = next((name for name, kind in FLOAT_FORMATS.items() if kind.format == stored), None)
    if stored not in ("pack-quantized", TABLE_FORMAT) and float_form is None:
        raise CheckpointError(
            f"{where}: format {shown(stored)} is not read here, only pack-quantized, mxfp4- and nvfp4-pack-quantized"
        )
    if group.get("input_activations") or group.get("output_activations"):
        raise CheckpointError(f"{where}: quantized activations are not read here, only weight-only checkpoints")
    bits, kind, strategy = weights.get("num_bits"), weights.get("type"), weights.get("strategy")
    form = INT
    if float_form is not None:
        form, bits = float_form, TABLE_BITS
        _check_float(weights, form, where)
    elif stored == TABLE_FORMAT and isinstance(kind, str) and kind in LEVELS:
        form = kind
        if bits != TABLE_BITS or weights.get("symmetric", True) is not True:
            raise CheckpointError(f"{where}: {form} weights have {TABLE_BITS} bits and no zero points")
        bits = TABLE_BITS
    elif isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8 or kind != "int":
        raise CheckpointError(
            f"{where}: {shown(bits)}-bit {shown(kind)} weights are not read here, only int of 2 to 8 bits"
        )
    if weights.get("dynamic"):
        raise CheckpointError(f"{where}: dynamic scales are not read here")
    group_size = PER_ROW if strategy == "channel" else weights.get("group_size")
    if (
        strategy not in ("group", "channel", *(("tensor_group",) if float_form else ()))
        or isinstance(group_size, bool)
        or not isinstance(group_size, int)
    ):
        raise CheckpointError(
            f"{where}: strategy {shown(strategy)} with group size {shown(group_size)} is not read here"
        )
    targets = group.get("targets")
    if not isinstance(targets, list) or not targets:
        raise CheckpointError(f"{where}: no targets")
    return Scheme(bits, group_size, weights.get("symmetric", True) is True, form), targets


def _check_float(weights: Mapping[str, Any], form: str, where: str) -> None:
    """What the block formats of e2m1 fix."""
    wanted = {"num_bits": TABLE_BITS, "type": "float", "group_size": GROUP_SIZE[form]}
    for key, value in wanted.items():
        if weights.get(key) != value or isinstance(weights.get(key), bool):
            raise CheckpointError(f"{where}: {form} weights have {key} {value}, got {shown(weights.get(key))}")
    if weights.get("symmetric", True) is not True:
        raise CheckpointError(f"{where}: {form} weights have no zero points")
    if weights.get("strategy") not in ("group", "tensor_group"):
        raise CheckpointError(f"{where}: strategy {shown(weights.get('strategy'))} is not that of {form} weights")


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
