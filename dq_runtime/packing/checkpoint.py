"""The checkpoint on disk: what we write, and what every reader gives of what anybody wrote.

We write a standard compressed-tensors ``pack-quantized`` directory. Per quantized linear: ``weight_packed`` int32 [N,
ceil(K*b/32)], ``weight_scale`` [N, G], ``weight_shape`` int64 [2], and for asymmetric grids ``weight_zero_point`` int32
[ceil(N*b/32), G] packed along out_features; mxfp4 and nvfp4 as :mod:`dq_runtime.packing.float4` says. ``SHA256SUMS``
(checkable with ``sha256sum -c``) covers every file, so that a flipped bit is found before it becomes text. The formats
read stand in :mod:`dq_runtime.packing.readers`.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dq_runtime.errors import CheckpointError
from dq_runtime.packing.atomic import save_tensors
from dq_runtime.packing.host import HostTensor, HostWeight
from dq_runtime.packing.quant_config import FLOAT_FORMATS, Scheme

if TYPE_CHECKING:  # reading needs no torch, whose import takes 2 s
    from torch import Tensor

    from dq_runtime.packing.layout import PackedWeight

SUMS = "SHA256SUMS"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 * 2**30


def packed_tensors(layer: str, w: PackedWeight, shift: int | None = None) -> dict[str, Tensor]:
    """The tensors that store one layer, by name. ``shift``: the power of two that layers of nvfp4 are to share, where
    this one can (:func:`dq_runtime.packing.float4.shared_shift`)."""
    import torch

    from dq_runtime.packing.float4 import float4_tensors
    from dq_runtime.packing.layout import pack_codes

    if w.form in FLOAT_FORMATS:
        return {f"{layer}.{name}": tensor for name, tensor in float4_tensors(layer, w, shift).items()}
    tensors = {
        f"{layer}.weight_packed": w.packed,
        f"{layer}.weight_scale": w.scale,
        f"{layer}.weight_shape": torch.tensor([w.n, w.k], dtype=torch.int64),
    }
    if w.zero is not None:
        tensors[f"{layer}.weight_zero_point"] = pack_codes(w.zero.t().contiguous(), w.bits).t()
    return tensors


def write_weights(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write ``model.safetensors``, or numbered shards of at most 4 GiB with their index."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    names = shard_names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        write_shard(directory / name, shard)
    if len(shards) > 1:
        total = sum(t.nbytes for t in tensors.values())
        write_index(directory, dict(zip(names, shards, strict=True)), total)


def shard_names(count: int) -> list[str]:
    """What ``count`` files of weights are called."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One file of weights."""
    save_tensors(path, tensors, {"format": "pt"})
    path.chmod(0o644)  # the library creates 0600, which a server's own user could not read


def write_index(directory: Path, shards: Mapping[str, Iterable[str]], total: int) -> None:
    """Which file holds which tensors, by name; ``total``: the bytes of all of them."""
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_sums(directory: Path) -> None:
    """Hash every file of the directory into ``SHA256SUMS``; call it last."""
    lines = []
    for file in sorted(f for f in directory.iterdir() if f.is_file() and f.name != SUMS):
        with file.open("rb") as f:
            lines.append(f"{hashlib.file_digest(f, 'sha256').hexdigest()}  {file.name}\n")
    (directory / SUMS).write_text("".join(lines), encoding="utf-8")


class NotPackedError(CheckpointError):
    """A model that is whole as far as it was looked at, but of which no reader here makes packed weights."""


@dataclass(frozen=True)
class Checkpoint(ABC):
    """A validated checkpoint, whatever its format, its tensors still on disk.

    ``path`` is a directory or a file; ``config`` says what config.json says of the model, whatever else it holds;
    ``layers`` the scheme of each packed linear (a weight may turn out symmetric where its scheme is not); ``dense`` the
    names of all other tensors; ``notes``, sentences for the user, what could not be kept packed. Names are those of
    transformers.
    """

    path: Path
    config: dict[str, Any]
    layers: dict[str, Scheme]
    dense: tuple[str, ...]
    notes: tuple[str, ...]

    @abstractmethod
    def array(self, name: str) -> HostTensor:
        """One of ``dense``, mapped from its file where it is stored as it is needed."""

    @abstractmethod
    def weight(self, layer: str) -> HostWeight:
        """One of ``layers``, validated by value: scales finite, padding bits zero."""

    @abstractmethod
    def release(self) -> None:
        """Give back the memory of what was read so far: the arrays stay, and are read again when they are needed."""

    def arrays(self, names: list[str]) -> Iterator[tuple[str, HostTensor]]:
        """Tensors by name."""
        return ((name, self.array(name)) for name in names)

    def weights(self) -> Iterator[tuple[str, HostWeight]]:
        """Every packed linear."""
        return ((layer, self.weight(layer)) for layer in self.layers)

    def read(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """:meth:`arrays` as torch tensors over the same memory."""
        from dq_runtime.packing.bridge import tensor_of

        return ((name, tensor_of(array)) for name, array in self.arrays(names))

    def packed(self) -> Iterator[tuple[str, PackedWeight]]:
        """:meth:`weights` as torch tensors over the same memory."""
        from dq_runtime.packing.bridge import packed_of

        return ((layer, packed_of(weight)) for layer, weight in self.weights())


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Find out the format and validate what can be without reading the values: files, hashes, config, tensor names,
    dtypes and shapes. Raises :class:`NotPackedError` for a model that is to be run dense, and :class:`CheckpointError`
    for anything that cannot be trusted or is of a format that is not read here."""
    from dq_runtime.packing.readers import reader_of

    return reader_of(Path(path))
