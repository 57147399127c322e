"""The windows of a run: cut from texts, or written by the model where there is no text."""

from __future__ import annotations

from functools import partial

import torch

from dq_runtime.data import Text, Windows, pack_windows
from dq_runtime.data.selection import mean_hidden_states, select_windows
from dq_runtime.errors import DQError, SpecError
from dq_runtime.packing.run_state import RunState
from dq_runtime.request import Listener, Request
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
    sampled = state.windows("sampled") if to_sample else torch.empty(0, request.length, dtype=torch.int64)
    if sampled is None:
        show = listener.stage("Sampling text from the model")
        sampled = sample_windows(lm, to_sample, request.length, request.spec.seed, show).tokens
        state.save_windows("sampled", sampled)
    sampled = sampled[:, : request.length]  # of an earlier try whose windows were longer
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
    return _longer(lm, state, made[0], request, listener), made[1]


def _longer(lm: TransformersModel, state: RunState, real: Windows, request: Request, listener: Listener) -> Windows:
    """The calibration windows and, after them, those that the model makes of them."""
    if not request.continued:
        return real
    more = state.windows("continued")
    if more is None:
        show = listener.stage("Sampling text from the model")
        more = continue_windows(lm, real.tokens, request.continued, request.spec.seed, request.dtype, show)
        state.save_windows("continued", more)
    elif len(more) != request.continued:
        raise SpecError(
            f"{request.output}.partial was begun with {len(more)} continued windows, not {request.continued}; ask for "
            "as many, or begin anew without --resume"
        )
    more = more[:, : request.length]
    return Windows(torch.cat([real.tokens, more]), f"{real.source}, and {len(more)} windows that the model wrote on")
