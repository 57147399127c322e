"""A directory of safetensors files and JSON as it was found, trusted in nothing: sums, index, headers are checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dq_runtime.errors import CheckpointError
from dq_runtime.packing.checkpoint import INDEX, SUMS, Checkpoint
from dq_runtime.packing.host import HostTensor
from dq_runtime.packing.shown import shown
from dq_runtime.packing.tensor_file import TensorFile

MOST_JSON_BYTES = 2**26  # the index of a model of 100,000 tensors takes 12 MB
# What older transformers saved of the model's buffers: computed from the config, so never read.
_BUFFERS = (".rotary_emb.inv_freq",)


@dataclass(frozen=True)
class DirectoryCheckpoint(Checkpoint):
    """A checkpoint whose tensors lie in safetensors files: ``files`` tensor name -> its file."""

    files: dict[str, TensorFile]

    def array(self, name: str) -> HostTensor:
        return self.files[name].tensor(name)

    def release(self) -> None:
        for file in set(self.files.values()):
            file.release()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; :class:`CheckpointError` for anything else, a key that stands there twice included."""
    try:
        with path.open("rb") as f:
            size = f.seek(0, 2)
            f.seek(0)
            content = f.read(min(size, MOST_JSON_BYTES))
        if size > MOST_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than {MOST_JSON_BYTES >> 20} MB; it is not what its name says")
        value = json.loads(content.decode(), object_pairs_hook=_unique)
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}; it is not a complete checkpoint") from None
    except OSError as e:
        raise CheckpointError(f"{path} could not be read: {e.strerror or e}") from None
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} is not valid JSON ({e}); the file is damaged") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands there twice")
    return found


def verify_sums(directory: Path) -> None:
    """Where SHA256SUMS exists, what it lists must match, but for the papers. Hashing costs about 0.6 s per GB."""
    sums = directory / SUMS
    if not sums.exists():
        return
    unlisted = {f.name for f in directory.glob("*.safetensors")} | {"config.json"}
    for line in sums.read_text(encoding="utf-8", errors="replace").splitlines() or [""]:
        digest, _, name = line.partition("  ")
        file = directory / name
        if len(digest) != 64 or not name or "/" in name:
            raise CheckpointError(f"{sums} is damaged; restore it, or delete it to load without integrity checks")
        unlisted.discard(name)
        if name.startswith(("README", "report.", "LICENSE", "NOTICE")):
            continue
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, although {SUMS} lists it; copy the checkpoint again")
        if _sha256(file) != digest:
            raise CheckpointError(
                f"{file} does not match {SUMS}: it is damaged, or was edited; copy the checkpoint again, or delete "
                f"{SUMS} if you meant to change it"
            )
    if unlisted:
        raise CheckpointError(f"{sums} does not list {min(unlisted)}: it was cut short; copy the checkpoint again")


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def tensor_files(directory: Path) -> dict[str, TensorFile]:
    """Tensor name -> its file, checked against the files' own headers. Files lie in the directory itself: a path in the
    index is refused, and so is a directory with nothing but pickles, which can run code when they are opened."""
    weight_map = None
    if (directory / INDEX).exists():
        weight_map = read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(_is_file_name(v) for v in weight_map.values()):
            raise CheckpointError(f"{directory / INDEX} has no usable weight_map")
        shards = sorted(set(weight_map.values()))
    else:
        shards = [_only_file(directory)]
    found: dict[str, TensorFile] = {}
    for shard in shards:
        file = directory / shard
        if not file.is_file():
            raise CheckpointError(f"{directory} has no {shard}; it is not a complete checkpoint")
        opened = TensorFile(file)
        for name in opened.names():
            if name in found:
                raise CheckpointError(f"{directory}: {name} is in {found[name].path.name} and again in {shard}")
            found[name] = opened
    located = {name: file.path.name for name, file in found.items()}
    if weight_map is not None and weight_map != located:
        odd = min(weight_map.items() ^ located.items())[0]
        raise CheckpointError(f"{directory}: index and shards disagree about {shown(odd)}")
    return {name: file for name, file in found.items() if not name.endswith(_BUFFERS)}


def _is_file_name(value: Any) -> bool:
    return (
        isinstance(value, str)
        and value.endswith(".safetensors")
        and value.isprintable()
        and not set(value) & set("/\\\0")
    )


def _only_file(directory: Path) -> str:
    """``model.safetensors``, or whatever else the only safetensors file is called (AutoGPTQ's names vary)."""
    present = sorted(f.name for f in directory.glob("*.safetensors"))
    if "model.safetensors" in present or not present:
        pickles = sorted(f.name for ending in ("*.bin", "*.pt", "*.pth") for f in directory.glob(ending))
        if not present and pickles:
            raise CheckpointError(
                f"{directory} holds {pickles[0]}, a pickle, which can run code when it is opened and is not read here; "
                "convert it to safetensors"
            )
        return "model.safetensors"
    if len(present) > 1:
        raise CheckpointError(f"{directory} holds {len(present)} safetensors files, but neither {INDEX} nor one model")
    return present[0]


def stored_scheme(directory: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What says how the weights are quantized: ``quantization_config`` of config.json, or the file that AutoGPTQ and
    AutoAWQ wrote beside it before there was one, completed by its ``quant_method``; None where the model is dense."""
    stated = config.get("quantization_config")
    if stated is not None:
        if not isinstance(stated, dict):
            raise CheckpointError(f"{directory / 'config.json'}: quantization_config is not an object")
        return stated
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if (directory / name).exists():
            return {"quant_method": method} | read_json(directory / name)
    return None
