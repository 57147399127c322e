"""Segments for models that have no paged memory: those that run through transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np

from dq_runtime.errors import SpecError
from dq_runtime.runtime.decoder.paged import BLOCK, Segment
from dq_runtime.runtime.decoder.paged_check import check_segments
from dq_runtime.runtime.language_model import LanguageModel


@dataclass
class _Held:
    """A sequence's cache and the ids it holds; ``sound`` is False from before a step until it has succeeded."""

    cache: Any
    tokens: list[int] = field(default_factory=list)
    sound: bool = True


@dataclass
class CachesInUse:
    """``blocks`` are counted and nothing else: the caches, by the first block of their sequence, grow by themselves."""

    blocks: int
    held: dict[int, _Held] = field(default_factory=dict)


class OneCacheEach:
    """A :class:`PagedDecoder` of any language model: segments run one after the other, each on its sequence's own cache
    of whatever kind the model makes.

    What that costs: a pass takes as long as its segments together, beginnings cannot be shared between sequences (so
    blocks must not be), and ``block_bytes`` only estimates what a cache takes. A sequence is known by its first block:
    :meth:`forget` must be told when that is given up.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self.block_bytes = BLOCK * _position_bytes(model)

    def memory(self, blocks: int, positions: int | None = None) -> CachesInUse:
        if blocks < 1:
            raise SpecError(f"a memory needs at least 1 block, got {blocks}")
        return CachesInUse(blocks)

    def forget(self, memory: CachesInUse) -> Callable[[Sequence[int]], None]:
        """What is to be called with the blocks of a sequence that gives them up: frees its cache."""

        def released(blocks: Sequence[int]) -> None:
            if blocks:
                memory.held.pop(blocks[0], None)

        return released

    def run(self, segments: Sequence[Segment], memory: CachesInUse) -> Any:
        check_segments(segments, self._model.vocabulary, memory.blocks)
        for s in segments:
            held = memory.held.get(s.blocks[0])
            if s.start > 0 and (held is None or len(held.tokens) < s.start):
                raise SpecError(f"the sequence of block {s.blocks[0]} does not hold {s.start} positions")
        rows = []
        for s in segments:
            held = self._resumed(s, memory)
            held.sound = False
            logits = self._model.step([list(s.tokens)], held.cache)
            held.tokens += s.tokens
            held.sound = True
            if s.wants_logits:
                rows.append(logits)
        if not rows:
            return np.empty((0, self._model.vocabulary), np.float32)
        library = np if isinstance(rows[0], np.ndarray) else import_module("torch")
        return library.concatenate(rows)

    def _resumed(self, segment: Segment, memory: CachesInUse) -> _Held:
        """The sequence's cache at ``segment.start``. A cache cannot go back: after a pass that failed, in this segment
        or behind it, it is made again from its ids."""
        first = segment.blocks[0]
        held = memory.held.get(first)
        if held is None or not held.sound or len(held.tokens) != segment.start:
            again = [] if held is None else held.tokens[: segment.start]
            held = _Held(self._model.start(1, memory.blocks * BLOCK), again)
            if again:
                self._model.step([again], held.cache)
            memory.held[first] = held
        return held


def _position_bytes(model: LanguageModel) -> int:
    """Bytes of keys and values of one position, as the config of a transformers model states its shape."""
    module: Any = getattr(model, "model", None)
    if module is None:
        raise SpecError(f"{model.path} cannot be served: it runs neither on our decoders nor through transformers")
    config = module.config.get_text_config()
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size: int = module.get_input_embeddings().weight.element_size()
    return int(2 * config.num_hidden_layers * kv_heads * dim * size)
