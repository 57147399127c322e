"""The loop of the methods that round the whole model at once: a step a window (or a few), its KL, the state kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from dq_runtime.environment import give_back_memory
from dq_runtime.errors import SpecError
from dq_runtime.rounding.base import Job, Student, Weights

# A run is called diverged where the KL of this many windows in a row is more than TOO_FAR times that of the first. From
# RISING on (means of 32 windows differ by some percent, not by half) nothing is saved over the last good state.
WATCHED = 32
TOO_FAR = 4.0
RISING = 1.5
LOWER = "use a smaller lr or float32 computation, and --resume to go on from the last good state"
Saved = tuple[int, dict[str, Tensor], dict[str, Any]] | None


def warmup_cosine(step: int, total: int, warmup: float) -> float:
    """The factor on every rate at a step from 0: linear over round(warmup * total) steps to 1, then half a cosine to
    0."""
    warm = max(1, round(warmup * total))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def check_kl(kl: float, step: int) -> None:
    """Raise :class:`SpecError` for a KL that is not finite; ``step`` counts from 0."""
    if not math.isfinite(kl):
        raise SpecError(f"the KL became {kl} at step {step + 1}; {LOWER}")


def batch_backward(student: Student, step: int, batch: int, weights: Weights | None = None) -> float:
    """The mean KL of the ``batch`` windows of a step from 0, which take turns; their gradients are added up.
    :class:`SpecError` where it is not finite."""
    kl = 0.0
    for i in range(step * batch, (step + 1) * batch):
        kl += student.kl_backward(i % student.windows, weights).item() / batch
    check_kl(kl, step)
    return kl


def check_progress(history: Sequence[Mapping[str, float]], steps: int) -> None:
    """Raise :class:`SpecError` where the KL has left the beginning of the last ``steps`` rows far behind."""
    if steps < 2 * WATCHED:
        return
    first, last = _ends(history, steps)
    if last > TOO_FAR * first:
        raise SpecError(f"the KL rose from {first:.3g} to {last:.3g} in {steps} steps; {LOWER}")


def rising(history: Sequence[Mapping[str, float]], steps: int) -> bool:
    """Whether the KL has left that beginning so far behind that the run may be about to diverge."""
    if steps < WATCHED // 2:
        return False
    first, last = _ends(history, steps)
    return last > RISING * first


def check_state(tensors: Mapping[str, Tensor], step: int) -> None:
    """Raise :class:`SpecError` for a state that is not finite, which a KL that still is does not show."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise SpecError(f"{name} of the optimiser became NaN or infinite at step {step}; {LOWER}")


def _ends(history: Sequence[Mapping[str, float]], steps: int) -> tuple[float, float]:
    """The mean KL at the beginning and at the end of the last ``steps`` rows, over WATCHED each or half of them."""
    count, begin = min(WATCHED, steps // 2), len(history) - steps
    first, last = history[begin : begin + count], history[-count:]
    return sum(row["kl"] for row in first) / count, sum(row["kl"] for row in last) / count


def run_steps(
    job: Job,
    saved: Saved,
    total: int,
    step: Callable[[int], dict[str, float]],
    state: Callable[[], Mapping[str, Tensor]],
    before: Sequence[dict[str, float]] = (),
    may_rise: bool = True,
) -> list[dict[str, float]]:
    """``step(i)`` for every i from where ``saved`` (already restored) ends to ``total``: it makes the step and returns
    its figures, ``kl`` among them. Figures are kept and shown, ``state()`` is saved when it is time, and the run stops
    when asked to and, unless the KL ``may_rise`` (as from a random start), where it diverges; what is saved then is a
    state from before it rose. Returns the history: it begins with ``before`` (what was made of the model before the
    first step, which is saved too) and holds that of ``saved``."""
    first, history = 0, list(before)
    if saved is not None:
        first, history = saved[0], list(saved[2]["history"])
    elif before:
        job.store.save(0, state(), {"history": history})
    give_back_memory()  # of the stage before; from step to step new pages would cost more than they save
    for i in range(first, total):
        figures = step(i)
        history.append({"step": len(history) + 1, **figures})
        if not may_rise:
            check_progress(history, i + 1)
        job.monitor(i + 1, total, **{name: figures[name] for name in ("kl", "rounded") if name in figures})
        stop = job.store.stop_requested()
        if i + 1 < total and (stop or job.store.due()) and (may_rise or not rising(history, i + 1)):
            tensors = state()
            check_state(tensors, i + 1)
            job.store.save(i + 1, tensors, {"history": history})
        if stop and i + 1 < total:
            job.store.stop(i + 1, total)
    return history
