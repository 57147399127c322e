"""The decoder in PyTorch: the definition of all others, and what runs on a GPU.

Shapes: B sequences, T new tokens, H hidden, D head_dim, S cache slots. Activations are in one dtype throughout; norms,
angles and softmax are computed in float32, as in transformers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dq_runtime.errors import SpecError
from dq_runtime.modules.quant_linear import QuantLinear
from dq_runtime.packing import PackedWeight
from dq_runtime.runtime.decoder.architecture import DecoderConfig
from dq_runtime.runtime.decoder.attention import attend, attend_causally, for_groups
from dq_runtime.runtime.decoder.captured import CapturedStep
from dq_runtime.runtime.decoder.fused_step import fused_step, refusal
from dq_runtime.runtime.decoder.kv_cache import CHUNK, KVCache, Storage, allocate, held_positions, visible
from dq_runtime.runtime.decoder.rotation import rotate, rotation
from dq_runtime.runtime.decoder.torch_weights import TorchParts, join, placed
from dq_runtime.runtime.decoder.weights import DecoderWeights, LayerWeights, Linear

# From q [B, heads, T, D] and k, v [B, kv_heads, T, D] of new tokens to [B, T, heads * D]: attention to them and to what
# is held of their sequences, which is where they are kept from then on.
Mix = Callable[[Tensor, Tensor, Tensor], Tensor]


class TorchDecoder(nn.Module):
    """See :class:`dq_runtime.runtime.decoder.Decoder`. On a GPU, steps of one token are captured once per batch size
    and per power of two of the length, both rounded up, and replayed."""

    scale: Tensor

    def __init__(
        self,
        config: DecoderConfig,
        weights: DecoderWeights[Any, Any],
        device: str,
        dtype: torch.dtype,
        exact: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.device = torch.device(device)
        self.dtype = dtype
        self._groups = config.heads // config.kv_heads
        self.embedding = nn.Parameter(placed(weights.embedding, self.device, dtype), requires_grad=False)
        self.layers = nn.ModuleList(
            _Layer(config, placed(layer, self.device, dtype), dtype) for layer in weights.layers
        )
        self.norm = _Norm(placed(weights.norm, self.device, dtype), config)
        tied: Linear[Tensor, PackedWeight] = Linear(self.embedding, None)
        self.head = _linear(tied if config.tied_head else placed(weights.head, self.device, dtype), dtype)
        self.register_buffer("scale", torch.tensor(config.embedding_scale).to(self.device, dtype))
        # Graphs need fixed addresses: shapes are rounded up, and the memory of the last cache is kept for the next.
        self.capture = self.device.type == "cuda"
        # Steps of one token through fused_step.py; the plain step is its definition. A captured step stays as it was.
        self.fused = self.capture and refusal(config) is None
        self._idle: dict[tuple[int, int], Storage] = {}

    @staticmethod
    def refusal(
        config: DecoderConfig, weights: DecoderWeights[Any, Any], device: str, dtype: torch.dtype, exact: bool = True
    ) -> str | None:
        """None: this one runs everything that :class:`DecoderConfig` can say, and always exactly."""
        return None

    @torch.inference_mode()
    def start(self, batch: int, capacity: int) -> KVCache:
        if batch < 1 or capacity < 1:
            raise SpecError(f"a cache needs a batch and a capacity of at least 1, got {batch} and {capacity}")
        shape = (_power_of_two(batch), _power_of_two(max(capacity, 256))) if self.capture else (batch, capacity)
        storage = self._idle.pop(shape, None)
        self._idle.clear()  # of another shape: freed before more is allocated
        if storage is None:
            storage = allocate(self.config, *shape, self.device, self.dtype)
        storage.reset(capacity)
        cache = KVCache(storage, batch, capacity)
        if self.capture:
            weakref.finalize(cache, _retire, self._idle, shape, storage).atexit = False
        return cache

    @torch.inference_mode()
    def step(self, tokens: Tensor | list[list[int]], cache: KVCache) -> Tensor:
        tokens = self._checked(tokens, cache)
        count, before = tokens.shape[1], cache.longest
        cache.reserve(count)
        if count == 1:
            return self._decode(tokens, cache)
        for start in range(0, count, CHUNK):
            hidden = self._pass(tokens[:, start : start + CHUNK], cache, before + start)
        return self.head_of(hidden[:, -1])

    @torch.inference_mode()
    def logits(self, tokens: Tensor | list[list[int]]) -> Tensor:
        tokens = torch.as_tensor(tokens, device=self.device)
        cache = self.start(*tokens.shape)
        tokens = self._checked(tokens, cache)
        cache.reserve(tokens.shape[1])
        hidden = [
            self._pass(tokens[:, start : start + CHUNK], cache, start) for start in range(0, tokens.shape[1], CHUNK)
        ]
        return self.head_of(torch.cat(hidden, 1))

    def _checked(self, tokens: Tensor | list[list[int]], cache: KVCache) -> Tensor:
        tokens = torch.as_tensor(tokens, device=self.device)
        if tokens.ndim != 2 or tokens.shape[0] != cache.batch or tokens.shape[1] < 1:
            raise SpecError(f"expected token ids [{cache.batch}, 1 or more], got {list(tokens.shape)}")
        return tokens

    def _decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """One token of each sequence; ``cache`` already counts it."""
        storage = cache.storage
        if not self.capture:
            return self._one(tokens, storage, cache.batch, _rounded(cache.longest, 64))
        used = _power_of_two(max(cache.longest, 256))
        if used not in storage.graphs:
            rows = storage.lengths.shape[0]
            storage.graphs[used] = CapturedStep(lambda ids: self._one(ids, storage, rows, used), rows, storage.lengths)
        logits: Tensor = storage.graphs[used](tokens)
        return logits[: cache.batch]

    def _one(self, tokens: Tensor, storage: Storage, batch: int, used: int) -> Tensor:
        if self.fused:
            return self._logits(fused_step(self, tokens[:, 0], storage, batch, used))
        return self.head_of(self._run(tokens, storage, batch, used, False)[:, -1])

    def _pass(self, tokens: Tensor, cache: KVCache, before: int) -> Tensor:
        """At most CHUNK tokens after ``before`` positions; hidden states [B, T, H]."""
        used = _rounded(before + tokens.shape[1], 64)
        return self._run(tokens, cache.storage, cache.batch, used, before == 0)

    def _run(self, tokens: Tensor, storage: Storage, batch: int, used: int, fresh: bool) -> Tensor:
        """All layers for the first ``batch`` rows of ``storage``, of which the first ``used`` slots matter; ``fresh``
        says that it was empty. Nothing here depends on values of tensors, so it can be captured."""
        count = tokens.shape[1]
        lengths = storage.lengths[:batch]
        positions = lengths.unsqueeze(1) + torch.arange(count, device=self.device)
        turns = {
            rope: rotation(frequencies, positions, rope.attention_factor, self.dtype)
            for rope, frequencies in storage.frequencies.items()
        }
        views: dict[tuple[int, int | None], _View] = {}
        x = F.embedding(tokens, self.embedding) * self.scale
        for i, layer in enumerate(self.layers):
            choice = self.config.layers[i]
            keys, values = storage.keys[i][:batch], storage.values[i][:batch]
            slots = keys.shape[2]
            if (slots, choice.window) not in views:
                held = held_positions(slots, min(used, slots), lengths + count)
                causal = fresh and self.config.attention_softcap is None and (choice.window or count) >= count
                mask = None if causal else for_groups(visible(held, positions, choice.window), self._groups)
                views[slots, choice.window] = _View(positions % slots, held.shape[1], mask)
            x = layer(x, turns[choice.rope], partial(self._mixed, keys, values, views[slots, choice.window]))
        lengths += count
        return x

    def _mixed(self, keys: Tensor, values: Tensor, view: _View, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v in a layer's cache, and attend to what it holds."""
        c = self.config
        index = view.slots[:, None, :, None].expand_as(k)
        keys.scatter_(2, index, k)
        values.scatter_(2, index, v)
        if view.mask is None:
            return attend_causally(q, k, v, c.attention_scale)
        keys, values = keys[:, :, : view.used], values[:, :, : view.used]
        return attend(q, keys, values, view.mask, c.attention_scale, c.attention_softcap)

    def head_of(self, hidden: Tensor) -> Tensor:
        """hidden [..., H] -> float32 logits [..., V]."""
        return self._logits(self.norm(hidden))

    def _logits(self, normed: Tensor) -> Tensor:
        """The output of the last norm [..., H] -> float32 logits [..., V]."""
        logits: Tensor = self.head(normed)
        cap = self.config.logit_softcap
        return (logits if cap is None else cap * torch.tanh(logits / cap)).float()


class _View(NamedTuple):
    """What one pass does with the caches of one kind of layer: ``slots`` [B, T] to write to, how many to read, and the
    mask [B, 1, G * T, used] over them (None: a first pass, plainly causal)."""

    slots: Tensor
    used: int
    mask: Tensor | None


class _Layer(nn.Module):
    """One transformer layer; the formulas are in :class:`DecoderConfig`."""

    def __init__(self, config: DecoderConfig, w: LayerWeights[Tensor, PackedWeight], dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.attention_norm = _Norm(w.attention_norm, config)
        self.qkv = _Parts(w.qkv, dtype)
        self.q_norm = None if w.q_norm is None else _Norm(w.q_norm, config)
        self.k_norm = None if w.k_norm is None else _Norm(w.k_norm, config)
        self.o = _linear(w.o, dtype)
        self.after_attention_norm = _optional_norm(w.after_attention_norm, config)
        self.mlp_norm = _Norm(w.mlp_norm, config)
        self.gate_up = _Parts(w.gate_up, dtype)
        self.down = _linear(w.down, dtype)
        self.after_mlp_norm = _optional_norm(w.after_mlp_norm, config)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], mix: Mix) -> Tensor:
        x = x + self.after_attention_norm(self._attention(self.attention_norm(x), turn, mix))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        gate = F.silu(gate) if self.config.activation == "silu" else F.gelu(gate, approximate="tanh")
        result: Tensor = x + self.after_mlp_norm(self.down(gate * up))
        return result

    def _attention(self, x: Tensor, turn: tuple[Tensor, Tensor], mix: Mix) -> Tensor:
        c = self.config
        batch, count, _ = x.shape
        heads = self.qkv(x).view(batch, count, c.heads + 2 * c.kv_heads, c.head_dim).transpose(1, 2)
        v = heads[:, c.heads + c.kv_heads :]
        turned = heads[:, : c.heads + c.kv_heads]  # q and k are rotated as they lie beside each other: fewer launches
        if self.q_norm is not None and self.k_norm is not None:
            turned = torch.cat((self.q_norm(turned[:, : c.heads]), self.k_norm(turned[:, c.heads :])), 1)
        turned = rotate(turned, *turn)
        q, k = turned[:, : c.heads], turned[:, c.heads :]
        result: Tensor = self.o(mix(q, k, v))
        return result


class _Norm(nn.Module):
    """RMSNorm (arXiv 1910.07467) over the last dimension. Gemma's weight is stored minus one and multiplied in float32,
    since 1 + w would lose what w says in 16 bits."""

    weight: Tensor

    def __init__(self, weight: Tensor, config: DecoderConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.register_buffer("weight", 1.0 + weight.float() if config.norm_plus_one else weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps).to(x.dtype)


class _Parts(nn.Module):
    """Linears of one input, their outputs side by side: one launch instead of three where they can be joined."""

    def __init__(self, parts: TorchParts, dtype: torch.dtype) -> None:
        super().__init__()
        self.parts = nn.ModuleList(_linear(part, dtype) for part in join(parts))

    def forward(self, x: Tensor) -> Tensor:
        outputs = [part(x) for part in self.parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def _linear(linear: Linear[Tensor, PackedWeight], dtype: torch.dtype) -> nn.Module:
    """The module that runs a linear placed on its device: repacked for the kernels there and activations of ``dtype``,
    or dense."""
    if isinstance(linear.weight, PackedWeight):
        packed = QuantLinear(linear.weight, linear.bias)
        packed.prepare(dtype)
        return packed
    n, k = linear.weight.shape
    dense = nn.Linear(k, n, bias=linear.bias is not None, device="meta")
    dense.weight = nn.Parameter(linear.weight, requires_grad=False)
    if linear.bias is not None:
        dense.bias = nn.Parameter(linear.bias, requires_grad=False)
    return dense


def _optional_norm(weight: Tensor | None, config: DecoderConfig) -> nn.Module:
    return nn.Identity() if weight is None else _Norm(weight, config)


def _retire(idle: dict[tuple[int, int], Storage], shape: tuple[int, int], storage: Storage) -> None:
    """Keep the memory of a cache nobody holds any more, and only the last one: it may be gigabytes."""
    idle.clear()
    idle[shape] = storage


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()


def _rounded(n: int, step: int) -> int:
    return -(-n // step) * step
