"""GGUF, what llama.cpp and everything built on it reads: one file with weights, tokenizer and chat template.

Packed linears become Q4_0, Q4_1 or Q8_0 blocks (see ``gguf_blocks.py``), vectors float32, other matrices float16 where
that is exact, else bfloat16 or float32. llama.cpp rotates neighbouring pairs where Hugging Face rotates halves, so in
its ``llama`` architecture the rows of q and k are reordered head by head.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_runtime.errors import SpecError
from dq_runtime.export.base import Progress, model_config
from dq_runtime.export.exact import smallest
from dq_runtime.export.gguf_blocks import Rows, blocks_of
from dq_runtime.export.gguf_tokenizer import add_tokenizer
from dq_runtime.packing import PackedWeight
from dq_runtime.packing.checkpoint import Checkpoint
from dq_runtime.runtime.decoder import DecoderConfig, read_config
from dq_runtime.runtime.decoder.rope import Llama3Scaling, LongRopeScaling
from dq_runtime.runtime.dense import licence_of
from dq_runtime.spec import options_from

# Hugging Face's model_type -> llama.cpp's architecture.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# Names of ggml's file types that are not MOSTLY_ and the type of most tensors.
_FILE_TYPES = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"}


@dataclass(frozen=True)
class Options:
    """``weights`` packed, or float32: the same values multiplied out, which llama.cpp multiplies without rounding
    activations to 8 bits, and from which llama-quantize makes its other types."""

    weights: str = "packed"

    def __post_init__(self) -> None:
        if self.weights not in ("packed", "float32"):
            raise SpecError(f"weights must be packed or float32, got {self.weights!r}")


class ToGGUF:
    """``NAME.gguf``, the name being that of the checkpoint."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options_from(Options, "export format 'gguf'", options)
        if find_spec("gguf") is None:
            raise SpecError("exporting to gguf needs the gguf package: pip install 'dq_runtime[gguf]'")

    def write(self, source: Checkpoint, directory: Path, show: Progress) -> list[str]:
        import gguf

        config = read_config(model_config(source))
        if not isinstance(config, DecoderConfig) or config.model_type not in ARCHITECTURES:
            why = config if isinstance(config, str) else f"its architecture {config.model_type!r} is not one of them"
            raise SpecError(f"only {', '.join(ARCHITECTURES)} models are exported to gguf so far, and {why}")
        if any(layer.window is not None and layer.window < config.context_length for layer in config.layers):
            raise SpecError("the model attends in a sliding window, which this export cannot tell llama.cpp")
        architecture = ARCHITECTURES[config.model_type]
        name = source.path.resolve().name
        writer = gguf.GGUFWriter(directory / f"{name}.gguf", architecture)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], len(config.layers))
        encode = blocks_of if self.options.weights == "packed" else _multiplied_out
        kinds = _write_tensors(writer, names, source, config, architecture, encode, show)
        self._metadata(writer, source, config, name, kinds)
        add_tokenizer(writer, source.path, config.vocab)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        counted = ", ".join(f"{count} layers {kind}" for kind, count in sorted(kinds.items()))
        notes = [f"every weight is exact: {counted}"]
        if self.options.weights == "packed":
            notes.append("llama.cpp rounds activations to 8 bits when it multiplies these")
        return notes

    def _metadata(
        self, writer: Any, source: Checkpoint, config: DecoderConfig, name: str, kinds: Mapping[str, int]
    ) -> None:
        import gguf

        rope = config.layers[0].rope
        writer.add_type("model")
        writer.add_name(name)
        licence = licence_of(str(source.path))
        if licence is not None:
            writer.add_license(licence)
        writer.add_vocab_size(config.vocab)
        writer.add_context_length(config.context_length)
        writer.add_embedding_length(config.hidden)
        writer.add_block_count(len(config.layers))
        writer.add_feed_forward_length(config.intermediate)
        writer.add_head_count(config.heads)
        writer.add_head_count_kv(config.kv_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_layer_norm_rms_eps(config.eps)
        writer.add_rope_freq_base(rope.theta)
        writer.add_rope_dimension_count(rope.dim)
        if isinstance(rope.scaling, LongRopeScaling):
            raise SpecError("longrope is not exported to gguf")
        if isinstance(rope.scaling, float) and rope.scaling != 1.0:
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope.scaling)
        most = max(kinds, key=lambda kind: kinds[kind])
        writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES.get(most, f"MOSTLY_{most}")))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _write_tensors(
    writer: Any,
    names: Any,
    source: Checkpoint,
    config: DecoderConfig,
    architecture: str,
    encode: Callable[[str, PackedWeight, Rows], tuple[str, NDArray[Any]]],
    show: Progress,
) -> Counter[str]:
    """All tensors under llama.cpp's names; how many linears took which type."""
    import gguf

    rope = config.layers[0].rope
    if isinstance(rope.scaling, Llama3Scaling):
        plain = 1 / np.power(np.float32(rope.theta), np.arange(0, rope.dim, 2, dtype=np.float32) / rope.dim)
        divisors = plain / rope.frequencies(config.context_length)
        writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
    for name, tensor in source.read(list(source.dense)):
        values, kind = _dense(tensor)
        rows = _rows(name.rpartition(".")[0], config, architecture)
        writer.add_tensor(_name(names, name), values if rows is None else values[rows], raw_dtype=kind)
    kinds: Counter[str] = Counter()
    for i, (name, w) in enumerate(source.packed(), 1):
        kind, blocks = encode(name, w, _rows(name, config, architecture))
        writer.add_tensor(_name(names, f"{name}.weight"), blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
        kinds[kind] += 1
        show(i, len(source.layers))
    return kinds


def _multiplied_out(name: str, w: PackedWeight, rows: Rows) -> tuple[str, NDArray[Any]]:
    """As :func:`blocks_of`, in float32, which is exact."""
    values = w.decode().numpy()
    return "F32", values if rows is None else values[rows]


def _name(names: Any, name: str) -> str:
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise SpecError(f"llama.cpp's architecture has no place for {name}; this model cannot be exported to gguf")
    return str(found)


def _rows(layer: str, config: DecoderConfig, architecture: str) -> Rows:
    """The order of the rows of q and k where pairs are neighbours; None for what stays as it is."""
    found = re.search(r"\.self_attn\.([qk])_proj$", layer)
    if architecture != "llama" or found is None:
        return None
    heads = config.heads if found[1] == "q" else config.kv_heads
    order = np.arange(heads * config.head_dim).reshape(heads, 2, config.head_dim // 2)
    return order.swapaxes(1, 2).reshape(-1)


def _dense(tensor: Tensor) -> tuple[NDArray[Any], Any]:
    """An unquantized tensor for the writer, and its ggml type."""
    import gguf

    if tensor.ndim == 1:
        return tensor.float().numpy(), gguf.GGMLQuantizationType.F32
    fits = smallest(tensor, (torch.float16, torch.bfloat16, torch.float32))
    if fits.dtype is torch.bfloat16:
        return fits.contiguous().view(torch.uint8).numpy(), gguf.GGMLQuantizationType.BF16
    kind = gguf.GGMLQuantizationType.F16 if fits.dtype is torch.float16 else gguf.GGMLQuantizationType.F32
    return fits.numpy(), kind
