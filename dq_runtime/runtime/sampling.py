"""From next-token logits to a token: the usual filters, in the usual order, on the model's device.

Logits are numpy arrays or torch tensors. What is used of the two libraries here has the same names and meaning in both
(``xp`` below is whichever it is), so that there is one definition, and one stream of random numbers: a seed gives the
same text wherever the logits are the same.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from dq_runtime.errors import SpecError
from dq_runtime.runtime.top_values import top_ids


@dataclass(frozen=True)
class Sampling:
    """How to choose a token. ``temperature`` 0 is greedy; every filter is off by default.

    ``top_k`` keeps the k most likely tokens (0: all); ``top_p`` the smallest set with that probability mass; both, what
    ties with the last one they keep. ``min_p`` keeps those at least ``min_p`` times as likely as the best;
    ``repetition_penalty`` divides positive (multiplies negative) logits of tokens already seen (CTRL, 1909.05858);
    ``presence_penalty`` is taken off the logits of tokens generated before, ``frequency_penalty`` once for every time;
    ``logit_bias`` holds (token, what to add to its logit): these three as OpenAI's API defines them, and tokens of the
    prompt do not count. ``seed`` makes a sampled text repeatable.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        rules = (
            (0 <= self.temperature < math.inf, f"temperature must be 0 or more, got {self.temperature}"),
            (isinstance(self.top_k, int) and self.top_k >= 0, f"top_k must be 0 (off) or more, got {self.top_k}"),
            (0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}"),
            (0 <= self.min_p < 1, f"min_p must be in [0, 1), got {self.min_p}"),
            (
                0 < self.repetition_penalty < math.inf,
                f"repetition_penalty must be positive, got {self.repetition_penalty}",
            ),
            (self.seed is None or abs(self.seed) < 2**63, f"seed must be below 2^63, got {self.seed}"),
            (math.isfinite(self.presence_penalty), f"presence_penalty must be finite, got {self.presence_penalty}"),
            (math.isfinite(self.frequency_penalty), f"frequency_penalty must be finite, got {self.frequency_penalty}"),
            (all(math.isfinite(bias) for _, bias in self.logit_bias), "logit_bias must be finite"),
        )
        for holds, message in rules:
            if not holds:
                raise SpecError(message)


class Sampler:
    """Applies a :class:`Sampling` step by step; owns the random state of one sequence."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        # Of one sign: random.Random(-1) is random.Random(1).
        self._random = random.Random(None if sampling.seed is None else sampling.seed % 2**64)
        self._prompt: int | None = None

    def choose(self, logits: Any, seen: Sequence[int]) -> Any:
        """The next token id, int64 [1, 1] where the float32 ``logits`` [V] are, given the ids ``seen`` so far (looked
        at only for the penalties; at the first call they are the prompt). Nothing here waits for a device."""
        s = self.sampling
        if self._prompt is None:
            self._prompt = len(seen)
        if s.logit_bias or s.presence_penalty or s.frequency_penalty:
            logits = self._shifted(logits, Counter(seen[self._prompt :]))
        if s.repetition_penalty != 1.0 and seen:
            ids = sorted(set(seen))
            values = logits[ids]
            logits = logits + 0.0  # a copy
            logits[ids] = _library(logits).where(
                values > 0, values / s.repetition_penalty, values * s.repetition_penalty
            )
        if s.temperature == 0:
            return logits.argmax().reshape(1, 1)
        ids, probs = _filtered(logits, s)
        cumulated = probs.cumsum(-1)
        # 32 bits: less than 1 after every rounding, so that what has no probability, at the end, is never reached.
        share = self._random.getrandbits(32) / 2**32
        at = (cumulated <= share * cumulated[-1]).sum()
        return (at if ids is None else ids[at]).reshape(1, 1)

    def _shifted(self, logits: Any, generated: Counter[int]) -> Any:
        """``logits`` with what is added to single tokens: the bias asked for, minus the penalties of ``generated``."""
        s = self.sampling
        added: dict[int, float] = dict(s.logit_bias)
        for token, times in generated.items():
            added[token] = added.get(token, 0.0) - s.presence_penalty - s.frequency_penalty * times
        values = _library(logits).asarray(list(added.values()), dtype=logits.dtype, device=logits.device)
        logits = logits + 0.0  # a copy
        logits[list(added)] += values
        return logits


def filtered_probabilities(logits: Any, s: Sampling) -> Any:
    """softmax(logits / temperature) with top-k, top-p and min-p applied in that order and renormalised: float64 [V] of
    the float32 ``logits`` [V], numpy or torch as they are."""
    ids, probs = _filtered(logits, s)
    if ids is None:
        return probs
    every = np.zeros(len(logits))
    every[ids] = probs
    return every


def _filtered(logits: Any, s: Sampling) -> tuple[Any, Any]:
    """The same as (ids, their probabilities), for the few ids that are left of numpy's; for all of them, and None as
    ids, where nothing is left out or torch would have to wait for the device to learn how many."""
    xp = _library(logits)
    top = logits.max()
    ids = None

    def mass(logits: Any) -> Any:
        # Relative to the best, so that a tiny temperature gives 0 and -inf instead of inf - inf.
        return xp.exp(xp.asarray((logits - top) / max(s.temperature, 1e-8), dtype=xp.float64))

    if 0 < s.top_k < len(logits) or s.top_p < 1:
        # The values alone: numpy sorts them three times as fast as it finds their order.
        ordered = _descending(logits, s)
        each = mass(ordered)
        cumulated = xp.cumsum(each, -1)
        total = cumulated[-1] if 0 < s.top_k < len(logits) else mass(logits).sum()
        # A token stays while the mass *before* it is below top_p, so at least one always stays.
        stays = cumulated - each < s.top_p * total
        least = xp.where(stays, ordered, xp.inf).min()
        if xp is np:
            ids = np.flatnonzero(logits >= least)
            logits = logits[ids]
        else:
            logits = xp.where(logits < least, -xp.inf, logits)
    probs = mass(logits)
    if s.min_p > 0:
        probs = xp.where(probs < s.min_p * probs.max(), 0.0, probs)
    return ids, probs / probs.sum()


def _descending(logits: Any, s: Sampling) -> Any:
    """In falling order the ``top_k`` best values, or, without top-k, at least those that top-p can keep."""
    kept = s.top_k or len(logits)
    if not isinstance(logits, np.ndarray):
        return logits.sort(descending=True).values[:kept]  # of all: to ask how many would wait for the device
    if kept < len(logits):
        return np.sort(logits[top_ids(logits, kept)])[::-1][:kept]
    if s.top_p < 1:
        # V tokens more than log(V / (1 - top_p)) below the best have less than 1 - top_p of its mass together, so that
        # none of them is among those with top_p of all. Of 49 thousand about a tenth are left to sort: 0.1 of 1.2 ms.
        depth = math.log(len(logits) / (1 - s.top_p)) * max(s.temperature, 1e-8)
        logits = logits[logits >= logits.max() - (depth + 1e-3 * (1 + depth))]  # and a margin for float32
    return np.sort(logits)[::-1]


def _library(array: Any) -> Any:
    """numpy or torch, whichever made ``array``; torch is there already if it made it."""
    return np if isinstance(array, np.ndarray) else import_module("torch")
