"""One cell, in a process of its own: peak memory is then the cell's, and nothing one cell breaks reaches the next."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dq_runtime.compare.cells import REFERENCE, Cell
from dq_runtime.compare.protocol import Protocol as Settings
from dq_runtime.data import Windows
from dq_runtime.environment import device_name, resolve_device, versions
from dq_runtime.errors import DQError, Interrupted
from dq_runtime.evaluate.metrics import compare
from dq_runtime.evaluate.perplexity import perplexity, running_text
from dq_runtime.evaluate.report import held_out_section
from dq_runtime.packing.checkpoint import open_checkpoint
from dq_runtime.pipeline import quantize
from dq_runtime.request import Silent, Stage
from dq_runtime.runtime.dense import load_dense
from dq_runtime.runtime.language_model import LanguageModel
from dq_runtime.runtime.load import load
from dq_runtime.scores import logits_of, task_answers


class Pipe(Protocol):
    """Where messages to the parent go: ("stage", title, step, total, figures), and at last ("done", figures),
    ("refused", {"reason": sentence}), ("failed", {"reason": sentence, "traceback": text}) or ("interrupted", {})."""

    def send(self, message: Any) -> None: ...


def work(pipe: Pipe, cell: Cell, settings: Settings, checkpoint: Path, threads: int, parent: int) -> None:
    """Entry point of the process. ``parent`` is who started it: without it nobody would collect the result."""
    os.setpgrp()  # Ctrl-C in a terminal reaches the whole group; the parent passes it on once
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    try:
        pipe.send(("done", run_cell(cell, settings, checkpoint, _Sender(pipe))))
    except (Interrupted, KeyboardInterrupt):
        pipe.send(("interrupted", {}))
    except DQError as e:
        pipe.send(("refused", {"reason": str(e)}))
    except Exception as e:  # a defect in one method must not cost the night's other cells
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        pipe.send(("failed", {"reason": reason, "traceback": traceback.format_exc()}))


def _die_with(parent: int) -> None:
    """A parent that was killed says nothing; its next try must not find this process at work on the same files."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


class _Sender(Silent):
    """A listener whose stages go through the pipe, at most ten messages a second."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe

    def stage(self, title: str) -> Stage:
        last = 0.0

        def show(step: int, total: int, **figures: float) -> None:
            nonlocal last
            if step == total or time.monotonic() - last > 0.1:
                last = time.monotonic()
                self._pipe.send(("stage", title, step, total, figures))

        return show


def run_cell(cell: Cell, settings: Settings, checkpoint: Path, listener: Silent) -> dict[str, Any]:
    """Round (or open) and measure one cell; what is rounded goes to ``checkpoint``. JSON in, JSON out."""
    device = resolve_device(settings.device)
    if cell.method == REFERENCE or cell.path is not None:
        result = _score(cell, settings, device, listener)
    else:
        result = _quantize(cell, settings, checkpoint, listener)
    path = settings.model if cell.method == REFERENCE else str(checkpoint) if cell.path is None else cell.path
    result |= _perplexity(path, settings, device, listener)
    if settings.tasks and cell.tasks:
        result |= _tasks(path, settings, device, listener)
    return {
        **result,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _quantize(cell: Cell, settings: Settings, checkpoint: Path, listener: Silent) -> dict[str, Any]:
    """Through `quantize`, which resumes by itself; a checkpoint that an earlier try finished is not made again."""
    resumed = checkpoint.with_name(checkpoint.name + ".partial").exists()
    if (checkpoint / "report.json").exists():
        report = json.loads((checkpoint / "report.json").read_text(encoding="utf-8"))
    else:
        shutil.rmtree(checkpoint, ignore_errors=True)
        report = quantize(
            settings.model,
            checkpoint,
            cell.spec(settings.seed, settings.row_layers),
            calibration=settings.calibration,
            held_out=settings.held_out,
            windows=settings.windows,
            window_length=settings.window_length,
            held_out_windows=settings.held_out_windows,
            continued_windows=settings.continued_windows,
            compute_dtype=settings.compute_dtype,
            device=settings.device,
            resume=True,
            listener=listener,
        )
    held, method = report["held_out"], cell.method
    return {
        "bpw": report["bits_per_weight"],
        "all_options": report["spec"]["rounding"]["options"],
        "learned_scales": report["learned_scales"],
        "per_window": held["per_window"][method],
        "kl_nearest": held["kl"]["nearest"],
        "held_out_sha256": held["sha256"],
        "calibration_sha256": report["calibration"]["sha256"] if report["calibration"]["windows"] else None,
        "seconds": report["rounding_seconds"],
        "total_seconds": report["seconds"],
        "resumed": resumed,
        "peak_memory_bytes": report["peak_memory_bytes"],
        "moved_fraction": report["moved_from_nearest"],
        "compute_dtype": report["compute_dtype"],
    }


def _score(cell: Cell, settings: Settings, device: str, listener: Silent) -> dict[str, Any]:
    """The unquantized model itself, or a checkpoint made elsewhere, against it; the evaluator is `quantize`'s."""
    show = listener.stage("Loading")
    show(0, 1)
    original = load_dense(settings.model, device)
    made: dict[str, Any] = {"bits": 16, "bpw": 16.0, "learned_scales": None}
    candidates: dict[str, Callable[[Tensor], Tensor]] = {}
    if cell.path is not None:
        candidate, made = _open(cell, device)
        candidates = {cell.method: logits_of(candidate)}
    windows = settings.held_windows(original.tokenizer)
    show(1, 1)
    results = compare(windows.tokens, logits_of(original), candidates, listener.stage("Evaluating"))
    section = held_out_section(results, windows.source, [len(windows.tokens), settings.window_length])
    return {
        **made,
        "all_options": {},
        "per_window": section["per_window"][cell.method],
        "kl_nearest": None,
        "held_out_sha256": windows.fingerprint(),
        "calibration_sha256": None,
        "seconds": None,
        "total_seconds": None,
        "resumed": False,
        "peak_memory_bytes": None,
        "moved_fraction": None,
        "compute_dtype": None,
    }


def _open(cell: Cell, device: str) -> tuple[LanguageModel, dict[str, Any]]:
    """A checkpoint made elsewhere and the grid it is on: packed (then it says so itself) or dense."""
    assert cell.path is not None
    config: Mapping[str, Any] = json.loads((Path(cell.path) / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" not in config:
        if cell.bits is None or cell.group_size is None:
            raise DQError(f"{cell.path} holds dense weights; say their grid: --checkpoint NAME=DIR@BITS:GROUP")
        return load_dense(cell.path, device), {"bpw": None, "learned_scales": None}
    packed = [weight for _, weight in open_checkpoint(cell.path).packed()]
    bpw = 8 * sum(w.nbytes for w in packed) / sum(w.n * w.k for w in packed)
    if not packed or len({w.bits for w in packed}) > 1:
        raise DQError(f"{cell.path} mixes bit widths; a row of the table has one")
    first = packed[0]
    grid = {"bits": first.bits, "group_size": "row" if first.group_size == first.k else first.group_size}
    symmetric = first.zero is None
    return load(cell.path, device, torch.float32, exact=True), {
        **grid,
        "symmetric": symmetric,
        "bpw": bpw,
        "learned_scales": None,
    }


def _is_packed(path: str) -> bool:
    config = Path(path) / "config.json"
    return config.is_file() and "quantization_config" in json.loads(config.read_text(encoding="utf-8"))


def _perplexity(path: str, settings: Settings, device: str, listener: Silent) -> dict[str, Any]:
    """Of the model at ``path`` on the raw test text; nothing where the protocol has none."""
    if settings.wikitext is None:
        return {}
    model = load(path, device, torch.float32, exact=True) if _is_packed(path) else load_dense(path, device)
    if model.tokenizer is None:
        raise DQError(f"{path} has no tokenizer to read {settings.wikitext} with")
    text = running_text(
        Path(settings.wikitext),
        model.tokenizer,
        settings.window_length,
        settings.wikitext_stride or settings.window_length,
    )
    windows = text.windows(settings.wikitext_windows)
    measured = perplexity(windows, logits_of(model), listener.stage("Perplexity"))
    return {
        "perplexity_windows": {"nll": measured.nll_windows, "tokens": measured.tokens},
        "perplexity_sha256": Windows(text.ids, settings.wikitext).fingerprint(),
    }


def _tasks(path: str, settings: Settings, device: str, listener: Silent) -> dict[str, Any]:
    """Right and wrong answers of the model at ``path``."""
    show = listener.stage("Tasks")
    show(0, 1)
    assert settings.tasks_data is not None
    answers = task_answers(path, settings.tasks, Path(settings.tasks_data), settings.task_items, device)
    show(1, 1)
    return {"tasks": answers}
