"""The first phases of a run, run for real in a process of their own: peak memory and seconds a step of each.

    loading; grids and nearest; a block of the first stage, some iterations; two steps of the second

on random tokens (memory does not depend on what a text says). ``python -m dq_runtime.planning.measured`` is that
process: a question as JSON on standard input, what was measured as JSON on standard output.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from dq_runtime.environment import flushed_denormals, memory_status, peak_memory
from dq_runtime.errors import DQError, Interrupted
from dq_runtime.modules.block_trace import block_list
from dq_runtime.modules.blocks import ModelBlocks
from dq_runtime.modules.student import StudentModel, loop_dtype_of
from dq_runtime.modules.student_layers import student_layers
from dq_runtime.modules.surgery import linears
from dq_runtime.planning.plan import Plan, Question
from dq_runtime.preflight import check_weights, plan
from dq_runtime.ranks import ALONE
from dq_runtime.rounding import ROUNDINGS, Choice, Job, Needs
from dq_runtime.rounding.discquant import Recipe, distil
from dq_runtime.rounding.latent import Latent
from dq_runtime.runtime.dense import load_dense
from dq_runtime.spec import QuantSpec

ITERATIONS = 4  # of a block
STEPS = 2  # of the second stage


def measured_phases(question: Question, found: Plan) -> dict[str, Any]:
    """``phases``: name, ``bytes`` and ``seconds`` a step as measured, and what ``found`` predicts of them. Raises
    :class:`DQError` where the process fails or is killed."""
    if question.blockwise or question.gpus > 1:
        raise DQError("--measure runs the whole model in one process; leave out --blockwise and --gpus")
    if not Path(question.model).exists() or Path(question.model).suffix == ".json":
        raise DQError(f"--measure needs the model's weights, and {question.model} has none here")
    asked = asdict(question) | {"output": "", "spec": question.spec.to_json()}
    done = subprocess.run(
        [sys.executable, "-m", "dq_runtime.planning.measured"], input=json.dumps(asked), capture_output=True, text=True
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"ended by signal {-done.returncode}"])[-1]
        raise DQError(f"the measured process failed: {said}")
    rows = json.loads(done.stdout.strip().splitlines()[-1])
    place = found.places[-1]
    phases = {phase.name: phase.total(place) for phase in found.phases}
    seconds = {duration.name: duration.seconds for duration in found.durations}
    for row in rows:
        row["predicted_bytes"] = phases[row["name"]]
        row["predicted_seconds"] = seconds.get(row["name"].partition(" (")[0])
    return {"place": place, "phases": rows}


class _Phases:
    """The peak of each phase, and the seconds of its steps."""

    def __init__(self, device: str) -> None:
        self._device, self.rows = device, list[dict[str, Any]]()
        self._times: list[float] = []
        self._began = time.perf_counter()

    def step(self, *progress: object, **figures: float) -> None:
        """A ``Monitor``: a step ends."""
        now = time.perf_counter()
        self._times.append(now - self._began)
        self._began = now

    def end(self, name: str) -> None:
        """A phase ends; the next one's peak counts from here, where the system can forget the one before."""
        times = sorted(self._times[1:])  # the first step loads and caches
        seconds = times[len(times) // 2] if times else None
        self.rows.append({"name": name, "bytes": self._peak(), "seconds": seconds})
        self._times, self._began = [], time.perf_counter()
        if self._device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")

    def _peak(self) -> int:
        found = memory_status("VmHWM") if self._device == "cpu" else None
        return peak_memory(self._device) if found is None else found


class _Store:
    """Saves nothing; asks to stop when the loop has asked ``after`` times whether it should."""

    def __init__(self, after: int) -> None:
        self._left = after

    def due(self) -> bool:
        return False

    def save(self, step: int, tensors: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        return None

    def load(self) -> None:
        return None

    def stop_requested(self) -> bool:
        self._left -= 1
        return self._left == 0

    def stop(self, step: int, total: int) -> None:
        raise Interrupted("that was the first block")


def run(question: Question) -> list[dict[str, Any]]:
    """Of the process itself."""
    device, spec = question.device, question.spec
    phases = _Phases(device)
    lm = load_dense(question.model, device)
    check_weights(lm.model)
    phases.end("loading")
    modules = linears(lm.model)
    layers = student_layers(lm.model, modules, plan(modules, spec), device, ALONE, lambda done, total: None)
    del modules
    tokens = torch.randint(0, lm.vocabulary, (question.windows, question.window_length))
    student = StudentModel(lm.model, layers, tokens, loop_dtype_of(question.compute_dtype, torch.device(device)))
    job = Job(layers, None, spec.seed, _Store(0), phases.step)
    choices = ROUNDINGS.get("nearest")({}).round(job).choices
    nearest = {name: layers[name].pack(choice) for name, choice in choices.items()}
    del choices
    phases.end("grids and nearest")
    _method(student, job, spec, phases)
    assert nearest  # held all the time, as the pipeline does
    return phases.rows


def _method(student: StudentModel, job: Job, spec: QuantSpec, phases: _Phases) -> None:
    """The first block, and two steps of the whole model, of the methods that have them."""
    name, options = spec.rounding.name, dict(spec.rounding.options)
    rounding = ROUNDINGS.get(name)(options)
    blockwise = {"discquant": "autoround", "autoround": "autoround", "gptq": "gptq"}.get(name)
    if blockwise is not None:
        few = {"iters": ITERATIONS, "batch": rounding.options()["batch"]} if blockwise == "autoround" else options
        count = len(block_list(student)) or len(student.layers)
        store = _Store(1 if blockwise == "autoround" else len(student.layers) // count)
        phases.step()
        try:
            ROUNDINGS.get(blockwise)(few).round(replace(job, store=store, blocks=ModelBlocks(student)))
        except Interrupted:
            student.end()
        phases.end({"discquant": "blocks (first stage)", "autoround": "blocks", "gptq": "layers"}[name])
    if Needs.STUDENT not in rounding.needs:
        return
    student.begin(relaxed=Needs.RELAXED in rounding.needs)
    student.windows = STEPS
    whole = replace(job, student=student, store=_Store(0))
    if name == "discquant":
        latents = {}
        for i, (key, layer) in enumerate(student.layers.items()):
            nearest = Choice(layer.grid.nearest(layer.weight(), layer.scales))
            latents[key] = Latent.start(layer, nearest, Recipe.room, i, student.compute_dtype)
        phases.step()
        distil(whole, None, latents, Recipe(epochs=1), [])
        phases.end("whole model (second stage)")
    else:
        phases.step()
        ROUNDINGS.get(name)(options | {"steps": STEPS, "batch": 1}).round(whole)
        phases.end("whole model")


def main() -> None:
    asked = json.load(sys.stdin)
    asked |= {"output": Path(asked["output"]), "spec": QuantSpec.from_json(asked["spec"])}
    with flushed_denormals():
        print(json.dumps(run(Question(**asked))))


if __name__ == "__main__":
    main()
