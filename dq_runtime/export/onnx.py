"""ONNX for ONNX Runtime: every packed linear a ``MatMulNBits``, built by onnxruntime-genai's model builder.

The builder reads GPTQ and repacks its codes without looking at the values, so the way there is a GPTQ export of ours in
a temporary folder. Left to itself it would also quantize the head and the embedding: they are excluded. Then the graph
is read back, and every MatMulNBits must decode to our weights bit for bit, or nothing is written.

``B`` uint8 [N, G, block * b/8] (the first code in the low bits), ``scales`` [N * G], ``zero_points`` uint8 packed along
G; 4 or 8 bits, blocks of a power of two from 16.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dq_runtime.errors import SpecError
from dq_runtime.export.base import Progress, copy_papers
from dq_runtime.export.gptq import write_gptq
from dq_runtime.packing.checkpoint import Checkpoint
from dq_runtime.spec import options_from

BITS = (4, 8)
GROUPS = (16, 32, 64, 128, 256)
# A matrix of the graph that stands for several linears, one below the other.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_PARTS = {"attn": "self_attn"}


@dataclass(frozen=True)
class Options:
    """``accuracy_level`` of ONNX Runtime's MatMulNBits: 1 multiplies in float32, 4 rounds activations to int8 first."""

    accuracy_level: int = 4

    def __post_init__(self) -> None:
        if self.accuracy_level not in (1, 4):
            raise SpecError(f"accuracy_level must be 1 (float32) or 4 (int8 activations), got {self.accuracy_level}")


class ToONNX:
    """``model.onnx`` with its data, a decoder with past keys and values, and ``genai_config.json``."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options_from(Options, "export format 'onnx'", options)
        for module in ("onnxruntime_genai", "onnx", "onnx_ir"):
            if find_spec(module) is None:
                raise SpecError("exporting to onnx needs onnxruntime-genai: pip install 'dq_runtime[onnx]'")

    def write(self, source: Checkpoint, directory: Path, show: Progress) -> list[str]:
        gptq = directory / ".gptq"
        gptq.mkdir()
        _, widened = write_gptq(source, gptq, 1, BITS, GROUPS, show)
        copy_papers(source.path, gptq, "gptq", [])
        _build(gptq, directory, self.options.accuracy_level)
        shutil.rmtree(gptq)
        _verify(source, directory / "model.onnx")
        notes = ["every MatMulNBits was read back and decodes to the checkpoint's weights, bit for bit"]
        if widened:
            notes.append(f"{widened} layers take the next width that MatMulNBits has (4 or 8 bits)")
        if self.options.accuracy_level == 4:
            notes.append("ONNX Runtime rounds activations to int8 when it multiplies; --set accuracy_level=1 does not")
        return notes


def _build(gptq: Path, directory: Path, accuracy_level: int) -> None:
    """The builder in a process of its own: it prints a line a tensor, and changes global settings of its libraries."""
    options = {
        "accuracy_level": accuracy_level,
        "nodes_to_exclude": "/lm_head/MatMul,/model/embed_tokens/Gather",
        "shared_embeddings": "false",
    }
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(gptq), "-o", str(directory)]
    command += ["-p", "int4", "-e", "cpu", "-c", str(gptq / ".cache")]
    command += ["--extra_options", *(f"{name}={value}" for name, value in options.items())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 or not (directory / "model.onnx").is_file():
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise SpecError(f"onnxruntime-genai's model builder could not build this model: {lines[-1]}")


def _verify(source: Checkpoint, file: Path) -> None:
    """Every MatMulNBits of the graph against the weights it stands for; :class:`SpecError` for any difference."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(file)).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    weights = dict(source.packed())
    left = set(weights)
    for node in graph.node:
        if node.op_type != "MatMulNBits":
            continue
        names = [name for name in _linears(node.name) if name in weights]
        if not names:
            raise SpecError(
                f"the model builder quantized {node.name}, which is dense in the checkpoint; nothing is written"
            )
        attributes = {a.name: a.i for a in node.attribute}
        tensors = [numpy_helper.to_array(stored[name]) for name in node.input[1:4] if name]
        decoded = _decode(attributes, *tensors)
        if not torch.equal(decoded, torch.cat([weights[name].decode() for name in names])):
            raise SpecError(f"the model builder changed the weights of {node.name}; nothing is written")
        left -= set(names)
    if left:
        raise SpecError(f"the model builder left {min(left)} out of the graph; nothing is written")


def _linears(node: str) -> list[str]:
    """``/model/layers.0/attn/qkv_proj/MatMulNBits`` -> the names of our linears behind it, in order."""
    *parents, leaf = node.strip("/").removesuffix("/MatMulNBits").split("/")
    prefix = ".".join(_PARTS.get(part, part) for part in parents)
    return [f"{prefix}.{name}" if prefix else name for name in _FUSED.get(leaf, (leaf,))]


def _decode(attributes: Mapping[str, int], codes: Any, scales: Any, zeros: Any = None) -> Tensor:
    """The values of a MatMulNBits, float32 [N, K]."""
    n, k, bits, block = (attributes[name] for name in ("N", "K", "bits", "block_size"))
    groups = -(-k // block)
    q = _fields(codes.reshape(n, groups, -1), bits)[..., :block].astype(np.float32)
    zero = np.float32(2 ** (bits - 1))
    if zeros is not None:
        zero = _fields(zeros.reshape(n, -1), bits)[:, :groups, None].astype(np.float32)
    values = (q - zero) * scales.reshape(n, groups, 1).astype(np.float32)
    return torch.from_numpy(values.reshape(n, -1)[:, :k].copy())


def _fields(values: Any, bits: int) -> Any:
    """uint8 [..., m] -> codes [..., m * 8/bits], the first in the low bits."""
    if bits == 8:
        return values
    return np.stack([values & 15, values >> 4], -1).reshape(*values.shape[:-1], -1)
