"""What the GPU kernels are measured against: torch's bf16 matmul and the weight-only kernels of other libraries.

Every packed rival carries the same weight: our symmetric int grid (absmax, bf16 scales), repacked into its own order.
So one decoded weight is everybody's reference, and a difference in time is no difference in quality. Each rival runs as
its library dispatches by default; what it tunes or compiles on its first call of a shape happens in :func:`trial`.

Needs nothing but torch to import. A library that is missing or broken is a reason string, never an exception.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dq_runtime.grids.int_grid import IntGrid
from dq_runtime.packing import PackedWeight, pack_codes
from dq_runtime.spec import PER_ROW, GridSpec

# Relative error of y (Frobenius norm) up to which a rival computes what it says. Decoded weights, products with a
# scale, partial sums of a split K and results may each be rounded to bf16, 2^-9 of a term at most; the squares of four
# independent roundings add up to 2 * 2^-9. Measured for two (weights and results): 0.0024, 0.6 of it. The unquantized
# weight in place of the 8-bit one errs by 0.0062.
MAX_RELATIVE_ERROR = 2.0**-8


@dataclass(frozen=True)
class Prepared:
    """One weight in a rival's form. ``reference`` float32 [N, K] is what it decodes to, ``nbytes`` what a call reads of
    it: codes and scales."""

    run: Callable[[Tensor], Tensor]
    reference: Tensor
    nbytes: int

    def __call__(self, x: Tensor) -> Tensor:
        """x bf16 [M, K] -> y bf16 [M, N]."""
        return self.run(x)


class Rival(Protocol):
    """One way to multiply with an [N, K] weight on the current GPU. ``group_size`` -1: a whole row shares a scale."""

    name: str

    def supports(self, bits: int, group_size: int, n: int, k: int, m: int) -> str | None:
        """None if this rival can be prepared for the shape and run with M = ``m`` tokens, else why not."""
        ...

    def prepare(self, weight: Tensor, bits: int, group_size: int) -> Prepared:
        """``weight`` bf16 [N, K] on the GPU; raises what the library raises where :meth:`supports` was not asked."""
        ...


def quantized(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, PackedWeight]:
    """Nearest codes uint8 [N, K], bf16 scales [N, G] and both as a :class:`PackedWeight`, symmetric."""
    grid = IntGrid(GridSpec(bits=bits, group_size=group_size))
    scales = grid.fit(weight)
    codes = grid.nearest(weight, scales)
    return codes, scales.scale, PackedWeight(pack_codes(codes, bits), scales.scale, None, bits, weight.shape[1])


@cache
def import_reason(module: str) -> str | None:
    """None if ``module`` imports, else why not. Libraries also raise at import where they dislike the GPU."""
    try:
        import_module(module)
    except Exception as error:
        return f"does not import here ({described(error)})"
    return None


def described(error: Exception) -> str:
    """Type, start of the message, file and line: libraries like to assert without a word."""
    message = (str(error).strip().splitlines() or ["no message"])[0][:160]
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {message}, {Path(where.filename).name}:{where.lineno}"


def grouping_reason(group_size: int, k: int, smallest: int) -> str | None:
    """Why no whole number of groups of at least ``smallest`` weights fills a row of K; None if one does."""
    if group_size != PER_ROW and (group_size < smallest or k % group_size):
        return f"needs groups of at least {smallest} weights that divide K, got {group_size} and K={k}"
    return None


class TorchBf16:
    """torch.mm on the dense bf16 weight: what everybody must beat (cuBLAS)."""

    name = "torch-bf16"

    def supports(self, bits: int, group_size: int, n: int, k: int, m: int) -> str | None:
        return None if bits == 16 else f"is dense, so it is 16 bits and not {bits}"

    def prepare(self, weight: Tensor, bits: int, group_size: int) -> Prepared:
        transposed = weight.t()
        return Prepared(lambda x: torch.mm(x, transposed), weight.float(), weight.nbytes)


class TorchInt4:
    """torch's own int4 kernel, ``_weight_int4pack_mm`` (tinygemm): value = scale * (code - 8) + zero, here zero = 0."""

    name = "torch-int4"

    def supports(self, bits: int, group_size: int, n: int, k: int, m: int) -> str | None:
        if bits != 4:
            return f"has 4 bits only, not {bits}"
        if group_size not in (32, 64, 128) or k % group_size:
            return f"has groups of 32, 64 or 128 weights that divide K, got {group_size} and K={k}"
        if n % 8 or k % 32:
            return f"needs N a multiple of 8 and K of 32, got {n} and {k}"
        return None

    def prepare(self, weight: Tensor, bits: int, group_size: int) -> Prepared:
        codes, scale, packed = quantized(weight, bits, group_size)
        inner = next(tiles for tiles in (8, 4, 2) if weight.shape[1] % (16 * tiles) == 0)  # the widest loads that fit
        pairs = codes[:, ::2] << 4 | codes[:, 1::2]
        words = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), inner)
        scale_and_zero = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).contiguous()  # [G, N, 2]

        def run(x: Tensor) -> Tensor:
            y: Tensor = torch.ops.aten._weight_int4pack_mm(x, words, group_size, scale_and_zero)
            return y

        return Prepared(run, packed.decode(), words.nbytes + scale_and_zero.nbytes)


class Gemlite:
    """gemlite's A16Wn (Triton): codes along K in int32 words, the integer 2^(bits-1) subtracted, then scaled."""

    name = "gemlite"

    def supports(self, bits: int, group_size: int, n: int, k: int, m: int) -> str | None:
        if bits not in (2, 4, 8):
            return f"has 2, 4 and 8 bits, not {bits}"
        if k % 32:
            return f"needs K a multiple of 32, got {k}"
        return grouping_reason(group_size, k, 16) or import_reason("gemlite")

    def prepare(self, weight: Tensor, bits: int, group_size: int) -> Prepared:
        gemlite: Any = import_module("gemlite")
        codes, scale, packed = quantized(weight, bits, group_size)
        n, k = weight.shape
        layer = gemlite.GemLiteLinear(
            bits,
            group_size=k if group_size == PER_ROW else group_size,
            in_features=k,
            out_features=n,
            input_dtype=gemlite.DType.BF16,
            output_dtype=gemlite.DType.BF16,
        )
        layer.pack(codes, scale, zeros=2 ** (bits - 1))
        return Prepared(layer.forward, packed.decode(), layer.W_q.nbytes + layer.scales.nbytes)


class Humming:
    """humming-kernels (CUDA C++, compiled at run time): takes our words as they are, then reorders them."""

    name = "humming"

    def supports(self, bits: int, group_size: int, n: int, k: int, m: int) -> str | None:
        if not 2 <= bits <= 8:
            return f"has 2 to 8 bits, not {bits}"
        if k % 64 or n % 64:
            return f"needs N and K multiples of 64, got {n} and {k}"
        return grouping_reason(group_size, k, 16) or import_reason("humming.layer")

    def prepare(self, weight: Tensor, bits: int, group_size: int) -> Prepared:
        humming: Any = import_module("humming.layer")
        _, scale, packed = quantized(weight, bits, group_size)
        n, k = weight.shape
        layer = humming.HummingLayer(
            shape_n=n,
            shape_k=k,
            weight_config={"dtype": f"uint{bits}", "group_size": 0 if group_size == PER_ROW else group_size},
            torch_dtype=torch.bfloat16,
        ).cuda()
        layer.load_from_tensors({"weight": packed.packed, "weight_scale": scale})
        layer.transform()
        return Prepared(layer.forward, packed.decode(), layer.weight.nbytes + layer.weight_scale.nbytes)


RIVALS: tuple[Rival, ...] = (TorchBf16(), TorchInt4(), Gemlite(), Humming())


def relative_error(prepared: Prepared, x: Tensor) -> float:
    """|y - x @ reference.T| / |x @ reference.T| in the Frobenius norm, the product in float64."""
    exact = x.double() @ prepared.reference.double().t()
    return float((prepared(x).double() - exact).norm() / exact.norm())


def trial(rival: Rival, weight: Tensor, bits: int, group_size: int, tokens: tuple[int, ...]) -> Prepared | str:
    """``rival`` ready to be timed with each M of ``tokens``, or why it cannot be, wrong results included.

    Runs once for every M, which also makes the rival compile and tune.
    """
    n, k = weight.shape
    for m in tokens:
        reason = rival.supports(bits, group_size, n, k, m)
        if reason is not None:
            return f"{rival.name} {reason}"
    try:
        prepared = rival.prepare(weight, bits, group_size)
        for m in tokens:
            x = torch.randn(m, k, device=weight.device, dtype=torch.bfloat16)
            error = relative_error(prepared, x)
            if not error <= MAX_RELATIVE_ERROR:  # NaN is not
                return f"{rival.name} is wrong at M={m}: relative error {error:.3g} against its own decoded weight"
    except Exception as error:
        return f"{rival.name} failed ({described(error)})"
    return prepared
