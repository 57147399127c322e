"""The decode loop: prefill, then one token at a time, streamed as text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dq_runtime.errors import SpecError
from dq_runtime.runtime.language_model import LanguageModel
from dq_runtime.runtime.load import load_for_text
from dq_runtime.runtime.sampling import Sampler, Sampling
from dq_runtime.runtime.text_stream import TextStream

Prompt = str | Sequence[int] | list[dict[str, str]]


@dataclass(frozen=True)
class Generation:
    """A finished answer. ``tokens`` are the generated ids without the end token; ``finish`` is stop, length or end;
    speeds are tokens per second of prompt processing and of decoding."""

    text: str
    tokens: list[int]
    prompt_tokens: int
    finish: str
    prefill_per_second: float
    decode_per_second: float


class Stream:
    """Iterate to receive pieces of text; afterwards :attr:`result` holds the whole :class:`Generation`."""

    def __init__(self, model: LanguageModel, ids: list[int], max_tokens: int, stop: list[str], sampling: Sampling):
        self._model, self._ids, self._max_tokens, self._stop, self._sampling = model, ids, max_tokens, stop, sampling
        self.result: Generation | None = None

    def __iter__(self) -> Iterator[str]:
        model, ids = self._model, self._ids
        cache = model.start(1, len(ids) + self._max_tokens)
        sampler = Sampler(self._sampling)
        text = TextStream(model, self._stop)
        ends = model.end_tokens()
        generated: list[int] = []
        seen = list(ids)
        finish = "length"
        started = time.perf_counter()
        logits = model.step([ids], cache)
        # Launches on a GPU return at once: the next step is on its way before the host asks which token was chosen, at
        # the price of one step too many when that was an end token.
        ahead = str(model.device).startswith("cuda")
        if ahead:
            logits[0, 0].item()  # waits for the prompt
        prefilled = time.perf_counter()
        while len(generated) < self._max_tokens:
            chosen = sampler.choose(logits[0], seen)
            more = len(generated) + 1 < self._max_tokens
            if ahead and more:
                logits = model.step(chosen, cache)
            token = chosen.item()
            if token in ends:
                finish = "end"
                break
            generated.append(token)
            seen.append(token)
            piece = text.push(token)
            if piece:
                yield piece
            if text.matched is not None:
                finish = "stop"
                break
            if more and not ahead:
                logits = model.step(chosen, cache)
        rest = text.flush()
        if rest:
            yield rest
        if text.matched is not None:
            finish = "stop"
        seconds = time.perf_counter() - prefilled
        self.result = Generation(
            text=text.text,
            tokens=generated,
            prompt_tokens=len(ids),
            finish=finish,
            prefill_per_second=len(ids) / (prefilled - started),
            decode_per_second=len(generated) / seconds if seconds else 0.0,
        )


def stream(
    model: LanguageModel | str | Path,
    prompt: Prompt,
    *,
    max_tokens: int = 256,
    chat: bool = False,
    stop: str | Sequence[str] = (),
    sampling: Sampling | None = None,
) -> Stream:
    """Prepare a streamed generation; see :func:`generate` for the arguments."""
    if not isinstance(model, LanguageModel):
        model = load_for_text(model)
    if isinstance(prompt, str):
        ids = model.encode_chat([{"role": "user", "content": prompt}]) if chat else model.encode(prompt)
    elif prompt and isinstance(prompt[0], dict):
        ids = model.encode_chat(list(prompt))  # type: ignore[arg-type]
    else:
        ids = [int(i) for i in prompt]  # type: ignore[arg-type]
    if not ids:
        raise SpecError("the prompt is empty; give at least one token")
    if max_tokens < 1:
        raise SpecError(f"max_tokens must be at least 1, got {max_tokens}")
    stop = [stop] if isinstance(stop, str) else list(stop)
    if any(not s for s in stop):
        raise SpecError("a stop string is empty; leave it out instead")
    if any(not 0 <= i < model.vocabulary for i in ids):
        raise SpecError(f"the prompt holds a token id outside 0..{model.vocabulary - 1}")
    limit = model.context_length
    if limit is not None and len(ids) + max_tokens > limit:
        if len(ids) >= limit:
            raise SpecError(f"the prompt has {len(ids)} tokens, but the model's context is {limit}")
        max_tokens = limit - len(ids)
    return Stream(model, ids, max_tokens, stop, sampling or Sampling())


def generate(
    model: LanguageModel | str | Path,
    prompt: Prompt,
    *,
    max_tokens: int = 256,
    chat: bool = False,
    stop: str | Sequence[str] = (),
    sampling: Sampling | None = None,
    on_text: Callable[[str], object] | None = None,
) -> Generation:
    """Generate from ``model`` (loaded, or the path of a packed checkpoint).

    ``prompt``: text, token ids, or chat messages ``[{"role": ..., "content": ...}]``; ``chat`` wraps a text prompt in
    the model's chat template. ``stop`` strings end the text and are not part of it. ``on_text`` receives the text as it
    comes. Greedy unless ``sampling`` says otherwise. At most ``max_tokens`` tokens, and never beyond the context.
    """
    running = stream(model, prompt, max_tokens=max_tokens, chat=chat, stop=stop, sampling=sampling)
    for piece in running:
        if on_text is not None:
            on_text(piece)
    assert running.result is not None
    return running.result
