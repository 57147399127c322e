"""The decoder as one C++ object (csrc/cpu/decoder.h): a whole step, from token ids to logits, without leaving it.

By default activations meet the weights as int8, one scale per group of at most 128 columns (as 15 bits for up to four
tokens, and in groups with outliers), unquantized linears are held in 8 bits, and keys and values in float16. ``exact``
keeps all of them as they are: float32 activations and cache, 16-bit weights; what differs from the torch decoder then
is the order of float32 sums.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dq_runtime.backends.cpu_prepared import (
    BLOCK,
    FLOAT_TYPES,
    Arena,
    NativeWeight,
    Part,
    Plan,
    native,
    prepare,
    zeros,
)
from dq_runtime.backends.cpu_prepared import plan as plan_parts
from dq_runtime.errors import BackendError, SpecError
from dq_runtime.packing import PackedWeight
from dq_runtime.runtime.decoder.architecture import DecoderConfig
from dq_runtime.runtime.decoder.weights import DecoderWeights, Linear, Parts


@dataclass
class NativeCache:
    """Keys and values of a batch of sequences: ``memory`` as the C++ decoder lays it out, ``lengths`` int64 [B], the
    positions held, at most ``capacity`` each; ``frequencies`` float32, the tables of all ropes one after the other."""

    memory: Tensor
    lengths: Tensor
    capacity: int
    frequencies: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values allocated."""
        return self.memory.nbytes


class NativeDecoder:
    """See :class:`dq_runtime.runtime.decoder.Decoder`."""

    def __init__(
        self, config: DecoderConfig, weights: DecoderWeights, device: str, dtype: torch.dtype, exact: bool = False
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self.exact = exact
        self._ropes = tuple(dict.fromkeys(layer.rope for layer in config.layers))
        self._kept: list[Any] = [weights.embedding.contiguous()]  # what the C++ object points into
        plans = _plans(config, weights, exact)
        self._arena = Arena(sum(p.nbytes for layer in plans for p in layer))
        threads = torch.get_num_threads()
        ready = [[prepare(p, self._arena, threads) for p in layer] for layer in plans]
        self._native = native().Decoder(self._model(weights, ready))

    @staticmethod
    def refusal(
        config: DecoderConfig, weights: DecoderWeights, device: str, dtype: torch.dtype, exact: bool = False
    ) -> str | None:
        """Why the native decoder cannot run this model here; None if it can."""
        if device != "cpu":
            return f"native runs on the CPU only, got {device}"
        requested = os.environ.get("DQ_BACKEND") or "native"
        if requested != "native":
            return f"DQ_BACKEND={requested} asks for other kernels"
        try:
            native()
        except ImportError as error:
            return f"the C++ extension dq_runtime._native is not built ({error})"
        if dtype != torch.float32:
            return f"native computes in float32, got {dtype}"
        if config.head_dim % 16:
            return f"native needs heads of a multiple of 16 values, got {config.head_dim}"
        if weights.embedding.dtype not in FLOAT_TYPES:
            return f"native reads float32, bfloat16 and float16 embeddings, got {weights.embedding.dtype}"
        try:
            _plans(config, weights, exact)
        except BackendError as error:
            return str(error)
        return None

    def _model(self, weights: DecoderWeights, ready: list[list[NativeWeight]]) -> dict[str, Any]:
        c = self.config
        layers = []
        for choice, layer, (qkv, o, gate_up, down) in zip(c.layers, weights.layers, ready, strict=False):
            gate, up = _halves(layer.gate_up, c.intermediate)
            layers.append(
                {
                    "attention_norm": self._norm(layer.attention_norm),
                    "after_attention_norm": self._norm(layer.after_attention_norm),
                    "mlp_norm": self._norm(layer.mlp_norm),
                    "after_mlp_norm": self._norm(layer.after_mlp_norm),
                    "q_norm": self._norm(layer.q_norm),
                    "k_norm": self._norm(layer.k_norm),
                    "qkv": self._linear(qkv, _bias(layer.qkv)),
                    "o": self._linear(o, layer.o.bias),
                    "gate_up": self._linear(gate_up, _interleaved(gate.bias, up.bias)),
                    "down": self._linear(down, layer.down.bias),
                    "window": choice.window or 0,
                    "rope": self._ropes.index(choice.rope),
                }
            )
        embedding: Tensor = self._kept[0]
        return {
            "hidden": c.hidden,
            "heads": c.heads,
            "kv_heads": c.kv_heads,
            "head_dim": c.head_dim,
            "intermediate": c.intermediate,
            "vocab": c.vocab,
            "eps": c.eps,
            "attention_scale": c.attention_scale,
            "attention_softcap": c.attention_softcap or 0.0,
            "logit_softcap": c.logit_softcap or 0.0,
            "embedding_scale": c.embedding_scale,
            "gelu": c.activation == "gelu_tanh",
            "exact": self.exact,
            "embedding": embedding.data_ptr(),
            "embedding_type": FLOAT_TYPES[embedding.dtype],
            "norm": self._norm(weights.norm),
            "head": self._linear(ready[-1][0], weights.head.bias),
            "layers": layers,
            "rope_dims": [rope.dim for rope in self._ropes],
            "rope_factors": [rope.attention_factor for rope in self._ropes],
        }

    def _norm(self, weight: Tensor | None) -> int:
        if weight is None:
            return 0
        return self._keep(weight.float() + 1.0 if self.config.norm_plus_one else weight.float())

    def _linear(self, weight: NativeWeight, bias: Tensor | None) -> tuple[Any, int]:
        if bias is None:
            return weight.handle, 0
        padded = torch.zeros(-(-weight.n // BLOCK) * BLOCK)
        padded[: bias.numel()] = bias
        return weight.handle, self._keep(padded)

    def _keep(self, values: Tensor) -> int:
        self._kept.append(values.contiguous())
        address: int = self._kept[-1].data_ptr()
        return address

    def start(self, batch: int, capacity: int) -> NativeCache:
        if batch < 1 or capacity < 1:
            raise SpecError(f"a cache needs a batch and a capacity of at least 1, got {batch} and {capacity}")
        nbytes = self._native.cache_bytes(batch, capacity)
        memory = zeros(nbytes)
        frequencies = torch.cat([rope.frequencies(capacity) for rope in self._ropes])
        return NativeCache(memory, torch.zeros(batch, dtype=torch.int64), capacity, frequencies)

    def step(self, tokens: Tensor, cache: NativeCache) -> Tensor:
        batch, count = self._checked(tokens, cache)
        logits = torch.empty(batch, self.config.vocab)
        width = _chunk(batch)
        for start in range(0, count, width):
            self._run(tokens[:, start : start + width], cache, logits, False)
        return logits

    def logits(self, tokens: Tensor) -> Tensor:
        batch, count = tokens.shape
        cache = self.start(batch, count)
        self._checked(tokens, cache)
        width = _chunk(batch)
        parts = []
        for start in range(0, count, width):
            chunk = tokens[:, start : start + width]
            parts.append(torch.empty(batch, chunk.shape[1], self.config.vocab))
            self._run(chunk, cache, parts[-1], True)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _checked(self, tokens: Tensor, cache: NativeCache) -> tuple[int, int]:
        batch = cache.lengths.numel()
        if tokens.ndim != 2 or tokens.shape[0] != batch or tokens.shape[1] < 1:
            raise SpecError(f"expected token ids [{batch}, 1 or more], got {list(tokens.shape)}")
        count = tokens.shape[1]
        longest = int(cache.lengths.max())
        if longest + count > cache.capacity:
            raise SpecError(
                f"the cache holds {longest} of {cache.capacity} positions and cannot take {count} more; start one of a "
                "larger capacity"
            )
        return batch, count

    def _run(self, tokens: Tensor, cache: NativeCache, logits: Tensor, every_token: bool) -> None:
        tokens = tokens.to(torch.int64).contiguous()
        self._native.step(
            tokens.data_ptr(),
            cache.lengths.data_ptr(),
            *tokens.shape,
            cache.memory.data_ptr(),
            cache.capacity,
            cache.frequencies.data_ptr(),
            logits.data_ptr(),
            every_token,
            torch.get_num_threads(),
        )
        cache.lengths += tokens.shape[1]


def _chunk(batch: int) -> int:
    """Tokens of each sequence in one pass."""
    most: int = native().CHUNK
    return max(1, most // batch)


def _plans(config: DecoderConfig, weights: DecoderWeights, exact: bool) -> list[list[Plan]]:
    """Per layer qkv, o, gate_up, down; last the head."""
    plans = []
    gate_blocks = -(-config.intermediate // BLOCK)
    for layer in weights.layers:
        gate, up = _halves(layer.gate_up, config.intermediate)
        alternating = [Part(gate.weight, 0, 2), Part(up.weight, 1, 2)]
        stacked, n = [], 0
        for part in (Part(linear.weight) for linear in layer.qkv):
            stacked.append(Part(part.weight, n // BLOCK))
            n += part.n  # a multiple of head_dim, so of 16
        plans.append(
            [
                plan_parts(stacked, n, exact),
                plan_parts([Part(layer.o.weight)], config.hidden, exact),
                plan_parts(alternating, 2 * gate_blocks * BLOCK, exact),
                plan_parts([Part(layer.down.weight)], config.hidden, exact),
            ]
        )
    return [*plans, [plan_parts([Part(weights.head.weight)], config.vocab, exact)]]


def _halves(joined: Parts, rows: int) -> tuple[Linear, Linear]:
    """gate and up, ``rows`` rows each, whether or not they are stored as one."""
    if len(joined) == 2:
        return joined
    whole = joined[0]

    def half(start: int, stop: int) -> Linear:
        w, bias = whole.weight, whole.bias
        if isinstance(w, PackedWeight):
            zero = None if w.zero is None else w.zero[start:stop]
            w = PackedWeight(w.packed[start:stop], w.scale[start:stop], zero, w.bits, w.k)
        else:
            w = w[start:stop]
        return Linear(w, None if bias is None else bias[start:stop])

    return half(0, rows), half(rows, 2 * rows)


def _bias(joined: Parts) -> Tensor | None:
    """The biases of all parts below each other, zeros for a part without; None where no part has one."""
    if all(part.bias is None for part in joined):
        return None
    return torch.cat([torch.zeros(Part(p.weight).n) if p.bias is None else p.bias.float() for p in joined])


def _interleaved(gate: Tensor | None, up: Tensor | None) -> Tensor | None:
    """Biases in the order of the alternating blocks of gate and up."""
    if gate is None or up is None:
        return None
    padding = -gate.numel() % BLOCK
    blocks = [torch.nn.functional.pad(bias.float(), (0, padding)).view(-1, BLOCK) for bias in (gate, up)]
    return torch.stack(blocks, 1).flatten()
