"""The model while it is rounded: one set of weights that can act as teacher, relaxed student or packed student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dq_runtime.errors import SpecError
from dq_runtime.modules.kl import mean_kl
from dq_runtime.modules.student_linear import Mode, StudentLinear
from dq_runtime.packing import PackedWeight


class StudentModel:
    """Wraps a causal LM whose linears are :class:`StudentLinear`; implements the ``Student`` contract of rounding.

    ``windows`` int64 [count, T] are the calibration windows. ``compute_dtype`` bfloat16 runs the whole forward under
    autocast (logits and activations in bfloat16 as in the paper's code, losses in float32).
    """

    def __init__(
        self, model: Any, layers: Mapping[str, StudentLinear], windows: Tensor, compute_dtype: torch.dtype
    ) -> None:
        self.model = model
        self.layers = layers
        self.tokens = windows
        self.windows = windows.shape[0]
        self.compute_dtype = compute_dtype
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    def set_mode(self, mode: Mode, packed: Mapping[str, PackedWeight] | None = None) -> None:
        """Switch every layer at once; PACKED takes the weights it is to use."""
        for name, layer in self.layers.items():
            layer.mode = mode
            layer.compute_dtype = torch.float32 if mode is Mode.PACKED else self.compute_dtype
            layer.packed = None if packed is None else packed[name]

    def logits(self, tokens: Tensor) -> Tensor:
        """Next-token logits [T, V] of one window [T]."""
        device = self.model.get_input_embeddings().weight.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.compute_dtype is torch.bfloat16):
            out = self.model(input_ids=tokens.to(device).unsqueeze(0), use_cache=False).logits
        assert isinstance(out, Tensor)
        return out[0]

    def kl(self, window: int) -> Tensor:
        tokens = self.tokens[window]
        self.set_mode(Mode.TEACHER)
        with torch.no_grad():
            teacher = self.logits(tokens)
        self.set_mode(Mode.RELAXED)
        return mean_kl(self.logits(tokens), teacher)

    def begin(self) -> None:
        """Allocate the relaxed choices and make them the only trainable tensors of the model."""
        for layer in self.layers.values():
            layer.begin_relaxation()
        assert all(p.requires_grad == (n.endswith(".x")) for n, p in self.model.named_parameters())

    def end(self) -> None:
        """Free them again."""
        for layer in self.layers.values():
            layer.end_relaxation()


def loop_dtype_of(requested: str, device: torch.device) -> torch.dtype:
    """Resolve ``auto|float32|bfloat16``. auto is bfloat16 where the chip multiplies it natively: 3.3x faster GEMMs than
    float32 on a 2-core Zen 4, but slower where it is emulated."""
    if requested != "auto":
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(requested)
        if dtype is None:
            raise SpecError(f"compute dtype must be auto, float32 or bfloat16, got {requested!r}")
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_bf16_supported")
    native = any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return torch.bfloat16 if native else torch.float32
