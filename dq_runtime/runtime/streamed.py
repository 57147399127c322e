"""Models whose weights stay on disk: an unquantized one to be rounded block by block, and the checkpoint it became."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dq_runtime.errors import CheckpointError, DQError, SpecError
from dq_runtime.modules.student_linear import Mode, StudentLinear
from dq_runtime.modules.surgery import is_conv1d, linears, tied_names
from dq_runtime.packing import PackedWeight
from dq_runtime.packing.bridge import packed_of, tensor_of
from dq_runtime.packing.checkpoint import Checkpoint
from dq_runtime.packing.directory import tensor_files
from dq_runtime.runtime.dense import check_directory, transformers_tokenizer
from dq_runtime.runtime.hub import local_path
from dq_runtime.runtime.skeleton import parameters_on_meta, read_generation_config
from dq_runtime.runtime.transformers_model import TransformersModel


class StoredModel(TransformersModel):
    """An unquantized model on disk: ``model`` is built from its config, its parameters on the meta device. Implements
    :class:`~dq_runtime.modules.streamed_model.StoredTensors`."""

    def __init__(self, path: Path, model: Any) -> None:
        super().__init__(model, transformers_tokenizer(str(path), {}), str(path))
        self._files = tensor_files(path)
        self._transposed = {name for name, module in linears(model).items() if is_conv1d(module)}
        # Some checkpoints leave out the name under which the model holds everything but its head.
        prefix = f"{model.base_model_prefix}."
        self._stored = {name: name if name in self._files else name.removeprefix(prefix) for name in model.state_dict()}
        tied = tied_names(model)
        missing = [name for name, stored in self._stored.items() if stored not in self._files and name not in tied]
        if missing:
            raise DQError(
                f"{path} holds no {missing[0]}: it is incomplete, or stored under other names than its model has; "
                "leave --blockwise out to let transformers sort it out"
            )

    def tensor(self, name: str) -> Tensor:
        """As it is stored, over mapped memory."""
        stored = self._stored[name]
        return tensor_of(self._files[stored].tensor(stored))

    def weight(self, layer: str) -> Tensor:
        """The weight of a linear, [N, K]."""
        weight = self.tensor(f"{layer}.weight")
        return weight.t() if layer in self._transposed else weight

    def weights(self, layers: Iterable[str]) -> Iterator[Tensor]:
        """Of these, one after the other."""
        for layer in layers:
            yield self.weight(layer)
            self.release()

    def fill(self, name: str, layer: StudentLinear, device: torch.device) -> None:
        """Put a layer's weight on its grid."""
        layer.hold(self.weight(name).to(device))
        if f"{name}.bias" in self._stored:
            layer.bias = self.tensor(f"{name}.bias").to(device, torch.float32, copy=True)

    def release(self) -> None:
        """Give back the memory of what was read so far."""
        for file in set(self._files.values()):
            file.release()

    def check_weights(self) -> None:
        """Refuse NaN and infinity anywhere in the model; reads it once."""
        for name in self._stored.keys() - tied_names(self.model):
            tensor = self.tensor(name)
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise DQError(f"{name} of the model holds NaN or infinity; the model is damaged")
            self.release()


def open_stored(source: str) -> StoredModel:
    """The model in a directory, or of a hub name, for :class:`~dq_runtime.modules.streamed_model.StreamedStudent`."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    path = local_path(source)
    if path.is_file():
        raise SpecError(f"--blockwise reads safetensors, and {source} is a file; give a model directory or a hub name")
    check_directory(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as e:  # transformers raises many types for a config it does not understand
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise DQError(f"{source} could not be loaded as a causal LM: {first}") from None
    read_generation_config(model, path)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return StoredModel(path, model.eval())


class PackedTensors:
    """The tensors of a packed checkpoint; implements :class:`~dq_runtime.modules.streamed_model.StoredTensors`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def tensor(self, name: str) -> Tensor:
        """As it is stored, over mapped memory."""
        if name not in self._checkpoint.dense:
            raise CheckpointError(f"{self._checkpoint.path}: {name} is missing")
        return tensor_of(self._checkpoint.array(name))

    def fill(self, name: str, layer: StudentLinear, device: torch.device) -> None:
        """Let a layer run on its packed weight."""
        w = packed_of(self._checkpoint.weight(name))
        zero = None if w.zero is None else w.zero.to(device)
        layer.packed = PackedWeight(w.packed.to(device), w.scale.to(device), zero, w.bits, w.k, w.form)
        layer.mode = Mode.PACKED
        if f"{name}.bias" in self._checkpoint.dense:
            layer.bias = self.tensor(f"{name}.bias").to(device, torch.float32, copy=True)

    def release(self) -> None:
        """Give back the memory of what was read so far."""
        self._checkpoint.release()
