"""quantize(): the one straight line from a model to a packed checkpoint, and the only file that sees all three axes.

W -> transform.fold -> grid.fit -> (scales, lo, hi) -> rounding.round -> codes -> packing.pack -> checkpoint -> report
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import time
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dq_runtime.data import Windows, pack_windows, read_documents, split_documents
from dq_runtime.environment import device_name, peak_memory, versions
from dq_runtime.errors import DQError, SpecError
from dq_runtime.evaluate.metrics import Quality, compare
from dq_runtime.evaluate.report import Report, held_out_section, model_card, write_report
from dq_runtime.grids import GRIDS
from dq_runtime.interrupt import interruptible
from dq_runtime.modules.student import StudentModel, student_model_dtype
from dq_runtime.modules.student_linear import Mode, StudentLinear
from dq_runtime.modules.surgery import bias_of, linears, replace_module, weight_of
from dq_runtime.packing import PackedWeight
from dq_runtime.packing.atomic import new_directory
from dq_runtime.packing.checkpoint import write_sums
from dq_runtime.packing.run_state import RunState
from dq_runtime.rounding import ROUNDINGS, Job, Needs, Rounding
from dq_runtime.runtime.dense import licence_of, load_dense
from dq_runtime.runtime.language_model import LanguageModel
from dq_runtime.runtime.load import load
from dq_runtime.runtime.save import any_transposed, write_model
from dq_runtime.runtime.self_text import sample_windows
from dq_runtime.spec import GridSpec, QuantSpec
from dq_runtime.transforms import TRANSFORMS


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
    compute_dtype: str = "auto",
    device: str = "auto",
    checkpoint_every: float = 120.0,
    resume: bool = False,
    overwrite: bool = False,
    report_directory: str | Path | None = None,
    listener: Listener | None = None,
) -> Report:
    """Round ``model`` (a directory, hub name or GGUF file) and write the packed checkpoint ``output``; return its report.

    ``calibration`` and ``held_out`` are text, JSONL or ``hf:`` sources. Without ``held_out``, whole documents of the
    calibration source are held out; without ``calibration``, the teacher samples both. ``compute_dtype`` (auto, float32,
    bfloat16) is that of the rounding loop; everything reported is measured in float32 on what was written to disk.
    Every ``checkpoint_every`` seconds the loop saves its state in ``output.partial/``, from which ``resume`` continues to
    bit-identical codes. Nothing appears at ``output`` before it is complete. Bad input raises :class:`DQError`.
    """
    started = time.monotonic()
    listener = listener or Silent()
    spec = spec or QuantSpec()
    output = Path(output)
    for name, value in (("windows", windows), ("held_out_windows", held_out_windows)):
        if value < 1:
            raise SpecError(f"{name} must be at least 1, got {value}")
    if window_length < 2:
        raise SpecError(f"window_length must be at least 2, got {window_length}")
    if output.exists() and not overwrite:
        raise SpecError(f"{output} exists; choose another output directory or add --overwrite")
    if output.exists() and not (output / "config.json").exists():
        raise SpecError(f"{output} exists and is not a checkpoint; it will not be overwritten")
    rounding: Rounding = ROUNDINGS.get(spec.rounding.name)(spec.rounding.options)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    loop_dtype = student_model_dtype(compute_dtype, torch.device(device))
    torch.set_flush_denormal(True)  # x and its moments decay towards 0; denormals there cost up to 2x

    show = listener.stage("Loading")
    show(0, 1)
    lm = load_dense(model, device)
    show(1, 1)
    modules = linears(lm.model)
    grids = _plan(modules, spec)
    if lm.context_length is not None and window_length > lm.context_length:
        raise SpecError(f"window_length {window_length} exceeds the model's context of {lm.context_length}")
    _check_disk(output, modules, grids, lm, Needs.STUDENT in rounding.needs)
    reference_bytes, reference_bits = _reference_size(lm)

    state = RunState(output, checkpoint_every)
    state.open(resume)
    counts = [windows, held_out_windows]
    train, held = _windows(lm, state, spec.seed, calibration, held_out, counts, window_length, listener)
    full_spec = {**spec.to_json(), "rounding": {"name": spec.rounding.name, "options": rounding.options()}}
    state.claim(
        {
            "spec": full_spec,
            "calibration text": train.fingerprint(),
            "held-out text": held.fingerprint(),
            "compute dtype": str(loop_dtype),
            "model": _fingerprint(modules, grids),
        }
    )

    layers = _students(lm, modules, grids, spec, listener)
    transposed = any_transposed({name: modules[name] for name in grids})
    dense_linears = sorted(set(modules) - set(grids) | _tied_linears(lm.model))
    del modules
    student = StudentModel(lm.model, layers, train.tokens, loop_dtype)

    nearest = _round(ROUNDINGS.get("nearest")({}), student, spec.seed, state, Silent().stage(""))
    if spec.rounding.name == "nearest":
        rounded, history = nearest, []
    else:
        rounded, history = _resumable(rounding, student, spec.seed, state, listener.stage(spec.rounding.name))

    candidates = {"nearest": nearest, spec.rounding.name: rounded}
    layer_rows = _layer_rows(layers, candidates, spec.rounding.name)
    with new_directory(output, overwrite) as directory:
        dtype = getattr(torch, spec.grid.scale_dtype)
        write_model(directory, lm, rounded, grids, dense_linears, transposed, dtype)
        results = _evaluate(student, nearest, spec.rounding.name, directory, held, device, listener.stage("Evaluating"))
        weights = sum(w.n * w.k for w in rounded.values())
        report: Report = {
            "model": _display_name(lm, model),
            "spec": full_spec,
            "bits_per_weight": 8 * sum(w.nbytes for w in rounded.values()) / weights,
            "quantized_weights": weights,
            "size_bytes": sum(f.stat().st_size for f in directory.glob("*.safetensors")),
            "reference_bytes": reference_bytes,
            "reference_bits_per_weight": reference_bits,
            "calibration": {"source": train.source, "windows": windows, "window_length": window_length},
            "held_out": held_out_section(results, held.source, [held_out_windows, window_length]),
            "moved_from_nearest": sum(r["moved"] * r["weights"] for r in layer_rows) / weights,
            "seconds": time.monotonic() - started,
            "peak_memory_bytes": peak_memory(device),
            "compute_dtype": str(loop_dtype).removeprefix("torch."),
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": " ".join(sys.argv),
            "history": history,
            "layers": layer_rows,
        }
        write_report(report, directory)
        (directory / "README.md").write_text(model_card(report, licence_of(model)), encoding="utf-8")
        write_sums(directory)
    state.clear()
    if report_directory is not None:
        write_report(report, Path(report_directory))
    return report


def _plan(modules: Mapping[str, Any], spec: QuantSpec) -> dict[str, GridSpec]:
    """The grid of every layer that will be quantized; everything that can be refused is refused here."""
    if not modules:
        raise SpecError("the model has no linear layers to quantize")
    for override in spec.overrides:
        if not any(fnmatchcase(name, override.pattern) for name in modules):
            raise SpecError(
                f"override pattern {override.pattern!r} matches no layer; the first layer is {next(iter(modules))}"
            )
    plan = {}
    for name, module in modules.items():
        grid = spec.grid_for(name)
        if grid is None:
            continue
        weight = weight_of(module)
        try:
            grid.groups(weight.shape[1])
        except SpecError as e:
            raise SpecError(f"{name}: {e} (--override '{name}=BITS:GROUP')") from None
        if not bool(torch.isfinite(weight).all()):
            raise DQError(f"{name}.weight of the model holds NaN or infinity; the model is damaged")
        plan[name] = grid
    if not plan:
        raise SpecError("no linear layer is left to quantize; check --ignore and --override")
    return plan


def _check_disk(
    output: Path, modules: Mapping[str, Any], grids: Mapping[str, GridSpec], lm: LanguageModel, with_state: bool
) -> None:
    """Refuse now rather than after hours: output, plus x, m and v in float32 while a student is rounded."""
    weights = sum(weight_of(modules[name]).numel() for name in grids)
    dense = sum(p.numel() for p in lm.model.parameters()) - weights
    needed = int(weights * 0.6 + 2 * dense) + (2 * 12 * weights if with_state else 0)  # a new state beside the old one
    existing = next(p for p in (output, *output.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DQError(
            f"{existing} has {free / 1e9:.1f} GB free, but this run needs {needed / 1e9:.1f} GB; free some space"
        )


def _fingerprint(modules: Mapping[str, Any], grids: Mapping[str, GridSpec]) -> str:
    """Hash of the largest magnitude of every row: the same model gives the same, a fine-tuned one does not."""
    digest = hashlib.sha256()
    for name in grids:
        digest.update(weight_of(modules[name]).detach().float().abs().amax(1).cpu().numpy().tobytes())
    return digest.hexdigest()


def _windows(
    lm: LanguageModel,
    state: RunState,
    seed: int,
    calibration: str | None,
    held_out: str | None,
    counts: list[int],
    length: int,
    listener: Listener,
) -> tuple[Windows, Windows]:
    """Calibration and held-out windows; held-out documents (or samples) never enter calibration."""
    if calibration is None and held_out is None:
        tokens = state.windows("sampled")
        if tokens is None:
            progress = listener.stage("Sampling calibration text from the model")
            sampled = sample_windows(lm, sum(counts), length, seed, progress)
            tokens = sampled.tokens
            state.save_windows("sampled", tokens)
        source = "text sampled from the teacher itself"
        return Windows(tokens[: counts[0]], source), Windows(tokens[counts[0] :], source)
    if lm.tokenizer is None:
        raise DQError(
            f"{lm.path} has no tokenizer, so text cannot be read; leave out --calibration to sample token ids"
        )
    if calibration is None:
        tokens = state.windows("sampled")
        if tokens is None:
            progress = listener.stage("Sampling calibration text from the model")
            tokens = sample_windows(lm, counts[0], length, seed, progress).tokens
            state.save_windows("sampled", tokens)
        train = Windows(tokens, "text sampled from the teacher itself")
        assert held_out is not None
        return train, pack_windows(read_documents(held_out), lm.tokenizer, counts[1], length, seed + 1, held_out)
    documents = read_documents(calibration)
    if held_out is None:
        documents, kept = split_documents(documents, seed)
        name = f"held-out documents of {calibration}"
    else:
        kept, name = read_documents(held_out), held_out
        overlap = set(documents) & set(kept)
        documents = [d for d in documents if d not in overlap]
        if not documents:
            raise DQError(f"every document of {calibration} is also in {held_out}; nothing is left to calibrate on")
    train = pack_windows(documents, lm.tokenizer, counts[0], length, seed, calibration)
    return train, pack_windows(kept, lm.tokenizer, counts[1], length, seed + 1, name)


def _students(
    lm: LanguageModel, modules: dict[str, Any], grids: Mapping[str, GridSpec], spec: QuantSpec, listener: Listener
) -> dict[str, StudentLinear]:
    """Replace each linear by its StudentLinear, one at a time, so that W is never held twice."""
    show = listener.stage("Fitting grids")
    transform = TRANSFORMS.get(spec.transform)()
    layers = {}
    for i, (name, grid) in enumerate(grids.items(), 1):
        module = modules[name]
        built = GRIDS.get(grid.name)(grid)
        layers[name] = StudentLinear(weight_of(module), bias_of(module), built, transform)
        replace_module(lm.model, name, layers[name])
        module.weight = None
        show(i, len(grids))
    return layers


def _tied_linears(model: Any) -> set[str]:
    """Linears left out because they share their weight with an embedding; readers must leave them alone too."""
    return {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


def _round(
    rounding: Rounding, student: StudentModel, seed: int, state: RunState, show: Stage
) -> dict[str, PackedWeight]:
    job = Job(student.layers, None, seed, state, show)
    return {name: student.layers[name].pack(codes) for name, codes in rounding.round(job).codes.items()}


def _resumable(
    rounding: Rounding, student: StudentModel, seed: int, state: RunState, show: Stage
) -> tuple[dict[str, PackedWeight], list[dict[str, float]]]:
    """Run a method, or take the codes that an earlier try finished."""
    finished = state.codes()
    if finished is None:
        with_student = Needs.STUDENT in rounding.needs
        if with_student:
            student.begin()
        with interruptible() as asked:
            state.asked_to_stop = asked
            result = rounding.round(Job(student.layers, student if with_student else None, seed, state, show))
        student.end()
        state.save_codes(result.codes, result.history)
        finished = dict(result.codes), result.history
    codes, history = finished
    return {name: student.layers[name].pack(c.to(student.layers[name].lo.device)) for name, c in codes.items()}, history


def _evaluate(
    student: StudentModel,
    nearest: Mapping[str, PackedWeight],
    method: str,
    directory: Path,
    held: Windows,
    device: str,
    show: Stage,
) -> dict[str, Quality]:
    """The original in float32 against nearest (in memory) and against what was just written, read back from disk."""
    written = load(directory, device, torch.float32)
    student.compute_dtype = torch.float32

    def teacher(tokens: Tensor) -> Tensor:
        student.set_mode(Mode.TEACHER)
        return student.logits(tokens)

    def rounded_to_nearest(tokens: Tensor) -> Tensor:
        student.set_mode(Mode.PACKED, nearest)
        return student.logits(tokens)

    def saved(tokens: Tensor) -> Tensor:
        logits: Tensor = written.model(input_ids=tokens.to(written.device).unsqueeze(0), use_cache=False).logits[0]
        return logits

    candidates = {"nearest": rounded_to_nearest, method: saved} if method != "nearest" else {"nearest": saved}
    return compare(held.tokens, teacher, candidates, show)


def _layer_rows(
    layers: Mapping[str, StudentLinear], candidates: Mapping[str, Mapping[str, PackedWeight]], method: str
) -> list[dict[str, Any]]:
    """Per layer: shape, bits, relative weight error of the method and of nearest, share of codes that differ."""
    rows = []
    for name, layer in layers.items():
        w = layer.weight()
        norm = float(w.square().sum()) or 1.0
        chosen, nearest = candidates[method][name], candidates["nearest"][name]
        moved = (chosen.codes() != nearest.codes()).float().mean().item()
        rows.append(
            {
                "name": name,
                "out_features": chosen.n,
                "in_features": chosen.k,
                "weights": chosen.n * chosen.k,
                "bits": chosen.bits,
                "group_size": layer.grid.spec.group_size,
                "bits_per_weight": 8 * chosen.nbytes / (chosen.n * chosen.k),
                "relative_error": float((chosen.decode() - w).square().sum()) / norm,
                "relative_error_nearest": float((nearest.decode() - w).square().sum()) / norm,
                "moved": moved,
            }
        )
    return rows


def _reference_size(lm: LanguageModel) -> tuple[int, float]:
    """Bytes and bits per weight of the model as it came: the GGUF file, the directory's weights, else float32."""
    path = Path(lm.path)
    files = [path] if path.is_file() else list(path.glob("*.safetensors")) if path.is_dir() else []
    parameters = sum(p.numel() for p in lm.model.parameters())
    size = sum(f.stat().st_size for f in files) or 4 * parameters
    return size, 8 * size / parameters


def _display_name(lm: LanguageModel, model: str) -> str:
    return Path(lm.path).stem if Path(lm.path).is_file() else Path(model).name if Path(model).is_dir() else model
