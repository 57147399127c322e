"""The decoder as one C++ object (csrc/cpu/decoder.h): a whole step, from token ids to logits, without leaving it.

By default activations meet the weights as int8, one scale per group of at most 128 columns, outliers apart (as 15 bits
for a prompt's logits and for up to four generated tokens of a pass), unquantized linears are held in 8 bits (of a large
head's, the lower two are read for the most likely tokens only, csrc/cpu/head.h), and keys and values in float16.
``exact`` keeps all of them as they are: float32 activations and cache, 16-bit weights; what differs from the torch
decoder then is the order of float32 sums.

With ``exact`` a token's result depends on what it is (of a prompt or generated) and on the tokens before it, and on
nothing else, bit for bit: not on the other sequences of a pass, on where a prompt was cut, on where its keys and values
lie, or on the number of threads. Without it that holds too, except that a generated token is computed more precisely in
a pass with at most four of them.

Everything here is numpy: with this decoder a process generates text without torch. ``native_on_torch`` is the same for
callers with tensors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dq_runtime.backends.cpu_prepared import (
    BLOCK,
    FLOAT_TYPES,
    Arena,
    NativeWeight,
    Part,
    Plan,
    address,
    native,
    prepare,
    zeros,
)
from dq_runtime.backends.cpu_prepared import plan as plan_parts
from dq_runtime.backends.cpu_threads import default_threads
from dq_runtime.errors import BackendError, SpecError
from dq_runtime.packing import HostTensor, HostWeight
from dq_runtime.runtime.decoder import paged
from dq_runtime.runtime.decoder.architecture import DecoderConfig
from dq_runtime.runtime.decoder.weights import HostWeights, Linear, Parts

HostLinear = Linear[HostTensor, HostWeight]
HostParts = Parts[HostTensor, HostWeight]


@dataclass
class NativeCache:
    """Keys and values of a batch of sequences: ``memory`` as the C++ decoder lays it out, ``lengths`` int64 [B], the
    positions held, at most ``capacity`` each; ``frequencies`` float32, the tables of all ropes one after the other."""

    memory: NDArray[np.uint8]
    lengths: NDArray[np.int64]
    capacity: int
    frequencies: NDArray[np.float32]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values allocated."""
        return self.memory.nbytes


@dataclass
class NativeMemory:
    """Keys and values of ``blocks`` blocks, shared by many sequences of at most ``positions`` positions each; see
    :class:`NativeCache` for ``memory`` and ``frequencies``."""

    memory: NDArray[np.uint8]
    blocks: int
    positions: int
    frequencies: NDArray[np.float32]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values allocated; the system provides them as they are first written."""
        return self.memory.nbytes


class NativeDecoder:
    """What :class:`dq_runtime.runtime.decoder.Decoder` and :class:`dq_runtime.runtime.decoder.paged.PagedDecoder` say,
    of numpy arrays. ``threads`` may be changed at any time; results do not depend on it. Not to be run by two threads
    at a time. ``release`` gives back the memory of weights read so far, see
    :meth:`dq_runtime.packing.checkpoint.Checkpoint.release`."""

    device = "cpu"

    def __init__(
        self,
        config: DecoderConfig,
        weights: HostWeights,
        exact: bool = False,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.exact = exact
        self.threads = default_threads()
        self._ropes = tuple(dict.fromkeys(layer.rope for layer in config.layers))
        self._embedding = weights.embedding.contiguous()
        self._kept: list[NDArray[Any]] = []  # what the C++ object points into
        plans = _plans(config, weights, exact)
        self._arena = Arena(sum(p.nbytes for layer in plans for p in layer))
        ready = []
        for layer in plans:
            ready.append([prepare(p, self._arena, self.threads, release) for p in layer])
            release()
        self._native = native().Decoder(self._model(weights, ready))

    @staticmethod
    def refusal(config: DecoderConfig, weights: HostWeights, exact: bool = False) -> str | None:
        """Why the native decoder cannot run this model here; None if it can."""
        requested = os.environ.get("DQ_BACKEND") or "native"
        if requested != "native":
            return f"DQ_BACKEND={requested} asks for other kernels"
        try:
            native()
        except ImportError as error:
            return f"the C++ extension dq_runtime._native is not built ({error})"
        if config.head_dim % 16:
            return f"native needs heads of a multiple of 16 values, got {config.head_dim}"
        if weights.embedding.dtype not in FLOAT_TYPES:
            return f"native reads float32, bfloat16 and float16 embeddings, got {weights.embedding.dtype}"
        try:
            _plans(config, weights, exact)
        except BackendError as error:
            return str(error)
        return None

    def _model(self, weights: HostWeights, ready: list[list[NativeWeight]]) -> dict[str, Any]:
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
                    "o": self._linear(o, _bias((layer.o,))),
                    "gate_up": self._linear(gate_up, _interleaved(gate.bias, up.bias)),
                    "down": self._linear(down, _bias((layer.down,))),
                    "window": choice.window or 0,
                    "rope": self._ropes.index(choice.rope),
                }
            )
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
            "embedding": address(self._embedding.values),
            "embedding_type": FLOAT_TYPES[self._embedding.dtype],
            "norm": self._norm(weights.norm),
            "head": self._linear(ready[-1][0], _bias((weights.head,))),
            "layers": layers,
            "rope_dims": [rope.dim for rope in self._ropes],
            "rope_factors": [rope.attention_factor for rope in self._ropes],
        }

    def _norm(self, weight: HostTensor | None) -> int:
        if weight is None:
            return 0
        return self._keep(weight.float32() + np.float32(self.config.norm_plus_one))

    def _linear(self, weight: NativeWeight, bias: NDArray[np.float32] | None) -> tuple[Any, int]:
        if bias is None:
            return weight.handle, 0
        padded = np.zeros(-(-weight.n // BLOCK) * BLOCK, np.float32)
        padded[: bias.size] = bias
        return weight.handle, self._keep(padded)

    def _keep(self, values: NDArray[np.float32]) -> int:
        self._kept.append(np.ascontiguousarray(values))
        return address(self._kept[-1])

    def start(self, batch: int, capacity: int) -> NativeCache:
        if batch < 1 or capacity < 1:
            raise SpecError(f"a cache needs a batch and a capacity of at least 1, got {batch} and {capacity}")
        nbytes = self._native.cache_bytes(batch, capacity)
        return NativeCache(zeros(nbytes), np.zeros(batch, np.int64), capacity, self._frequencies(capacity))

    def _frequencies(self, capacity: int) -> NDArray[np.float32]:
        return np.concatenate([rope.frequencies(capacity) for rope in self._ropes])

    def step(self, tokens: ArrayLike, cache: NativeCache) -> NDArray[np.float32]:
        """See the protocol. One token of each sequence, after others, is taken for a generated one, all else for parts
        of prompts: the difference that :class:`paged.Segment` explains."""
        ids = self._checked(tokens, cache)
        generated = ids.shape[1] == 1 and bool(cache.lengths.all())
        batch, count = ids.shape
        logits = np.empty((batch, self.config.vocab), np.float32)
        width = _chunk(batch)
        for start in range(0, count, width):
            self._step(ids[:, start : start + width], cache, logits, generated=generated, every_token=False)
        return logits

    def logits(self, tokens: ArrayLike) -> NDArray[np.float32]:
        batch, count = np.shape(tokens)
        cache = self.start(batch, count)
        ids = self._checked(tokens, cache)
        width = _chunk(batch)
        parts = []
        for start in range(0, count, width):
            chunk = ids[:, start : start + width]
            parts.append(np.empty((batch, chunk.shape[1], self.config.vocab), np.float32))
            self._step(chunk, cache, parts[-1], generated=False, every_token=True)
        return parts[0] if len(parts) == 1 else np.concatenate(parts, 1)

    def _checked(self, tokens: ArrayLike, cache: NativeCache) -> NDArray[np.int64]:
        ids = np.asarray(tokens, np.int64)
        batch = cache.lengths.size
        if ids.ndim != 2 or ids.shape[0] != batch or ids.shape[1] < 1:
            raise SpecError(f"expected token ids [{batch}, 1 or more], got {list(ids.shape)}")
        count = ids.shape[1]
        longest = int(cache.lengths.max())
        if longest + count > cache.capacity:
            raise SpecError(
                f"the cache holds {longest} of {cache.capacity} positions and cannot take {count} more; start one of a "
                "larger capacity"
            )
        return ids

    def _step(
        self,
        ids: NDArray[np.int64],
        cache: NativeCache,
        logits: NDArray[np.float32],
        *,
        generated: bool,
        every_token: bool,
    ) -> None:
        ids = np.ascontiguousarray(ids)
        self._native.step(
            address(ids),
            address(cache.lengths),
            *ids.shape,
            address(cache.memory),
            cache.capacity,
            address(cache.frequencies),
            address(logits),
            generated,
            every_token,
            self.threads,
        )
        cache.lengths += ids.shape[1]

    @property
    def block_bytes(self) -> int:
        nbytes: int = self._native.block_bytes()
        return nbytes

    def memory(self, blocks: int, positions: int | None = None) -> NativeMemory:
        """See the protocol. No sequence may exceed ``positions``: by default the model's context, or all blocks where
        those are fewer. Layers with a sliding window keep every position here, too.

        Longrope has one set of angles for the memory's whole life, that of sequences of ``positions``: a sequence's
        keys cannot be turned again when it grows beyond the context the model was first trained for. A caller that
        serves shorter requests than the model's context therefore says so, and gets the angles made for them.
        """
        if blocks < 1:
            raise SpecError(f"a memory needs at least 1 block of {paged.BLOCK} positions, got {blocks}")
        if positions is None:
            positions = min(self.config.context_length, blocks * paged.BLOCK)
        if positions < 1:
            raise SpecError(f"sequences need at least 1 position, got {positions}")
        nbytes = blocks * self.block_bytes
        try:
            memory = zeros(nbytes)
        except (OSError, OverflowError) as error:
            raise SpecError(f"no memory for {blocks} blocks of keys and values, {nbytes} bytes ({error})") from error
        return NativeMemory(memory, blocks, positions, self._frequencies(positions))

    def run(self, segments: Sequence[paged.Segment], memory: NativeMemory) -> NDArray[np.float32]:
        """See the protocol; logits [n, V]."""
        try:
            tokens = np.array([token for s in segments for token in s.tokens], np.int64)
            tables = np.array([block for s in segments for block in s.blocks], np.int64)
        except OverflowError as error:
            raise SpecError(f"token ids and block numbers are 64-bit integers ({error})") from error
        rows = np.array(
            [(len(s.tokens), s.start, s.wants_logits, s.generated, len(s.blocks)) for s in segments], np.int64
        )
        logits = np.empty((sum(s.wants_logits for s in segments), self.config.vocab), np.float32)
        try:
            self._native.run(
                address(tokens),
                address(rows),
                len(segments),
                address(tables),
                address(memory.memory),
                memory.blocks,
                memory.positions,
                address(memory.frequencies),
                address(logits),
                self.threads,
            )
        except ValueError as error:
            raise SpecError(str(error)) from None
        return logits


def _chunk(batch: int) -> int:
    """Tokens of each sequence in one pass."""
    most: int = native().CHUNK
    return max(1, most // batch)


def _plans(config: DecoderConfig, weights: HostWeights, exact: bool) -> list[list[Plan]]:
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
    return [*plans, [plan_parts([Part(weights.head.weight)], config.vocab, exact, head=True)]]


def _halves(joined: HostParts, rows: int) -> tuple[HostLinear, HostLinear]:
    """gate and up, ``rows`` rows each, whether or not they are stored as one."""
    if len(joined) == 2:
        return joined
    whole = joined[0]

    def half(start: int, stop: int) -> HostLinear:
        bias = None if whole.bias is None else whole.bias.rows(start, stop)
        return Linear(whole.weight.rows(start, stop), bias)

    return half(0, rows), half(rows, 2 * rows)


def _bias(joined: HostParts) -> NDArray[np.float32] | None:
    """The biases of all parts below each other, zeros for a part without; None where no part has one."""
    if all(part.bias is None for part in joined):
        return None
    return np.concatenate(
        [np.zeros(Part(p.weight).n, np.float32) if p.bias is None else p.bias.float32() for p in joined]
    )


def _interleaved(gate: HostTensor | None, up: HostTensor | None) -> NDArray[np.float32] | None:
    """Biases in the order of the alternating blocks of gate and up."""
    if gate is None or up is None:
        return None
    blocks = [np.pad(bias.float32(), (0, -bias.shape[0] % BLOCK)).reshape(-1, BLOCK) for bias in (gate, up)]
    return np.stack(blocks, 1).reshape(-1)
