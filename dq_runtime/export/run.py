"""export(): the straight line from a packed checkpoint to a directory in another engine's format."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dq_runtime.errors import SpecError
from dq_runtime.export import EXPORTERS
from dq_runtime.export.base import Exporter, Progress, copy_papers
from dq_runtime.packing.atomic import new_directory
from dq_runtime.packing.checkpoint import open_checkpoint, write_sums


@dataclass(frozen=True)
class Exported:
    """What an export wrote: ``layers`` packed linears, ``size_bytes`` of all files, ``notes`` for the user."""

    format: str
    output: str
    layers: int
    size_bytes: int
    seconds: float
    notes: tuple[str, ...]


def export(
    checkpoint: str | Path,
    form: str,
    output: str | Path,
    options: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
    stage: Callable[[str], Progress] = lambda title: lambda step, total, **figures: None,
) -> Exported:
    """Write the packed ``checkpoint`` as ``form`` (a member of :data:`EXPORTERS`) into the new directory ``output``.

    Exact, or refused with a :class:`DQError`; nothing appears at ``output`` before it is complete. ``stage`` is asked
    for a progress bar.
    """
    started = time.monotonic()
    exporter: Exporter = EXPORTERS.get(form)(options or {})
    output = Path(output)
    if output.exists() and not overwrite:
        raise SpecError(f"{output} exists already; choose another directory, or add --overwrite")
    source = open_checkpoint(checkpoint)
    with new_directory(output, overwrite) as directory:
        notes = [*source.notes, *exporter.write(source, directory, stage(f"Exporting to {form}"))]
        if not source.path.is_dir():
            notes.append(f"{source.path.name} is one file, so there are no tokenizer files beside it to take along")
        copy_papers(source.path, directory, form, notes)
        write_sums(directory)
        size = sum(f.stat().st_size for f in directory.rglob("*") if f.is_file())
    return Exported(form, str(output), len(source.layers), size, time.monotonic() - started, tuple(notes))
