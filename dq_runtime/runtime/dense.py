"""Load an unquantized causal LM: a Hugging Face directory, a hub name, or a GGUF file (dequantized by transformers)."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dq_runtime.errors import DQError
from dq_runtime.packing.checkpoint import NotPackedError, open_checkpoint
from dq_runtime.packing.directory import tensor_files
from dq_runtime.packing.readers.gguf import gguf_file
from dq_runtime.runtime.transformers_model import TransformersModel


def load_dense(source: str, device: str = "cpu") -> TransformersModel:
    """The model in float32, in eval mode, with its tokenizer (None if it has none)."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    path = Path(source)
    if path.suffix == ".gguf" or (path.is_file() and _magic(path) == b"GGUF"):
        loaded = _load_gguf(path)
    elif path.is_dir():
        loaded = _load_directory(path)
    elif path.exists():
        raise DQError(f"{source} is a file but not a GGUF; give a model directory, a hub name or a .gguf file")
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and not source.startswith("."):
        loaded = _load_pretrained(source, {})
    else:
        raise DQError(f"{source} does not exist; give a model directory, a hub name or a .gguf file")
    loaded.model.eval().to(device)
    return loaded


def _magic(path: Path) -> bytes:
    with path.open("rb") as f:
        return f.read(4)


def check_directory(path: Path) -> None:
    """:class:`DQError` for a directory that holds no unquantized model in files that can be trusted."""
    try:
        config = json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        raise DQError(f"{path} has no config.json; give the directory of a Hugging Face model") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise DQError(f"{path / 'config.json'} is not valid JSON; restore it from the original model") from None
    if "quantization_config" in config:
        raise DQError(f"{path} is already quantized; give the original model")
    tensor_files(path)  # transformers trusts the index and the headers


def _load_directory(path: Path) -> TransformersModel:
    check_directory(path)
    return _load_pretrained(str(path), {})


def _load_pretrained(source: str, kwargs: dict[str, Any]) -> TransformersModel:
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,  # left out, it would ask on a terminal
            use_safetensors=True,  # never a pickle
            **kwargs,
        )
    except Exception as e:  # transformers raises OSError, ValueError, KeyError, SafetensorError, struct.error, ...
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise DQError(f"{kwargs.get('gguf_file', source)} could not be loaded as a causal LM: {first}") from None
    if info["missing_keys"]:  # transformers would go on with random weights there
        missing = min(info["missing_keys"])
        raise DQError(f"{kwargs.get('gguf_file', source)} is incomplete: {missing} is missing from its weights")
    return TransformersModel(model, None if "gguf_file" in kwargs else transformers_tokenizer(source, kwargs), source)


def transformers_tokenizer(source: str, kwargs: dict[str, Any]) -> Any:
    """transformers' tokenizer of a model, or None."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **kwargs)
    except Exception:  # a model without tokenizer files is fine for token-id use; encode() says so when it is not
        return None


def _load_gguf(path: Path) -> TransformersModel:
    if not path.is_file():
        raise DQError(f"{path} does not exist")
    with suppress(NotPackedError):  # an architecture that only transformers knows; anything worse is refused here
        open_checkpoint(path)
    try:
        import accelerate  # noqa: F401
    except ImportError as e:
        raise DQError(f"reading {path.name} needs the {e.name} package: pip install 'dq_runtime[gguf]'") from None
    loaded = _load_pretrained(str(path.parent), {"gguf_file": path.name})
    loaded.path = str(path)
    # transformers marks the model as GGUF-quantized and then refuses to save it, although its weights are dense now.
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(loaded.model, name):
            delattr(loaded.model, name)
    loaded.model.is_quantized = False
    if hasattr(loaded.model.config, "quantization_config"):
        del loaded.model.config.quantization_config
    loaded.tokenizer = gguf_tokenizer(path)
    return loaded


def gguf_tokenizer(path: Path) -> Any:
    """The tokenizer in a GGUF file's metadata, with its chat template; None if there is none that is known."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    tokenizer = transformers_tokenizer(str(path.parent), {"gguf_file": path.name})
    if tokenizer is not None and gguf_file(path).metadata.get("tokenizer.ggml.pre") == "smollm":
        _split_digits(tokenizer)
    return tokenizer


def licence_of(source: str) -> str | None:
    """The licence a model states in its GGUF metadata or its model card, or None."""
    path = Path(source)
    if path.suffix == ".gguf":
        stated = gguf_file(path).metadata.get("general.license")
        return stated if isinstance(stated, str) else None
    card = path / "README.md"
    if card.is_file():
        found = re.search(r"^license:\s*(\S+)\s*$", card.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        return found and found.group(1)
    return None


def _split_digits(tokenizer: Any) -> None:
    """SmolLM splits every digit; transformers 5 builds its GGUF tokenizer without that, so "   12" comes out wrong."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)]
    )
