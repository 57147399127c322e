"""What the engines can load and on which kernel: facts alone, with the version whose source they were read in.

vLLM 0.33.0: ``_POSSIBLE_KERNELS`` of vllm/model_executor/kernels/linear/__init__.py (the order in which kernels are
asked), each kernel's ``can_implement`` in kernels/linear/mixed_precision/, and
layers/quantization/compressed_tensors/schemes/compressed_tensors_wNa16.py (bits 2 to 8, symmetric or not, groups or
whole rows; activation order is rejected). It was read, not run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dq_runtime.allocation import group_layers
from dq_runtime.spec import PER_ROW

VLLM = "vLLM 0.33.0"
TRANSFORMERS = "transformers 5.23.0 with compressed-tensors 0.20.0"
LLAMA_CPP = "llama-cpp-python 0.3.36, of which a model exported to gguf was run"
ONNXRUNTIME = "onnxruntime 1.32.0, of which a model exported to onnx was run"
MLX = "mlx 0.32.4 and mlx-lm 0.32.2 (mx.quantize: bits and group_size of mode affine)"

ROW_PARALLEL = re.compile(r"\.(o_proj|down_proj|w2|out_proj|dense|fc2|c_proj)$")


@dataclass(frozen=True)
class Kernel:
    """When a vLLM kernel takes a layer: ``grids`` are (bits, symmetric); ``groups`` None for any; the part of a layer
    on one rank must be [multiple of ``n``, multiple of ``k``]; ``dtype`` "" for any 16-bit activations."""

    name: str
    grids: frozenset[tuple[int, bool]]
    groups: tuple[int, ...] | None
    n: int = 1
    k: int = 1
    dtype: str = ""
    rows: bool = True  # whether one scale a row is taken


_W4 = frozenset({(4, True), (4, False)})
_W4_W8 = frozenset((bits, symmetric) for bits in (4, 8) for symmetric in (True, False))
_ANY = frozenset((bits, symmetric) for bits in range(2, 9) for symmetric in (True, False))
_MARLIN = Kernel("Marlin", frozenset({(4, True), (8, True), (4, False)}), (32, 64, 128, PER_ROW))
_EXLLAMA = Kernel("Exllama", frozenset({(4, True), (8, True)}), None, n=8, dtype="float16", rows=False)
_TRITON = Kernel("Triton W4A16", _W4, (32, 64, 128, 256, PER_ROW), n=8)
_HUMMING = Kernel("Humming", _ANY, None)
# Platform -> kernels in the order in which vLLM asks them. Conch comes before Exllama, but only where its package is.
KERNELS: dict[str, tuple[Kernel, ...]] = {
    "Hopper": (
        Kernel("Machete", _W4_W8, (64, 128, PER_ROW), n=128, k=64),
        _MARLIN,
        _EXLLAMA,
        _TRITON,
        _HUMMING,
    ),
    "other CUDA (sm_75+)": (_MARLIN, _EXLLAMA, _TRITON, _HUMMING),
    "CPU": (Kernel("CPUWNA16", _W4, None, n=32, k=32),),
}


@dataclass(frozen=True)
class Reader:
    """An engine that reads an export: ``bits`` and ``groups`` it takes as they are or exactly refitted, how the codes
    run there, and the command that writes what it reads."""

    version: str
    bits: tuple[int, ...]
    groups: tuple[int, ...]
    form: str


READERS: dict[str, Reader] = {
    "llama.cpp": Reader(LLAMA_CPP, (4, 8), (32,), "gguf"),
    "onnxruntime": Reader(ONNXRUNTIME, (4, 8), (16, 32, 64, 128, 256), "onnx"),
    "mlx": Reader(MLX, (2, 3, 4, 5, 6, 8), (32, 64, 128), "mlx"),
}
ENGINES = ("vllm", "transformers", *READERS)


def fused_groups(names: Sequence[str]) -> list[list[str]]:
    """Layers that vLLM runs as one matrix, each list in the order of ``names``."""
    return list(group_layers(names, fused=True).values())


def input_shards(name: str) -> bool:
    """Whether tensor parallelism splits the inputs of this layer (the others' outputs are split)."""
    return ROW_PARALLEL.search(name) is not None
