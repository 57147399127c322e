"""What every cell of a comparison shares: model, texts, windows, seed, and what is measured."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dq_runtime.data import Text, Tokenizer, Windows, pack_windows, read_texts
from dq_runtime.errors import DQError, SpecError
from dq_runtime.evaluate.tasks import check_tasks


@dataclass(frozen=True)
class Protocol:
    """The settings of a comparison; all but the paths may also stand in a cells file.

    ``windows`` calibration and ``held_out_windows`` held-out windows of ``window_length`` tokens; to the former the
    model adds ``continued_windows``, going on from pieces of them. ``row_layers``: patterns of layers whose in_features
    no group size divides; they get one scale a row in every cell. ``wikitext``: the raw text on which perplexity is
    measured, in ``wikitext_windows`` (0: all) windows of ``window_length`` tokens that start every ``wikitext_stride``
    (0: ``window_length``). ``tasks``: names of files in ``tasks_data``, of which the first ``task_items`` items count.
    """

    model: str
    calibration: str
    held_out: str | None = None
    wikitext: str | None = None
    tasks_data: str | None = None
    windows: int = 128
    window_length: int = 512
    held_out_windows: int = 24
    continued_windows: int = 0
    seed: int = 0
    compute_dtype: str = "auto"
    device: str = "auto"
    row_layers: tuple[str, ...] = ()
    wikitext_windows: int = 0
    wikitext_stride: int = 0
    tasks: tuple[str, ...] = ()
    task_items: int = 500

    def __post_init__(self) -> None:
        for name in ("row_layers", "tasks"):  # TOML gives lists
            value: Any = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(v, str) for v in value):
                raise SpecError(f"{name} must be a list of strings, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        least = {"windows": 1, "window_length": 2, "held_out_windows": 2, "task_items": 2}
        least |= {"continued_windows": 0, "wikitext_windows": 0, "wikitext_stride": 0, "seed": 0}
        for name, minimum in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise SpecError(f"{name} must be an integer of at least {minimum}, got {value!r}")
        if self.tasks_data is not None and not self.tasks:
            raise SpecError(f"which tasks of {self.tasks_data} are to be measured? name them: --tasks piqa,arc_easy")
        check_tasks(self.tasks, None if self.tasks_data is None else Path(self.tasks_data))

    def texts(self) -> tuple[Text, Text]:
        """(calibration, held-out) documents, disjoint."""
        calibration, held_out = read_texts(self.calibration, self.held_out, self.seed)
        assert calibration is not None, "calibration text is not optional here"
        assert held_out is not None, "it is split off the calibration text where there is no other"
        return calibration, held_out

    def held_windows(self, tokenizer: Tokenizer | None) -> Windows:
        """The held-out windows, the same that `quantize` measures on (a test compares their sums)."""
        _, held = self.texts()
        if tokenizer is None:
            raise DQError(f"{self.model} has no tokenizer to read {held.source} with")
        return pack_windows(
            held.documents, tokenizer, self.held_out_windows, self.window_length, self.seed + 1, held.source
        )

    def describe(self) -> dict[str, Any]:
        """For the result file: everything that decides a figure, files by name and sha256."""
        held_out = (
            {"file": None, "note": "a tenth of the calibration documents, kept out of it"}
            if self.held_out is None
            else _file(self.held_out)
        )
        described: dict[str, Any] = {
            "model": {"name": Path(self.model).name, "sha256": _model_sum(self.model)},
            "calibration": {
                **_file(self.calibration),
                "windows": self.windows,
                **({"continued_windows": self.continued_windows} if self.continued_windows else {}),
                "window_length": self.window_length,
            },
            "held_out": {**held_out, "windows": self.held_out_windows, "window_length": self.window_length},
            "seed": self.seed,
            "compute_dtype": self.compute_dtype,
            "row_layers": list(self.row_layers),
            "kl": "KL(unquantized || rounded) in nats per token, float32, on the checkpoint as written",
            "intervals": "95%, Student's t over windows (items for tasks); differences paired window by window",
        }
        if self.wikitext is not None:
            described["perplexity"] = {
                **_file(self.wikitext),
                "text": '"\\n\\n".join(rows), tokenized in one go without special tokens',
                "windows": self.wikitext_windows or "all",
                "window_length": self.window_length,
                "stride": self.wikitext_stride or self.window_length,
            }
        if self.tasks:
            described["tasks"] = {
                "items": self.task_items,
                "metric": "acc of lm-eval, 0-shot",
                "sha256": {name: _file(f"{self.tasks_data}/{name}.jsonl")["sha256"] for name in self.tasks},
            }
        return described


def protocol_from(in_file: Mapping[str, Any], flags: Mapping[str, Any]) -> Protocol:
    """Settings of a cells file's [protocol], overridden by the flags that were given (those that are not None)."""
    paths = ("model", "calibration", "held_out", "wikitext", "tasks_data")
    known = [f.name for f in fields(Protocol) if f.name not in paths]
    if unknown := sorted(set(in_file) - set(known)):
        raise SpecError(f"[protocol] has no key {unknown[0]!r}; known: {', '.join(known)}")
    given = {name: value for name, value in flags.items() if value is not None}
    return Protocol(**{**in_file, **given})


def _file(source: str) -> dict[str, Any]:
    path = Path(source)
    if not path.is_file():
        return {"file": source, "sha256": None}  # a hub data set; what is no source at all is refused when it is read
    return {"file": path.name, "sha256": _sum([path])}


def _model_sum(model: str) -> str | None:
    path = Path(model)
    files = sorted([*path.glob("*.safetensors"), *path.glob("*.bin")]) if path.is_dir() else [path]
    return _sum(files) if files and all(f.is_file() for f in files) else None


def _sum(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as f:
            while part := f.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()
