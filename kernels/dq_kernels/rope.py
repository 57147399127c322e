"""From the output of the qkv linear to a rotated query and a longer cache, one launch, one program a head.

Shapes: B sequences with one new token each, N = heads + 2 * kv heads of D, a rotation of the first R <= D values of a
head, caches of S slots. By definition, for the token at position p = lengths[b] of sequence b,

    q, k, v = qkv[b].split(...)                                                   q heads first, then k, then v
    q, k    = rmsnorm(q, q_norm), rmsnorm(k, k_norm)                              per head, rounded; where there are any
    q, k    = x * cos + swap(x) * sin for the first R values, the rest unchanged  swap: the halves of R exchanged
    keys[b, :, p % S], values[b, :, p % S] = k, v

with ``sin`` carrying the sign of the first half (RoFormer, arXiv 2104.09864, half-split as Hugging Face stores it).
Everything in float32, rounded once after the norm and once after the rotation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dq_kernels.case import Case
from dq_kernels.cast import by_hand, round_to
from dq_kernels.check import check_tensor
from dq_kernels.dequant import TL_DTYPES


@triton.jit
def rope_kernel(
    qkv_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, lengths_ptr, q_ptr, keys_ptr, values_ptr, slots, eps,
    HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr,
    BY_HAND: tl.constexpr,
):  # fmt: skip
    """One head of one token. BLOCK: D rounded up to a power of two. Grid: (B, HEADS + 2 * KV)."""
    DTYPE: tl.constexpr = qkv_ptr.dtype.element_ty
    b = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK)
    keep = d < D
    at = qkv_ptr + (b * (HEADS + 2 * KV) + head) * D
    slot = tl.load(lengths_ptr + b) % slots
    loaded = tl.load(at + d, mask=keep, other=0.0)
    if head >= HEADS + KV:
        tl.store(values_ptr + ((b * KV + head - HEADS - KV) * slots + slot) * D + d, loaded, mask=keep)
    else:
        x = loaded.to(tl.float32)
        turned = d < R
        other = tl.where(turned, tl.where(d < R // 2, d + R // 2, d - R // 2), d)
        y = tl.load(at + other, mask=turned, other=0.0).to(tl.float32)
        if NORM:
            is_q = head < HEADS
            # Two masked loads, one of which reads nothing: a pointer cannot be chosen at run time.
            w = tl.load(q_norm_ptr + d, mask=keep & is_q, other=0.0).to(tl.float32)
            w += tl.load(k_norm_ptr + d, mask=keep & (head >= HEADS), other=0.0).to(tl.float32)
            w_other = tl.load(q_norm_ptr + other, mask=turned & is_q, other=0.0).to(tl.float32)
            w_other += tl.load(k_norm_ptr + other, mask=turned & (head >= HEADS), other=0.0).to(tl.float32)
            scale = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
            x = round_to(x * scale * w, DTYPE, BY_HAND).to(tl.float32)
            y = round_to(y * scale * w_other, DTYPE, BY_HAND).to(tl.float32)
        cos = tl.load(cos_ptr + b * R + d, mask=turned, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + b * R + d, mask=turned, other=0.0).to(tl.float32)
        result = round_to(x * cos + y * sin, DTYPE, BY_HAND)
        if head < HEADS:
            tl.store(q_ptr + (b * HEADS + head) * D + d, result, mask=keep)
        else:
            tl.store(keys_ptr + ((b * KV + head - HEADS) * slots + slot) * D + d, result, mask=keep)


def rope_and_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """qkv [B, N * D] -> q [B, heads, D]; writes one slot of keys and values [B, kv heads, S, D]. All in one dtype.

    cos, sin [B, R]; ``norms``: the weights of q and k, [D] each in any float dtype; ``lengths`` int64 [B], positions
    held before this token. ``out``: a contiguous tensor for q. Raises ValueError for what does not fit together.
    """
    batch, kv, slots, dim = keys.shape
    heads = qkv.shape[1] // dim - 2 * kv
    turned = cos.shape[1]
    if heads < 1 or turned % 2 or turned > dim or qkv.dtype not in TL_DTYPES:
        raise ValueError(
            f"rope_and_cache cannot split {qkv.dtype} rows of {qkv.shape[1]} into heads of {dim}, {kv} of k and v each,"
            f" and rotate {turned} values"
        )
    check_tensor("qkv", qkv, (batch, (heads + 2 * kv) * dim), qkv.dtype)
    check_tensor("cos", cos, (batch, turned), qkv.dtype)
    check_tensor("sin", sin, (batch, turned), qkv.dtype)
    for name, norm in zip(("q_norm", "k_norm"), norms or (), strict=False):
        check_tensor(name, norm, (dim,), norm.dtype)
    check_tensor("keys", keys, (batch, kv, slots, dim), qkv.dtype)
    check_tensor("values", values, (batch, kv, slots, dim), qkv.dtype)
    check_tensor("lengths", lengths, (batch,), torch.int64)
    q = torch.empty(batch, heads, dim, dtype=qkv.dtype, device=qkv.device) if out is None else out
    q_norm, k_norm = norms or (cos, cos)
    rope_kernel[(batch, heads + 2 * kv)](
        qkv, cos, sin, q_norm, k_norm, lengths, q, keys, values, slots, eps, HEADS=heads, KV=kv, D=dim,
        BLOCK=triton.next_power_of_2(dim), R=turned, NORM=norms is not None, BY_HAND=by_hand(qkv.dtype), num_warps=1,
    )  # fmt: skip
    return q


def offline_cases() -> list[Case]:
    """Llama 3 8B, SmolLM2, Qwen3 8B, Gemma 3 (float32 norms), Phi-3 mini, a partial rotation."""
    kinds = [
        (32, 8, 128, 128, "bf16", None), (9, 3, 64, 64, "fp16", None), (32, 8, 128, 128, "bf16", "bf16"),
        (8, 4, 256, 256, "bf16", "fp32"), (32, 32, 96, 96, "bf16", None), (32, 32, 80, 32, "fp16", None),
    ]  # fmt: skip
    cases = []
    for heads, kv, dim, turned, dtype, norm in kinds:
        tensors = ("qkv_ptr", "cos_ptr", "sin_ptr", "q_ptr", "keys_ptr", "values_ptr")
        types = dict.fromkeys(tensors, f"*{dtype}") | dict.fromkeys(("q_norm_ptr", "k_norm_ptr"), f"*{norm or dtype}")
        cases.append(
            Case(
                label=f"rope_and_cache {dtype} {heads}+2*{kv} heads of {dim}{' norm' if norm else ''}",
                kernel=rope_kernel,
                types={**types, "lengths_ptr": "*i64", "slots": "i32", "eps": "fp32"},
                constants={
                    "HEADS": heads, "KV": kv, "D": dim, "BLOCK": triton.next_power_of_2(dim), "R": turned,
                    "NORM": norm is not None, "BY_HAND": False,
                },
                options={"num_warps": 1},
            )
        )  # fmt: skip
    return cases
