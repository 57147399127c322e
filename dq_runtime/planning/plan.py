"""The plan of one quantization: phases, disk, time, whether it fits, and what to lower where it does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dq_runtime.backends import training
from dq_runtime.environment import memory_status, peak_memory
from dq_runtime.errors import SpecError
from dq_runtime.modules.hidden_states import IN_MEMORY
from dq_runtime.modules.student import loop_dtype_of
from dq_runtime.planning.blockwise import ABLE, blockwise, stream_size
from dq_runtime.planning.disk import DISK, disk_use
from dq_runtime.planning.memory import GPU, HOST, METHODS, Component, Phase, Setting
from dq_runtime.planning.phases import whole_model
from dq_runtime.planning.seconds import Duration, Rates, durations, measured_rates
from dq_runtime.planning.shapes import ModelShape, model_shape
from dq_runtime.preflight import check_grid
from dq_runtime.rounding import ROUNDINGS
from dq_runtime.spec import QuantSpec


@dataclass(frozen=True)
class Plan:
    """``limits``: bytes that there are, by place (HOST, GPU of each, DISK); ``advice``: what makes it fit, in words."""

    shape: ModelShape
    setting: Setting
    phases: tuple[Phase, ...]
    disk: tuple[Component, ...]
    durations: tuple[Duration, ...]
    rates: str
    limits: Mapping[str, int]
    advice: tuple[str, ...] = ()

    @property
    def places(self) -> list[str]:
        return [HOST] if self.setting.device == "cpu" else [HOST, GPU]

    def peak(self, place: str) -> Phase:
        """The phase that takes most there."""
        return max(self.phases, key=lambda phase: phase.total(place))

    def needed(self, place: str) -> int:
        """Bytes at the worst moment; of all processes on the host."""
        if place == DISK:
            return sum(component.size for component in self.disk)
        return self.peak(place).total(place) * (self.setting.world if place == HOST else 1)

    def short(self) -> list[str]:
        """The places where it does not fit."""
        return [place for place in (*self.places, DISK) if self.needed(place) > self.limits.get(place, 2**63)]

    def to_json(self) -> dict[str, Any]:
        """Everything, bytes and seconds as numbers."""
        return {
            "model": self.shape.name,
            "weights": self.shape.weights,
            "dense_parameters": self.shape.dense,
            "setting": asdict(self.setting),
            "phases": [
                {
                    "name": phase.name,
                    "bytes": {place: phase.total(place) for place in self.places},
                    "components": [asdict(component) for component in phase.components],
                }
                for phase in self.phases
            ],
            "peak": {
                place: {"phase": self.peak(place).name, "bytes": self.peak(place).total(place)} for place in self.places
            },
            "disk": [asdict(component) for component in self.disk],
            "seconds": [asdict(d) | {"total": d.total} for d in self.durations],
            "rates": self.rates,
            "limits": dict(self.limits),
            "fits": not self.short(),
            "advice": list(self.advice),
        }


@dataclass(frozen=True)
class Question:
    """What a plan is wanted for: the arguments of ``quantize`` that matter, and the machine. ``host_memory`` and
    ``gpu_memory`` in bytes, 0: what is here; ``flops`` 0: measured."""

    model: str
    spec: QuantSpec
    windows: int = 96
    window_length: int = 512
    held_out_windows: int = 16
    compute_dtype: str = "auto"
    device: str = "cpu"
    blockwise: bool = False
    gpus: int = 1
    gpu_memory: int = 0
    host_memory: int = 0
    flops: float = 0.0
    output: Path = Path()


def make_plan(question: Question) -> Plan:
    """Nothing is read but the config. Raises :class:`DQError` for a model that cannot be planned, and
    :class:`SpecError` for what ``quantize`` would refuse."""
    spec = question.spec
    rounding = ROUNDINGS.get(spec.rounding.name)(spec.rounding.options)
    check_grid(spec, rounding)
    if spec.rounding.name not in METHODS:
        raise SpecError(f"dq plan knows {', '.join(METHODS)}; of {spec.rounding.name} nothing has been worked out")
    if question.blockwise and spec.rounding.name not in ABLE:
        raise SpecError(f"--blockwise rounds with {', '.join(ABLE)}, not with {spec.rounding.name}")
    if question.gpus > 1 and (question.device == "cpu" or spec.rounding.name != "discquant" or question.blockwise):
        raise SpecError("several GPUs share the work of discquant on the whole model: add --device cuda")
    shape = model_shape(question.model, spec)
    if shape.context and question.window_length > shape.context:
        raise SpecError(f"window_length {question.window_length} exceeds the model's context of {shape.context}")
    setting = _setting(question, rounding.options(), shape)
    rates = measured_rates(setting, question.window_length, question.flops or None)
    plan = _planned(shape, setting, rates, _limits(question))
    return replace(plan, advice=_advice(plan, rates, question)) if plan.short() else plan


def _planned(shape: ModelShape, setting: Setting, rates: Rates, limits: Mapping[str, int]) -> Plan:
    phases = (blockwise if setting.blockwise else whole_model)(shape, setting)
    streams = 2 * stream_size(shape, setting) if setting.blockwise else 0
    disk = disk_use(shape, setting.method, setting.blockwise, streams if streams > 2 * IN_MEMORY else 0)
    found = durations(shape, setting, rates)
    return Plan(shape, setting, tuple(phases), tuple(disk), tuple(found), rates.source, limits)


def _setting(question: Question, options: dict[str, Any], shape: ModelShape) -> Setting:
    kind = question.device.partition(":")[0]
    here = kind == "cpu" or torch.cuda.is_available()
    device = torch.device(kind)
    if here:
        dtype = loop_dtype_of(question.compute_dtype, device)
        compact = training.holds_compactly(device)
        fused = training.layer_passes(device, dtype) is not None and not shape.head_dim % 32
    else:  # what a GPU that is not here would choose
        dtype = torch.float32 if question.compute_dtype == "float32" else torch.bfloat16
        compact, fused = True, False
    return Setting(
        method=question.spec.rounding.name,
        options=options,
        windows=question.windows,
        length=question.window_length,
        held=question.held_out_windows,
        loop=2 if dtype is torch.bfloat16 else 4,
        device=kind,
        compact=compact,
        fused=fused,
        mapped=kind == "cpu" and shape.stored_dtype == "float32" and not question.blockwise,
        blockwise=question.blockwise,
        world=question.gpus,
        baseline=_resident(),
    )


def _resident() -> int:
    """Bytes of this process, which has built the model's class and read nothing."""
    found = memory_status("VmRSS")
    return peak_memory("cpu") if found is None else found


def _limits(question: Question) -> dict[str, int]:
    """What there is; a place that cannot be asked is left out."""
    from shutil import disk_usage

    limits = {}
    existing = next(p for p in (question.output, *question.output.absolute().parents) if p.exists())
    limits[DISK] = disk_usage(existing).free
    if question.host_memory:
        limits[HOST] = question.host_memory
    elif (memory := Path("/proc/meminfo")).exists():
        found = next(line for line in memory.read_text().splitlines() if line.startswith("MemAvailable:"))
        limits[HOST] = 1024 * int(found.split()[1]) + _resident()
    if question.gpu_memory:
        limits[GPU] = question.gpu_memory
    elif question.device != "cpu" and torch.cuda.is_available():
        limits[GPU] = torch.cuda.get_device_properties(0).total_memory
    return limits


def _advice(plan: Plan, rates: Rates, question: Question) -> tuple[str, ...]:
    """What would fit, each found by planning it again; the sizes that remain where nothing does."""
    setting = plan.setting
    tries: list[tuple[str, Callable[[Setting], Setting]]] = []
    for length in (256, 128):
        if length < setting.length:
            tries.append((f"--window-length {length}", lambda s, n=length: replace(s, length=n)))  # type: ignore[misc]
    if setting.loop == 4:
        tries.append(("--compute-dtype bfloat16", lambda s: replace(s, loop=2)))
    if int(setting.options.get("batch", 1)) > 1 and setting.method in ("discquant", "autoround"):
        tries.append(("--set batch=1", lambda s: replace(s, options={**s.options, "batch": 1})))
    if not setting.blockwise:
        method = setting.method if setting.method in ABLE else "autoround"
        options = ROUNDINGS.get(method)({}).options()
        name = "--blockwise" + ("" if method == setting.method else f" --rounding {method}")
        tries.append(
            (name, lambda s: replace(s, method=method, options=options, blockwise=True, mapped=False, world=1))
        )
    if setting.device != "cpu" and setting.method == "discquant" and not setting.blockwise:
        for world in (2, 4, 8, 16, 32):
            if world > setting.world:
                tries.append((f"--gpus {world}", lambda s, n=world: replace(s, world=n)))  # type: ignore[misc]
    fitting, everything = [], setting
    for name, change in tries:
        if not _planned(plan.shape, change(setting), rates, plan.limits).short():
            fitting.append(name)
        elif not name.startswith(("--blockwise", "--gpus")):
            everything = change(everything)
    if not fitting and not _planned(plan.shape, everything, rates, plan.limits).short():
        last = {name.split(" ")[0]: name for name, _ in tries if not name.startswith(("--blockwise", "--gpus"))}
        fitting.append(" ".join(last.values()))
    short = ", ".join(
        f"{plan.needed(place) / 1e9:.1f} GB of {place} and there are {plan.limits[place] / 1e9:.1f}"
        for place in plan.short()
    )
    return (f"it needs {short}", *(f"it fits with {name}" for name in fitting))
