"""Open a checkpoint of any format as a model whose packed linears stay packed: no dense copy of them ever exists. What
no reader keeps packed (an unquantized directory, say) runs dense through transformers, and a note says so.

:func:`load` gives a model of torch tensors. Text alone needs none: where the native decoder runs the model,
:func:`load_for_text` gives one of numpy arrays, and torch, whose import takes 2 s and 200 MB, is never imported.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dq_runtime.backends.cpu_prepared import native
from dq_runtime.errors import CheckpointError
from dq_runtime.packing.checkpoint import Checkpoint, NotPackedError, open_checkpoint
from dq_runtime.packing.directory import read_json
from dq_runtime.packing.shown import shown
from dq_runtime.runtime.decoder import (
    DecoderConfig,
    HostWeights,
    build_decoder,
    read_config,
    read_weights,
    requested_decoder,
)
from dq_runtime.runtime.decoder.native_decoder import NativeDecoder
from dq_runtime.runtime.hub import local_path
from dq_runtime.runtime.language_model import LanguageModel, LeanModel
from dq_runtime.runtime.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import torch

AMD_DEVICE = Path("/dev/kfd")


def load(
    path: str | Path | Checkpoint, device: str = "auto", dtype: torch.dtype | None = None, exact: bool = False
) -> LanguageModel:
    """The model of a checkpoint, ready to run: by our own decoder where it knows the architecture, else through
    transformers. ``path`` is a directory, a .gguf file, or a hub name, which is fetched first; or a checkpoint that is
    open already, whose files are not hashed a second time.

    ``dtype`` is that of activations and unquantized weights: by default float32 on a CPU (whose low-bit kernels
    accumulate in float32 anyway), the checkpoint's own dtype on a GPU. ``exact`` forbids to round activations to less
    than that, which the CPU's decoder otherwise does for speed (int8, one scale per group). Everything is validated
    before the model is built; a bad checkpoint raises :class:`CheckpointError`.
    """
    from dq_runtime.environment import resolve_device

    device = resolve_device(device)
    checkpoint = _open(path)
    if isinstance(checkpoint, tuple):
        return _dense(*checkpoint, device, dtype)
    config = read_config(checkpoint.config)
    weights = read_weights(checkpoint, config) if isinstance(config, DecoderConfig) else None
    return _on_torch(checkpoint, config, weights, device, dtype, exact)


def load_for_text(path: str | Path | Checkpoint, device: str = "auto", exact: bool = False) -> LanguageModel:
    """As :func:`load`, for callers that want text and not tensors: a model of numpy arrays, in a process without torch,
    wherever the native decoder would run it; else what :func:`load` gives."""
    if torch_is_wanted(device) is not None:
        return load(path, device, exact=exact)
    checkpoint = _open(path)
    if isinstance(checkpoint, tuple):
        from dq_runtime.environment import resolve_device

        return _dense(*checkpoint, resolve_device(device), None)
    config = read_config(checkpoint.config)
    if not isinstance(config, DecoderConfig):
        return _on_torch(checkpoint, config, None, "cpu", None, exact)
    weights = read_weights(checkpoint, config)
    if NativeDecoder.refusal(config, weights, exact) is not None:
        return _on_torch(checkpoint, config, weights, "cpu", None, exact)
    return _lean(checkpoint, NativeDecoder(config, weights, exact, checkpoint.release))


def _open(path: str | Path | Checkpoint) -> Checkpoint | tuple[Path, NotPackedError]:
    """The checkpoint, its notes passed on; or what is to be run dense, and why."""
    if isinstance(path, Checkpoint):
        checkpoint = path
    else:
        found = local_path(path)
        try:
            checkpoint = open_checkpoint(found)
        except NotPackedError as reason:
            return found, reason
    for sentence in checkpoint.notes:
        _note(f"{checkpoint.path}: {sentence}")
    return checkpoint


def _dense(path: Path, reason: NotPackedError, device: str, dtype: torch.dtype | None) -> LanguageModel:
    """An unquantized model, or one that only transformers knows, in float32 unless ``dtype`` is given."""
    from dq_runtime.runtime.dense import load_dense

    model = load_dense(str(path), device)
    if dtype is not None:
        model.model.to(dtype)
    _note(f"{reason}, so it runs dense, through transformers")
    return model


def _note(sentence: str) -> None:
    """To the log, which unless it was configured is standard error."""
    import logging

    logging.getLogger("dq").warning("note: %s", sentence)


def torch_is_wanted(device: str) -> str | None:
    """Why text on ``device`` is generated with torch whatever the checkpoint, in one clause; None if it need not be."""
    if requested_decoder() not in (None, "native"):
        return f"DQ_DECODER={requested_decoder()} asks for it"
    if (os.environ.get("DQ_BACKEND") or "native") != "native":
        return f"DQ_BACKEND={os.environ['DQ_BACKEND']} asks for other kernels"
    try:
        native()
    except ImportError as error:
        return f"the C++ extension dq_runtime._native is not built ({error})"
    if device == "cpu":
        return None
    if device != "auto":
        return f"device {device} was asked for"
    return "there may be a GPU" if _may_have_gpu() else None


def _may_have_gpu() -> bool:
    """False where torch could find no GPU: no driver library of NVIDIA's, no device of AMD's, or all hidden."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    if AMD_DEVICE.exists():
        return True
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return False
    return True


def _on_torch(
    checkpoint: Checkpoint,
    config: DecoderConfig | str,
    weights: HostWeights | None,
    device: str,
    dtype: torch.dtype | None,
    exact: bool,
) -> LanguageModel:
    """The model of a checkpoint that was opened, of whatever was read of it already."""
    import torch

    serving = getattr(torch, str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")), None)
    if dtype is None:
        dtype = torch.float32 if device == "cpu" or not isinstance(serving, torch.dtype) else serving
    if isinstance(config, DecoderConfig) and weights is not None:
        return _lean(checkpoint, build_decoder(config, weights, device, dtype, exact))
    from dq_runtime.runtime.skeleton import load_through_transformers

    return load_through_transformers(checkpoint, device, dtype)


def _lean(checkpoint: Checkpoint, decoder: Any) -> LeanModel:
    return LeanModel(decoder, _end_tokens(checkpoint), load_tokenizer(checkpoint.path), str(checkpoint.path))


def _end_tokens(checkpoint: Checkpoint) -> list[int]:
    """``eos_token_id`` of generation_config.json, where chat models list several, else of config.json."""
    file = checkpoint.path / "generation_config.json"
    if file.exists():
        ends = read_json(file).get("eos_token_id")
    else:
        text = checkpoint.config.get("text_config")
        ends = ((text if isinstance(text, dict) else {}) | checkpoint.config).get("eos_token_id")
        file = checkpoint.path / "config.json"
    stated = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(end) is int for end in stated):
        raise CheckpointError(f"{file} could not be read: eos_token_id is {shown(ends)}, expected token ids")
    return stated
