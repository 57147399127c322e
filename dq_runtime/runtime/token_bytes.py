"""The bytes of single tokens. A token's own text does not say them: many are parts of a character."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenBytes:
    """``tokenizer``: ours, one of transformers', or None (then every token is empty)."""

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None) or getattr(tokenizer, "backend", None)
        self._tokenizer = tokenizer
        self._backend = backend if hasattr(backend, "to_str") else None
        self._added: dict[int, str] = {}
        self._byte_level = False
        if self._backend is not None:
            self._added = {i: t.content for i, t in self._backend.get_added_tokens_decoder().items()}
            self._byte_level = '"ByteLevel"' in json.dumps(json.loads(self._backend.to_str()).get("decoder"))
        self._of = lru_cache(maxsize=2**16)(self._read)  # of a vocabulary of 128 thousand, what a server's texts use

    def __call__(self, token: int) -> bytes:
        """What ``token`` adds to a text, special tokens as they are written; empty for an id that is no token."""
        return self._of(token)

    def _read(self, token: int) -> bytes:
        if self._backend is None:
            return b"" if self._tokenizer is None else str(self._tokenizer.decode([token])).encode()
        if token in self._added:
            return self._added[token].encode()
        piece = self._backend.id_to_token(token)
        if piece is None:
            return b""
        if self._byte_level:
            table = _byte_of_character()
            return bytes(table[c] for c in piece) if all(c in table for c in piece) else piece.encode()
        if byte := _BYTE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        text: str = piece.replace("▁", " ")  # SentencePiece's blank
        return text.encode()


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """GPT-2's byte-level alphabet: printable Latin-1 bytes stand for themselves, the others, in order, for the
    characters from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}
