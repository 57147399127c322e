"""A weight under training in four bytes: a 16-bit number whose first bits are its code, and Adam's moments.

    u [N, K] in [0, 1), held as u * 2^16 (less 2^15: torch has no arithmetic on uint16)
    code = floor(u * 2^bits): the first ``bits`` bits.   w_hat = scale * (code - zero)

So u * 2^bits is the weight in grid steps, counted from the lower edge of the lowest code's cell, and at 3 bits 2^-13 of
a step is the least that can change. The model runs on w_hat; its gradient counts as that of u (the straight-through
estimator, arXiv 1308.3432), also at both ends of the grid, where u stops. One step of Adam, without weight decay:

    u <- u - lr * (m / sqrt(v)) with the usual bias corrections, lr in grid steps

The size of a scale cancels in m / sqrt(v), so the gradient is taken with respect to w_hat, and has its scale's sign. No
gradient is kept: the update is made as soon as the backward pass has that of the layer, while those of the layers below
it do not exist yet. Where several windows make a step together, their sum is kept: 4 bytes a weight more, of all layers
at once.

Where several processes round one model (dq_runtime/ranks.py), each holds some rows of u, of the moments, of the scales
and of that sum; the codes of all are gathered when the weight is built, and of a gradient each gets the rows it holds,
summed over the processes. Random numbers are those of the whole layer, so that rows come out as in one process.

What is written here in PyTorch is the definition; CPUs run it in C++ (latent_native.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dq_runtime.grids import Grid, Scales
from dq_runtime.ranks import ALONE, Ranks, is_shared, local
from dq_runtime.rounding import latent_native
from dq_runtime.rounding.base import Choice, LayerProblem, shared, whole_choice
from dq_runtime.rounding.byte_moments import BETA1, BETA2, ByteMoments, correction, smallest
from dq_runtime.rounding.dither import Dither, chunks


class _StraightThrough(torch.autograd.Function):
    """w_hat, whose gradient is handed to a leaf that holds no numbers."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, latent: Latent) -> Tensor:
        return latent.decoded()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class Latent:
    """One layer. ``u`` int16 [N, K] as held, on fixed ``scales``, both shared out among ``ranks``; ``moments`` of this
    process's rows; ``seed``: of its stochastic rounding; ``dtype``: of the weights that the model runs on, and so of
    their gradients. Of the attributes ``u`` and ``moments`` are this process's rows, all of them where it is alone."""

    def __init__(
        self,
        grid: Grid,
        scales: Scales,
        u: Tensor,
        moments: ByteMoments,
        seed: int,
        dtype: torch.dtype,
        ranks: Ranks = ALONE,
    ) -> None:
        self._grid, self._seed, self._dtype, self._ranks, self._shape = grid, seed, dtype, ranks, u.shape
        own = local(scales.scale)
        self._signs = own.sign().unsqueeze(-1).to(dtype) if bool((own < 0).any()) else None
        self.bits = grid.spec.bits
        self.scales, self.u, self.moments = scales, local(u), moments
        self.lr = 0.0  # of the next step, in grid steps
        self.awaited = 0  # windows whose gradients come after the next one and belong to the same step
        self._sum: Tensor | None = None  # of the gradients that have come since the last step
        # Zero strides: [N, K] to autograd, 4 bytes in memory.
        self._leaf = torch.zeros((), dtype=dtype, device=u.device).expand(self._shape).detach().requires_grad_()
        self._leaf.register_post_accumulate_grad_hook(self._consume)  # type: ignore[no-untyped-call]

    @classmethod
    def start(
        cls,
        layer: LayerProblem,
        choice: Choice,
        room: float,
        seed: int,
        dtype: torch.dtype = torch.float32,
        ranks: Ranks = ALONE,
    ) -> Latent:
        """From a choice: at the original weight, but at most ``room`` grid steps from the middle of its code's cell
        (0.5: up to the edge)."""
        choice = whole_choice(choice)
        scales = choice.scales or layer.scales
        u = ranks.share(_start(layer, choice.codes, scales, room))
        moments = ByteMoments.zeros(local(u).shape, u.device)
        return cls(layer.grid, shared(scales, ranks), u, moments, seed, dtype, ranks)

    @classmethod
    def resumed(
        cls,
        layer: LayerProblem,
        name: str,
        tensors: Mapping[str, Tensor],
        seed: int,
        dtype: torch.dtype = torch.float32,
        ranks: Ranks = ALONE,
    ) -> Latent:
        """From what :meth:`tensors` gave, in as many processes or not."""
        device = layer.scales.scale.device
        held = {
            key: ranks.share(tensors[f"{name}.{key}"].to(device))
            for key in ("u", "m", "v", "scale", "zero")
            if f"{name}.{key}" in tensors
        }
        bound = tensors[f"{name}.bound"].to(device)
        moments = ByteMoments(local(held["m"]), local(held["v"]), bound, int(tensors[f"{name}.steps"]))
        return cls(layer.grid, Scales(held["scale"], held.get("zero")), held["u"], moments, seed, dtype, ranks)

    def codes(self) -> Tensor:
        """uint8, of this process's rows."""
        high = self.u.bitwise_right_shift(16 - self.bits)
        return high.add_(1 << (self.bits - 1)).to(torch.uint8)

    def decoded(self) -> Tensor:
        """w_hat [N, K], rounded once to the dtype."""
        if not is_shared(self.scales.scale) and latent_native.runs(self.u, self._dtype):
            return latent_native.weight(self.u, self.scales, self.bits, self._dtype)
        choice = whole_choice(self.choice())
        assert choice.scales is not None
        return self._grid.decode(choice.codes, choice.scales, self._dtype)

    def weight(self) -> Tensor:
        """The same; a gradient that reaches it makes a step."""
        result: Tensor = _StraightThrough.apply(self._leaf, self)  # type: ignore[no-untyped-call]
        return result

    def choice(self) -> Choice:
        """The codes as they are now, with the scales that they are meant with."""
        return Choice(self._ranks.rows_of(self.codes(), self._shape), self.scales)

    def _consume(self, leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        assert gradient is not None
        if self.awaited or self._sum is not None or self._ranks.world > 1:
            gradient = gradient.float()  # a sum of bfloat16 would lose what is small
        gradient = self._ranks.sum_rows(gradient)
        self._sum = gradient if self._sum is None else self._sum.add_(gradient)
        if not self.awaited:
            self.settle()

    def settle(self) -> None:
        """Make the step of the gradients that have come, if any has: of an expert that the last window of a step did
        not reach, nothing else will."""
        gradient, self._sum = self._sum, None
        if gradient is not None:
            self.step(gradient)

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        """One step with the KL's gradient to this process's rows of w_hat, any float dtype. Where it is not finite: in
        C++ a :class:`SpecError` and nothing changed; in PyTorch, which would have to wait for a GPU, the KL of the next
        step tells."""
        shape, device, moments = self.u.shape, self.u.device, self.moments
        if self._signs is not None:
            gradient = (gradient.view(*self._signs.shape[:2], -1) * self._signs).view(shape)
        steps = moments.steps + 1  # of this layer: an expert makes one only where a token reached it
        dither = Dither(self._shape, 3, self._seed * 1_000_003 + steps, device, self._ranks.begin(self._shape[0]))
        rate = self.lr * 2 ** (16 - self.bits)  # in units of u's last bit
        if latent_native.runs(self.u, gradient.dtype):
            latent_native.step(self.u, moments, gradient, rate, dither, self._ranks.largest)
            return
        bound = moments.bound_after(self._largest(gradient))
        least = smallest(bound)
        for rows in chunks(shape, device):
            g = gradient[rows].float()
            m, v = moments.decode(rows)
            v = v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2).clamp_(min=least)
            share = m.mul_(BETA1).add_(g, alpha=1 - BETA1).div_(v.sqrt()).mul_(correction(steps))
            moments.encode(rows, share, v, bound, (dither.of(0, rows), dither.of(1, rows)))
            moved = self.u[rows] + dither.of(2, rows).sub_(share, alpha=rate)
            self.u[rows] = moved.floor_().clamp_(-(2**15), 2**15 - 1).to(torch.int16)
        moments.bound, moments.steps = bound, steps

    def _largest(self, gradient: Tensor) -> Tensor:
        """Of the whole layer, float32 []."""
        largest = gradient.abs().max().float() if gradient.numel() else torch.zeros((), device=gradient.device)
        return self._ranks.largest(largest)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Everything that a resumed run needs, named after the layer."""
        held = {"u": self.u, "m": self.moments.m, "v": self.moments.v}
        tensors = {f"{name}.{key}": self._ranks.rows_of(rows, self._shape) for key, rows in held.items()}
        tensors |= {f"{name}.bound": self.moments.bound, f"{name}.steps": torch.tensor(self.moments.steps)}
        tensors[f"{name}.scale"] = self.scales.scale
        return tensors if self.scales.zero is None else tensors | {f"{name}.zero": self.scales.zero}


@torch.no_grad()
def _start(layer: LayerProblem, codes: Tensor, scales: Scales, room: float) -> Tensor:
    """u of the original weight, at most ``room`` grid steps from the middle of its code's cell, as it is held."""
    bits = layer.grid.spec.bits
    position = layer.grid.position(layer.weight(), scales)
    codes = codes.to(position.device)
    off = position.sub_(codes).clamp_(-room, room)
    held = off.add_(codes).add_(0.5).mul_(2 ** (16 - bits)).floor_().sub_(2**15)
    # room 0.5 would reach the next cell.
    lowest = (codes.int() - 2 ** (bits - 1)) * 2 ** (16 - bits)
    return held.int().clamp_(lowest, lowest + 2 ** (16 - bits) - 1).to(torch.int16)
