"""The model that is served: its name and size for whoever asks, and prompts turned into token ids."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dq_runtime.errors import DQError
from dq_runtime.levels import SCALE_BITS
from dq_runtime.packing.checkpoint import Checkpoint
from dq_runtime.runtime.language_model import LanguageModel
from dq_runtime.server.errors import APIError

_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Size:
    """``bits`` of the packed weights' codes (several where layers differ), ``bits_per_weight`` with scales (None where
    nothing could be kept packed), ``size_bytes`` of all tensors on disk."""

    bits: tuple[int, ...]
    bits_per_weight: float | None
    size_bytes: int


def measure(checkpoint: Checkpoint) -> Size:
    """The :class:`Size` of a packed checkpoint."""
    widths: set[int] = set()
    stored, weights = 0.0, 0
    for _, weight in checkpoint.weights():
        widths.add(weight.bits)
        by_group = SCALE_BITS.get(weight.form, 16) + (0 if weight.zero is None else weight.bits)
        stored += weight.n * weight.k * (weight.bits + by_group / weight.group_size)
        weights += weight.n * weight.k
    checkpoint.release()
    files = [checkpoint.path] if checkpoint.path.is_file() else list(checkpoint.path.glob("*.safetensors"))
    per_weight = round(stored / weights, 3) if weights else None
    return Size(tuple(sorted(widths)), per_weight, sum(file.stat().st_size for file in files))


def sampling_defaults(path: str | Path) -> dict[str, Any]:
    """What generation_config.json of a checkpoint recommends: only positive finite numbers of the fields we have."""
    try:
        config = json.loads(Path(path, "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found = {name: config.get(name) for name in _DEFAULTS} if isinstance(config, dict) else {}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    }


@dataclass(frozen=True)
class Served:
    """``name``: what clients call it. ``limit``: most tokens of prompt and answer together.
    ``defaults``: sampling fields where a request leaves them out."""

    name: str
    model: LanguageModel
    size: Size
    created: int
    limit: int
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def card(self) -> dict[str, Any]:
        """The entry of ``/v1/models``: OpenAI's fields, vLLM's ``max_model_len``, and what we know of the size."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "dq_runtime",
            "max_model_len": self.limit,
            "bits": list(self.size.bits),
            "bits_per_weight": self.size.bits_per_weight,
            "size_bytes": self.size.size_bytes,
        }

    def check_name(self, asked: str | None) -> None:
        """404 for a model that is not this one; a request that names none means this one."""
        if asked is not None and asked != self.name:
            message = f"the model {asked[:100]!r} is not served here; this server has {self.name!r}"
            raise APIError(404, message, "model", "model_not_found")

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a plain prompt."""
        return self._encoded(lambda: self.model.encode(text), "prompt")

    def encode_chat(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[int]:
        """Token ids of a conversation, ready for the answer. Templates that never mention tools would drop them in
        silence: then tools are refused."""
        template = getattr(self.model.tokenizer, "chat_template", None)
        if tools and "tools" not in str(template):
            raise APIError(400, f"the chat template of {self.name!r} takes no tools; leave them out", "tools")
        return self._encoded(lambda: self.model.encode_chat(messages, tools), "messages")

    def token_text(self, ids: Sequence[int]) -> str:
        """The text of prompt tokens, for ``echo``."""
        return self.model.decode(list(ids))

    def check_ids(self, ids: Sequence[int]) -> list[int]:
        """Prompts that were sent as token ids: 400 for ids that the model has not."""
        if any(not 0 <= i < self.model.vocabulary for i in ids):
            raise APIError(400, f"the prompt holds a token id outside 0..{self.model.vocabulary - 1}", "prompt")
        return list(ids)

    def _encoded(self, encode: Any, param: str) -> list[int]:
        try:
            ids: list[int] = encode()
        except DQError as error:
            raise APIError(400, str(error), param) from None
        except (TypeError, UnicodeError):  # what the tokenizer says of half a UTF-16 pair
            raise APIError(400, f"{param} holds text that is not valid Unicode", param) from None
        if not ids:
            raise APIError(400, f"{param} is empty; give at least one token", param)
        return ids
