"""The windows of a run: cut from texts, or written by the model where there is no text."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dq_runtime.data import Text, Windows, pack_windows
from dq_runtime.data.selection import mean_hidden_states, select_windows
from dq_runtime.errors import DQError, SpecError
from dq_runtime.packing.run_state import RunState
from dq_runtime.request import Listener, Request, Stage
from dq_runtime.runtime.self_text import continue_windows, sample_windows
from dq_runtime.runtime.transformers_model import TransformersModel


def windows_of(
    lm: TransformersModel,
    state: RunState,
    texts: tuple[Text | None, Text | None],
    request: Request,
    listener: Listener,
) -> tuple[Windows, Windows]:
    """Calibration and held-out windows; what the teacher has to write of them is sampled once per output."""
    to_sample = sum(count for text, count in zip(texts, request.counts, strict=True) if text is None)

    def sample(show: Stage) -> Tensor:
        return sample_windows(lm, to_sample, request.length, request.spec.seed, show).tokens

    sampled = _once("sampled", to_sample, sample, state, request, listener)
    made = []
    for i, (text, count) in enumerate(zip(texts, request.counts, strict=True)):
        if text is None:
            made.append(Windows(sampled[:count], "text sampled from the teacher itself"))
            sampled = sampled[count:]
        elif lm.tokenizer is None:
            raise DQError(f"{lm.path} has no tokenizer to read {text.source} with; leave text out to sample token ids")
        else:
            length, seed = request.length, request.spec.seed + i
            pack = partial(pack_windows, text.documents, lm.tokenizer, length=length, seed=seed, source=text.source)
            look = partial(mean_hidden_states, lm.model, stage=listener.stage)
            made.append(select_windows(pack, count, "random" if i else request.select, seed, look))
    real, held = made
    if not request.continued:
        return real, held

    def go_on(show: Stage) -> Tensor:
        return continue_windows(lm, real.tokens, request.continued, request.spec.seed, request.dtype, show)

    more = _once("continued", request.continued, go_on, state, request, listener)
    source = f"{real.source}, and {request.continued} windows that the model wrote on"
    return Windows(torch.cat([real.tokens, more]), source), held


def _once(
    name: str, count: int, write: Callable[[Stage], Tensor], state: RunState, request: Request, listener: Listener
) -> Tensor:
    """``count`` windows that the teacher writes, int64 [count, length]: those of an earlier try (which may have been
    longer), or what ``write`` gives."""
    if not count:
        return torch.empty(0, request.length, dtype=torch.int64)
    tokens = state.windows(name)
    if tokens is None:
        tokens = write(listener.stage("Sampling text from the model"))
        state.save_windows(name, tokens)
    elif len(tokens) != count:
        raise SpecError(
            f"{request.output}.partial was begun with {len(tokens)} {name} windows, not {count}; ask for as many, or "
            "begin anew without --resume"
        )
    return tokens[:, : request.length]
