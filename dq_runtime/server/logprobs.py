"""Log probabilities in OpenAI's two forms: objects for chats, parallel lists for completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dq_runtime.runtime.engine import TokenLogprob

LEAST = -9999.0  # JSON has no minus infinity; OpenAI writes this number


def chat_form(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """``{"content": [{"token", "logprob", "bytes", "top_logprobs"}], "refusal": None}``."""

    def one(text: str, data: bytes, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": max(logprob, LEAST), "bytes": list(data)}

    content = [
        one(t.text, t.bytes, t.logprob) | {"top_logprobs": [one(a.text, a.bytes, a.logprob) for a in t.top]}
        for t in tokens
    ]
    return {"content": content, "refusal": None}


def completion_form(tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """``{"tokens", "token_logprobs", "top_logprobs", "text_offset"}``; ``offset``: characters of text before them."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [t.text for t in tokens],
        "token_logprobs": [max(t.logprob, LEAST) for t in tokens],
        "top_logprobs": [{a.text: max(a.logprob, LEAST) for a in t.top} for t in tokens],
        "text_offset": offsets,
    }
