"""The weights of a decoder as torch tensors: from numpy arrays, and back, over the same memory; and linears joined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dq_runtime.packing import HostTensor, HostWeight, PackedWeight
from dq_runtime.packing.bridge import host_of, host_weight_of, packed_of, tensor_of
from dq_runtime.runtime.decoder.weights import DecoderWeights, HostWeights, Linear, Parts

TorchParts = Parts[Tensor, PackedWeight]


def on_host(weights: DecoderWeights[Any, Any]) -> HostWeights:
    """``weights``, on the CPU and of either kind, as numpy arrays."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, PackedWeight):
            return host_weight_of(leaf)
        return host_of(leaf) if isinstance(leaf, Tensor) else leaf

    converted: HostWeights = _each(weights, convert)
    return converted


def placed(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Weights of either kind, or any part of them, as torch tensors on ``device``, dense ones in ``dtype``."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, HostWeight):
            leaf = packed_of(leaf)
        if isinstance(leaf, PackedWeight):
            zero = None if leaf.zero is None else leaf.zero.to(device)
            return replace(leaf, packed=leaf.packed.to(device), scale=leaf.scale.to(device), zero=zero)
        tensor = tensor_of(leaf) if isinstance(leaf, HostTensor) else leaf
        return tensor.to(device, dtype)

    return _each(value, convert)


def _each(value: Any, convert: Callable[[Any], Any]) -> Any:
    """The same structure with every tensor and packed weight converted."""
    if value is None:
        return None
    if isinstance(value, tuple):
        return tuple(_each(member, convert) for member in value)
    if is_dataclass(value) and not isinstance(value, HostTensor | HostWeight | PackedWeight | type):
        return replace(value, **{f.name: _each(getattr(value, f.name), convert) for f in fields(value)})
    return convert(value)


def join(parts: TorchParts) -> TorchParts:
    """The parts as one linear, rows below each other, where they are stored alike; else as they are. Rows are
    independent in the packed bitstream, so that joining them is a concatenation (and a copy)."""
    if len(parts) == 1 or len({_kind(p) for p in parts}) > 1:
        return parts
    biases = [p.bias for p in parts if p.bias is not None]
    bias = torch.cat(biases) if biases else None
    packed = [p.weight for p in parts if isinstance(p.weight, PackedWeight)]
    if not packed:
        return (Linear(torch.cat([p.weight for p in parts if isinstance(p.weight, Tensor)]), bias),)
    zeros = [w.zero for w in packed if w.zero is not None]
    joined = PackedWeight(
        torch.cat([w.packed for w in packed]),
        torch.cat([w.scale for w in packed]),
        torch.cat(zeros) if zeros else None,
        packed[0].bits,
        packed[0].k,
        packed[0].form,
    )
    return (Linear(joined, bias),)


def _kind(part: Linear[Tensor, PackedWeight]) -> tuple[object, ...]:
    """Linears of one kind can be joined."""
    w = part.weight
    stored = (
        (w.bits, w.form, w.group_size, w.zero is None, w.scale.dtype) if isinstance(w, PackedWeight) else (w.dtype,)
    )
    return (*stored, None if part.bias is None else part.bias.dtype)
