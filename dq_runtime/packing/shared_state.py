"""The state of a run of several processes: ``torch.distributed.checkpoint`` (DCP) writes it, each process its own rows.

Beside what ``run_state.py`` keeps, ``OUT.partial/`` holds ``state-7/`` as DCP writes it and ``state.json``, which names
that directory, with step and history. A new state goes to ``state-8/``; the name is replaced last, in one rename, and
then the old directory goes: whoever is killed, and when, one whole state is there. DCP hands out rows anew where a run
continues with another number of processes. The directory must be one that all processes see.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from dq_runtime.errors import CheckpointError, DQError, SpecError
from dq_runtime.packing.atomic import TOGETHER, new_directory, replace_file
from dq_runtime.packing.run_state import Claim, RunState
from dq_runtime.ranks import Ranks


def state_of(output: Path, every: float, ranks: Ranks) -> RunState:
    """The state of a run of one process, or of several."""
    return RunState(output, every) if ranks.mesh is None else SharedState(output, every, ranks)


@contextmanager
def one_directory(path: Path, overwrite: bool, ranks: Ranks) -> Iterator[Path]:
    """:func:`new_directory` of the first process, for all: it becomes ``path`` once all have left."""
    if not ranks.first:
        path_of_it, writer = ranks.told(("", 0))
        TOGETHER.add(writer)
        yield Path(path_of_it)
        ranks.wait()
        return
    with new_directory(path, overwrite) as directory:
        ranks.told((str(directory), os.getpid()))
        yield directory
        ranks.wait()


class SharedState(RunState):
    """What :class:`RunState` is, asked by all processes at the same time: all get one answer, the first one writes what
    is not a tensor of rows. What is called after a failure, maybe of one process, waits for no other."""

    def __init__(self, output: Path, every: float, ranks: Ranks) -> None:
        super().__init__(output, every)
        self._ranks = ranks

    def open(self, resume: bool) -> None:
        super().open(resume)
        self._ranks.wait()  # the first must not make the directory before the last has looked

    def claim(self, claim: Claim) -> None:
        wanted = json.loads(json.dumps(asdict(claim)))
        first, parts = self._ranks.told(wanted), ("fixed", "windows", "adjustable")
        other = [key for part in parts for key in wanted[part] if first[part].get(key) != wanted[part][key]]
        if self._ranks.any(bool(other)):
            named = f" {' and '.join(other)}" if other else " something"
            raise SpecError(f"the processes were given a different{named}; start all of them by one torchrun")
        self._ranks.once(super().claim, claim)
        self.adjusted = self._ranks.told(self.adjusted)

    def save_windows(self, name: str, tokens: Tensor) -> None:
        self._ranks.once(super().save_windows, name, tokens)

    def choices(self) -> tuple[dict[str, Tensor], list[dict[str, float]]] | None:
        saved = self._load("choices")
        return super().choices() if saved is None else (saved[0], saved[1]["history"])

    def save_choices(self, choices: Mapping[str, Tensor], history: list[dict[str, float]]) -> None:
        self._save("choices", choices, {"history": history})

    def add_seconds(self, seconds: float) -> None:
        if self._ranks.first:
            super().add_seconds(seconds)

    def due(self) -> bool:
        return self._ranks.any(super().due())

    def stop_requested(self) -> bool:
        """A signal reaches the processes at different moments: all stop after the step in which one has seen it."""
        return self._ranks.any(super().stop_requested())

    def save(self, step: int, tensors: Mapping[str, Tensor], extra: Mapping[str, Any]) -> None:
        self._save("state", tensors, {"step": step, "extra": dict(extra)})
        self.saved_now()

    def load(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """Rows of this process; whole tensors where one process without torchrun saved them."""
        saved = self._load("state")
        return super().load() if saved is None else (saved[1]["step"], saved[0], saved[1]["extra"])

    def discard_unless_resumable(self) -> None:
        if self._ranks.first:
            super().discard_unless_resumable()

    def clear(self) -> None:
        if self._ranks.first:
            super().clear()

    def _pointer(self, name: str) -> dict[str, Any] | None:
        """What ``NAME.json`` says."""
        file = self.directory / f"{name}.json"
        pointer = file.read_text(encoding="utf-8") if self._ranks.first and file.exists() else ""
        pointer = self._ranks.told(pointer)
        return dict(json.loads(pointer)) if pointer else None

    def _save(self, name: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.state_dict_saver import save

        last = self._pointer(name)
        number = 1 if last is None else last["number"] + 1
        target = self.directory / f"{name}-{number}"
        self._ranks.once(shutil.rmtree, target, True)  # of a process that was killed while it wrote
        try:
            save(dict(tensors), checkpoint_id=str(target))
        except CheckpointException as e:  # in every process, whichever of them failed
            reasons = "; ".join(sorted({str(error[0]) for error in e.failures.values()}))
            raise DQError(f"could not write {target}: {reasons}; the state before it is still there") from None
        self._ranks.once(self._replace, name, {"number": number, **header})

    def _replace(self, name: str, pointer: Mapping[str, Any]) -> None:
        text = json.dumps(pointer)
        replace_file(self.directory / f"{name}.json", lambda p: p.write_text(text, encoding="utf-8"))
        for directory in self.directory.glob(f"{name}-*"):
            if directory.name != f"{name}-{pointer['number']}":
                shutil.rmtree(directory, ignore_errors=True)

    def _load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata
        from torch.distributed.checkpoint.state_dict_loader import load

        pointer = self._pointer(name)
        if pointer is None:
            return None
        target = self.directory / f"{name}-{pointer['number']}"
        try:
            held = FileSystemReader(str(target)).read_metadata().state_dict_metadata
            tensors = {
                key: self._ranks.empty(entry.size, entry.properties.dtype)
                for key, entry in held.items()
                if isinstance(entry, TensorStorageMetadata)
            }
            load(tensors, checkpoint_id=str(target))
        except (CheckpointException, OSError, EOFError, ValueError) as e:
            reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            raise CheckpointError(f"{target} is damaged ({reason}); delete {self.directory} and start again") from None
        return tensors, pointer
