"""The state of a quantization in progress, in ``OUT.partial/``: what ``--resume`` needs to continue bit for bit.

``request.json`` says what is being made; a resumed run that asks for anything else is refused, but for what a run that
diverged or ran out of memory has to lower. ``state.safetensors`` holds the method's tensors, its step and history in
the header: one file, one rename, never half a state.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dq_runtime.errors import CheckpointError, Interrupted, SpecError
from dq_runtime.packing.atomic import remove_unfinished, replace_file, save_tensors


def _save(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    replace_file(path, lambda temporary: save_tensors(temporary, tensors, {"dq": json.dumps(header)}))


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as f:
            header = json.loads(f.metadata()["dq"])
            return {name: f.get_tensor(name) for name in f.keys()}, header  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as e:
        raise CheckpointError(f"{path} is damaged ({e}); delete {path.parent} and start again") from None


@dataclass(frozen=True)
class Claim:
    """What a run makes. Of a resumed run ``fixed`` must be the same; ``windows`` too, unless ``window_length`` was
    lowered; ``adjustable`` (dtype of the loop, rates, batches) may change, in the loop's next steps."""

    fixed: Mapping[str, Any]
    windows: Mapping[str, Any]
    window_length: int
    adjustable: Mapping[str, Any]


class RunState:
    """Implements the ``StateStore`` contract of rounding over a directory beside the output."""

    def __init__(self, output: Path, every: float) -> None:
        self.output = output
        self.directory = output.with_name(output.name + ".partial")
        self.every = every
        self.asked_to_stop: Callable[[], bool] = lambda: False
        self.adjusted: list[str] = []  # what resumed runs have changed, in words
        self._last = time.monotonic()
        self._found = False

    def open(self, resume: bool) -> None:
        """Refuse an unfinished run that was not asked to be resumed; called before any work."""
        self._found = self.directory.exists()
        if self._found and not resume:
            raise SpecError(
                f"{self.directory} holds an unfinished run; add --resume to continue it, or delete it to start again"
            )
        if resume:  # whoever was writing the output is gone; a killed process could not clean up after itself
            remove_unfinished(self.output)

    def claim(self, claim: Claim) -> None:
        """Write down what is being made, or refuse to continue a state that was made for something else."""
        self.directory.mkdir(parents=True, exist_ok=True)
        file = self.directory / "request.json"
        wanted = json.loads(json.dumps(asdict(claim)))
        if file.exists():
            self._compare(file, wanted)
        if not file.exists() or self.adjusted:
            text = json.dumps(wanted | {"adjusted": self.adjusted}, indent=2)
            replace_file(file, lambda p: p.write_text(text, encoding="utf-8"))

    def _compare(self, file: Path, wanted: Mapping[str, Any]) -> None:
        """Refuse what must not change; tell the user, and remember, what did."""
        try:
            before = dict(json.loads(file.read_text(encoding="utf-8")))
            length = int(before["window_length"])
            same = ("fixed", "windows") if length == wanted["window_length"] else ("fixed",)
            changed = [key for part in same for key in wanted[part] if before[part].get(key) != wanted[part][key]]
            old = before["adjustable"] | {"window_length": length}
            self.adjusted = list(before["adjusted"])
        except (ValueError, TypeError, KeyError, AttributeError):
            raise CheckpointError(f"{file} is damaged; delete {self.directory} and start again") from None
        if length < wanted["window_length"]:
            changed.append("window_length (it may be lowered, not raised)")
        if changed:
            raise SpecError(
                f"{self.directory} was made with a different {' and '.join(changed)}; repeat the original options, or "
                "delete it to start again"
            )
        new = wanted["adjustable"] | {"window_length": wanted["window_length"]}
        moved = [f"{key} {new[key]} instead of {old.get(key)}" for key in new if new[key] != old.get(key)]
        if moved:
            logging.getLogger("dq").warning("note: goes on with %s", ", ".join(moved))
        self.adjusted += moved

    def windows(self, name: str) -> Tensor | None:
        """Token windows saved by an earlier try (sampling them from the teacher takes minutes)."""
        saved = _load(self.directory / f"{name}.safetensors")
        return None if saved is None else saved[0]["tokens"]

    def save_windows(self, name: str, tokens: Tensor) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        _save(self.directory / f"{name}.safetensors", {"tokens": tokens}, {})

    def choices(self) -> tuple[dict[str, Tensor], list[dict[str, float]]] | None:
        """The finished choices (flat, by name) of an earlier try that stopped after rounding, and their history."""
        saved = _load(self.directory / "choices.safetensors")
        return None if saved is None else (saved[0], saved[1]["history"])

    def save_choices(self, choices: Mapping[str, Tensor], history: list[dict[str, float]]) -> None:
        _save(self.directory / "choices.safetensors", choices, {"history": history})

    def basis(self) -> tuple[dict[str, Tensor], list[dict[str, float]]] | None:
        """The rotations (flat, by number) that an earlier try learned, and their history."""
        saved = _load(self.directory / "basis.safetensors")
        return None if saved is None else (saved[0], saved[1]["history"])

    def save_basis(self, rotations: Mapping[str, Tensor], history: list[dict[str, float]]) -> None:
        _save(self.directory / "basis.safetensors", rotations, {"history": history})

    def sensitivity(self) -> dict[str, dict[str, float]]:
        """What an earlier try has measured of the KL of each group of layers at each bit width (as text)."""
        file = self.directory / "sensitivity.json"
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}

    def save_sensitivity(self, measured: Mapping[str, Mapping[str, float]]) -> None:
        text = json.dumps(measured)
        replace_file(self.directory / "sensitivity.json", lambda p: p.write_text(text, encoding="utf-8"))

    def seconds(self) -> float:
        """How long the method has run so far, in every try that ended in order (a killed one is not counted)."""
        file = self.directory / "seconds.json"
        return float(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else 0.0

    def add_seconds(self, seconds: float) -> None:
        total = self.seconds() + seconds
        replace_file(self.directory / "seconds.json", lambda p: p.write_text(json.dumps(total), encoding="utf-8"))

    def due(self) -> bool:
        return time.monotonic() - self._last >= self.every

    def save(self, step: int, tensors: Mapping[str, Tensor], extra: Mapping[str, Any]) -> None:
        _save(self.directory / "state.safetensors", tensors, {"step": step, "extra": dict(extra)})
        self.saved_now()

    def saved_now(self) -> None:
        """The next state is due ``every`` seconds from now."""
        self._last = time.monotonic()

    def load(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        saved = _load(self.directory / "state.safetensors")
        if saved is None:
            if (self.directory / "state.json").exists():
                raise SpecError(
                    f"{self.directory} was made under torchrun; continue it there (torchrun --nproc-per-node 1 will do)"
                )
            return None
        tensors, header = saved
        return header["step"], tensors, header["extra"]

    def stop_requested(self) -> bool:
        return self.asked_to_stop()

    def stop(self, step: int, total: int) -> None:
        raise Interrupted(f"stopped after step {step} of {total}; run the same command with --resume to continue")

    def discard_unless_resumable(self) -> None:
        """After a failure: keep what an earlier try left, and of this one what would save a resumed run work."""
        worth = ["basis.safetensors", "sensitivity.json", "state.safetensors", "choices.safetensors"]
        worth += ["state.json", "choices.json"]  # of several processes, see shared_state.py
        if not self._found and not any((self.directory / f).exists() for f in worth):
            self.clear()

    def clear(self) -> None:
        """The run is complete and its output in place."""
        shutil.rmtree(self.directory, ignore_errors=True)
