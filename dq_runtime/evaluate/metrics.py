"""Held-out quality of several models against one reference, window by window, in one pass.

KL(reference || candidate) in nats per token, perplexity of the text, and how often the most likely token agrees.
Standard errors are over windows: tokens of one window are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from dq_runtime.errors import DQError
from dq_runtime.modules.kl import kl_per_token

# Tokens looked at together: 64 rows of a 150k vocabulary are 38 MB of float32.
PIECE = 64


class Rows(Protocol):
    """Logits [T, V], given out some rows at a time: a tensor, or what computes them when they are asked for."""

    def __getitem__(self, rows: slice, /) -> Tensor: ...


Logits = Callable[[Tensor], Rows]  # token ids [T] -> logits [T, V]


@dataclass
class Quality:
    """Per-window figures of one model; the properties summarise them."""

    kl_windows: list[float] = field(default_factory=list)
    nll_windows: list[float] = field(default_factory=list)
    agreement_windows: list[float] = field(default_factory=list)

    @property
    def per_window(self) -> dict[str, list[float]]:
        """KL and negative log-likelihood in nats per token, and share of tokens that agree, of each window in order."""
        return {"kl": self.kl_windows, "nll": self.nll_windows, "top1": self.agreement_windows}

    @property
    def kl(self) -> float:
        """Nats per token."""
        return sum(self.kl_windows) / len(self.kl_windows)

    @property
    def kl_stderr(self) -> float:
        n = len(self.kl_windows)
        return math.nan if n < 2 else torch.tensor(self.kl_windows, dtype=torch.float64).std().item() / math.sqrt(n)

    @property
    def perplexity(self) -> float:
        return math.exp(sum(self.nll_windows) / len(self.nll_windows))

    @property
    def agreement(self) -> float:
        """Share of tokens whose most likely next token is the reference's."""
        return sum(self.agreement_windows) / len(self.agreement_windows)


@torch.no_grad()
def compare(
    windows: Tensor,
    reference: Logits,
    candidates: Mapping[str, Logits],
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, Quality]:
    """Quality of "reference" and of every candidate on ``windows`` int64 [count, T]."""
    results = {name: Quality() for name in ("reference", *candidates)}
    for i, tokens in enumerate(windows):
        base = reference(tokens)
        for name, quality in results.items():
            logits = base if name == "reference" else candidates[name](tokens)
            kl, nll, agreement = _means(base, logits, tokens)
            if not (math.isfinite(kl) and math.isfinite(nll)):
                raise DQError(
                    f"{name} gives NaN or infinity on held-out window {i + 1}, so its quality cannot be measured and "
                    "nothing is written; look for damaged or huge weights in the model"
                )
            quality.kl_windows.append(kl)
            quality.nll_windows.append(nll)
            quality.agreement_windows.append(agreement)
        if progress is not None:
            progress(i + 1, len(windows))
    return results


def _means(base: Rows, logits: Rows, tokens: Tensor) -> tuple[float, float, float]:
    """KL(base || logits), negative log-likelihood and agreement, means over all tokens [T] but the first."""
    last = len(tokens) - 1
    sums = torch.zeros(3, dtype=torch.float64)
    for start in range(0, last, PIECE):
        rows = slice(start, min(start + PIECE, last))
        expected = base[rows].float()
        found = expected if logits is base else logits[rows].float()
        right = tokens[rows.start + 1 : rows.stop + 1].to(found.device)
        kl = 0.0 if logits is base else kl_per_token(expected, found).double().sum().item()
        nll = torch.nn.functional.cross_entropy(found, right, reduction="sum").item()
        sums += torch.tensor([kl, nll, (found.argmax(-1) == expected.argmax(-1)).sum().item()], dtype=torch.float64)
    kl, nll, agreement = (sums / last).tolist()
    return kl, nll, agreement
