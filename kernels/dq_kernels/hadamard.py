"""Hadamard-type transform of the last dimension, one program a row: H_n = (P_m kron W_S) / sqrt(S), n = m * S.

Shapes: x_RN (R rows of N), small_MM float32 orthogonal (a Hadamard matrix over sqrt(m), or any other), S a power of
two. The row is read as X_MS: first P X, m multiply-adds an element, then log2(S) butterflies in registers, all float32.
One read and one write of x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dq_kernels.case import Case
from dq_kernels.dequant import stage

# Elements a program holds, m rounded up to a power of two times S: 64 a thread at 16 warps.
MAX_ELEMENTS = 32768


@triton.jit
def hadamard_kernel(
    x_ptr, small_ptr, out_ptr, factor, M: tl.constexpr, MP: tl.constexpr, S: tl.constexpr, TRANSPOSED: tl.constexpr
):  # fmt: skip
    """out[row] = (P kron W) x[row] * factor; MP: M rounded up to a power of two. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64) * (M * S)
    s = tl.arange(0, S)
    i = tl.arange(0, MP)
    y = tl.zeros((MP, S), tl.float32)
    for j in range(0, M):
        x = tl.load(x_ptr + row + j * S + s).to(tl.float32)
        p = tl.load(small_ptr + (j * M + i if TRANSPOSED else i * M + j), mask=i < M, other=0.0)
        y += p[:, None] * x[None, :]
    STAGES: tl.constexpr = S.bit_length() - 1
    for _ in tl.static_range(STAGES):
        # The lowest bit of the position is summed over and becomes the highest: after all stages the order is back.
        even, odd = tl.split(y.reshape(MP, S // 2, 2))
        y = tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)).reshape(MP, S)
    at = out_ptr + row + i[:, None] * S + s[None, :]
    tl.store(at, (y * factor).to(out_ptr.dtype.element_ty), mask=(i < M)[:, None])


def num_warps(elements: int) -> int:
    """4 to 16 warps, at most 64 elements a thread."""
    return 4 if elements <= 4096 else 8 if elements <= 16384 else 16


def hadamard_transform(x: Tensor, small: Tensor, *, transposed: bool = False, out: Tensor | None = None) -> Tensor:
    """x [..., N] bf16/fp16/fp32, small float32 [m, m] with N / m a power of two -> H x (``transposed``: H^T x) for
    every row, in x's dtype. ``out``: a contiguous tensor like x, not x itself. Raises ValueError for other widths."""
    n, m = x.shape[-1], small.shape[0]
    length = n // m
    padded = triton.next_power_of_2(m)
    if length * m != n or length & (length - 1) or padded * length > MAX_ELEMENTS:
        raise ValueError(f"width {n} must be {m} times a power of two, at most {MAX_ELEMENTS} padded")
    if small.shape != (m, m) or small.dtype != torch.float32 or not small.is_contiguous():
        raise ValueError(f"small must be contiguous float32 [m, m], got {small.dtype} {list(small.shape)}")
    x = x.contiguous()
    if out is None:
        out = torch.empty_like(x)
    if out.data_ptr() == x.data_ptr():
        raise ValueError("out cannot be x: a warp may have stored its rows of X_MS before another has read them")
    written = stage(out)
    hadamard_kernel[(x.numel() // n,)](
        x, small, written, length**-0.5, M=m, MP=padded, S=length, TRANSPOSED=transposed,
        num_warps=num_warps(padded * length),
    )  # fmt: skip
    return out if written is out else out.copy_(written)


def offline_cases() -> list[Case]:
    """The widths of SmolLM2 (576 = 36 * 16), Qwen2.5 (896 = 28 * 32), gpt-oss (2880 = 180 * 16), Llama 3 8B."""
    cases = []
    for n, m in ((576, 36), (896, 28), (2880, 180), (4096, 1), (14336, 28)):
        padded = triton.next_power_of_2(m)
        cases.append(
            Case(
                label=f"hadamard bf16 N={n} = {m} * {n // m}",
                kernel=hadamard_kernel,
                types={"x_ptr": "*bf16", "small_ptr": "*fp32", "out_ptr": "*bf16", "factor": "fp32"},
                constants={"M": m, "MP": padded, "S": n // m, "TRANSPOSED": False},
                options={"num_warps": num_warps(padded * n // m), "num_stages": 1},
            )
        )
    return cases
