"""Mean KL(softmax(teacher) || softmax(student)) with its gradient: one program a token, no softmax in memory.

Shapes: teacher_MV, student_MV, grad_MV of one dtype. Two passes over a token's logits, in chunks of the vocabulary: the
first finds both maxima and sums of exponentials together, the second adds up p * (log p - log q) and writes
(q - p) / M. Everything is float32 but the logits and the gradient; log p and log q are formed before their difference,
as in the plain definition, so logits of any size lose nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dq_kernels.case import Case
from dq_kernels.dequant import stage

# Logits of a chunk: 8 a thread. Timed on an H100 at V = 128,256, M = 2048: 939 us (2.8 TB/s); 4096 1036 us, 8192 1295.
BLOCK = 2048
NUM_WARPS = 8


@triton.jit
def kl_kernel(student_ptr, teacher_ptr, grad_ptr, kl_ptr, inverse_m, V: tl.constexpr, BLOCK: tl.constexpr):
    """kl_ptr float32 [M]: the KL of each token in nats. Grid: (M,). grad_ptr may be teacher_ptr: a thread has read a
    chunk of both before it writes that chunk, and no other program touches the token's row."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    # Per lane, merged after the pass: one reduction a token and not one a chunk.
    top_s = tl.full((BLOCK,), -float("inf"), tl.float32)
    top_t = tl.full((BLOCK,), -float("inf"), tl.float32)
    sum_s = tl.zeros((BLOCK,), tl.float32)
    sum_t = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        keep = start + columns < V
        at = token * V + start + columns
        s = tl.load(student_ptr + at, mask=keep, other=-float("inf")).to(tl.float32)
        t = tl.load(teacher_ptr + at, mask=keep, other=-float("inf")).to(tl.float32)
        new_s, new_t = tl.maximum(top_s, s), tl.maximum(top_t, t)
        # A lane past V has seen nothing: its maximum stays -inf, and -inf - -inf would be NaN.
        sum_s = tl.where(new_s > -float("inf"), sum_s * tl.exp(top_s - new_s) + tl.exp(s - new_s), 0.0)
        sum_t = tl.where(new_t > -float("inf"), sum_t * tl.exp(top_t - new_t) + tl.exp(t - new_t), 0.0)
        top_s, top_t = new_s, new_t
    max_s, max_t = tl.max(top_s, 0), tl.max(top_t, 0)
    log_s = tl.log(tl.sum(sum_s * tl.exp(top_s - max_s), 0))
    log_t = tl.log(tl.sum(sum_t * tl.exp(top_t - max_t), 0))
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        keep = start + columns < V
        at = token * V + start + columns
        s = tl.load(student_ptr + at, mask=keep, other=0.0).to(tl.float32)
        t = tl.load(teacher_ptr + at, mask=keep, other=0.0).to(tl.float32)
        log_q, log_p = (s - max_s) - log_s, (t - max_t) - log_t
        p = tl.exp(log_p)
        total += tl.where(keep, p * (log_p - log_q), 0.0)
        grad = (tl.exp(log_q) - p) * inverse_m
        tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=keep)
    tl.store(kl_ptr + token, tl.sum(total, 0))


def mean_kl_with_grad(student: Tensor, teacher: Tensor, *, out: Tensor) -> Tensor:
    """Contiguous logits [M, V] of one float dtype -> float32 scalar in nats; the gradient to the student's logits goes
    into ``out`` [M, V] of that dtype, which may be ``teacher`` (or ``student``) itself: its logits are then lost."""
    if student.ndim != 2 or not student.shape == teacher.shape == out.shape:
        raise ValueError(f"logits must be [M, V], got {list(student.shape)}, {list(teacher.shape)}, {list(out.shape)}")
    if not (student.is_contiguous() and teacher.is_contiguous() and out.is_contiguous()):
        raise ValueError("logits must be contiguous")
    m, v = student.shape
    kl = torch.empty(m, dtype=torch.float32, device=student.device)
    written = stage(out)
    kl_kernel[(m,)](student, teacher, written, kl, 1.0 / m, V=v, BLOCK=BLOCK, num_warps=NUM_WARPS)
    if written is not out:
        out.copy_(written)
    return kl.sum() / m


def offline_cases() -> list[Case]:
    """The vocabularies of Llama 2 and 3 in bfloat16, one in float32."""
    return [
        Case(
            label=f"kl {dtype} V={v}",
            kernel=kl_kernel,
            types={
                "student_ptr": f"*{dtype}", "teacher_ptr": f"*{dtype}", "grad_ptr": f"*{dtype}", "kl_ptr": "*fp32",
                "inverse_m": "fp32",
            },
            constants={"V": v, "BLOCK": BLOCK},
            options={"num_warps": NUM_WARPS, "num_stages": 3},
        )
        for dtype, v in (("bf16", 32000), ("bf16", 128256), ("fp16", 49152), ("fp32", 32000))
    ]  # fmt: skip
