"""Open a packed checkpoint as a model whose linears stay packed: no dense copy of a quantized weight ever exists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dq_runtime.environment import resolve_device
from dq_runtime.errors import CheckpointError
from dq_runtime.packing.checkpoint import Checkpoint, open_checkpoint
from dq_runtime.runtime.decoder import DecoderConfig, build_decoder, read_config, read_weights
from dq_runtime.runtime.language_model import LanguageModel, LeanModel
from dq_runtime.runtime.tokenizer import load_tokenizer


def load(
    path: str | Path, device: str = "auto", dtype: torch.dtype | None = None, exact: bool = False
) -> LanguageModel:
    """The model of a packed checkpoint, ready to run: by our own decoder where it knows the architecture, else through
    transformers.

    ``dtype`` is that of activations and unquantized weights: by default float32 on a CPU (whose low-bit kernels
    accumulate in float32 anyway), the checkpoint's own dtype on a GPU. ``exact`` forbids to round activations to less
    than that, which the CPU's decoder otherwise does for speed (int8, one scale per group). Everything is validated
    before the model is built; a bad checkpoint raises :class:`CheckpointError`.
    """
    device = resolve_device(device)
    checkpoint = open_checkpoint(path)
    serving = getattr(torch, str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")), None)
    if dtype is None:
        dtype = torch.float32 if device == "cpu" or not isinstance(serving, torch.dtype) else serving
    config = read_config(checkpoint.config)
    if isinstance(config, DecoderConfig):
        decoder = build_decoder(config, read_weights(checkpoint, config), device, dtype, exact)
        tokenizer = load_tokenizer(checkpoint.path)
        return LeanModel(decoder, _end_tokens(checkpoint), tokenizer, str(checkpoint.path))
    from dq_runtime.runtime.skeleton import load_through_transformers

    return load_through_transformers(checkpoint, device, dtype)


def _end_tokens(checkpoint: Checkpoint) -> Any:
    """``eos_token_id`` of generation_config.json, where chat models list several, else of config.json."""
    file = checkpoint.path / "generation_config.json"
    if not file.exists():
        text = checkpoint.config.get("text_config")
        return (checkpoint.config if text is None else text | checkpoint.config).get("eos_token_id")
    try:
        ends = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as e:
        raise CheckpointError(f"{file} could not be read: {e}") from None
    stated = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(isinstance(end, int) for end in stated):
        raise CheckpointError(f"{file} could not be read: eos_token_id is {ends!r}, expected token ids")
    return ends
