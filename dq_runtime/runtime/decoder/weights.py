"""Checkpoint tensors -> the weights of a decoder, by role instead of by name; every name, shape and value checked.

Projections that read the same input belong together: q, k, v in ``qkv`` and gate, up in ``gate_up``. They are read as
the checkpoint has them, as numpy arrays mapped from the file; ``torch_weights`` makes torch tensors of them, and one
linear of several, for a decoder that wants that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from dq_runtime.errors import CheckpointError
from dq_runtime.packing import HostTensor, HostWeight
from dq_runtime.packing.checkpoint import Checkpoint
from dq_runtime.runtime.decoder.architecture import DecoderConfig

# What a multimodal checkpoint holds besides its language model; never read.
_OTHER_MODALITIES = ("vision_tower.", "multi_modal_projector.")
_FLOATS = ("float32", "bfloat16", "float16", "float64")
_PIECE = 2**22  # values checked before the pages they were read from are given back

# The two kinds of weights: numpy's (HostTensor, HostWeight) and torch's (Tensor, PackedWeight).
A = TypeVar("A")
P = TypeVar("P")


@dataclass(frozen=True)
class Linear(Generic[A, P]):
    """y = x @ weight.T + bias: ``weight`` packed, or dense [N, K] as stored; ``bias`` [N] or None."""

    weight: P | A
    bias: A | None


# Linears of one input, whose outputs are to be concatenated; a single one where the checkpoint stores them fused.
Parts = tuple[Linear[A, P], ...]


@dataclass(frozen=True)
class LayerWeights(Generic[A, P]):
    """One layer. Norm weights [hidden] as stored (minus one for Gemma); ``q_norm``, ``k_norm`` [head_dim]; the norms
    after attention and MLP exist only with ``sandwich_norms``. Outputs of ``qkv``: heads of q, k, v."""

    attention_norm: A
    qkv: Parts[A, P]
    q_norm: A | None
    k_norm: A | None
    o: Linear[A, P]
    after_attention_norm: A | None
    mlp_norm: A
    gate_up: Parts[A, P]
    down: Linear[A, P]
    after_mlp_norm: A | None


@dataclass(frozen=True)
class DecoderWeights(Generic[A, P]):
    """All of them, dense tensors in the dtype they are stored in.

    ``embedding`` [vocab, hidden]; ``head`` [vocab, hidden], the same tensor as the embedding where they are tied.
    """

    embedding: A
    layers: tuple[LayerWeights[A, P], ...]
    norm: A
    head: Linear[A, P]


HostWeights = DecoderWeights[HostTensor, HostWeight]


def read_weights(checkpoint: Checkpoint, config: DecoderConfig) -> HostWeights:
    """Read, mapped from the files, and validate; raises :class:`CheckpointError` for a missing, unknown, mis-shaped or
    non-finite tensor."""
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
    head: Linear[HostTensor, HostWeight] = Linear(embedding, None) if config.tied_head else tree.linear(tree.head)
    return DecoderWeights(embedding, tuple(layers), tree.dense[f"{tree.prefix}norm.weight"], head)


class _Tree:
    """The checkpoint's tensors by name, validated against the names and shapes that ``config`` calls for."""

    def __init__(self, checkpoint: Checkpoint, config: DecoderConfig) -> None:
        where = checkpoint.path
        self.prefix, self.head = _place(checkpoint, config)
        shapes = dict(_linears(config, self.prefix, self.head))
        self.packed: dict[str, HostWeight] = {}
        for name, weight in checkpoint.weights():
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
        stored = [n for n in stored if n in wanted or not self._is_no_bias(checkpoint, n, shapes)]
        missing = sorted(set(wanted) - set(stored))
        unknown = sorted(set(stored) - set(wanted) - set(optional))
        if missing or unknown:
            problem = f"{missing[0]} is missing" if missing else f"{unknown[0]} is not part of the model"
            raise CheckpointError(f"{where}: {problem}")
        self.dense: dict[str, HostTensor] = {}
        for name, tensor in checkpoint.arrays(stored):
            expected = list((wanted | optional)[name])
            if tensor.shape != expected:
                raise CheckpointError(f"{where}: {name} is {tensor.shape}, but the model wants {expected}")
            if tensor.dtype not in _FLOATS:
                raise CheckpointError(f"{where}: {name} is {tensor.dtype}, but the model wants a floating-point tensor")
            for piece in tensor.pieces(_PIECE):
                if not piece.is_finite():
                    raise CheckpointError(f"{where}: {name} holds NaN or infinity")
                checkpoint.release()
            self.dense[name] = tensor

    def linear(self, name: str) -> Linear[HostTensor, HostWeight]:
        return Linear(self.packed[name] if name in self.packed else self.dense[f"{name}.weight"], self._bias(name))

    @staticmethod
    def _is_no_bias(checkpoint: Checkpoint, name: str, shapes: dict[str, tuple[int, int, bool]]) -> bool:
        """Whether this is a bias of zeros that the model does not have: early GPTQ tools wrote one for every linear."""
        layer = name.removesuffix(".bias")
        if name == layer or layer not in shapes:
            return False
        tensor = checkpoint.array(name)
        return tensor.shape == [shapes[layer][0]] and tensor.dtype in _FLOATS and not tensor.float32().any()

    def _bias(self, name: str) -> HostTensor | None:
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
