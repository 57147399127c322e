"""From next-token logits to a token: the usual filters, in the usual order, on the model's device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dq_runtime.errors import SpecError


@dataclass(frozen=True)
class Sampling:
    """How to choose a token. ``temperature`` 0 is greedy; every filter is off by default.

    ``top_k`` keeps the k most likely tokens (0: all); ``top_p`` the smallest set with that probability mass; ``min_p``
    those at least ``min_p`` times as likely as the best; ``repetition_penalty`` divides positive (multiplies negative)
    logits of tokens already seen (CTRL, arXiv 1909.05858); ``seed`` makes a sampled text repeatable.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

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
        )
        for holds, message in rules:
            if not holds:
                raise SpecError(message)


class Sampler:
    """Applies a :class:`Sampling` step by step; owns the random state of one sequence."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.sampling = sampling
        self.generator = torch.Generator(device=device)
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)

    def choose(self, logits: Tensor, seen: Sequence[int] | Tensor) -> Tensor:
        """The next token id, int64 [1] on the device of the float32 ``logits`` [V], given the ids ``seen`` so far
        (looked at only for the penalty). Nothing here waits for the device."""
        s = self.sampling
        if s.repetition_penalty != 1.0 and len(seen):
            ids = torch.unique(torch.as_tensor(seen, dtype=torch.int64, device=logits.device))
            values = logits[ids]
            penalised = torch.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
            logits = logits.index_copy(0, ids, penalised)
        if s.temperature == 0:
            return logits.argmax(keepdim=True)
        probs = filtered_probabilities(logits, s)
        return torch.multinomial(probs, 1, generator=self.generator)


def filtered_probabilities(logits: Tensor, s: Sampling) -> Tensor:
    """softmax(logits / temperature) with top-k, top-p and min-p applied in that order and renormalised, float32 [V]."""
    # Relative to the best, so that a tiny temperature gives 0 and -inf instead of inf - inf.
    logits = (logits - logits.max()) / max(s.temperature, 1e-8)
    if 0 < s.top_k < logits.numel():
        kth = logits.topk(s.top_k).values[-1]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if s.top_p < 1:
        ordered, order = logits.softmax(-1).sort(descending=True)
        # A token stays while the mass *before* it is below top_p, so at least one always stays.
        drop = ordered.cumsum(-1) - ordered >= s.top_p
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(0, order, drop), -torch.inf)
    probs = logits.softmax(-1)
    if s.min_p > 0:
        probs = probs.masked_fill(probs < s.min_p * probs.max(), 0.0)
    return probs / probs.sum()
