"""A model that can be run, whoever built it: token ids in, next-token logits out, a cache in between."""

from __future__ import annotations

from abc import ABC, abstractmethod
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from dq_runtime.errors import DQError
from dq_runtime.runtime.decoder import Decoder
from dq_runtime.runtime.decoder.kv_cache import CHUNK


class LanguageModel(ABC):
    """A causal LM, its tokenizer and where it came from; the decode loop uses only :meth:`start` and :meth:`step`.

    ``tokenizer`` is ours (:class:`dq_runtime.runtime.tokenizer.Tokenizer`), one of transformers', or None; ``path`` is
    for messages. ``context_length`` is the most positions the model was made for (None where nobody says) and
    ``vocabulary`` the number of token ids.
    """

    device: torch.device
    context_length: int | None
    vocabulary: int

    def __init__(self, tokenizer: Any, path: str) -> None:
        self.tokenizer = tokenizer
        self.path = path

    @abstractmethod
    def start(self, batch: int, capacity: int) -> Any:
        """An empty cache for ``batch`` equally long sequences of at most ``capacity`` positions."""

    @abstractmethod
    def step(self, tokens: Tensor, cache: Any) -> Tensor:
        """Feed ids int64 [B, T] after what ``cache`` holds, in as many passes as bound the memory of activations;
        float32 logits [B, V] of the last position."""

    @abstractmethod
    def logits(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, V] of every position of ids int64 [B, T]."""

    @abstractmethod
    def end_tokens(self) -> set[int]:
        """The ids that end a text: generation_config's, and the tokenizer's."""

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, with whatever special tokens the tokenizer adds by itself."""
        ids: list[int] = self._tokenizer().encode(text)
        return ids

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation through the model's chat template, ready for the answer."""
        tokenizer = self._tokenizer()
        if not tokenizer.chat_template:
            raise DQError(f"{self.path} has no chat template; generate from plain text instead")
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids`` without special tokens."""
        text: str = self._tokenizer().decode(ids, skip_special_tokens=True)
        return text

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise DQError(f"{self.path} has no tokenizer files; pass token ids, or add tokenizer.json to it")
        return self.tokenizer

    def _ends(self, stated: Any) -> set[int]:
        """``eos_token_id`` of a config, which is an id, a list of them or null, and the tokenizer's own."""
        found = set(stated if isinstance(stated, list) else [] if stated is None else [stated])
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            found.add(self.tokenizer.eos_token_id)
        return found


class LeanModel(LanguageModel):
    """Runs on our own ``decoder``. ``eos_token_id`` as generation_config.json states it."""

    def __init__(self, decoder: Decoder, eos_token_id: Any, tokenizer: Any, path: str) -> None:
        super().__init__(tokenizer, path)
        self.decoder = decoder
        self.device = decoder.device
        self.context_length = decoder.config.context_length
        self.vocabulary = decoder.config.vocab
        self._eos_token_id = eos_token_id

    def start(self, batch: int, capacity: int) -> Any:
        return self.decoder.start(batch, capacity)

    def step(self, tokens: Tensor, cache: Any) -> Tensor:
        return self.decoder.step(tokens, cache)

    def logits(self, tokens: Tensor) -> Tensor:
        return self.decoder.logits(tokens)

    def end_tokens(self) -> set[int]:
        return self._ends(self._eos_token_id)


class TransformersModel(LanguageModel):
    """Runs on ``model``, a transformers module (its linears packed if it came from a packed checkpoint)."""

    def __init__(self, model: Any, tokenizer: Any, path: str) -> None:
        super().__init__(tokenizer, path)
        self.model = model
        # Logits of the whole prompt would cost more than the prompt itself; almost every architecture can skip them.
        takes = "logits_to_keep" in signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if takes else {}
        value = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.context_length = value if isinstance(value, int) else None
        self.vocabulary = model.get_input_embeddings().weight.shape[0]

    @property
    def device(self) -> torch.device:  # type: ignore[override]  # follows the model when it is moved
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    def start(self, batch: int, capacity: int) -> Any:
        """Grows as it is filled: ``batch`` and ``capacity`` bound it only through who calls."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    @torch.inference_mode()
    def step(self, tokens: Tensor, cache: Any) -> Tensor:
        for part in torch.split(tokens.to(self.device), CHUNK, 1):
            out = self.model(input_ids=part, past_key_values=cache, use_cache=True, **self._last_only)
        logits: Tensor = out.logits[:, -1].float()
        return logits

    @torch.inference_mode()
    def logits(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens.to(self.device), use_cache=False).logits
        return logits

    def end_tokens(self) -> set[int]:
        config = self.model.generation_config
        return self._ends(config.eos_token_id if config else None)
