"""Between numpy and torch, without a copy: both look at the same memory."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dq_runtime.packing.host import HostTensor, HostWeight
from dq_runtime.packing.layout import PackedWeight


def tensor_of(host: HostTensor) -> Tensor:
    """A torch tensor over the values of ``host``."""
    values = torch.from_numpy(host.values)
    wanted: torch.dtype = getattr(torch, host.dtype)
    return values if values.dtype is wanted else values.view(wanted)


def packed_of(host: HostWeight) -> PackedWeight:
    """The same weight over the same memory."""
    zero = None if host.zero is None else torch.from_numpy(host.zero)
    return PackedWeight(torch.from_numpy(host.packed), tensor_of(host.scale), zero, host.bits, host.k, host.form)


def host_of(tensor: Tensor) -> HostTensor:
    """The values of a tensor on the CPU."""
    tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16:
        return HostTensor(tensor.view(torch.int16).numpy().view(np.uint16), "bfloat16")
    name = str(tensor.dtype).removeprefix("torch.")
    bits = tensor.view(torch.uint8) if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
    return HostTensor(bits.numpy(), name)


def host_weight_of(w: PackedWeight) -> HostWeight:
    """The same weight, its tensors on the CPU, over the same memory."""
    zero = None if w.zero is None else w.zero.numpy()
    return HostWeight(w.packed.numpy(), host_of(w.scale), zero, w.bits, w.k, w.form)
