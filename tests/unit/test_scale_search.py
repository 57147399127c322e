"""The weighted search for scales, against a loop over groups and factors."""

from __future__ import annotations

import pytest
import torch
from block_fakes import GRID_CASES, FakeLayer
from torch import Tensor

from dq_runtime.grids import Scales
from dq_runtime.rounding.scale_search import FACTORS, searched_scales
from dq_runtime.spec import GridSpec


def _layer(spec: GridSpec, k: int, n: int = 4) -> tuple[FakeLayer, Tensor]:
    g = torch.Generator().manual_seed(spec.bits)
    return FakeLayer(torch.randn(n, k, generator=g), spec), torch.rand(k, generator=g) ** 4


def _error(layer: FakeLayer, scales: Scales, h: Tensor) -> Tensor:
    """[N, G], from the grid's own nearest and decode."""
    w = layer.weight()
    difference = layer.grid.decode(layer.grid.nearest(w, scales), scales) - w
    return (h * difference.square()).unflatten(1, (scales.scale.shape[1], -1)).sum(-1)


@pytest.mark.parametrize(("spec", "k"), GRID_CASES)
def test_it_finds_the_best_factor_of_every_group(spec: GridSpec, k: int) -> None:
    layer, h = _layer(spec, k)
    found = _error(layer, searched_scales(layer, h), h)
    groups = layer.weight().unflatten(1, (layer.scales.scale.shape[1], -1))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    best = _error(layer, layer.scales, h)
    for factor in FACTORS:
        top = 2**spec.bits - 1
        if spec.symmetric:
            scale = (2 * factor * torch.maximum(-low, high) / top).bfloat16()
            best = torch.minimum(best, _error(layer, Scales(-scale), h))
            trial = Scales(scale)
        else:
            scale = (factor * (high - low) / top).bfloat16()
            trial = Scales(scale, (-factor * low / scale.float()).round().clamp(0, top).to(torch.uint8))
        best = torch.minimum(best, _error(layer, trial, h))
    torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-7)


def test_large_inputs_decide() -> None:
    """The largest weight of a group lies on an input that is always 0: the range it asks for is given up."""
    w = torch.linspace(-1, 1, 16).unsqueeze(0)
    w[0, 3] = 2.0
    layer = FakeLayer(w, GridSpec(bits=3, group_size=16))
    h = torch.ones(16)
    with_it = searched_scales(layer, h)
    h[3] = 0
    without_it = searched_scales(layer, h)
    assert abs(without_it.scale.item()) <= 0.3 < 0.4 <= abs(with_it.scale.item())  # 2 / 7 = 0.286 spans [-1, 1]


def test_the_lowest_code_goes_to_the_side_of_the_largest_weight() -> None:
    """Codes of 3 bits reach from -4 to 3: {-3, .., 4} is theirs with a negative scale, without error."""
    w = torch.arange(-3, 5).float().repeat(2, 2)
    w[1] = -w[1]
    layer = FakeLayer(w, GridSpec(bits=3, group_size=16))
    found = searched_scales(layer, torch.ones(16))
    assert found.scale.tolist() == [[-1.0], [1.0]]
    assert torch.equal(layer.grid.decode(layer.grid.nearest(w, found), found), w)


def test_without_inputs_the_layers_own_scales_stay() -> None:
    for symmetric in (True, False):
        layer, h = _layer(GridSpec(bits=3, group_size=16, symmetric=symmetric), 48)
        found = searched_scales(layer, torch.zeros_like(h))
        assert torch.equal(found.scale, layer.scales.scale)


def test_a_group_of_zeros_keeps_a_scale_of_one() -> None:
    layer = FakeLayer(torch.zeros(2, 16), GridSpec(bits=3, group_size=16))
    assert searched_scales(layer, torch.ones(16)).scale.tolist() == [[1.0], [1.0]]
