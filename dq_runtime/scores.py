"""Finished checkpoints side by side: held-out KL, perplexity, agreement and tasks, on the same text as it was saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dq_runtime.data import pack_windows
from dq_runtime.data.documents import read_documents
from dq_runtime.errors import DQError, SpecError
from dq_runtime.evaluate.intervals import Interval, ci95, paired_ci95
from dq_runtime.evaluate.metrics import Quality, compare
from dq_runtime.evaluate.tasks import check_tasks, score_tasks
from dq_runtime.packing.checkpoint import NotPackedError, open_checkpoint
from dq_runtime.runtime.dense import load_dense
from dq_runtime.runtime.language_model import LanguageModel
from dq_runtime.runtime.load import load
from dq_runtime.runtime.skeleton import load_through_transformers


class Stage(Protocol):
    """Receives the progress of one stage."""

    def __call__(self, step: int, total: int, **figures: float) -> None: ...


@dataclass(frozen=True)
class Score:
    """One model. ``kl`` in nats per token against the reference and ``top1`` the share of tokens on which the most
    likely one agrees, each with its 95% interval over windows (None of a single one); ``beside`` compares the negative
    log-likelihood per token with the first model's, window by window: (difference, interval). ``tasks``: accuracy and
    its interval."""

    path: str
    perplexity: float
    kl: float
    kl_ci95: Interval | None
    top1: float
    top1_ci95: Interval | None
    beside: tuple[float, Interval | None]
    tasks: dict[str, tuple[float, Interval | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """What was measured on: ``count`` windows of ``length`` tokens of ``text``; ``task_items`` of each of ``tasks``,
    found in ``tasks_data``."""

    text: str
    count: int = 16
    length: int = 512
    seed: int = 0
    tasks: tuple[str, ...] = ()
    tasks_data: Path | None = None
    task_items: int = 500


def score(
    paths: Sequence[str],
    reference: str | None,
    protocol: Measurement,
    device: str,
    stage: Callable[[str], Stage] = lambda title: lambda step, total, **figures: None,
) -> list[Score]:
    """The scores of packed checkpoints or dense models ``paths``, in float32 without rounded activations. ``reference``
    is what KL and agreement are measured against; without one, the first of ``paths``."""
    if protocol.count < 1 or protocol.length < 2:
        raise SpecError(f"at least 1 window of 2 tokens is needed, got {protocol.count} of {protocol.length}")
    if len(set(paths)) < len(paths):
        raise SpecError("a checkpoint is given twice")
    check_tasks(protocol.tasks, protocol.tasks_data)
    documents = read_documents(protocol.text)
    show = stage("Loading")
    base = _open(paths[0] if reference is None else reference, device)
    models = {path: base if path == paths[0] and reference is None else _open(path, device) for path in paths}
    show(1, 1)
    if base.tokenizer is None:
        raise DQError(f"{base.path} has no tokenizer to read {protocol.text} with")
    windows = pack_windows(documents, base.tokenizer, protocol.count, protocol.length, protocol.seed, protocol.text)
    for model in models.values():
        if model.vocabulary != base.vocabulary:
            raise SpecError(
                f"{model.path} has {model.vocabulary} tokens and {base.path} {base.vocabulary}: not one model"
            )
    candidates = {path: logits_of(model) for path, model in models.items()}
    qualities = compare(windows.tokens, logits_of(base), candidates, stage("Evaluating"))
    first = qualities[paths[0]]
    del base, models, candidates
    answers = {}
    for path in paths if protocol.tasks else ():
        assert protocol.tasks_data is not None
        show = stage(f"Tasks of {path}")
        answers[path] = task_answers(path, protocol.tasks, protocol.tasks_data, protocol.task_items, device)
        show(1, 1)
    return [_score(path, qualities[path], first, answers.get(path, {})) for path in paths]


def _score(path: str, quality: Quality, first: Quality, answers: dict[str, list[int]]) -> Score:
    difference = sum(quality.nll_windows) - sum(first.nll_windows)
    return Score(
        path,
        quality.perplexity,
        quality.kl,
        ci95(quality.kl_windows),
        quality.agreement,
        ci95(quality.agreement_windows),
        (difference / len(first.nll_windows), paired_ci95(quality.nll_windows, first.nll_windows)),
        {name: (sum(right) / len(right), ci95([float(r) for r in right])) for name, right in answers.items()},
    )


def _open(path: str, device: str) -> LanguageModel:
    """A packed checkpoint as it runs here, its activations exact; anything else dense."""
    try:
        open_checkpoint(path)
    except NotPackedError:
        return load_dense(path, device)
    return load(path, device, torch.float32, exact=True)


def logits_of(model: LanguageModel) -> Callable[[Tensor], Tensor]:
    """``model`` as the evaluator takes it: one window [T] of ids to its logits [T, V]."""

    def logits(tokens: Tensor) -> Tensor:
        out: Tensor = model.logits(tokens.unsqueeze(0))[0]
        return out

    return logits


def task_answers(path: str, tasks: Sequence[str], data: Path, items: int, device: str) -> dict[str, list[int]]:
    """Right (1) and wrong (0) answers of the model at ``path`` to the first ``items`` of each of ``tasks`` through
    lm-eval, the linears of a packed directory packed."""
    from transformers import AutoTokenizer

    try:
        # What is no directory (a GGUF file, a hub name) only transformers can give lm-eval: dense.
        checkpoint = open_checkpoint(path) if Path(path).is_dir() else None
    except NotPackedError:
        checkpoint = None
    if checkpoint is None:
        dense = load_dense(path, device)
        model, tokenizer = dense.model, dense.tokenizer
    else:
        model = load_through_transformers(checkpoint, device, torch.float32).model
        tokenizer = AutoTokenizer.from_pretrained(path)
    return score_tasks(model, tokenizer, tasks, data, items, device)
