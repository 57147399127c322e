"""A model that can be run, whoever built it: token ids in, next-token logits out, a cache in between."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from dq_runtime.errors import DQError


@dataclass
class LanguageModel:
    """A causal LM, its tokenizer and where it came from.

    ``model`` is the torch module (its linears packed if it came from a packed checkpoint), ``tokenizer`` a Hugging Face
    tokenizer or None. The decode loop uses only :meth:`start` and :meth:`step`.
    """

    model: Any
    tokenizer: Any
    path: str

    def __post_init__(self) -> None:
        # Logits of the whole prompt would cost more than the prompt itself; almost every architecture can skip them.
        takes = "logits_to_keep" in signature(self.model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if takes else {}

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @property
    def context_length(self) -> int | None:
        """Most positions the model was made for, or None where its config does not say."""
        value = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return value if isinstance(value, int) else None

    def start(self) -> Any:
        """An empty cache for one sequence (or one batch of equally long ones)."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    @torch.inference_mode()
    def step(self, tokens: Tensor, cache: Any) -> Tensor:
        """Feed ids [B, T] after what ``cache`` holds; float32 logits [B, V] of the last position."""
        out = self.model(input_ids=tokens.to(self.device), past_key_values=cache, use_cache=True, **self._last_only)
        logits: Tensor = out.logits[:, -1].float()
        return logits

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
        text: str = self._tokenizer().decode(ids, skip_special_tokens=True)
        return text

    def end_tokens(self) -> set[int]:
        """The ids that end a text: generation_config's, and the tokenizer's."""
        ends = self.model.generation_config.eos_token_id if self.model.generation_config else None
        found = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            found.add(self.tokenizer.eos_token_id)
        return found

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise DQError(f"{self.path} has no tokenizer files; pass token ids, or add tokenizer.json to it")
        return self.tokenizer
