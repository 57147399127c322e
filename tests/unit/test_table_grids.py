"""Grids of tabulated levels: their values, scales, neighbours; the kernels that decode them; rounding on them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dq_runtime.backends import cpu_prepared, dispatch
from dq_runtime.backends.base import Call
from dq_runtime.backends.training import Lerp
from dq_runtime.backends.training_reference import lerp_weight
from dq_runtime.cli.quantize import GRID_NAMES as SHOWN_NAMES
from dq_runtime.errors import SpecError
from dq_runtime.grids import GRIDS
from dq_runtime.grids.block_grids import shift_of
from dq_runtime.levels import E2M1, LEVELS, ordered, sign_magnitude
from dq_runtime.modules.ops import qmm
from dq_runtime.modules.quant_linear import QuantLinear
from dq_runtime.modules.student_linear import StudentLinear
from dq_runtime.packing import PackedWeight, pack_codes
from dq_runtime.packing.bridge import host_weight_of
from dq_runtime.packing.float4 import e8m0_of, float4_tensors, shared_shift
from dq_runtime.spec import GRID_NAMES, GridSpec

TABLES = tuple(LEVELS)
EPS = 2.0**-23
N, K = 20, 192


def grid_of(name: str, **given: Any) -> Any:
    spec = GridSpec.named(name, **given)
    return GRIDS.get(spec.name)(spec)


def weights(n: int = N, k: int = K) -> Tensor:
    """Ordinary weights, an outlier, a one-sided row, exact zeros, a row and a group of zeros, magnitudes far apart."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(n * 1000 + k)) * 0.05
    w[1, 7] = 3.0
    w[2] = w[2].abs()
    w[3, ::2] = 0
    w[4] = 0
    w[5, :64] = 0
    w[6] *= 1e-3
    return w


def packed(name: str, n: int = N, k: int = K, group: int | None = None, dtype: str | None = None) -> PackedWeight:
    """Random codes on scales fitted to random weights."""
    grid = grid_of(name, group_size=group, scale_dtype=dtype)
    scales = grid.fit(weights(n, k))
    codes = torch.randint(0, 16, (n, k), generator=torch.Generator().manual_seed(k), dtype=torch.uint8)
    return PackedWeight(pack_codes(codes, 4), scales.scale, None, 4, k, name)


def decoded(w: PackedWeight) -> Tensor:
    """The definition in float64, written out."""
    levels = torch.tensor(LEVELS[w.form], dtype=torch.float64)[w.codes().long()]
    return levels * w.scale.double().repeat_interleave(w.group_size, 1)


def test_levels_ascend_and_codes_of_e2m1_are_those_of_the_format() -> None:
    for levels in LEVELS.values():
        assert len(levels) == 16
        assert list(levels) == sorted(levels)
        assert 0.0 in levels
    # Sign, two bits of exponent with bias 1, one of mantissa (OCP MX v1.0, section 5.3.3).
    for stored in range(16):
        exponent, mantissa = stored >> 1 & 3, stored & 1
        magnitude = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
        value = E2M1[ordered(stored)]
        assert value == (-magnitude if stored & 8 else magnitude)
        assert str(value).startswith("-") == bool(stored & 8), "-0 keeps its sign"
        assert sign_magnitude(ordered(stored)) == stored


def test_nf4_are_quantiles_of_the_normal_distribution() -> None:
    """QLoRA's construction: 8 quantiles on the positive side, 7 on the negative, scaled to magnitude 1, and zero."""
    normal = torch.distributions.Normal(0.0, 1.0)
    offset = 0.9677083
    positive = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    levels = torch.cat([negative, torch.zeros(1), positive.flip(0)]) / positive.max()
    torch.testing.assert_close(levels, torch.tensor(LEVELS["nf4"]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("rule", ["absmax", "mse"])
@pytest.mark.parametrize("name", TABLES)
def test_neighbours_position_and_nearest(name: str, rule: str) -> None:
    grid, w = grid_of(name, scale=rule), weights()
    scales = grid.fit(w)
    assert scales.zero is None
    assert bool((scales.scale > 0).all())
    lo, hi = grid.neighbours(w, scales)
    between = lo < hi
    assert bool((hi[between] == lo[between] + 1).all())
    assert bool((grid.decode(lo, scales) <= w)[between].all())
    assert bool((w <= grid.decode(hi, scales))[between].all())
    ends = [grid.decode(torch.full_like(lo, code), scales) for code in (0, 15)]
    assert not bool(between[(w < ends[0]) | (w > ends[1])].any())
    distances = torch.stack([(grid.decode(torch.full_like(lo, c), scales).double() - w).abs() for c in range(16)])
    nearest = grid.nearest(w, scales)
    error = (grid.decode(nearest, scales).double() - w).abs()
    step = scales.scale.double().repeat_interleave(K // scales.scale.shape[1], 1)
    assert bool((error <= distances.amin(0) + 2**-20 * step).all())
    assert bool(((nearest == lo) | (nearest == hi)).all())
    assert bool((grid.decode(grid.nearest(w, scales), scales)[4] == 0).all())
    assert bool((grid.decode(nearest, scales)[3, ::2] == 0).all())
    # lo and the position together are the weight: what the rounding loop calls the teacher.
    lerp = Lerp(lo, scales.scale, None, 4, K, name)
    torch.testing.assert_close(lerp_weight(lerp, grid.position(w, scales) - lo, torch.float32), w, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", TABLES)
def test_the_search_is_no_worse_than_absmax(name: str) -> None:
    w, errors = weights(), []
    for rule in ("mse", "absmax"):
        grid = grid_of(name, scale=rule)
        scales = grid.fit(w)
        errors.append(float((grid.decode(grid.nearest(w, scales), scales) - w).square().sum()))
    assert errors[0] < errors[1]


def test_block_scales_are_those_of_their_formats() -> None:
    w = weights()
    scale = grid_of("mxfp4").fit(w).scale.float()
    assert bool((torch.frexp(scale)[0] == 0.5).all())
    largest = w.view(N, -1, 32).abs().amax(-1)
    there = largest > 0
    assert bool(((largest >= 4 * scale) & (largest < 8 * scale))[there].all())
    scale = grid_of("nvfp4").fit(w).scale.double()
    moved = scale * 2.0 ** shift_of(3.0 / 6)
    assert torch.equal(moved.to(torch.float8_e4m3fn).double(), moved)
    assert 224 < float(moved.max()) <= 448


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1e6, 1e30])
def test_tiny_and_huge_weights_give_finite_positive_scales(name: str, magnitude: float) -> None:
    grid, w = grid_of(name), weights() / 3 * magnitude
    scales = grid.fit(w)
    assert bool(torch.isfinite(scales.scale).all())
    assert bool((scales.scale > 0).all())
    assert float((grid.decode(grid.nearest(w, scales), scales) - w).abs().max()) <= 0.34 * magnitude


def test_names_and_what_they_mean() -> None:
    assert SHOWN_NAMES == GRID_NAMES
    assert GridSpec.named("gguf:q4_0") == GridSpec("int", 4, 32, True, "absmax", "float16")
    assert GridSpec.named("gguf:q8_0", bits=8, scale="mse") == GridSpec("int", 8, 32, True, "mse", "float16")
    assert GridSpec.named("int", bits=2, group_size=None) == GridSpec(bits=2)
    assert GridSpec.named("nvfp4") == GridSpec("nvfp4", 4, 16)
    with pytest.raises(SpecError, match="gguf:q4_0 means group_size 32, got 64"):
        GridSpec.named("gguf:q4_0", group_size=64)
    with pytest.raises(SpecError, match="nf4 means symmetric True"):
        GridSpec.named("nf4", symmetric=False)
    with pytest.raises(SpecError, match="unknown grid 'q4'"):
        GridSpec.named("q4")
    with pytest.raises(SpecError, match="grid nf4 has 4 bits and no zero points, got 3 bits"):
        GridSpec("nf4", 3)
    with pytest.raises(SpecError, match="mxfp4 has groups of 32"):
        GridSpec("mxfp4", 4, 64)


# --- the kernels -----------------------------------------------------------------------------------------------------

SHAPES = ((20, 192, None, None), (67, 576, 64, "bfloat16"), (9, 96, 16, "float16"), (17, 77, -1, "float16"))


def table_weights() -> list[Any]:
    cases = [(name, n, k, g, d) for name in ("nf4", "fp4") for n, k, g, d in SHAPES[1:]]
    return [*cases, *((name, 33, 192, None, None) for name in ("mxfp4", "nvfp4"))]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(("name", "n", "k", "group", "dtype"), table_weights())
def test_every_backend_decodes_tables(
    backend: str, name: str, n: int, k: int, group: int | None, dtype: str | None
) -> None:
    w = packed(name, n, k, group, dtype)
    chosen = dispatch.backend(backend)
    x = torch.randn(70, k, generator=torch.Generator().manual_seed(3))
    if dispatch.refusal(backend, Call.qmm(x, w)) is not None:
        pytest.skip(str(dispatch.refusal(backend, Call.qmm(x, w))))
    exact, size = x.double() @ decoded(w).T, x.double().abs() @ decoded(w).abs().T
    assert torch.equal(w.decode().double(), decoded(w).float().double())
    ready = chosen.prepare(w, torch.float32)
    for m in (1, 2, 4, 5, 8, 16, 17, 70):
        y = chosen.qmm(x[:m], w)
        assert bool(((y - exact[:m]).abs() <= (k + 2) * EPS * size[:m]).all())
        if ready is not None:
            y = chosen.qmm_prepared(x[:m], ready)
            assert bool(((y - exact[:m]).abs() <= (k + 2) * EPS * size[:m]).all())


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("name", "n", "k", "group", "dtype"), table_weights())
def test_integer_activations_meet_the_levels_as_bytes(
    name: str, n: int, k: int, group: int | None, dtype: str | None
) -> None:
    """With 15-bit activations the error is theirs, half of 1/256 of a step of their group's, and for nf4 that of its
    bytes: half a step of 1/127 of the largest level."""
    pytest.importorskip("dq_runtime._native")
    w = packed(name, n, k, group, dtype)
    layout = cpu_prepared.plan([cpu_prepared.Part(host_weight_of(w))], n, exact=False)
    assert layout.storage == cpu_prepared.TABLE
    ready = cpu_prepared.prepare(layout, cpu_prepared.Arena(layout.nbytes), 1)
    x = torch.randn(40, k, generator=torch.Generator().manual_seed(4))
    dense = decoded(w)
    size = x.double().abs() @ dense.abs().T
    bytes_off = 0.5 / 127 if name == "nf4" else 0.0
    scale = w.scale.double().repeat_interleave(w.group_size, 1)
    step = x.view(40, -1, layout.group).abs().amax(-1).double() / 127
    per_group = dense.view(n, -1, layout.group).abs().sum(-1).T
    for m in (1, 3, 4, 40):
        y = torch.from_numpy(cpu_prepared.qmm_prepared(x[:m].numpy(), ready, False, 1))
        activations = step[:m] @ per_group * (0.51 / 256 if m <= 4 else 0.51)
        levels = x[:m].double().abs() @ scale.T * bytes_off * 1.01
        bound = activations + levels + (k + 4) * EPS * size[:m]
        assert bool(((y - x[:m].double() @ dense.T).abs() <= bound).all())


def test_the_bytes_of_e2m1_are_exact() -> None:
    for form in TABLES:
        levels = cpu_prepared.levels_of(form)
        off = max(abs(levels.step * (b - levels.middle) - v) for b, v in zip(levels.bytes, levels.values, strict=True))
        assert off <= (0.5 / 127 if form == "nf4" else 0)
        assert all(0 <= b <= 255 for b in levels.bytes)


def test_the_gradient_to_the_input_and_prepared_linears() -> None:
    w = packed("nf4", 20, 192, 64)
    x = torch.randn(3, 192, generator=torch.Generator().manual_seed(5), requires_grad=True)
    qmm(x, w).square().sum().backward()
    dense = decoded(w).float()
    y = x.detach() @ dense.T
    torch.testing.assert_close(x.grad, 2 * y @ dense, rtol=1e-5, atol=1e-5)
    torch.library.opcheck(torch.ops.dq_runtime.qmm.default, (x.detach(), w.packed, w.scale, None, 4, 192, "nf4"))
    linear = QuantLinear(w, None)
    linear.prepare(torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(linear(x.detach()), y, rtol=1e-5, atol=1e-5)


# --- rounding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_the_student_s_gradient_is_that_of_its_weight(name: str) -> None:
    w = weights()
    student = StudentLinear(w, None, grid_of(name))
    torch.testing.assert_close(student.weight(), w, rtol=0, atol=1e-6)
    student.begin_relaxation()
    start = torch.rand(N, K, generator=torch.Generator().manual_seed(6)) * student.free
    x = start.double().requires_grad_()
    levels = torch.tensor(LEVELS[name], dtype=torch.float64)
    lo = student.lo.long()
    step = torch.where(student.free, levels[(lo + 1).clamp(max=15)] - levels[lo], 1.0)
    scale = student.scale.double().repeat_interleave(K // student.scale.shape[1], 1)
    inputs = torch.randn(4, K, generator=torch.Generator().manual_seed(7))
    (inputs.double() @ (scale * (levels[lo] + x * step)).T).square().sum().backward()
    with torch.no_grad():
        student.x.copy_(start)
    student.x.requires_grad_()
    from dq_runtime.modules.training_ops import lerp_mm

    lerp_mm(inputs, student.x, student.lerp, torch.float32).square().sum().backward()
    free = student.free
    torch.testing.assert_close(student.x.grad.double()[free], x.grad[free], rtol=2e-4, atol=1e-4)
    free_steps = (scale * step)[free]
    assert student.mean_squared_step() > 0.1 * float(free_steps.square().mean())


# --- on disk ---------------------------------------------------------------------------------------------------------


def test_layers_share_their_power_of_two_where_it_is_exact() -> None:
    small = packed("nvfp4")
    ordinary = torch.rand(small.scale.shape, generator=torch.Generator().manual_seed(8)) * 400 + 40
    small = replace(small, scale=(ordinary.to(torch.float8_e4m3fn).float() / 4096).bfloat16())
    large = replace(small, scale=small.scale * 4)
    shift = shared_shift([small, large])
    stored = [float4_tensors("x", w, shift) for w in (small, large)]
    assert stored[0]["weight_global_scale"] == stored[1]["weight_global_scale"] == 2.0**shift
    for w, tensors in zip((small, large), stored, strict=True):
        assert torch.equal(tensors["weight_scale"].double() / tensors["weight_global_scale"], w.scale.double())
    far = replace(large, scale=large.scale * 2.0**30)  # too far for one e4m3 to hold both
    shift = shared_shift([small, far])
    ours = float4_tensors("x", small, shift)["weight_global_scale"]
    assert ours != float4_tensors("x", far, shift)["weight_global_scale"]
    with pytest.raises(SpecError, match="no 8-bit floats"):
        float4_tensors("x", replace(small, scale=small.scale * 1.1))
    with pytest.raises(SpecError, match="no power of two"):
        e8m0_of(torch.tensor([[1.5]]).bfloat16())
    assert e8m0_of(torch.tensor([[2.0**-127, 1.0, 2.0**127]]).bfloat16()).tolist() == [[0, 127, 254]]
