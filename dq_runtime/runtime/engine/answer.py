"""One request's own part of a pass: from logits to a token, from tokens to text, and when to end."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dq_runtime.errors import DQError
from dq_runtime.runtime.engine.constraint import Guide
from dq_runtime.runtime.engine.events import FinishReason, TextEvent, TokenLogprob
from dq_runtime.runtime.engine.logprobs import token_logprob
from dq_runtime.runtime.engine.request import Request
from dq_runtime.runtime.language_model import LanguageModel
from dq_runtime.runtime.sampling import Sampler
from dq_runtime.runtime.text_stream import TextStream
from dq_runtime.runtime.token_bytes import TokenBytes


class Answer:
    """What a request owns alone: its random stream, its text, its place in a grammar. ``tokens`` are the ids of prompt
    and answer; ``most`` how many the answer may have. ``finish`` is set once it has ended, ``message`` on no account
    but an error's. Nothing in here knows of other requests."""

    def __init__(
        self,
        request: Request,
        model: LanguageModel,
        most: int,
        ends: set[int],
        spelled: TokenBytes,
        guide: Guide | None,
    ) -> None:
        self.tokens = list(request.tokens)
        self.finish: FinishReason | None = None
        self._request, self._most, self._spelled, self._guide = request, most, spelled, guide
        self._ends = set() if request.ignore_end else ends
        self._sampler = Sampler(request.sampling)
        self._text = TextStream(model, request.stop)

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self._request.tokens)

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._text.matched

    def advance(self, logits: Any) -> TextEvent:
        """Choose the next token by float32 ``logits`` [V], numpy or torch, and say what it adds. Raises whatever the
        parts raise, and :class:`DQError` for logits that are not finite."""
        request = self._request
        allowed = logits if self._guide is None else self._guide.mask(_on_host(logits))
        greedy = request.sampling.temperature == 0
        if not greedy:
            _check_finite(allowed.max())
        token = int(self._sampler.choose(allowed, self.tokens).item())
        if greedy:  # it has the largest logit, or one that is NaN: no need to look for that again
            _check_finite(allowed[token])
        if token in self._ends:
            return TextEvent(self._ended("end"))
        if self._guide is not None:
            self._guide.accept(token)
        logprobs: tuple[TokenLogprob, ...] = ()
        if request.logprobs is not None:
            logprobs = (token_logprob(_on_host(logits), token, request.logprobs, self._spelled),)
        self.tokens.append(token)
        piece = self._text.push(token)
        if self._text.matched is not None:
            self.finish = "stop"
        elif self._guide is not None and self._guide.complete:
            piece += self._ended("end")
        elif self.generated == self._most:
            piece += self._ended("length")
        return TextEvent(piece, (token,), logprobs)

    def _ended(self, reason: FinishReason) -> str:
        """End the text; what was held back of it. That may still complete a stop string."""
        rest = self._text.flush()
        self.finish = reason if self._text.matched is None else "stop"
        return rest


def _check_finite(largest: Any) -> None:
    if not math.isfinite(float(largest)):
        raise DQError("the model's logits are not finite; the checkpoint or the memory is damaged")


def _on_host(logits: Any) -> NDArray[np.float32]:
    return logits if isinstance(logits, np.ndarray) else logits.numpy(force=True)
