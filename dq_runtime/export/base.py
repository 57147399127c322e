"""The contract of an export format, and the papers that travel with every one. Shapes: N = out_features,
K = in_features, G = K / group_size."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from dq_runtime._version import __version__
from dq_runtime.errors import SpecError
from dq_runtime.packing.checkpoint import Checkpoint

# What a model needs besides weights and config.json, and what its licence asks to be passed on.
PAPERS = (
    "tokenizer*",
    "*.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    "COPYING*",
)
QUANTIZER = f"dq_runtime:{__version__}"


class Progress(Protocol):
    """Called once a layer."""

    def __call__(self, step: int, total: int, **figures: float) -> None: ...


class Exporter(Protocol):
    """A format is built from its options; unknown options raise :class:`SpecError`."""

    def __init__(self, options: Mapping[str, Any]) -> None: ...

    def write(self, source: Checkpoint, directory: Path, show: Progress) -> list[str]:
        """Write everything but the papers into the empty ``directory``; return notes for the user, one sentence each.
        Raises :class:`SpecError` for a value that the format cannot hold, naming the layer and what would fit."""
        ...


def copy_papers(source: Path, directory: Path, form: str, notes: list[str]) -> None:
    """Tokenizer, chat template, generation config and licences of a checkpoint directory, and its model card with a
    section on the export. ``form`` is the format's name. A source that is one file has no such files beside it."""
    if not source.is_dir():
        return
    for pattern in PAPERS:
        for file in source.glob(pattern):
            shutil.copy(file, directory / file.name)
    card = source / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {source.resolve().name}\n"
    lines = "".join(f"- {note}\n" for note in notes)
    section = f"\n## Export\n\nWritten in the {form} format by dq_runtime {__version__}.\n\n{lines}"
    (directory / "README.md").write_text(text.rstrip("\n") + "\n" + section, encoding="utf-8")


def model_config(source: Checkpoint) -> dict[str, Any]:
    """The config of the model itself, without what says how it is stored.

    transformers 5 keeps the rotation under ``rope_parameters``. Readers that know transformers 4's keys alone (mlx-lm
    0.32) would rotate by a base of 10000 without a word: on SmolLM2, whose base is 100000, a KL of 0.22. So both are
    written.
    """
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping) and "rope_theta" in rope and "rope_theta" not in config:
        config["rope_theta"] = rope["rope_theta"]
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        config["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else scaling
    if str(config.get("model_type", "")).startswith("dq_"):
        raise SpecError(
            f"{source.path} holds transposed linears (GPT-2's Conv1D), which no other engine reads from such a "
            "checkpoint; run it here, or quantize another architecture"
        )
    return config


def dense_linears(source: Checkpoint) -> list[str]:
    """Names of the layers with an unquantized matrix, but for embeddings and the head."""
    names = []
    for name, tensor in source.read(list(source.dense)):
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight" and tensor.ndim == 2 and not re.search(r"(^|\.)(lm_head$|embed|wte$|wpe$)", layer):
            names.append(layer)
    return names


def dense_tensors(source: Checkpoint) -> dict[str, Tensor]:
    """Everything that is not packed, as it is stored."""
    return dict(source.read(list(source.dense)))
