"""Checkpoint tensors -> the weights of a decoder, by role instead of by name; every name, shape and value checked.

Projections that read the same input belong together: q, k, v in ``qkv`` and gate, up in ``gate_up``. They are read as
the checkpoint has them, mapped from the file; :func:`join` makes one linear of them for a decoder that wants one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dq_runtime.errors import CheckpointError
from dq_runtime.packing import PackedWeight
from dq_runtime.packing.checkpoint import Checkpoint
from dq_runtime.runtime.decoder.architecture import DecoderConfig

# What a multimodal checkpoint holds besides its language model; never read.
_OTHER_MODALITIES = ("vision_tower.", "multi_modal_projector.")


@dataclass(frozen=True)
class Linear:
    """y = x @ weight.T + bias: ``weight`` packed, or dense [N, K] as stored; ``bias`` [N] or None."""

    weight: PackedWeight | Tensor
    bias: Tensor | None


# Linears of one input, whose outputs are to be concatenated; a single one where the checkpoint stores them fused.
Parts = tuple[Linear, ...]


@dataclass(frozen=True)
class LayerWeights:
    """One layer. Norm weights [hidden] as stored (minus one for Gemma); ``q_norm``, ``k_norm`` [head_dim]; the norms
    after attention and MLP exist only with ``sandwich_norms``. Outputs of ``qkv``: heads of q, k, v."""

    attention_norm: Tensor
    qkv: Parts
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    after_attention_norm: Tensor | None
    mlp_norm: Tensor
    gate_up: Parts
    down: Linear
    after_mlp_norm: Tensor | None


@dataclass(frozen=True)
class DecoderWeights:
    """All of them, dense tensors in the dtype they are stored in and mapped from the file.

    ``embedding`` [vocab, hidden]; ``head`` [vocab, hidden], the same tensor as the embedding where they are tied.
    """

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Linear


def read_weights(checkpoint: Checkpoint, config: DecoderConfig) -> DecoderWeights:
    """Read and validate; raises :class:`CheckpointError` for a missing, unknown, mis-shaped or non-finite tensor."""
    tree = _Tree(checkpoint, config)
    layers = []
    for i in range(len(config.layers)):
        at = f"{tree.prefix}layers.{i}"
        if config.fused:
            qkv, gate_up = [f"{at}.self_attn.qkv_proj"], [f"{at}.mlp.gate_up_proj"]
        else:
            qkv = [f"{at}.self_attn.{name}_proj" for name in "qkv"]
            gate_up = [f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"]
        after, before = "post_attention_layernorm", "pre_feedforward_layernorm"
        layers.append(
            LayerWeights(
                attention_norm=tree.dense[f"{at}.input_layernorm.weight"],
                qkv=tuple(tree.linear(name) for name in qkv),
                q_norm=tree.dense.get(f"{at}.self_attn.q_norm.weight"),
                k_norm=tree.dense.get(f"{at}.self_attn.k_norm.weight"),
                o=tree.linear(f"{at}.self_attn.o_proj"),
                after_attention_norm=tree.dense[f"{at}.{after}.weight"] if config.sandwich_norms else None,
                mlp_norm=tree.dense[f"{at}.{before if config.sandwich_norms else after}.weight"],
                gate_up=tuple(tree.linear(name) for name in gate_up),
                down=tree.linear(f"{at}.mlp.down_proj"),
                after_mlp_norm=tree.dense.get(f"{at}.post_feedforward_layernorm.weight"),
            )
        )
    embedding = tree.dense[f"{tree.prefix}embed_tokens.weight"]
    head = Linear(embedding, None) if config.tied_head else tree.linear(tree.head)
    return DecoderWeights(embedding, tuple(layers), tree.dense[f"{tree.prefix}norm.weight"], head)


class _Tree:
    """The checkpoint's tensors by name, validated against the names and shapes that ``config`` calls for."""

    def __init__(self, checkpoint: Checkpoint, config: DecoderConfig) -> None:
        where = checkpoint.path
        self.prefix, self.head = _place(checkpoint, config)
        shapes = dict(_linears(config, self.prefix, self.head))
        self.packed: dict[str, PackedWeight] = {}
        for name, weight in checkpoint.packed():
            if config.nested and _foreign(name):
                continue
            if name not in shapes:
                raise CheckpointError(f"{where}: {name} is packed, but the model has no linear of that name")
            n, k, _ = shapes[name]
            if (n, k) != (weight.n, weight.k):
                raise CheckpointError(f"{where}: {name} is {[weight.n, weight.k]}, but the model wants {[n, k]}")
            self.packed[name] = weight
        wanted = dict(_vectors(config, self.prefix))
        wanted |= {f"{name}.weight": (n, k) for name, (n, k, _) in shapes.items() if name not in self.packed}
        wanted |= {f"{name}.bias": (n,) for name, (n, _, bias) in shapes.items() if bias}
        # A tied head may be stored all the same; the embedding is what counts, as in transformers.
        optional = {f"{self.head}.weight": (config.vocab, config.hidden)} if config.tied_head else {}
        stored = [n for n in checkpoint.dense if not (config.nested and _foreign(n))]
        missing = sorted(set(wanted) - set(stored))
        unknown = sorted(set(stored) - set(wanted) - set(optional))
        if missing or unknown:
            problem = f"{missing[0]} is missing" if missing else f"{unknown[0]} is not part of the model"
            raise CheckpointError(f"{where}: {problem}")
        self.dense: dict[str, Tensor] = {}
        for name, tensor in checkpoint.read(stored):
            expected = list((wanted | optional)[name])
            if list(tensor.shape) != expected:
                raise CheckpointError(f"{where}: {name} is {list(tensor.shape)}, but the model wants {expected}")
            if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                raise CheckpointError(f"{where}: {name} is {tensor.dtype}, but the model wants a floating-point tensor")
            # Infinities and NaN show in the extremes, which take no temporary: 4 ms instead of 170 for 28 M values.
            if not all(math.isfinite(extreme) for extreme in torch.aminmax(tensor)):
                raise CheckpointError(f"{where}: {name} holds NaN or infinity")
            self.dense[name] = tensor

    def linear(self, name: str) -> Linear:
        return Linear(self.packed[name] if name in self.packed else self.dense[f"{name}.weight"], self._bias(name))

    def _bias(self, name: str) -> Tensor | None:
        return self.dense.get(f"{name}.bias")


def _place(checkpoint: Checkpoint, config: DecoderConfig) -> tuple[str, str]:
    """Prefix of the decoder's tensors, and the name of the head. Nested models are stored in two ways: as published
    (``language_model.model.``) and as transformers 5 names them in memory (``model.language_model.``)."""
    if not config.nested:
        return "model.", "lm_head"
    if any(name.startswith("model.language_model.") for name in checkpoint.dense):
        return "model.language_model.", "lm_head"
    return "language_model.model.", "language_model.lm_head"


def _foreign(name: str) -> bool:
    return name.removeprefix("model.").startswith(_OTHER_MODALITIES)


def _linears(c: DecoderConfig, prefix: str, head: str) -> Iterator[tuple[str, tuple[int, int, bool]]]:
    """Name -> (out_features, in_features, has a bias) of every linear."""
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    for i in range(len(c.layers)):
        attention, mlp = f"{prefix}layers.{i}.self_attn", f"{prefix}layers.{i}.mlp"
        if c.fused:
            yield f"{attention}.qkv_proj", (q + 2 * kv, c.hidden, c.qkv_bias)
            yield f"{mlp}.gate_up_proj", (2 * c.intermediate, c.hidden, c.mlp_bias)
        else:
            for name, n in (("q", q), ("k", kv), ("v", kv)):
                yield f"{attention}.{name}_proj", (n, c.hidden, c.qkv_bias)
            for name in ("gate", "up"):
                yield f"{mlp}.{name}_proj", (c.intermediate, c.hidden, c.mlp_bias)
        yield f"{attention}.o_proj", (c.hidden, q, c.o_bias)
        yield f"{mlp}.down_proj", (c.hidden, c.intermediate, c.mlp_bias)
    if not c.tied_head:
        yield head, (c.vocab, c.hidden, False)


def _vectors(c: DecoderConfig, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name -> shape of everything that is not a linear."""
    yield f"{prefix}embed_tokens.weight", (c.vocab, c.hidden)
    yield f"{prefix}norm.weight", (c.hidden,)
    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if c.sandwich_norms else []
    for i in range(len(c.layers)):
        for name in norms:
            yield f"{prefix}layers.{i}.{name}.weight", (c.hidden,)
        for name in ("q_norm", "k_norm") if c.qk_norm else ():
            yield f"{prefix}layers.{i}.self_attn.{name}.weight", (c.head_dim,)


def join(parts: Parts) -> Parts:
    """The parts as one linear, rows below each other, where they are stored alike; else as they are. Rows are
    independent in the packed bitstream, so that joining them is a concatenation (and a copy)."""
    if len(parts) == 1 or len({_kind(p) for p in parts}) > 1:
        return parts
    biases = [p.bias for p in parts if p.bias is not None]
    bias = torch.cat(biases) if biases else None
    packed = [p.weight for p in parts if isinstance(p.weight, PackedWeight)]
    if not packed:
        return (Linear(torch.cat([p.weight for p in parts if isinstance(p.weight, Tensor)]), bias),)
    zeros = [w.zero for w in packed if w.zero is not None]
    joined = PackedWeight(
        torch.cat([w.packed for w in packed]),
        torch.cat([w.scale for w in packed]),
        torch.cat(zeros) if zeros else None,
        packed[0].bits,
        packed[0].k,
    )
    return (Linear(joined, bias),)


def _kind(part: Linear) -> tuple[object, ...]:
    """Linears of one kind can be joined."""
    w = part.weight
    stored = (w.bits, w.group_size, w.zero is None, w.scale.dtype) if isinstance(w, PackedWeight) else (w.dtype,)
    return (*stored, None if part.bias is None else part.bias.dtype)
