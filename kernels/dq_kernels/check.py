"""What every launcher asks of a tensor before a kernel gets its address."""

from __future__ import annotations

import torch


def check_tensor(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raises ValueError unless ``tensor`` is contiguous, of that shape and dtype: a kernel reads past a wrong one."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        how = "" if tensor.is_contiguous() else ", not contiguous"
        raise ValueError(
            f"{name} must be contiguous {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}{how}"
        )
