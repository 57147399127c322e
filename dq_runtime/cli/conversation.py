"""A conversation with one model: what was said, and the next answer. Knows nothing of terminals.

It goes through the engine: prompts of earlier turns stay in its memory of keys and values, so that a turn costs the
last answer and the new question (docs/engine.md).
"""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dq_runtime.errors import DQError
from dq_runtime.packing.atomic import replace_file
from dq_runtime.runtime.engine import Engine, Event, FinishedEvent, Request, TextEvent
from dq_runtime.runtime.language_model import LanguageModel
from dq_runtime.runtime.sampling import Sampling


@dataclass(frozen=True)
class Turn:
    """What an answer cost: tokens of its prompt, of those the ones that were still in memory, tokens of the answer,
    seconds to its first token and per token after it, and how it ended (an engine's reason)."""

    prompt_tokens: int
    cached_tokens: int
    tokens: int
    first_seconds: float
    tokens_per_second: float
    reason: str

    def __str__(self) -> str:
        speed = f", {self.tokens_per_second:.1f} tokens/s" if self.tokens > 1 else ""
        return (
            f"prompt {self.prompt_tokens} tokens, {self.cached_tokens} of them from memory; answer {self.tokens} "
            f"tokens ({self.reason}), the first after {self.first_seconds:.2f} s{speed}"
        )


class Conversation:
    """``messages`` are the turns so far, without the ``system`` prompt. ``engine`` runs ``model``."""

    def __init__(self, engine: Engine, model: LanguageModel, sampling: Sampling, max_tokens: int, system: str) -> None:
        self._engine, self._model, self._sampling, self._max_tokens = engine, model, sampling, max_tokens
        self.system = system
        self.messages: list[dict[str, Any]] = []
        self.turns: list[Turn] = []

    def ask(self, text: str, write: Callable[[str], object]) -> Turn:
        """Answer ``text``; ``write`` receives the answer as it comes. KeyboardInterrupt meanwhile ends the answer where
        it is, and what was said stays said. Raises :class:`DQError` where there can be no answer; the conversation is
        then as it was."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        asked = [*self.messages, {"role": "user", "content": text}]
        tokens = self._model.encode_chat([*self._opening(), *asked])
        started = time.perf_counter()
        handle = self._engine.submit(Request(tokens, self._max_tokens, self._sampling), events.put)
        pieces: list[str] = []
        first = last = started
        while True:
            try:
                event = events.get()
                if isinstance(event, TextEvent):
                    last = time.perf_counter()
                    first = last if first == started else first
                    pieces.append(event.text)
                    write(event.text)
            except KeyboardInterrupt:
                handle.cancel()
                continue
            if isinstance(event, FinishedEvent):
                break
        if event.reason == "error":
            raise DQError(f"the answer failed: {event.message}")
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]
        usage = event.usage
        rate = (usage.completion_tokens - 1) / (last - first) if last > first else 0.0
        reason = "stopped" if event.reason == "cancelled" else event.reason
        turn = Turn(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens, first - started, rate, reason)
        self.turns.append(turn)
        return turn

    def reset(self) -> None:
        """Forget what was said, keep the system prompt."""
        self.messages, self.turns = [], []

    def save(self, path: Path) -> None:
        """Write the conversation as ``{"model", "messages"}``, in the form that chat APIs take."""
        found = {"model": self._model.path, "messages": [*self._opening(), *self.messages]}
        text = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
        replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def _opening(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self.system}] if self.system else []
