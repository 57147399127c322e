"""What every registered grid of evenly spaced levels promises, over bits, symmetry, group size, scale rule and dtype.

Other grids stand in test_table_grids.py."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch

from dq_runtime.errors import SpecError
from dq_runtime.grids import GRIDS
from dq_runtime.levels import LEVELS
from dq_runtime.packing import pack_codes, unpack_codes
from dq_runtime.spec import GROUP_SIZES, PER_ROW, SCALE_DTYPES, SCALE_RULES, GridSpec

N, K = 12, 192
BITS = (2, 3, 4, 8)
EVEN = [name for name in GRIDS if name not in LEVELS]


def combinations() -> list[Any]:
    axes = itertools.product(EVEN, BITS, (True, False), (16, 64, PER_ROW), SCALE_RULES, SCALE_DTYPES)
    return [
        pytest.param(GridSpec(n, b, g, s, r, d), id=f"{n}-{b}bit-{'sym' if s else 'asym'}-g{g}-{r}-{d}")
        for n, b, s, g, r, d in axes
    ]


every_spec = pytest.mark.parametrize("spec", combinations())


def build(spec: GridSpec) -> Any:
    return GRIDS.get(spec.name)(spec)


@cache
def fitted(spec: GridSpec) -> tuple[Any, torch.Tensor, Any]:
    """Grid, ordinary weights and their scales; once a spec, because the MSE search is what takes the time."""
    grid, w = build(spec), weights()
    return grid, w, grid.fit(w)


def weights(seed: int = 0) -> torch.Tensor:
    """Ordinary weights, a row with an outlier, one-sided rows, constants, exact zeros: what real layers contain."""
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) * 0.05
    w[1, 7] = 3.0
    w[2] = w[2].abs()
    w[3] = -w[3].abs()
    w[4] = 0.25
    w[5, ::2] = 0.0
    w[6] = 0.0
    w[7, :64] = 0.0
    return w


def per_weight(scale: torch.Tensor, k: int = K) -> torch.Tensor:
    return scale.double().repeat_interleave(k // scale.shape[1], dim=1)


def decode_range(grid: Any, scales: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and largest value each weight may take."""
    lowest = torch.zeros(N, K, dtype=torch.uint8)
    return grid.decode(lowest, scales), grid.decode(lowest + (2**grid.spec.bits - 1), scales)


@every_spec
def test_scales_have_the_promised_shape_dtype_and_sign(spec: GridSpec) -> None:
    _, _, scales = fitted(spec)
    shape = (N, spec.groups(K))
    assert scales.scale.shape == shape
    assert scales.scale.dtype is getattr(torch, spec.scale_dtype)
    assert bool(torch.isfinite(scales.scale).all())
    assert bool((scales.scale > 0).all())
    if spec.symmetric:
        assert scales.zero is None
    else:
        assert scales.zero is not None
        assert scales.zero.dtype is torch.uint8
        assert scales.zero.shape == shape
        assert int(scales.zero.max()) < 2**spec.bits


@every_spec
def test_neighbours_enclose_the_weight_exactly(spec: GridSpec) -> None:
    grid, w, scales = fitted(spec)
    lo, hi = grid.neighbours(w, scales)
    assert lo.dtype is torch.uint8
    assert hi.dtype is torch.uint8
    assert int(hi.max()) < 2**spec.bits
    between = lo < hi
    assert bool((hi[between] == lo[between] + 1).all())
    # An integer of at most 8 bits times a 16-bit float is exact in float32, so no tolerance is needed.
    assert bool((grid.decode(lo, scales) <= w)[between].all())
    assert bool((w <= grid.decode(hi, scales))[between].all())


@every_spec
def test_neighbours_coincide_exactly_outside_the_grid_or_on_one_of_its_values(spec: GridSpec) -> None:
    grid, w, scales = fitted(spec)
    lo, hi = grid.neighbours(w, scales)
    bottom, top = decode_range(grid, scales)
    outside = (w < bottom) | (w > top)
    same = lo == hi
    assert bool(same[outside].all())
    assert bool((hi[w > top] == 2**spec.bits - 1).all())
    assert bool((lo[w < bottom] == 0).all())
    # Inside, coincidence means the weight is that value, up to the rounding of w / scale + zero in float32.
    distance = (grid.decode(lo, scales).double() - w.double()).abs() / per_weight(scales.scale)
    assert float(distance[same & ~outside].max()) <= 2**-15


@every_spec
def test_nearest_is_the_closer_neighbour(spec: GridSpec) -> None:
    grid, w, scales = fitted(spec)
    nearest, (lo, hi) = grid.nearest(w, scales), grid.neighbours(w, scales)
    assert bool(((nearest == lo) | (nearest == hi)).all())
    error = (grid.decode(nearest, scales).double() - w.double()).abs()
    slack = 2**-15 * per_weight(scales.scale)  # ties that float32 cannot tell apart
    for other in (lo, hi):
        assert bool((error <= (grid.decode(other, scales).double() - w.double()).abs() + slack).all())


@every_spec
def test_position_is_the_inverse_of_decode(spec: GridSpec) -> None:
    grid, _, scales = fitted(spec)
    codes = torch.randint(0, 2**spec.bits, (N, K), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    values = grid.decode(codes, scales)
    torch.testing.assert_close(grid.position(values, scales), codes.float(), rtol=0, atol=2**-14)
    assert torch.equal(grid.nearest(values, scales), codes)


@every_spec
def test_codes_survive_packing(spec: GridSpec) -> None:
    grid, w, scales = fitted(spec)
    codes = grid.nearest(w, scales)
    assert torch.equal(unpack_codes(pack_codes(codes, spec.bits), spec.bits, K), codes)


@every_spec
def test_a_group_of_zeros_decodes_to_exactly_zero(spec: GridSpec) -> None:
    grid, w, scales = fitted(spec)
    values = grid.decode(grid.nearest(w, scales), scales)
    assert bool((values[6] == 0).all())
    if spec.group_size != PER_ROW:
        assert bool((values[7, :64] == 0).all())
    assert bool((values[5, ::2] == 0).all()), "zero itself is a grid value in every group"


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", SCALE_DTYPES)
def test_symmetric_absmax_scale_is_that_of_gptq_rounded_to_its_dtype(bits: int, dtype: str) -> None:
    grid, w, scales = fitted(GridSpec("int", bits, 64, True, "absmax", dtype))
    absmax = w.view(N, -1, 64).abs().amax(-1)
    exact = torch.where(absmax == 0, 1.0, 2 * absmax / (2**bits - 1))  # any scale decodes a group of zeros
    assert torch.equal(scales.scale, exact.to(getattr(torch, dtype)))
    middle = torch.full((N, K), 2 ** (bits - 1), dtype=torch.uint8)
    assert bool((grid.decode(middle, scales) == 0).all()), "the zero point is the middle code 2^(b-1)"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", SCALE_DTYPES)
def test_asymmetric_absmax_covers_the_range_of_the_group(bits: int, dtype: str) -> None:
    spec = GridSpec("int", bits, 64, False, "absmax", dtype)
    grid, w = build(spec), weights()
    scales = grid.fit(w)
    bottom, top = decode_range(grid, scales)
    # Half a step for rounding the zero point, and the scale's own rounding over the whole range.
    slack = per_weight(scales.scale) * (0.5 + 2**bits * torch.finfo(getattr(torch, dtype)).eps)
    assert bool((w.double() >= bottom.double() - slack).all())
    assert bool((w.double() <= top.double() + slack).all())


@pytest.mark.parametrize("name", EVEN)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, 64, PER_ROW])
@pytest.mark.parametrize("dtype", SCALE_DTYPES)
def test_mse_scales_never_have_a_larger_squared_error_than_absmax(
    name: str, bits: int, symmetric: bool, group_size: int, dtype: str
) -> None:
    errors = []
    for rule in ("mse", "absmax"):
        spec = GridSpec(name, bits, group_size, symmetric, rule, dtype)
        grid, w, scales = fitted(spec)
        residual = grid.decode(grid.nearest(w, scales), scales).double() - w.double()
        errors.append(residual.square().view(N, spec.groups(K), -1).sum(-1))
    assert bool((errors[0] <= errors[1] * (1 + 1e-5) + 1e-12).all())
    if bits <= 4:
        assert errors[0].sum() < errors[1].sum()


@pytest.mark.parametrize("dtype", SCALE_DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("magnitude", [1e-38, 1e-30, 1e-6, 1e3, 6e4])
def test_tiny_and_huge_weights_give_finite_positive_scales(
    dtype: str, symmetric: bool, rule: str, magnitude: float
) -> None:
    spec = GridSpec("int", 3, 64, symmetric, rule, dtype)
    grid, w = build(spec), weights() / 3 * magnitude
    scales = grid.fit(w)
    assert bool(torch.isfinite(scales.scale).all())
    assert bool((scales.scale > 0).all())
    values = grid.decode(grid.nearest(w, scales), scales)
    assert bool(torch.isfinite(values).all())
    assert float((values - w).abs().max()) <= 3.1 * magnitude


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rule", SCALE_RULES)
def test_a_scale_that_just_fits_float16_is_not_refused_by_the_search_around_it(symmetric: bool, rule: str) -> None:
    w = torch.zeros(1, 64)
    w[0, :2] = torch.tensor([-1.0, 1.0]) * 65000 * 3.5  # absmax scale at 3 bits: 65000, below 65504
    scales = build(GridSpec("int", 3, 64, symmetric, rule, "float16")).fit(w)
    assert bool(torch.isfinite(scales.scale).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_scale_beyond_float16_is_refused_with_the_way_out(symmetric: bool) -> None:
    with pytest.raises(SpecError, match=r"float16 cannot hold.*bfloat16"):
        build(GridSpec("int", 3, 64, symmetric, "absmax", "float16")).fit(torch.full((2, 64), 1e6))


@pytest.mark.parametrize("name", EVEN)
@pytest.mark.parametrize("group_size", [g for g in GROUP_SIZES if g != PER_ROW])
def test_a_ragged_last_group_is_refused_naming_the_group_size(name: str, group_size: int) -> None:
    k = group_size * 2 + 8
    with pytest.raises(SpecError, match=rf"in_features {k} is not a multiple of group size {group_size}.*row"):
        build(GridSpec(name, 3, group_size)).fit(torch.randn(4, k))


@pytest.mark.parametrize("name", EVEN)
def test_a_row_of_any_length_can_be_one_group(name: str) -> None:
    grid = build(GridSpec(name, 3, PER_ROW))
    w = torch.randn(4, 77, generator=torch.Generator().manual_seed(0))
    assert grid.fit(w).scale.shape == (4, 1)


@pytest.mark.parametrize(
    "bad",
    [{"bits": 1}, {"bits": 9}, {"bits": True}, {"group_size": 48}, {"scale": "max"}, {"scale_dtype": "float32"}],
    ids=str,
)
def test_a_grid_outside_the_contract_cannot_be_described(bad: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=next(iter(bad))):
        GridSpec(**bad)
