"""A model that can be run, whoever built it: token ids in, next-token logits out, a cache in between."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from dq_runtime.errors import DQError
from dq_runtime.runtime.decoder import Decoder


class LanguageModel(ABC):
    """A causal LM, its tokenizer and where it came from; the decode loop uses only :meth:`start` and :meth:`step`.

    Its arrays are torch tensors on ``device``, or numpy arrays (then ``device`` is "cpu"); token ids may be given as
    nested lists to either. ``tokenizer`` is ours (:class:`dq_runtime.runtime.tokenizer.Tokenizer`), one of
    transformers', or None; ``path`` is for messages. ``context_length`` is the most positions the model was made for
    (None where nobody says) and ``vocabulary`` the number of token ids.
    """

    device: Any
    context_length: int | None
    vocabulary: int

    def __init__(self, tokenizer: Any, path: str) -> None:
        self.tokenizer = tokenizer
        self.path = path

    @abstractmethod
    def start(self, batch: int, capacity: int) -> Any:
        """An empty cache for ``batch`` equally long sequences of at most ``capacity`` positions."""

    @abstractmethod
    def step(self, tokens: Any, cache: Any) -> Any:
        """Feed ids int64 [B, T] after what ``cache`` holds, in as many passes as bound the memory of activations;
        float32 logits [B, V] of the last position."""

    @abstractmethod
    def logits(self, tokens: Any) -> Any:
        """Logits [B, T, V] of every position of ids int64 [B, T]."""

    @abstractmethod
    def end_tokens(self) -> set[int]:
        """The ids that end a text: generation_config's, and the tokenizer's."""

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, with whatever special tokens the tokenizer adds by itself."""
        ids: list[int] = self._tokenizer().encode(text)
        return ids

    def encode_chat(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """Token ids of a conversation through the model's chat template, ready for the answer. ``tools``: functions
        the model may call, as OpenAI's API describes them, for templates that know of them."""
        tokenizer = self._tokenizer()
        if not tokenizer.chat_template:
            raise DQError(f"{self.path} has no chat template; generate from plain text instead")
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
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

    def step(self, tokens: Any, cache: Any) -> Any:
        return self.decoder.step(tokens, cache)

    def logits(self, tokens: Any) -> Any:
        return self.decoder.logits(tokens)

    def end_tokens(self) -> set[int]:
        return self._ends(self._eos_token_id)
