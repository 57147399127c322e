"""Calibration text that the teacher writes: all of it for those who have none (as in LLM-QAT, arXiv 2305.17888), or
more of what there is, by going on from pieces of it.

Text is sampled at temperature 1, so that windows follow the model's own distribution, the one under which the KL is to
be small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dq_runtime.data import Windows
from dq_runtime.runtime.language_model import LanguageModel
from dq_runtime.runtime.transformers_model import TransformersModel

BATCH = 64  # sequences at once: a 512-token window then costs 8 forward passes' worth of weights instead of 512
PIECE = 32  # tokens of a real window that the model goes on from

Progress = Callable[[int, int], object] | None


def sample_windows(model: LanguageModel, count: int, length: int, seed: int, progress: Progress = None) -> Windows:
    """``count`` windows of ``length`` token ids written by ``model``, each from a token drawn uniformly from the
    vocabulary on; deterministic for a seed."""
    generator = torch.Generator(device=model.device).manual_seed(seed)

    def first(start: int, rows: int) -> Tensor:
        return torch.randint(0, model.vocabulary, (rows, 1), generator=generator, device=model.device)

    return Windows(_written(model, first, count, length, generator, progress), "text sampled from the teacher itself")


def continue_windows(
    model: TransformersModel, windows: Tensor, count: int, seed: int, dtype: torch.dtype, progress: Progress = None
) -> Tensor:
    """``count`` more windows, int64 [count, T]: :data:`PIECE` tokens (at most half a window) from a random place in
    each of ``windows`` [n, T] in turn, and what ``model`` writes after them. ``dtype`` bfloat16 runs it under autocast,
    with half the linears' bytes more while it lasts. Deterministic for a seed."""
    generator = torch.Generator(device=model.device).manual_seed(seed)
    length = windows.shape[1]
    piece = min(PIECE, length // 2)

    def first(start: int, rows: int) -> Tensor:
        places = torch.randint(0, length - piece + 1, (rows,), generator=generator, device=model.device).tolist()
        taken = [windows[(start + i) % len(windows), place : place + piece] for i, place in enumerate(places)]
        return torch.stack(taken).to(model.device)

    if dtype is not torch.bfloat16:
        return _written(model, first, count, length, generator, progress)
    with torch.autocast(model.device.type, torch.bfloat16), _narrow_linears(model.model):
        return _written(model, first, count, length, generator, progress)


@contextmanager
def _narrow_linears(model: nn.Module) -> Iterator[None]:
    """Linears hold the bfloat16 that autocast would make of their weights for every token: half of SmolLM2's time."""
    linears = [(module, module.weight) for module in model.modules() if isinstance(module, nn.Linear)]
    try:
        for module, weight in linears:
            module.weight = nn.Parameter(weight.bfloat16(), requires_grad=False)
        yield
    finally:
        for module, weight in linears:
            module.weight = weight


def _written(
    model: LanguageModel,
    first: Callable[[int, int], Tensor],
    count: int,
    length: int,
    generator: torch.Generator,
    progress: Progress,
) -> Tensor:
    """int64 [count, length], BATCH of them at a time; ``first(start, rows)`` [rows, P]: what windows ``start`` and on
    begin with."""
    windows = []
    for start in range(0, count, BATCH):
        rows = min(BATCH, count - start)
        tokens = first(start, rows)
        cache = model.start(rows, length)
        columns = [tokens]
        for place in range(tokens.shape[1], length):
            tokens = _draw(model.step(tokens, cache), generator)
            columns.append(tokens)
            if progress is not None:
                progress(start * (length - 1) + rows * place, count * (length - 1))
        windows.append(torch.cat(columns, 1))
    return torch.cat(windows).cpu()


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A token id of each row's softmax, [rows, 1], by inversion. torch.multinomial took four times as long (121 against
    30 ms for 128 rows of 49152), more than half of a step."""
    sums = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    at = torch.rand(len(sums), 1, dtype=torch.float64, generator=generator, device=sums.device) * sums[:, -1:]
    return torch.searchsorted(sums, at, right=True).clamp(max=sums.shape[1] - 1)
