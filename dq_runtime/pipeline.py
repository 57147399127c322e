"""quantize(): the one straight line from a model to a packed checkpoint, and the only file that sees all three axes.

model -> transform (other bases, same function) -> W -> grid.fit -> (scales, lo, hi) -> rounding.round -> codes
      -> packing.pack -> checkpoint -> report
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dq_runtime.allocation import Allocation, Planner, allocate
from dq_runtime.blockwise import BlockwiseRun, check_blockwise
from dq_runtime.calibration import windows_of
from dq_runtime.data import Text, Windows, read_texts
from dq_runtime.data.selection import check_selection
from dq_runtime.environment import device_name, flushed_denormals, peak_memory, resolve_device, versions
from dq_runtime.errors import SpecError
from dq_runtime.evaluate.figures import Measured, sizes
from dq_runtime.evaluate.metrics import Quality, compare
from dq_runtime.evaluate.report import Report, describe, held_out_section, write_report
from dq_runtime.interrupt import interruptible
from dq_runtime.modules.basis_change import BasisChange
from dq_runtime.modules.blocks import ModelBlocks
from dq_runtime.modules.fisher import kronecker_fisher
from dq_runtime.modules.student import StudentModel, loop_dtype_of
from dq_runtime.modules.student_layers import check_every_token_everywhere, student_layers
from dq_runtime.modules.student_linear import Mode
from dq_runtime.modules.surgery import is_conv1d, linears, weight_of
from dq_runtime.out_of_memory import raise_out_of_memory
from dq_runtime.packing import PackedWeight
from dq_runtime.packing.run_state import RunState
from dq_runtime.packing.shared_state import one_directory, state_of
from dq_runtime.planning.disk import check_disk
from dq_runtime.preflight import (
    check_continued,
    check_grid,
    check_output,
    check_processes,
    check_weights,
    claim,
    fingerprint,
    plan,
)
from dq_runtime.ranks import join
from dq_runtime.request import Listener, Request, Silent, Stage
from dq_runtime.rounding import ROUNDINGS, Choice, Job, Needs, Rounded, Rounding
from dq_runtime.rounding.base import choices_from_tensors, choices_to_tensors
from dq_runtime.runtime.dense import licence_of, load_dense
from dq_runtime.runtime.load import load
from dq_runtime.runtime.save import dense_tensors, write_model
from dq_runtime.runtime.streamed import StoredModel, open_stored
from dq_runtime.runtime.transformers_model import TransformersModel
from dq_runtime.spec import GridSpec, QuantSpec
from dq_runtime.transforms import TRANSFORMS, Transform
from dq_runtime.transforms import Needs as TransformNeeds


def quantize(
    model: str,
    output: str | Path,
    spec: QuantSpec | None = None,
    *,
    calibration: str | None = None,
    held_out: str | None = None,
    windows: int = 96,
    window_length: int = 512,
    held_out_windows: int = 16,
    continued_windows: int = 0,
    calibration_select: str = "random",
    compute_dtype: str = "auto",
    device: str = "auto",
    checkpoint_every: float = 120.0,
    resume: bool = False,
    overwrite: bool = False,
    blockwise: bool = False,
    report_directory: str | Path | None = None,
    listener: Listener | None = None,
) -> Report:
    """Round ``model`` (directory, hub name or GGUF file), write the packed checkpoint ``output``, return its report.

    ``calibration`` and ``held_out`` are text, JSONL or ``hf:`` sources. Without ``held_out``, whole documents of the
    calibration source are held out; without ``calibration``, the teacher samples both. ``continued_windows``: so many
    more calibration windows, each a piece of one of the text's and what the teacher writes after it.
    ``calibration_select`` (random, coreset) says which windows of the text calibrate. ``compute_dtype`` (auto, float32,
    bfloat16) is that of the rounding loop; everything reported is measured in float32 on what was written to disk.
    ``blockwise``: one block's weights in memory at a time, for methods that need no more
    (:mod:`dq_runtime.blockwise`). Every ``checkpoint_every`` seconds the loop saves its state in ``output.partial/``,
    from which ``resume`` continues to bit-identical codes. Nothing appears at ``output`` before it is complete, and a
    failed run leaves nothing but a state worth resuming. Bad input raises :class:`DQError`.
    """
    started = time.monotonic()
    spec = spec or QuantSpec()
    least = {"windows": (windows, 1), "held_out_windows": (held_out_windows, 1), "window_length": (window_length, 2)}
    for name, (value, minimum) in least.items():
        if value < minimum:
            raise SpecError(f"{name} must be at least {minimum}, got {value}")
    check_continued(continued_windows, calibration, blockwise)
    check_output(Path(output), overwrite)
    rounding: Rounding = ROUNDINGS.get(spec.rounding.name)(spec.rounding.options)
    transform: Transform = TRANSFORMS.get(spec.transform)(spec.transform_options)
    needs_text = rounding.needs != Needs.WEIGHTS or TransformNeeds.OBJECTIVE in transform.needs or bool(spec.target)
    check_grid(spec, rounding)
    if blockwise:
        check_blockwise(
            spec, rounding, calibration_select, (needs_text and not calibration) or not (held_out or calibration)
        )
    ranks, device = join(resolve_device(device))
    check_processes(spec, rounding, transform, ranks)
    request = Request(
        model=model,
        output=Path(output),
        spec=spec,
        rounding=rounding,
        transform=transform,
        counts=(windows if needs_text else 0, held_out_windows),
        continued=continued_windows if needs_text else 0,
        length=window_length,
        select=check_selection(calibration_select, calibration),
        dtype=loop_dtype_of(compute_dtype, torch.device(device)),
        device=device,
        overwrite=overwrite,
        blockwise=blockwise,
        ranks=ranks,
    )
    listener = listener if listener and ranks.first else Silent()
    state = state_of(request.output, checkpoint_every, ranks)
    state.open(resume)
    texts = read_texts(calibration, held_out, spec.seed)
    try:
        with flushed_denormals():  # x and its moments decay towards 0; denormals there cost up to 2x
            report = _run(request, texts, state, listener, started)
    except BaseException as error:
        state.discard_unless_resumable()
        lower = {**rounding.options(), "window_length": request.length, "compute_dtype": request.dtype}
        raise_out_of_memory(error, lower, rounding.adjustable)
        raise
    state.clear()
    if report_directory is not None:
        ranks.once(write_report, report, Path(report_directory))
    return report


def _run(
    request: Request,
    texts: tuple[Text | None, Text | None],
    state: RunState,
    listener: Listener,
    started: float,
) -> Report:
    """The straight line itself."""
    spec, output, ranks = request.spec, request.output, request.ranks
    show = listener.stage("Loading")
    show(0, 1)
    place = request.device if ranks.mesh is None else "cpu"  # no GPU may have room for all
    lm = open_stored(request.model) if request.blockwise else load_dense(request.model, place)
    show(1, 1)
    if lm.context_length is not None and request.length > lm.context_length:
        raise SpecError(f"window_length {request.length} exceeds the model's context of {lm.context_length}")
    stored = lm if isinstance(lm, StoredModel) else None
    check_weights(lm.model) if stored is None else stored.check_weights()
    basis = BasisChange(lm.model, spec.transform, request.transform)
    modules = linears(lm.model)
    grids = plan(modules, spec)
    planner = None if spec.target is None else Planner(modules, grids, spec)
    check_disk(output, lm.model, modules, grids, spec.rounding.name, request.blockwise)
    train, held = windows_of(lm, state, texts, request, listener)
    weights = fingerprint(stored.weights(grids) if stored else (weight_of(modules[name]) for name in grids))
    state.claim(claim(request, texts, (train, held), weights))

    turned = basis.make(grids, train.tokens, request.dtype, spec.seed, state, listener.stage)
    allocation = None
    if planner is not None:
        allocation = _allocate(lm, modules, planner, train.tokens, state, listener)
        request = replace(request, spec=allocation.spec)
        spec, grids = request.spec, plan(modules, request.spec)
    if stored is not None:
        made = _streamed(stored, grids, train, held, request, state, listener)
    else:
        made = _whole(lm, modules, grids, train, held, request, state, listener)
    del modules, basis

    with one_directory(output, request.overwrite, ranks) as directory:
        made.write(directory)
        measured = made.measure(directory)
        rows = measured.rows
        report: Report = {
            "model": _display_name(lm, request.model),
            "spec": request.full_spec,
            **sizes(lm.model, measured.weights, measured.packed_bytes, directory, turned.original_parameters),
            "transform": turned.figures,
            "allocation": None if allocation is None else allocation.figures,
            "moved_from_nearest": sum(r["moved"] * r["weights"] for r in rows) / sum(r["weights"] for r in rows),
            "learned_scales": measured.learned_scales,
            "calibration": {
                "source": train.source,
                "windows": request.counts[0],
                "continued_windows": request.continued,
                "window_length": request.length,
                "sha256": train.fingerprint(),
            },
            "held_out": {
                **held_out_section(measured.results, held.source, [request.counts[1], request.length]),
                "sha256": held.fingerprint(),
            },
            "rounding_seconds": made.seconds,
            "seconds": time.monotonic() - started,
            "peak_memory_bytes": peak_memory(request.device),
            "compute_dtype": str(request.dtype).removeprefix("torch."),
            "adjusted": state.adjusted,
            "device": device_name(request.device),
            "threads": torch.get_num_threads(),
            "processes": ranks.world,
            "versions": versions(),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": shlex.join(sys.argv),
            "history": made.history,
            "layers": rows,
        }
        ranks.once(describe, report, directory, licence_of(request.model))
    return report


def _allocate(
    lm: TransformersModel,
    modules: dict[str, Any],
    planner: Planner,
    windows: Tensor,
    state: RunState,
    listener: Listener,
) -> Allocation:
    with interruptible() as asked:
        state.asked_to_stop = asked
        return allocate(lm.model, modules, planner, windows, state, listener.stage("Measuring sensitivity"))


@dataclass(frozen=True)
class _Made:
    """A rounding that is done: the figures of its steps, its seconds, and how what it chose is written to a directory
    and then measured there."""

    history: list[dict[str, float]]
    seconds: float
    write: Callable[[Path], None]
    measure: Callable[[Path], Measured]


def _streamed(
    lm: StoredModel,
    grids: Mapping[str, GridSpec],
    train: Windows,
    held: Windows,
    request: Request,
    state: RunState,
    listener: Listener,
) -> _Made:
    """One block after the other, read when its turn comes."""
    windows = train.tokens if len(train.tokens) else held.tokens[:1]  # nearest runs the model only to be measured
    run = BlockwiseRun(lm, grids, request.spec, windows, request.dtype, request.device, state)
    history = run.round(request.rounding, listener.stage(request.spec.rounding.name))
    show = listener.stage("Evaluating")
    return _Made(history, state.seconds(), run.write, lambda directory: run.measure(directory, held.tokens, show))


def _whole(
    lm: TransformersModel,
    modules: dict[str, Any],
    grids: Mapping[str, GridSpec],
    train: Windows,
    held: Windows,
    request: Request,
    state: RunState,
    listener: Listener,
) -> _Made:
    """All layers in memory; every :class:`StudentLinear` takes the place of its linear."""
    spec, ranks = request.spec, request.ranks
    transposed = any(is_conv1d(modules[name]) for name in grids)
    layers = student_layers(lm.model, modules, grids, request.device, ranks, listener.stage("Fitting grids"))
    modules.clear()
    student = StudentModel(lm.model, layers, train.tokens, request.dtype)
    result = None if spec.rounding.name == "nearest" else _resumable(student, request, state, listener)
    began = time.monotonic()
    nearest = _pack(
        student, ROUNDINGS.get("nearest")({}).round(_job(student, request, state, Silent().stage(""))).choices
    )
    rounded, history, seconds = nearest, list[dict[str, float]](), time.monotonic() - began
    if result is not None:
        rounded, history, seconds = _pack(student, result.choices), result.history, state.seconds()
    dtype = getattr(torch, spec.grid.scale_dtype)

    def write(directory: Path) -> None:
        dense = dense_tensors(lm.model, rounded)  # gathered by all, written by one
        ranks.once(write_model, directory, lm, rounded, grids, transposed, dtype, dense)

    def measure(directory: Path) -> Measured:
        measured = Measured(_evaluate(student, nearest, request, directory, held, listener.stage("Evaluating")))
        measured.add(layers, rounded, nearest)
        return measured

    return _Made(history, seconds, write, measure)


def _job(student: StudentModel, request: Request, state: RunState, show: Stage) -> Job:
    return Job(student.layers, None, request.spec.seed, state, show, ranks=request.ranks)


def _pack(student: StudentModel, choices: Mapping[str, Choice]) -> dict[str, PackedWeight]:
    return {name: student.layers[name].pack(choice) for name, choice in choices.items()}


def _resumable(student: StudentModel, request: Request, state: RunState, listener: Listener) -> Rounded:
    """Run the method, or take the choices that an earlier try finished."""
    finished = state.choices()
    if finished is not None:
        tensors, history = finished
        return Rounded(choices_from_tensors(tensors), history)
    if request.ranks.world > 1:
        check_every_token_everywhere(student)
    needs = request.rounding.needs
    job = _job(student, request, state, listener.stage(request.spec.rounding.name))
    if Needs.STUDENT in needs:
        student.begin(relaxed=Needs.RELAXED in needs)
        job = replace(job, student=student)
    if Needs.BLOCKS in needs:
        job = replace(job, blocks=ModelBlocks(student))
    if Needs.FISHER in needs:
        gradients = _stoppable(state, listener.stage("Gradients of the KL"))
        job = replace(job, fisher=lambda: kronecker_fisher(student, request.spec.seed, gradients))
    began = time.monotonic()
    try:
        with interruptible() as asked:
            state.asked_to_stop = asked
            result = request.rounding.round(job)
    finally:
        state.add_seconds(time.monotonic() - began)
    student.end()
    state.save_choices(choices_to_tensors(result.choices), result.history)
    return result


def _stoppable(state: RunState, show: Stage) -> Stage:
    """``show``, for a pass that keeps no state: where the user asks to stop it ends, and a resumed run repeats it."""

    def step(step: int, total: int, **figures: float) -> None:
        show(step, total, **figures)
        if step < total and state.stop_requested():
            state.stop(step, total)

    return step


def _evaluate(
    student: StudentModel,
    nearest: Mapping[str, PackedWeight],
    request: Request,
    directory: Path,
    held: Windows,
    show: Stage,
) -> dict[str, Quality]:
    """The original in float32 against nearest (in memory) and against what was just written, read back from disk."""
    written = load(directory, request.device, torch.float32, exact=True)
    student.compute_dtype = torch.float32

    def teacher(tokens: Tensor) -> Tensor:
        student.set_mode(Mode.TEACHER)
        return student.logits(tokens)

    def rounded_to_nearest(tokens: Tensor) -> Tensor:
        student.set_mode(Mode.PACKED, nearest)
        return student.logits(tokens)

    def saved(tokens: Tensor) -> Tensor:
        logits: Tensor = written.logits(tokens.unsqueeze(0))[0]
        return logits

    method = request.spec.rounding.name
    # When the method is nearest itself, the second entry replaces the first: what is on disk is what counts.
    return compare(held.tokens, teacher, {"nearest": rounded_to_nearest, method: saved}, show)


def _display_name(lm: TransformersModel, model: str) -> str:
    return (
        Path(lm.path).stem if Path(lm.path).is_file() else Path(model).resolve().name if Path(model).is_dir() else model
    )
