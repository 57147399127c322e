"""Calibration text for those who have none: the teacher writes it (as in LLM-QAT, arXiv 2305.17888).

Every window starts with a token drawn uniformly from the vocabulary and continues by sampling at temperature 1, so that
the windows follow the model's own distribution, the one under which the KL is to be small.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dq_runtime.data import Windows
from dq_runtime.runtime.language_model import LanguageModel

BATCH = 32  # sequences at once: a 512-token window then costs 16 forward passes' worth of weights instead of 512


def sample_windows(
    model: LanguageModel, count: int, length: int, seed: int, progress: Callable[[int, int], object] | None = None
) -> Windows:
    """``count`` windows of ``length`` token ids written by ``model``; deterministic for a seed."""
    generator = torch.Generator(device=model.device).manual_seed(seed)
    vocabulary = model.vocabulary
    windows = []
    done = 0
    for start in range(0, count, BATCH):
        rows = min(BATCH, count - start)
        tokens = torch.randint(0, vocabulary, (rows, 1), generator=generator, device=model.device)
        cache = model.start(rows, length)
        columns = [tokens]
        for _ in range(length - 1):
            probs = model.step(tokens, cache).softmax(-1)
            tokens = torch.multinomial(probs, 1, generator=generator)
            columns.append(tokens)
            done += rows
            if progress is not None:
                progress(done, count * (length - 1))
        windows.append(torch.cat(columns, 1))
    return Windows(torch.cat(windows).cpu(), "text sampled from the teacher itself")
