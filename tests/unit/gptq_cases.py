"""Weights whose GPTQ tensors an independent reader has read: what golden_export/gptq.json holds the hashes of."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from dq_runtime.packing import PackedWeight, pack_codes

CASES = [(bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)]
N, K, GROUP = 64, 192, 32


def gptq_case(bits: int, symmetric: bool) -> PackedWeight:
    """[64, 192] in groups of 32, the same on every machine and with every release of torch; no zero point is 0, so
    that version 1 of the format holds it too."""
    i, j = torch.arange(N).unsqueeze(1), torch.arange(K).unsqueeze(0)
    codes = ((37 * i + 11 * j + i * j % 7) % 2**bits).to(torch.uint8)
    groups = j[:, : K // GROUP]
    scale = (2.0**-8 * (1 + (5 * i + 3 * groups) % 64 / 64)).to(torch.float16)
    zero = None if symmetric else (1 + (3 * i + 5 * groups) % (2**bits - 1)).to(torch.uint8)
    return PackedWeight(pack_codes(codes, bits), scale, zero, bits, K)


def integers(w: PackedWeight) -> Tensor:
    """code - zero, int16 [N, K]: what a reader multiplies by the scales."""
    zero = torch.full(w.scale.shape, 2 ** (w.bits - 1)) if w.zero is None else w.zero
    return (w.codes().to(torch.int16).view(w.n, -1, w.group_size) - zero.to(torch.int16).unsqueeze(-1)).view(w.n, w.k)


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def read_by_autoround(tensors: dict[str, Tensor], name: str, bits: int, version: int) -> Tensor:
    """code - zero, int16 [N, K], as AutoRound's torch linear unpacks them: its output for the identity with scales of
    1. Raises ImportError where auto-round is not installed."""
    if version == 2:
        from auto_round_extension.torch.qlinear_torch import QuantLinear
    else:
        from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
    linear = QuantLinear(bits, GROUP, K, N, bias=False)
    linear.qweight, linear.qzeros = tensors[f"{name}.qweight"], tensors[f"{name}.qzeros"]
    linear.scales = torch.ones_like(tensors[f"{name}.scales"])
    return linear.forward(torch.eye(K, dtype=torch.float32)).T.round().to(torch.int16)
