"""The state of a quantization in progress, in ``OUT.partial/``: what ``--resume`` needs to continue bit for bit.

``request.json`` says what is being made; a resumed run that asks for anything else is refused. ``state.safetensors``
holds the method's tensors with its step and history in the header: one file, one rename, never half a state.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
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


class RunState:
    """Implements the ``StateStore`` contract of rounding over a directory beside the output."""

    def __init__(self, output: Path, every: float) -> None:
        self.output = output
        self.directory = output.with_name(output.name + ".partial")
        self.every = every
        self.asked_to_stop: Callable[[], bool] = lambda: False
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

    def claim(self, request: Mapping[str, Any]) -> None:
        """Write down what is being made, or refuse to continue a state that was made for something else."""
        self.directory.mkdir(parents=True, exist_ok=True)
        file = self.directory / "request.json"
        wanted = json.loads(json.dumps(request))
        if not file.exists():
            replace_file(file, lambda p: p.write_text(json.dumps(wanted, indent=2), encoding="utf-8"))
            return
        try:
            previous = dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise CheckpointError(f"{file} is damaged; delete {self.directory} and start again") from None
        changed = [key for key in wanted if previous.get(key) != wanted[key]]
        if changed:
            raise SpecError(
                f"{self.directory} was made with a different {' and '.join(changed)}; repeat the original options, or "
                "delete it to start again"
            )

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
