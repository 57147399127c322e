"""The original model's logits, window after window and epoch after epoch, without running it more than once.

What it hands to its head is kept, T x H numbers a window (38 to 75 MB for 128 windows of 256 tokens at H = 576, in
ordinary memory), and afterwards only the head runs: a fifth of SmolLM2's forward pass, a hundredth of a 70B model's.
Unlike the k largest logits, this leaves nothing out: the logits are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class TeacherOutputs:
    """Of one causal LM, which must be the original one whenever :meth:`logits` is called."""

    def __init__(self, model: Any) -> None:
        self._head = model.get_output_embeddings()
        self._kept: dict[int, Tensor] = {}
        self._device = torch.device("cpu")  # of the head
        # Whether the head's output is the model's: not where it is scaled or capped after it (Granite, Gemma 2).
        self._head_is_last = self._head is not None

    def logits(self, window: int, run: Callable[[], Tensor]) -> Tensor:
        """[T, V] of a window, given what runs the whole model on it; the caller may write over them."""
        kept = self._kept.get(window)
        if kept is not None:
            return self._of(kept)
        if not self._head_is_last:
            return run()
        given: list[Tensor] = []
        hook = self._head.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
        try:
            logits = run()
        finally:
            hook.remove()
        if not self._kept and len(given) == 1:
            self._device = given[0].device
            self._head_is_last = torch.equal(self._of(given[0]), logits)
        if self._head_is_last and len(given) == 1:
            self._kept[window] = given[0].cpu()
        return logits

    def _of(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._head(hidden.to(self._device))
        return logits.squeeze(0)
