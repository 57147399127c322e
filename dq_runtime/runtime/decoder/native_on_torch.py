"""The native decoder for callers with torch tensors: the same memory under another name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dq_runtime.runtime.decoder.architecture import DecoderConfig
from dq_runtime.runtime.decoder.native_decoder import NativeCache, NativeDecoder, NativeMemory
from dq_runtime.runtime.decoder.paged import Segment
from dq_runtime.runtime.decoder.torch_weights import on_host
from dq_runtime.runtime.decoder.weights import DecoderWeights


class NativeOnTorch:
    """See :class:`dq_runtime.runtime.decoder.Decoder` and, for :meth:`run`, :class:`paged.PagedDecoder`; as many
    threads as torch uses."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: DecoderWeights[Any, Any],
        device: str,
        dtype: torch.dtype,
        exact: bool = False,
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self.native = NativeDecoder(config, on_host(weights), exact)

    @staticmethod
    def refusal(
        config: DecoderConfig,
        weights: DecoderWeights[Any, Any],
        device: str,
        dtype: torch.dtype,
        exact: bool = False,
    ) -> str | None:
        """Why the native decoder cannot run this model here; None if it can."""
        if device != "cpu":
            return f"native runs on the CPU only, got {device}"
        if dtype != torch.float32:
            return f"native computes in float32, got {dtype}"
        return NativeDecoder.refusal(config, on_host(weights), exact)

    def start(self, batch: int, capacity: int) -> NativeCache:
        return self.native.start(batch, capacity)

    def step(self, tokens: Tensor | list[list[int]], cache: NativeCache) -> Tensor:
        self.native.threads = torch.get_num_threads()
        return torch.from_numpy(self.native.step(_ids(tokens), cache))

    def logits(self, tokens: Tensor | list[list[int]]) -> Tensor:
        self.native.threads = torch.get_num_threads()
        return torch.from_numpy(self.native.logits(_ids(tokens)))

    @property
    def block_bytes(self) -> int:
        return self.native.block_bytes

    def memory(self, blocks: int, positions: int | None = None) -> NativeMemory:
        """See :meth:`NativeDecoder.memory`."""
        return self.native.memory(blocks, positions)

    def run(self, segments: Sequence[Segment], memory: NativeMemory) -> Tensor:
        self.native.threads = torch.get_num_threads()
        return torch.from_numpy(self.native.run(segments, memory))


def _ids(tokens: Tensor | list[list[int]]) -> Any:
    return tokens.numpy(force=True) if isinstance(tokens, Tensor) else tokens
