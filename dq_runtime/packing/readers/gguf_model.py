"""What a GGUF file's metadata and tensor names mean: config.json and tensor names as transformers has them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dq_runtime.packing.gguf_file import GgufFile
from dq_runtime.packing.shown import shown

# general.architecture, which is also transformers' model_type -> class.
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Keys of the architecture that are understood below, or say nothing about what is computed.
_KNOWN = {
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "expert_count",
    "expert_used_count",
}
_FREQUENCIES = "rope_freqs.weight"


@dataclass(frozen=True)
class GgufModel:
    """``config`` as in config.json; ``tensors`` transformers' name -> the file's; ``interleaved`` the rows of a head of
    the q and k projections, which are to be put back in order, or 0."""

    config: dict[str, Any]
    tensors: dict[str, str]
    interleaved: int

    def interleaved_rows(self, name: str) -> int:
        """How many rows this tensor must have if they are interleaved, else 0."""
        if not self.interleaved or not re.search(r"\.[qk]_proj\.(weight|bias)$", name):
            return 0
        heads = "num_attention_heads" if ".q_proj." in name else "num_key_value_heads"
        return int(self.config[heads]) * self.interleaved

    def row_order(self, name: str) -> NDArray[np.intp] | None:
        """Which row of the file each row [N] of this tensor is; None where the file has them in order."""
        count = self.interleaved_rows(name)
        if not count:
            return None
        return np.arange(count, dtype=np.intp).reshape(-1, self.interleaved // 2, 2).swapaxes(1, 2).reshape(-1)


class _Refusal(Exception):  # noqa: N818 (an answer, not an error)
    """Carries the reason out of the reader."""


def read_model(file: GgufFile) -> GgufModel | str:
    """The model of a file, or one clause saying why it is not understood."""
    try:
        return _read(file)
    except _Refusal as e:
        return str(e)


def _read(file: GgufFile) -> GgufModel:
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise _Refusal(f"its architecture {shown(architecture)} is not one of {', '.join(ARCHITECTURES)}")
    values = {
        key.removeprefix(f"{architecture}."): value
        for key, value in file.metadata.items()
        if key.startswith(f"{architecture}.")
    }
    if unknown := sorted(set(values) - _KNOWN):
        raise _Refusal(f"its metadata {architecture}.{unknown[0][:100]} is not known")
    if values.get("expert_count"):
        raise _Refusal("it is a mixture of experts")
    tensors = _tensors(file)
    heads = _integer(values, "attention.head_count")
    head_dim = _integer(values, "attention.key_length", _integer(values, "embedding_length") // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if _integer(values, key, head_dim) != head_dim:
            raise _Refusal(f"its {key} is not the size of a head, {head_dim}")
    config = {
        "model_type": architecture,
        "architectures": [ARCHITECTURES[architecture]],
        "hidden_size": _integer(values, "embedding_length"),
        "num_hidden_layers": _integer(values, "block_count"),
        "intermediate_size": _integer(values, "feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": _integer(values, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": _number(values, "attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": _integer(values, "context_length"),
        "vocab_size": file.tensors[tensors["model.embed_tokens.weight"]].shape[0],
        "hidden_act": "silu",
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "rope_parameters": _rope(values, file, head_dim),
        "eos_token_id": _end_tokens(file.metadata),
    }
    if architecture == "llama":
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in tensors
        config["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in tensors
    interleaved = head_dim if architecture == "llama" else 0
    model = GgufModel(config, tensors, interleaved)
    for name, stored in tensors.items():  # before as many rows are allocated as the metadata claims
        rows = model.interleaved_rows(name)
        shape = file.tensors[stored].shape
        if (rows and (shape[0] != rows or head_dim % 2)) or len(shape) > 2:
            raise _Refusal(f"{stored} is {list(shape)}, which does not fit {heads} heads of {head_dim}")
        if len(shape) == 1 and (name.endswith("_proj.weight") or name == "lm_head.weight"):
            raise _Refusal(f"{stored} is {list(shape)}, which is no matrix")
    return model


def _tensors(file: GgufFile) -> dict[str, str]:
    """transformers' name -> the file's."""
    found = {}
    for stored in file.tensors:
        block = re.fullmatch(r"blk\.(0|[1-9]\d{0,5})\.(\w+)\.(weight|bias)", stored, re.ASCII)
        if stored in _TOP:
            found[_TOP[stored]] = stored
        elif block is not None and block[2] in _BLOCK:
            found[f"model.layers.{block[1]}.{_BLOCK[block[2]]}.{block[3]}"] = stored
        elif stored != _FREQUENCIES:
            raise _Refusal(f"its tensor {stored} is not known")
    if "model.embed_tokens.weight" not in found:
        raise _Refusal("it has no token embedding")
    return found


def _rope(values: dict[str, Any], file: GgufFile, head_dim: int) -> dict[str, Any]:
    """The rotation. llama.cpp stores Llama 3's scaling as a factor for every frequency, which is what the config calls
    longrope, without its stretching of the attention."""
    base = {"rope_theta": _number(values, "rope.freq_base", 10000.0)}
    kind = values.get("rope.scaling.type", "none")
    factors = file.tensors.get(_FREQUENCIES)
    if factors is not None:
        if kind != "none" or factors.shape != (head_dim // 2,) or factors.kind != 0:
            raise _Refusal(f"its {_FREQUENCIES} is not {head_dim // 2} float32 factors")
        numbers = np.frombuffer(file.raw(_FREQUENCIES).tobytes(), np.float32)
        if not (np.isfinite(numbers) & (numbers > 0)).all():
            raise _Refusal(f"its {_FREQUENCIES} holds a factor that is not finite and positive")
        context = _integer(values, "context_length")
        return base | {
            "rope_type": "longrope",
            "short_factor": numbers.tolist(),
            "long_factor": numbers.tolist(),
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": context,
        }
    if kind == "none":
        return base | {"rope_type": "default"}
    if kind == "linear":
        return base | {"rope_type": "linear", "factor": _number(values, "rope.scaling.factor")}
    raise _Refusal(f"its rope scaling {shown(kind)} is not known")


def _end_tokens(metadata: dict[str, Any]) -> list[int]:
    """The ids that end a text, or a turn of a conversation."""
    ends = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    return list(dict.fromkeys(end for end in ends if type(end) is int))


def _integer(values: dict[str, Any], key: str, default: int | None = None) -> int:
    value = values.get(key, default)
    if type(value) is not int or not 0 < value < 2**31:
        raise _Refusal(f"its metadata says {key}: {shown(value)} where a positive integer is needed")
    return value


def _number(values: dict[str, Any], key: str, default: float | None = None) -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise _Refusal(f"its metadata says {key}: {shown(value)} where a positive number is needed")
    return float(value)
