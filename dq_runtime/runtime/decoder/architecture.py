"""config.json -> what a decoder must compute, or the reason why it cannot.

Knows the Llama family by its Hugging Face ``model_type``: llama, mistral, qwen2, qwen3, phi3, gemma2, gemma3_text, and
the text half of gemma3. Reads the keys of transformers 4 (``rope_theta``, ``rope_scaling``, ``torch_dtype``) and of
transformers 5 (``rope_parameters``, ``layer_types``, ``dtype``). What is not known is refused, never guessed: a wrong
rotation still produces fluent text.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from dq_runtime.runtime.decoder.rope import Llama3Scaling, LongRopeScaling, Rope

# Defaults of transformers' config classes for keys that published checkpoints leave out.
_GEMMA = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh",
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4096},
    "qwen2": {"sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
    "phi3": {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    "gemma2": _GEMMA
    | {"vocab_size": 256000, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    | {"max_position_embeddings": 8192, "sliding_window_pattern": 2},
    "gemma3_text": _GEMMA | {"vocab_size": 262208, "max_position_embeddings": 131072, "sliding_window_pattern": 6},
}
_MOST_LAYERS = 10_000
_NULL_IS_OFF = {"sliding_window", "attn_logit_softcapping", "final_logit_softcapping"}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
_ROPE_KEYS = {
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "short_factor",
    "long_factor",
    "attention_factor",
}


@dataclass(frozen=True)
class LayerConfig:
    """What differs from layer to layer. A query sees the last ``window`` positions, itself included; None: all."""

    window: int | None
    rope: Rope


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer of the Llama family, all its choices made explicit.

    One layer, with n() = RMSNorm (weight stored minus one where ``norm_plus_one``), x the residual stream [M, hidden]:

        q, k, v = qkv(n(x));  with ``qk_norm`` q and k are normalised per head;  q, k rotated by the layer's rope
        scores  = cap(attention_scale * q @ k, attention_softcap)             cap(s, c) = c * tanh(s / c), None: s
        x += m(o(softmax(scores) @ v));  gate, up = gate_up(n(x));  x += m(down(activation(gate) * up))

    where m is a further norm with ``sandwich_norms`` and the identity without. Before the first layer
    x = embedding[token] * embedding_scale; after the last, logits = cap(head(n(x)), logit_softcap).
    """

    model_type: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    layers: tuple[LayerConfig, ...]
    eps: float
    activation: str  # "silu" or "gelu_tanh"
    norm_plus_one: bool
    sandwich_norms: bool
    qk_norm: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    fused: bool  # the checkpoint holds qkv_proj and gate_up_proj instead of their parts
    tied_head: bool
    attention_scale: float
    attention_softcap: float | None
    logit_softcap: float | None
    embedding_scale: float
    context_length: int
    nested: bool  # the text half of a model that also has others, its tensors under a longer prefix


class _Refusal(Exception):  # noqa: N818 (an answer, not an error)
    """Carries the reason out of the reader."""


def read_config(config: Mapping[str, Any]) -> DecoderConfig | str:
    """The decoder that config.json describes, or one clause saying why it is not one of ours (for a message such as
    "the lean decoder cannot run this model: ...")."""
    try:
        return _read(config)
    except _Refusal as e:
        return str(e)


def _read(config: Mapping[str, Any]) -> DecoderConfig:
    model_type = config.get("model_type")
    nested = model_type == "gemma3"
    if nested:
        text = config.get("text_config")
        if not isinstance(text, Mapping):
            raise _Refusal("gemma3 has no text_config")
        inherited = {k: config[k] for k in ("tie_word_embeddings", "architectures") if k in config}
        config, model_type = {**text, **inherited}, "gemma3_text"
    if not isinstance(model_type, str) or model_type not in _DEFAULTS:
        raise _Refusal(f"its architecture {model_type!r} is not one of {', '.join(_DEFAULTS)}")
    names = config.get("architectures") or []
    wanted = ("ForCausalLM", "ForConditionalGeneration") if nested else ("ForCausalLM",)
    if not isinstance(names, list) or not all(isinstance(n, str) and n.endswith(wanted) for n in names):
        raise _Refusal(f"{names} is not a causal LM")
    if config.get("use_bidirectional_attention"):
        raise _Refusal("it attends in both directions")
    # null is "use the default" for most keys, and "off" for the few whose default is not off.
    c = _Keys({**_DEFAULTS[model_type], **{k: v for k, v in config.items() if v is not None or k in _NULL_IS_OFF}})

    heads = c.integer("num_attention_heads")
    kv_heads = c.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise _Refusal(f"{heads} heads are not a multiple of {kv_heads} key-value heads")
    hidden = c.integer("hidden_size")
    head_dim = c.integer("head_dim", hidden // heads)
    gemma = model_type.startswith("gemma")
    attention_bias = model_type in ("llama", "qwen3", "gemma2", "gemma3_text") and c.flag("attention_bias")
    attention_softcap = c.optional("attn_logit_softcapping") if gemma else None
    if model_type == "gemma3_text" and attention_softcap is not None:
        raise _Refusal("gemma3 with attn_logit_softcapping: implementations disagree whether it applies")
    activation = c.get("hidden_activation" if gemma and "hidden_activation" in c.values else "hidden_act", "silu")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise _Refusal(f"its activation {activation!r} is not one of {', '.join(_ACTIVATIONS)}")
    return DecoderConfig(
        model_type=model_type,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=c.integer("intermediate_size"),
        vocab=c.integer("vocab_size"),
        layers=_layers(model_type, c, head_dim),
        eps=c.number("rms_norm_eps", 1e-6),
        activation=_ACTIVATIONS[activation],
        norm_plus_one=gemma,
        sandwich_norms=gemma,
        qk_norm=model_type in ("qwen3", "gemma3_text"),
        qkv_bias=attention_bias or model_type == "qwen2",
        o_bias=attention_bias,
        mlp_bias=model_type == "llama" and c.flag("mlp_bias"),
        fused=model_type == "phi3",
        tied_head=c.flag("tie_word_embeddings"),
        attention_scale=(c.number("query_pre_attn_scalar") if gemma else head_dim) ** -0.5,
        attention_softcap=attention_softcap,
        logit_softcap=c.optional("final_logit_softcapping") if gemma else None,
        embedding_scale=math.sqrt(hidden) if gemma else 1.0,
        context_length=c.integer("max_position_embeddings"),
        nested=nested,
    )


class _Keys:
    """Typed access to the keys of a JSON object."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise _Refusal(f"config.json says {key}: {value!r} where a positive integer is needed")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if not _is_positive(value):
            raise _Refusal(f"config.json says {key}: {value!r} where a positive number is needed")
        return float(value)

    def optional(self, key: str) -> float | None:
        """A positive number, or None where there is none."""
        return None if self.values.get(key) is None else self.number(key)

    def flag(self, key: str) -> bool:
        return bool(self.values.get(key, False))


def _is_positive(value: Any) -> TypeGuard[int | float]:
    """Whether this is a positive number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _layers(model_type: str, c: _Keys, head_dim: int) -> tuple[LayerConfig, ...]:
    count = c.integer("num_hidden_layers")
    if count > _MOST_LAYERS:
        raise _Refusal(f"config.json says num_hidden_layers: {count}")
    window = _window(model_type, c)
    types = c.get("layer_types")
    if types is not None and not (
        isinstance(types, list) and len(types) == count and all(isinstance(t, str) for t in types)
    ):
        raise _Refusal(f"layer_types does not list {count} layers")
    if model_type in ("mistral", "phi3", "llama"):  # one kind of layer, whatever layer_types says
        kind = "full_attention" if window is None else "sliding_attention"
        if types is not None and set(types) != {kind}:
            raise _Refusal(f"{model_type} with layer_types of its own")
        types = [kind] * count
    elif types is None and model_type.startswith("qwen"):
        first = c.get("max_window_layers")
        if not isinstance(first, int):
            raise _Refusal(f"config.json says max_window_layers: {first!r} where an integer is needed")
        types = ["sliding_attention" if window and i >= first else "full_attention" for i in range(count)]
    elif types is None:
        pattern = c.integer("sliding_window_pattern")
        types = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(count)]
    unknown = {str(t) for t in types} - {"full_attention", "sliding_attention"}
    if unknown:
        raise _Refusal(f"its layer type {min(unknown)!r} is not known")
    if window is None and "sliding_attention" in types:
        raise _Refusal("it has sliding layers, but no sliding_window")
    ropes = {kind: _rope(model_type, kind, c, head_dim) for kind in set(types)}
    return tuple(LayerConfig(window if kind == "sliding_attention" else None, ropes[kind]) for kind in types)


def _window(model_type: str, c: _Keys) -> int | None:
    if model_type == "llama" or (model_type.startswith("qwen") and not c.flag("use_sliding_window")):
        return None
    return None if c.get("sliding_window") is None else c.integer("sliding_window")


def _rope(model_type: str, kind: str, c: _Keys, head_dim: int) -> Rope:
    """The rotation of the layers of one kind; both generations of keys end up in one dict first."""
    given = c.get("rope_scaling") or c.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise _Refusal(f"its rope parameters {given!r} are not an object")
    p = dict(given)
    theta = c.get("rope_theta", 10000.0)
    if model_type == "gemma3_text":  # two kinds of layers, each with its own base; scaling is for the full ones
        nested = c.get("rope_parameters") or {}
        local = kind == "sliding_attention"
        theta = c.get("rope_local_base_freq", 10000.0) if local else c.get("rope_theta", 1000000.0)
        p = dict(nested.get(kind) or {})
        if nested and not set(nested) <= {"full_attention", "sliding_attention"}:
            raise _Refusal("gemma3 whose rope_parameters are not given by layer type")
        if not local:
            p |= c.get("rope_scaling") or {}
    p = {k: v for k, v in p.items() if v is not None}
    unknown = set(p) - _ROPE_KEYS
    if unknown:
        raise _Refusal(f"its rope parameter {min(unknown)!r} is not known")
    keys = _Keys(p)
    base = keys.number("rope_theta", theta)
    partial = keys.number("partial_rotary_factor", c.get("partial_rotary_factor", 1.0))
    if partial != 1.0 and model_type != "phi3":
        raise _Refusal(f"{model_type} that rotates only a part of each head")
    dim = int(head_dim * partial)
    if dim % 2 or not 0 < dim <= head_dim:
        raise _Refusal(f"{dim} rotated values of a head of {head_dim}")
    rope_type = p.get("rope_type", p.get("type", "default"))
    if model_type == "phi3" and rope_type in ("su", "yarn"):  # names of longrope in early Phi-3 checkpoints
        rope_type = "longrope"
    return Rope(dim, base, _scaling(rope_type, keys, c, dim))


def _scaling(rope_type: Any, p: _Keys, c: _Keys, dim: int) -> float | Llama3Scaling | LongRopeScaling:
    if rope_type == "default":
        return 1.0
    if rope_type == "linear":
        return p.number("factor")
    context = c.integer("max_position_embeddings")
    original = c.get("original_max_position_embeddings") or p.integer("original_max_position_embeddings", context)
    if rope_type == "llama3":
        return Llama3Scaling(p.number("factor"), p.number("low_freq_factor"), p.number("high_freq_factor"), original)
    if rope_type == "longrope":
        sets = [p.get("short_factor"), p.get("long_factor")]
        if not all(isinstance(s, list) and len(s) == dim // 2 and all(map(_is_positive, s)) for s in sets):
            raise _Refusal(f"longrope needs {dim // 2} short and long factors, positive numbers")
        short, long = (tuple(float(f) for f in s) for s in sets)
        stretch = p.number("factor", context / original)
        default = 1.0 if stretch <= 1.0 or original <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))
        return LongRopeScaling(short, long, original, p.number("attention_factor", default))
    raise _Refusal(f"its rope type {rope_type!r} is not known")
