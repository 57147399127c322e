"""From token ids to text, piece by piece, of what may be shown already."""

from __future__ import annotations

from collections.abc import Sequence

from dq_runtime.runtime.language_model import LanguageModel

LONGEST_HELD = 32  # ids: what is no character by then never will be (UTF-8 needs at most 4)


class TextStream:
    """Token ids in, printable text out: holds back incomplete UTF-8 and anything that may begin one of the ``stop``
    strings. ``text`` is all that was given out, ``matched`` the stop string that ended it, if one did. Without a
    tokenizer there is no text."""

    def __init__(self, model: LanguageModel, stop: Sequence[str]) -> None:
        self._model, self._stop = model, stop
        self._pending: list[int] = []  # ids since the last safe cut
        self._context = ""  # text of the ids before them that decode together with them
        self._held = ""
        self.text = ""
        self.matched: str | None = None

    def push(self, token: int) -> str:
        """The text that may be shown now that ``token`` follows."""
        if self._model.tokenizer is None:
            return ""
        self._pending.append(token)
        decoded = self._model.decode(self._pending)
        new = decoded[len(self._context) :]
        if new.endswith("\ufffd") and len(self._pending) < LONGEST_HELD:  # the middle of a character
            return ""
        # Keep the last id as context: some tokenizers drop a leading blank of the first id they decode.
        self._pending = self._pending[-1:]
        self._context = self._model.decode(self._pending)
        return self._release(new)

    def flush(self) -> str:
        """The text that was held back: an incomplete character, the beginning of a stop string that never came."""
        if self.matched is not None or self._model.tokenizer is None:
            return ""
        piece = self._release(self._model.decode(self._pending)[len(self._context) :])
        rest, self._held = self._held, ""
        self.text += rest
        return piece + rest

    def _release(self, new: str) -> str:
        held = self._held + new
        found = [(at, s) for s in self._stop if (at := held.find(s)) >= 0]
        if found:
            at, self.matched = min(found)
            piece, self._held = held[:at], ""
        else:
            keep = max((_overlap(held, s) for s in self._stop), default=0)
            piece, self._held = held[: len(held) - keep], held[len(held) - keep :]
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
