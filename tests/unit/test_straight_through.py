"""Quantize-dequantize with gradients, against the same formula composed of torch operations."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from block_fakes import GRID_CASES, FakeLayer
from torch import Tensor

from dq_runtime.grids import Scales
from dq_runtime.rounding.straight_through import RANGE, LearnedScales, codes, rate_factor, served, snap
from dq_runtime.spec import GridSpec


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _rounded(x: Tensor) -> Tensor:
    """round(x) whose gradient is that of x."""
    return x + (x.round() - x).detach()


def _definition(w: Tensor, s: Tensor, z: Tensor, top: int, v: Tensor | None) -> Tensor:
    size = w.shape[1] // s.shape[1]
    s, z = s.repeat_interleave(size, 1), z.repeat_interleave(size, 1)
    q = _rounded(w / s + (0 if v is None else v) + z).clamp(0, top)
    return s * (q - z)


@pytest.mark.parametrize("offsets", [True, False])
@pytest.mark.parametrize(("n", "k", "groups"), [(1, 7, 1), (5, 48, 3), (192, 576, 9)])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_snap_and_its_gradients_are_those_of_the_definition(
    bits: int, n: int, k: int, groups: int, offsets: bool
) -> None:
    top = 2**bits - 1
    w = _random(n, k)
    s = 2.0 / top * (0.5 + torch.rand(n, groups, generator=torch.Generator().manual_seed(1)))  # a share is clipped
    z = torch.randint(0, top + 1, (n, groups), generator=torch.Generator().manual_seed(2)).float()
    v = _random(n, k, seed=3) * 0.3 if offsets else None
    gradient = _random(n, k, seed=4)
    results = []
    for function in (snap, _definition):
        leaves = [t.clone().requires_grad_() for t in (w, s, z, *([v] if v is not None else []))]
        out = function(*leaves[:3], top, leaves[3] if offsets else None)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, gradient)))
    clipped = (w / s.repeat_interleave(k // groups, 1) + z.repeat_interleave(k // groups, 1)).round()
    assert n * k < 20 or bool(((clipped < 0) | (clipped > top)).any()), "the clamp is exercised"
    for ours, reference in zip(*results, strict=True):
        # Sums of K/G terms of size up to top * |gradient| (about 4): float32 loses K/G * 2^-24 of that.
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=4 * top * k / groups * 2.0**-24)


@pytest.mark.parametrize(("spec", "k"), GRID_CASES)
def test_codes_decode_to_exactly_what_snap_returned(spec: GridSpec, k: int) -> None:
    layer = FakeLayer(_random(6, k), spec)
    scales = LearnedScales(layer.grid, layer.scales)
    v = 0.5 * _random(6, k, seed=1)
    s, z = scales.now()
    got = Scales(*vars(scales.held(s, z)).values())
    q = codes(layer.weight(), s, z, scales.top, v)
    assert torch.equal(layer.grid.decode(q, got), snap(layer.weight(), s, z, scales.top, v))


@pytest.mark.parametrize(("spec", "k"), GRID_CASES)
def test_learned_scales_begin_as_the_start_and_plain_codes_as_nearest(spec: GridSpec, k: int) -> None:
    layer = FakeLayer(_random(6, k), spec)
    scales = LearnedScales(layer.grid, layer.scales)
    s, z = scales.now()
    held = scales.held(s, z)
    assert torch.equal(held.scale, layer.scales.scale)
    assert (held.zero is None) == spec.symmetric
    if layer.scales.zero is not None:
        assert held.zero is not None
        assert torch.equal(held.zero, layer.scales.zero)
    assert torch.equal(codes(layer.weight(), s, z, scales.top), layer.grid.nearest(layer.weight(), layer.scales))


def test_factors_move_the_ends_of_the_range() -> None:
    """2 bits, s0 = 1, z0 = 1: the range is [-1, 2]. Its lower end doubled and its upper end halved: [-2, 1], s = 1,
    z = 2; both halved: [-0.5, 1], s = 0.5, z = 1."""
    layer = FakeLayer(torch.tensor([[-1.0, 2.0, 0.5]]), GridSpec(bits=2, group_size=-1, symmetric=False))
    assert layer.scales.scale.item() == 1
    scales = LearnedScales(layer.grid, layer.scales)
    assert scales.low is not None
    for high, low, expected in ((0.5, 2.0, (1.0, 2.0)), (0.5, 0.5, (0.5, 1.0))):
        s, z = scales.now([torch.full((1, 1), high), torch.full((1, 1), low)])
        assert (s.item(), z.item()) == expected


def test_factors_stay_in_their_range_and_scales_positive() -> None:
    for symmetric in (True, False):
        layer = FakeLayer(_random(2, 16), GridSpec(bits=3, group_size=16, symmetric=symmetric))
        scales = LearnedScales(layer.grid, layer.scales)
        with torch.no_grad():
            for factor in scales.parameters:
                factor.copy_(torch.tensor([[-5.0], [9.0]]))
        scales.confine()
        assert all(factor.flatten().tolist() == pytest.approx(list(RANGE)) for factor in scales.parameters)
        assert bool((scales.now()[0] > 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_served_scales_are_of_the_dtype_finite_not_0_and_let_the_gradient_through(dtype: torch.dtype) -> None:
    s = torch.tensor([-1.0, 0.0, 1e-30, 0.1, 1.0 + 2.0**-12, 1e38, 3e38, -1e38, -1e-45]).requires_grad_()
    out = served(s, dtype)
    assert torch.equal(out.to(dtype).float(), out)
    assert out.sign().tolist() == [-1, 1, 1, 1, 1, 1, 1, -1, -1]
    assert bool(out.isfinite().all())
    assert torch.equal(out[[0, 3, 4]].detach(), s[[0, 3, 4]].detach().to(dtype).float())
    gradient = _random(9)
    assert torch.equal(torch.autograd.grad(out, s, gradient)[0], gradient)


def test_per_group_scale_gradient_sums_its_own_group_only() -> None:
    for group, row in product(range(3), range(2)):
        s = torch.full((2, 3), 0.5).requires_grad_()
        gradient = torch.zeros(2, 12)
        gradient[row, 4 * group] = 1.0
        (ds,) = torch.autograd.grad(snap(_random(2, 12), s, torch.full((2, 3), 4.0), 7), s, gradient)
        assert [tuple(i) for i in ds.nonzero().tolist()] in ([], [(row, group)])


def test_rates_of_relative_changes_halve_with_every_bit_above_four() -> None:
    assert [rate_factor(bits) for bits in range(2, 9)] == [1, 1, 1, 0.5, 0.25, 0.125, 0.0625]
