"""Grouped-query attention over a cache: B sequences, T queries each, S slots; G query heads share a key-value head.

The softmax is in float32 whichever way is taken. Queries of one group are laid out as further rows of one key-value
head, so that keys and values are never repeated in memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def for_groups(mask: Tensor, groups: int) -> Tensor:
    """A mask [B, 1, T, S] of queries as :func:`attend` wants it for ``groups`` query heads a key-value head:
    [B, 1, G * T, S]. The same for many layers, so made once for all of them."""
    batch, _, count, slots = mask.shape
    return mask.expand(batch, groups, count, slots).reshape(batch, 1, groups * count, slots)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None) -> Tensor:
    """q [B, heads, T, D], k and v [B, kv_heads, S, D], mask bool [B, 1, G * T, S] (true: seen) -> [B, T, heads * D]."""
    batch, heads, count, dim = q.shape
    rows = q.reshape(batch, k.shape[1], -1, dim)
    if softcap is None:
        out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
    else:
        scores = rows @ k.transpose(-1, -2) * scale
        scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~mask, -torch.inf)
        out = scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v
    return out.reshape(batch, heads, count, dim).transpose(1, 2).reshape(batch, count, heads * dim)


def attend_causally(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The same for a whole sequence at once, S = T and no window: the kernel skips what the mask would hide."""
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)
