"""Formats of checkpoints, one file each. A reader is a function of a path that gives a
:class:`dq_runtime.packing.checkpoint.Checkpoint`, lossless: codes, scales and zero points are carried over as they are,
and a layer that our grids cannot hold is dequantized with a note, never rounded again.

A directory says its format in ``quantization_config.quant_method``, a file in its first bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dq_runtime.errors import CheckpointError
from dq_runtime.packing.atomic import TOGETHER, unfinished_by
from dq_runtime.packing.checkpoint import Checkpoint, NotPackedError
from dq_runtime.packing.directory import read_json, stored_scheme, tensor_files, verify_sums
from dq_runtime.packing.quant_config import OWN_METHOD
from dq_runtime.packing.shown import shown
from dq_runtime.registry import Registry

# Name of the format -> function (path, config, scheme) of a directory, or (path) of a file.
READERS = Registry(
    "checkpoint format",
    {
        "compressed-tensors": "dq_runtime.packing.readers.compressed_tensors:open_compressed_tensors",
        "gptq": "dq_runtime.packing.readers.gptq:open_gptq",
        "awq": "dq_runtime.packing.readers.awq:open_awq",
        "gguf": "dq_runtime.packing.readers.gguf:open_gguf",
    },
)
GGUF_MAGIC = b"GGUF"
_PACKED = (".weight_packed", ".qweight")


def format_of(scheme: dict[str, Any], where: str) -> str:
    """The member of :data:`READERS` for what a config says about quantization."""
    method = scheme.get("quant_method")
    if method == OWN_METHOD:  # ours, in a model that other readers of compressed-tensors cannot serve
        return "compressed-tensors"
    if method in ("auto-round", "intel/auto-round"):
        return "awq" if "awq" in str(scheme.get("packing_format")) else "gptq"
    if method in ("compressed-tensors", "gptq", "awq"):
        return str(method)
    raise CheckpointError(
        f"{where}: quant_method {shown(method)} is not read here, only compressed-tensors, gptq, awq and auto-round; "
        "give the original model, or one of these"
    )


def reader_of(path: Path) -> Checkpoint:
    """What :func:`dq_runtime.packing.checkpoint.open_checkpoint` says."""
    if path.is_file():
        with path.open("rb") as f:
            if f.read(4) != GGUF_MAGIC:
                raise CheckpointError(f"{path} is a file but not a GGUF; give a directory or a .gguf file")
        open_file: Callable[[Path], Checkpoint] = READERS.get("gguf")
        return open_file(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory or a file; give one that holds a model, or a hub name")
    if unfinished_by(path) not in (None, os.getpid(), *TOGETHER):
        raise CheckpointError(f"{path} is what a killed run left of its output; resume that run, or delete it")
    verify_sums(path)
    config = read_json(path / "config.json")
    scheme = stored_scheme(path, config)
    if scheme is None:
        for name in tensor_files(path):
            if name.endswith(_PACKED):
                raise CheckpointError(f"{path}: {name} is packed, but config.json has no quantization_config")
        raise NotPackedError(f"{path / 'config.json'} has no quantization_config; it is not a packed checkpoint")
    open_directory: Callable[[Path, dict[str, Any], dict[str, Any]], Checkpoint]
    open_directory = READERS.get(format_of(scheme, str(path / "config.json")))
    return open_directory(path, config, scheme)
