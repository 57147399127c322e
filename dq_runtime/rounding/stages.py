"""A method made of several others, one after the other: each sees a job of its own, the user one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from dq_runtime.rounding.base import Job
from dq_runtime.rounding.whole_model import Saved


class Part:
    """The part ``name`` of ``job``: of ``total`` units of work it does ``share``, after ``before``. A ``StateStore``
    and a ``Monitor`` for it: what it says of its own steps is told in units of the whole, and what is saved is marked,
    so that :meth:`load` gives each part its own state only."""

    def __init__(self, job: Job, name: str, before: int, share: int, total: int) -> None:
        self._job, self._name = job, name
        self._before, self._share, self._total = before, share, total

    def job(self) -> Job:
        """The job as the part sees it."""
        return replace(self._job, store=self, monitor=self)

    def __call__(self, step: int, total: int, **figures: float) -> None:
        self._job.monitor(self._at(step, total), self._total, **figures)

    def due(self) -> bool:
        return self._job.store.due()

    def save(self, step: int, tensors: Mapping[str, Tensor], extra: Mapping[str, Any]) -> None:
        self._job.store.save(step, tensors, {**extra, "part": self._name})

    def load(self) -> Saved:
        saved = self._job.store.load()
        return saved if saved is not None and saved[2]["part"] == self._name else None

    def stop_requested(self) -> bool:
        return self._job.store.stop_requested()

    def stop(self, step: int, total: int) -> None:
        self._job.store.stop(self._at(step, total), self._total)

    def _at(self, step: int, total: int) -> int:
        return self._before + self._share * step // total
