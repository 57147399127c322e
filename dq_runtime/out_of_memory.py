"""Memory that runs out in the middle of a run, told in one sentence that says what to lower."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping
from typing import Any

import torch

from dq_runtime.errors import DQError

# How torch's allocators of host memory say it, as RuntimeErrors without a type of their own.
HOST = re.compile(r"can't allocate memory|not enough memory|cannot allocate memory|bad_alloc", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is Python's, numpy's, torch's or CUDA's way to say that there is no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and HOST.search(str(error)) is not None


def raise_out_of_memory(error: BaseException, options: Mapping[str, Any], lower: frozenset[str]) -> None:
    """Raise :class:`DQError` if ``error`` means that memory ran out, naming what takes less of it and can be changed by
    a resumed run; return otherwise.

    ``options``: the values of this run, ``window_length`` and ``compute_dtype`` (a torch dtype) among the method's own;
    ``lower``: those of the method that can be changed. What the stopped frames hold is given back first, so that a
    caller can try again in the same process.
    """
    if not is_out_of_memory(error):
        return
    traceback.clear_frames(error.__traceback__)
    ways = [f"--window-length (it is {options['window_length']})"]
    if "batch" in lower and options["batch"] > 1:
        ways.append(f"--set batch (it is {options['batch']})")
    sentence = f"memory ran out ({_asked_for(error)}); lower {' or '.join(ways)}"
    if options["compute_dtype"] is not torch.bfloat16:
        sentence += ", or take --compute-dtype bfloat16"
    sentence += ", and add --resume to go on from the last saved state; dq plan says what each needs"
    raise DQError(sentence) from None


def _asked_for(error: BaseException) -> str:
    """The size that was asked for, in the words of the allocator that had to say no."""
    found = re.search(r"tried to allocate ([\d.]+ ?\w+)", str(error), re.IGNORECASE)
    return "not even for a tensor" if found is None else f"asked for {found.group(1)}"
