"""What to quantize and how: frozen, comparable, round-trips through JSON, refuses unknown keys."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

from dq_runtime.errors import SpecError
from dq_runtime.levels import GROUP_SIZE, INT, LEVELS, TABLE_BITS

PER_ROW = -1
GROUP_SIZES = (16, 32, 64, 128, PER_ROW)
SCALE_RULES = ("absmax", "mse")
SCALE_DTYPES = ("bfloat16", "float16")
# Integer grids by the names of the formats that hold them exactly: what a block of ggml stores (gguf_blocks.py).
ALIASES: dict[str, dict[str, Any]] = {
    "gguf:q4_0": {"name": INT, "bits": 4, "group_size": 32, "symmetric": True, "scale_dtype": "float16"},
    "gguf:q8_0": {"name": INT, "bits": 8, "group_size": 32, "symmetric": True, "scale_dtype": "float16"},
}
GRID_NAMES = (INT, *ALIASES, *LEVELS)


def _checked(cls: type, data: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise SpecError(f"{cls.__name__}: expected a JSON object, got {type(data).__name__}")
    known = {f.name for f in fields(cls)}
    unknown = sorted(set(data) - known)
    if unknown:
        raise SpecError(f"{cls.__name__}: unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")
    required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    if absent := [name for name in required if name not in data]:
        raise SpecError(f"{cls.__name__}: key {absent[0]!r} is missing")
    return dict(data)


@dataclass(frozen=True)
class GridSpec:
    """Which values a weight may take.

    ``name`` is int, or a table (nf4, fp4, mxfp4, nvfp4: levels.py), which has 4 bits, no zero points and, in the last
    two, a group size of its own. ``group_size`` weights along in_features share a scale (-1: a whole row does).
    ``scale_dtype`` is the dtype the scales are served in, so the grid is fitted with scales already rounded to it.
    """

    name: str = "int"
    bits: int = 3
    group_size: int = 64
    symmetric: bool = True
    scale: str = "absmax"
    scale_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise SpecError(f"bits must be an integer from 2 to 8, got {self.bits!r}")
        if not isinstance(self.group_size, int) or self.group_size not in GROUP_SIZES:
            raise SpecError(f"group_size must be 16, 32, 64, 128 or -1 (per row), got {self.group_size!r}")
        if not isinstance(self.symmetric, bool):
            raise SpecError(f"symmetric must be true or false, got {self.symmetric!r}")
        if self.scale not in SCALE_RULES:
            raise SpecError(f"scale must be one of {', '.join(SCALE_RULES)}, got {self.scale!r}")
        if self.scale_dtype not in SCALE_DTYPES:
            raise SpecError(f"scale_dtype must be one of {', '.join(SCALE_DTYPES)}, got {self.scale_dtype!r}")
        if self.name in LEVELS:
            self._check_table()

    def _check_table(self) -> None:
        own = GROUP_SIZE.get(self.name)
        if self.bits != TABLE_BITS or not self.symmetric:
            raise SpecError(
                f"grid {self.name} has {TABLE_BITS} bits and no zero points, got {self.bits} bits"
                f"{'' if self.symmetric else ' with zero points'}"
            )
        if own is not None and (self.group_size != own or self.scale_dtype != "bfloat16"):
            raise SpecError(
                f"grid {self.name} has groups of {own} and scales that bfloat16 alone holds, got group size "
                f"{self.group_size} and {self.scale_dtype}"
            )

    @classmethod
    def named(cls, name: str, **given: Any) -> GridSpec:
        """A grid by a name of :data:`GRID_NAMES`, with what is ``given`` (None: not given) besides; :class:`SpecError`
        where the name means another value already."""
        if name not in GRID_NAMES:
            raise SpecError(f"unknown grid {name!r}; known: {', '.join(GRID_NAMES)}")
        fixed = ALIASES.get(name)
        if fixed is None:
            fixed = {"name": name}
            if name in LEVELS:
                fixed |= {"bits": TABLE_BITS, "symmetric": True}
            if name in GROUP_SIZE:
                fixed |= {"group_size": GROUP_SIZE[name], "scale_dtype": "bfloat16"}
        stated = {key: value for key, value in given.items() if value is not None}
        for key, value in fixed.items():
            if stated.get(key, value) != value:
                raise SpecError(f"grid {name} means {key} {value}, got {stated[key]}; leave it out")
        return cls(**stated | fixed)

    def groups(self, k: int) -> int:
        """Number of scales per row of K = ``k`` weights; raises where the last group would be ragged."""
        if self.group_size == PER_ROW:
            return 1
        if k % self.group_size:
            fits = [str(g) for g in GROUP_SIZES if g > 0 and k % g == 0]
            raise SpecError(
                f"in_features {k} is not a multiple of group size {self.group_size}, and the pack-quantized format "
                f"has no ragged last group; use group size {' or '.join([*fits, 'row'])} there"
            )
        return k // self.group_size


@dataclass(frozen=True)
class RoundingSpec:
    """Which grid value each weight gets: a method's name and its options (checked by the method itself)."""

    name: str = "discquant"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.options, Mapping):
            raise SpecError(f"rounding options must be an object of names and values, got {self.options!r}")
        object.__setattr__(self, "options", dict(self.options))


@dataclass(frozen=True)
class Override:
    """A different bit width (0: leave dense) or group size for the layers whose name matches ``pattern`` (fnmatch)."""

    pattern: str
    bits: int
    group_size: int | None = None

    @classmethod
    def parse(cls, text: str) -> Override:
        """``'model.layers.0.*=8'``, ``'*.down_proj=4:32'``, ``'*.o_proj=3:row'``, ``'*.gate=dense'``."""
        pattern, sep, value = text.rpartition("=")
        bits, colon, group = value.partition(":")
        try:
            if not sep or not pattern or (colon and not group):
                raise ValueError
            if bits == "dense" and not colon:
                return cls(pattern, 0)
            return cls(pattern, int(bits), None if not colon else PER_ROW if group == "row" else int(group))
        except ValueError:
            raise SpecError(
                f"override {text!r} is not PATTERN=BITS[:GROUP]; write for example 'model.layers.0.*=8', "
                "'*.down_proj=4:32', '*.down_proj=3:row' or '*.gate=dense'"
            ) from None


@dataclass(frozen=True)
class Target:
    """Bits chosen layer by layer so that the mean, scales and zero points included, is ``bits_per_weight`` or a little
    less: among ``choices``, by the KL measured on ``windows`` calibration windows. With ``fused``, projections that
    vLLM multiplies as one matrix share their bits. Layers that an override names keep its bits."""

    bits_per_weight: float
    choices: tuple[int, ...] = (2, 3, 4)
    fused: bool = True
    windows: int = 4

    def __post_init__(self) -> None:
        bpw, choices, windows = self.bits_per_weight, self.choices, self.windows
        if isinstance(bpw, bool) or not isinstance(bpw, int | float) or not 0 < bpw < math.inf:
            raise SpecError(f"target bits per weight must be a positive number, got {bpw!r}")
        if not isinstance(choices, list | tuple) or len(set(choices)) != len(choices) or len(choices) < 2:
            raise SpecError(f"bits choices must be at least two different bit widths, got {choices!r}")
        for bits in choices:
            GridSpec(bits=bits)  # refuses what is no bit width
        object.__setattr__(self, "choices", tuple(sorted(choices)))
        if not isinstance(self.fused, bool):
            raise SpecError(f"fused must be true or false, got {self.fused!r}")
        if isinstance(windows, bool) or not isinstance(windows, int) or windows < 1:
            raise SpecError(f"windows to measure the sensitivity on must be at least 1, got {windows!r}")


@dataclass(frozen=True)
class QuantSpec:
    """The whole request: grid x transform x rounding, with exceptions by layer name. Frozen; JSON round trip.

    With a ``target``, overrides with the bits that were chosen replace the grid's (dq_runtime/allocation.py), and a
    checkpoint is described by the spec with those, without the target."""

    grid: GridSpec = field(default_factory=GridSpec)
    transform: str = "identity"
    transform_options: Mapping[str, Any] = field(default_factory=dict)  # checked by the transform itself
    rounding: RoundingSpec = field(default_factory=RoundingSpec)
    ignore: tuple[str, ...] = ("lm_head",)
    overrides: tuple[Override, ...] = ()
    target: Target | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        patterns: Any = self.ignore  # whatever came out of JSON; a bare string would be taken letter by letter
        if isinstance(patterns, str) or not all(isinstance(p, str) for p in patterns):
            raise SpecError(f"ignore must be a list of patterns, got {patterns!r}")
        if not isinstance(self.transform_options, Mapping):
            raise SpecError(f"transform_options must be an object of names and values, got {self.transform_options!r}")
        object.__setattr__(self, "transform_options", dict(self.transform_options))
        object.__setattr__(self, "ignore", tuple(self.ignore))
        object.__setattr__(self, "overrides", tuple(self.overrides))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise SpecError(f"seed must be a non-negative integer below 2^63, got {self.seed!r}")
        for override in self.overrides:
            self._apply(override)  # bad bits or group sizes are refused here, not hours later

    def _apply(self, override: Override) -> GridSpec | None:
        if override.bits == 0:
            return None
        group = self.grid.group_size if override.group_size is None else override.group_size
        return replace(self.grid, bits=override.bits, group_size=group)

    def grid_for(self, layer: str) -> GridSpec | None:
        """The grid of one layer, or None where it stays dense. The last matching override wins."""
        if any(fnmatch.fnmatchcase(layer, p) for p in self.ignore):
            return None
        grid: GridSpec | None = self.grid
        for override in self.overrides:
            if fnmatch.fnmatchcase(layer, override.pattern):
                grid = self._apply(override)
        return grid

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> QuantSpec:
        d = _checked(cls, data)
        if "grid" in d:
            d["grid"] = GridSpec(**_checked(GridSpec, d["grid"]))
        if "rounding" in d:
            d["rounding"] = RoundingSpec(**_checked(RoundingSpec, d["rounding"]))
        if "overrides" in d:
            if not isinstance(d["overrides"], list | tuple):
                raise SpecError(f"overrides must be a list, got {d['overrides']!r}")
            d["overrides"] = tuple(Override(**_checked(Override, o)) for o in d["overrides"])
        if d.get("target") is not None:
            d["target"] = Target(**_checked(Target, d["target"]))
        return cls(**d)


T = TypeVar("T")


def options_from(cls: type[T], owner: str, options: Mapping[str, Any]) -> T:
    """Build a frozen options dataclass, converting strings from the command line; an unknown key is one sentence.
    ``owner`` is whose options they are, as a message says it: ``rounding 'gptq'``."""
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in options.items():
        if key not in known:
            raise SpecError(f"{owner} has no option {key!r}; known: {', '.join(known) or 'none'}")
        kind: Any = type(known[key].default)
        try:
            if kind is bool and isinstance(value, str):
                values[key] = {"true": True, "false": False}[value.lower()]
            elif (kind is not bool and isinstance(value, bool)) or (kind is int and int(value) != float(value)):
                raise TypeError  # True is not a rate, and 2.5 steps are not 2
            else:
                values[key] = kind(value)
        except (ValueError, TypeError, KeyError):
            raise SpecError(f"{owner}: option {key} takes a {kind.__name__}, got {value!r}") from None
    return cls(**values)
