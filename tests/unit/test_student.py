"""The linear that is rounded, and the model of them: the algebra, its gradients, and what it keeps in memory."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from students import student_linear, student_model
from torch import Tensor

from dq_runtime.backends.training_reference import lerp_weight
from dq_runtime.errors import SpecError
from dq_runtime.modules.kl import mean_kl
from dq_runtime.modules.quant_linear import QuantLinear
from dq_runtime.modules.student import loop_dtype_of
from dq_runtime.modules.student_linear import Mode, StudentLinear
from dq_runtime.rounding.base import Choice
from dq_runtime.runtime.dense import load_dense

M, K, N = 17, 576, 192

GRIDS: list[dict[str, Any]] = [
    {"bits": 3, "group_size": 64},
    {"bits": 3, "group_size": 64, "symmetric": False},
    {"bits": 2, "group_size": 32, "scale": "mse"},
    {"bits": 2, "group_size": 64, "symmetric": False, "scale": "mse"},
    {"bits": 4, "group_size": -1, "scale_dtype": "float16"},
    {"bits": 8, "group_size": 16},
]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _expanded(layer: StudentLinear) -> tuple[Tensor, Tensor | float]:
    """scale and zero as [N, K] in float64."""
    size = layer.in_features // layer.scale.shape[1]
    scale = layer.scale.double().repeat_interleave(size, 1)
    if layer.zero is None:
        return scale, float(2 ** (layer.grid.spec.bits - 1))
    return scale, layer.zero.double().repeat_interleave(size, 1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_teacher_reproduces_the_original_linear(grid: dict[str, Any]) -> None:
    w, bias, inputs = _random(N, K), _random(N, seed=1), _random(2, M, K, seed=2)
    layer = student_linear(w, bias, **grid)
    scale, zero = _expanded(layer)
    position = (w.double() / scale + zero).abs()
    if grid.get("scale") == "mse":
        assert ((layer.y < 0) | (layer.y > 1)).any(), "the MSE scale must clip something here"
    # Four float32 operations on numbers of the size of the position on the code axis, then one scaling.
    tolerance = 4 * 2**-24 * position.clamp(min=2.0 ** grid["bits"]) * scale
    assert bool(((layer.weight().double() - w.double()).abs() <= tolerance).all())

    exact = inputs.double() @ w.double().t() + bias.double()
    size = inputs.double().abs()
    bound = size @ tolerance.t() + (K + 2) * 2**-24 * (size @ w.double().abs().t() + bias.double().abs())
    assert bool(((layer(inputs).double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", GRIDS[:2] + GRIDS[4:5], ids=str)
def test_lerp_mm_and_both_gradients_match_autograd_of_the_formula(grid: dict[str, Any], dtype: torch.dtype) -> None:
    bias = _random(N, seed=3)
    layer = student_linear(_random(N, K), bias, **grid)
    layer.begin_relaxation()
    with torch.no_grad():
        layer.x.copy_(torch.rand(N, K, generator=torch.Generator().manual_seed(4)) * layer.free)
    layer.mode, layer.compute_dtype = Mode.RELAXED, dtype
    inputs, upstream = _random(M, K, seed=5).requires_grad_(), _random(M, N, seed=6)
    y = layer(inputs)
    assert y.dtype is torch.float32
    y.backward(upstream)

    scale, zero = _expanded(layer)
    x64, inputs64 = layer.x.detach().double().requires_grad_(), inputs.detach().double().requires_grad_()
    w64 = scale * (layer.lo.double() - zero + x64)
    y64 = inputs64 @ w64.t() + bias.double()
    y64.backward(upstream.double())

    # Relative to the sum of magnitudes: each operand and the result rounded to dtype, a float32 sum of K terms, and
    # w itself, whose float32 error is that of a number of size 2^bits before scaling.
    def check(ours: Tensor | None, exact: Tensor | None, left: Tensor, right: Tensor, depth: int) -> None:
        assert ours is not None
        assert exact is not None
        unit = 2**-24 if dtype is torch.float32 else 2**-8
        bound = (4 * unit + (depth + 4) * 2**-24) * (left.abs() @ right.abs())
        assert bool(((ours.double() - exact).abs() <= bound).all())

    w_size = w64.detach().abs() + 2.0 ** grid["bits"] * scale * (1.0 if dtype is torch.float32 else 2**-15)
    g64, i64 = upstream.double(), inputs.detach().double()
    check(y - bias, (y64 - bias.double()).detach(), i64, w_size.t(), K)
    check(inputs.grad, inputs64.grad, g64, w_size, N)
    check(layer.x.grad / scale, None if x64.grad is None else x64.grad / scale, g64.t(), i64, M)


def test_gradients_accumulate_over_calls_and_reach_only_what_asks_for_them() -> None:
    layer = student_linear(_random(N, K))
    layer.begin_relaxation()
    layer.mode = Mode.RELAXED
    inputs = _random(3, K, seed=1)
    layer(inputs).sum().backward()
    once = layer.x.grad
    assert once is not None
    once = once.clone()
    layer(inputs).sum().backward()
    torch.testing.assert_close(layer.x.grad, 2 * once)
    layer.x.requires_grad_(False)
    inputs.requires_grad_()
    layer(inputs).sum().backward()
    assert inputs.grad is not None


def test_lerp_mm_keeps_leading_dimensions() -> None:
    layer = student_linear(_random(N, K))
    layer.begin_relaxation()
    layer.mode = Mode.RELAXED
    inputs = _random(2, 3, K, seed=1).requires_grad_()
    y = layer(inputs)
    assert y.shape == (2, 3, N)
    y.sum().backward()
    assert inputs.grad is not None
    assert inputs.grad.shape == inputs.shape


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rounded_y_gives_the_nearest_codes_and_the_nearest_packed_output(grid: dict[str, Any]) -> None:
    w, inputs = _random(N, K), _random(M, K, seed=1)
    layer = student_linear(w, _random(N, seed=2), **grid)
    layer.begin_relaxation()
    with torch.no_grad():
        layer.x.copy_(layer.y.round().clamp(0, 1) * layer.free)
    nearest = layer.grid.nearest(w, layer.scales)
    ties = layer.y == 0.5  # exactly half way (about one weight in 2^16 at 8 bits) both codes are nearest
    assert torch.equal(layer.codes()[~ties], nearest[~ties])
    nearest = layer.codes()
    layer.mode = Mode.RELAXED
    relaxed = layer(inputs)
    layer.mode, layer.packed = Mode.PACKED, layer.pack(Choice(nearest))
    torch.testing.assert_close(layer(inputs), relaxed, rtol=1e-4, atol=1e-3)
    at_vertex = lerp_weight(layer.lerp, layer.x.detach(), torch.float32)
    assert torch.equal(at_vertex, layer.packed.decode())


@pytest.mark.parametrize("grid", GRIDS[:2], ids=str)
def test_packed_mode_is_the_linear_that_serves(grid: dict[str, Any]) -> None:
    bias, inputs = _random(N, seed=1), _random(M, K, seed=2)
    layer = student_linear(_random(N, K), bias, **grid)
    layer.mode, layer.packed = Mode.PACKED, layer.pack(Choice(layer.lo))
    assert torch.equal(layer(inputs), QuantLinear(layer.packed, bias)(inputs))


def test_x_exists_only_between_begin_and_end() -> None:
    layer = student_linear(_random(N, K))
    assert layer.x.numel() == 0
    assert not layer.x.requires_grad
    layer.begin_relaxation()
    assert layer.x.shape == (N, K)
    assert layer.x.requires_grad
    assert not layer.x.any()
    layer.end_relaxation()
    assert layer.x.numel() == 0
    assert not layer.x.requires_grad


def test_what_cannot_move_has_equal_neighbours_and_the_rest_lies_inside() -> None:
    layer = student_linear(_random(N, K), bits=3, group_size=64)
    inside = (layer.y >= 0) & (layer.y < 1)
    assert bool(inside[layer.free].all())
    assert 0.005 < 1 - layer.free.float().mean().item() < 0.03  # 1-3% of weights at 3 bits, group 64


@pytest.mark.parametrize("grid", GRIDS[:2], ids=str)
def test_one_copy_of_the_weight(grid: dict[str, Any]) -> None:
    """Per weight: lo 1, y 4, free 1 byte, and x 4 while it is optimised. A second copy of W would be 2 or 4 more."""

    def held(layer: StudentLinear) -> int:
        found = {}
        for tensor in [*layer.parameters(), *layer.buffers(), *(v for v in vars(layer).values())]:
            if isinstance(tensor, Tensor):
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return sum(found.values())

    layer = student_linear(_random(N, K), **grid)
    scales = layer.scale.nbytes + (0 if layer.zero is None else layer.zero.nbytes)
    assert held(layer) <= N * K * (1 + 4 + 1) + scales
    layer.begin_relaxation()
    layer.mode = Mode.RELAXED
    layer(_random(M, K, seed=1)).sum().backward()
    assert held(layer) <= N * K * (1 + 4 + 1 + 4) + scales
    layer.x.grad = None
    layer.mode = Mode.TEACHER
    layer(_random(M, K, seed=1))
    assert held(layer) <= N * K * (1 + 4 + 1 + 4) + scales


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return torch.randint(3, 260, (2, 24), generator=torch.Generator().manual_seed(0))


def test_the_teacher_of_the_whole_model_is_the_original_model(tiny_model: Path, windows: Tensor) -> None:
    original = load_dense(str(tiny_model)).model
    student = student_model(tiny_model, windows)
    student.set_mode(Mode.TEACHER)
    with torch.no_grad():
        expected = original(input_ids=windows[:1]).logits[0]
        torch.testing.assert_close(student.logits(windows[0]), expected, rtol=1e-3, atol=1e-3)


def test_kl_gradient_of_the_whole_model_agrees_with_finite_differences(tiny_model: Path, windows: Tensor) -> None:
    student = student_model(tiny_model, windows)
    student.begin()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in student.layers.values():
            layer.x.copy_(torch.rand(layer.x.shape, generator=generator) * layer.free)
    trainable = {n for n, p in student.model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.x" for name in student.layers}
    loss = student.kl(windows[1])
    assert loss.item() > 0
    loss.backward()

    def shifted(layer: StudentLinear, at: tuple[int, int], step: float) -> float:
        with torch.no_grad():
            layer.x[at] += step
            value = student.kl(windows[1]).double().item()
            layer.x[at] -= step
        return value

    checked = 0
    for layer in student.layers.values():
        assert layer.x.grad is not None
        # The largest derivative of each layer stands clear of the float32 noise of the loss.
        row, column = divmod(int(layer.x.grad.abs().argmax()), layer.in_features)
        slope = layer.x.grad[row, column].item()
        h = 0.02
        difference = (shifted(layer, (row, column), h) - shifted(layer, (row, column), -h)) / (2 * h)
        assert difference == pytest.approx(slope, rel=0.05, abs=2e-5)
        checked += 1
    assert checked == 14
    student.end()
    assert not any(p.requires_grad for p in student.model.parameters())


def test_kl_is_zero_where_x_is_y(tiny_model: Path, windows: Tensor) -> None:
    student = student_model(tiny_model, windows, bits=3, group_size=64, symmetric=False)
    student.begin()
    with torch.no_grad():
        for layer in student.layers.values():
            layer.x.copy_(layer.y)
    assert student.kl(windows[0]).item() == pytest.approx(0, abs=1e-6)


def test_kl_compares_the_student_with_the_teacher_on_that_window(tiny_model: Path, windows: Tensor) -> None:
    student = student_model(tiny_model, windows)
    student.begin()
    with torch.no_grad():
        student.set_mode(Mode.TEACHER)
        teacher = student.logits(windows[1])
        student.set_mode(Mode.RELAXED)
        relaxed = student.logits(windows[1])
    assert student.kl(windows[1]).item() == pytest.approx(mean_kl(relaxed, teacher).item(), rel=1e-6)
    assert student.kl(windows[0]).item() != pytest.approx(student.kl(windows[1]).item(), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("caps", [False, True])
def test_the_teacher_runs_once_a_window_and_its_logits_stay_the_same_to_the_bit(
    tiny_model: Path, windows: Tensor, caps: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless its logits are not what its head gives, as where a model caps them: then it runs every time."""
    student = student_model(tiny_model, windows)
    student.compute_dtype = dtype
    if caps:
        own = student.model.forward

        def capped(*args: Any, **kwargs: Any) -> Any:
            out = own(*args, **kwargs)
            out.logits = 2 * torch.tanh(out.logits / 2)
            return out

        student.model.forward = capped
    student.begin(relaxed=False)
    weights = {name: partial(torch.zeros, *layer.weight().shape) for name, layer in student.layers.items()}
    ran: list[Mode] = []
    first = next(iter(student.layers.values()))
    first.observer = lambda inputs: ran.append(first.mode)
    teachers: list[Tensor] = []
    monkeypatch.setattr("dq_runtime.modules.student.mean_kl", lambda s, t, reuse_teacher: teachers.append(t) or t.sum())
    for window in (0, 1, 0, 1, 0):
        student.kl_of(window, weights)
    assert ran.count(Mode.TEACHER) == (5 if caps else 2)
    for i, window in enumerate((0, 1, 0, 1, 0)):
        assert torch.equal(teachers[i], teachers[window])
    student.set_mode(Mode.TEACHER)
    with torch.no_grad(), student._fused():
        assert torch.equal(student.logits(windows[1]), teachers[3])
    student.end()


def test_loop_dtype_names() -> None:
    cpu = torch.device("cpu")
    assert loop_dtype_of("float32", cpu) is torch.float32
    assert loop_dtype_of("bfloat16", cpu) is torch.bfloat16
    assert loop_dtype_of("auto", cpu) in (torch.float32, torch.bfloat16)
    with pytest.raises(SpecError, match="auto, float32 or bfloat16, got 'fp8'"):
        loop_dtype_of("fp8", cpu)


def test_the_head_is_cast_once_for_a_bfloat16_loop_and_given_back(tiny_model: Path, windows: Tensor) -> None:
    """Autocast would cast it to the same bits in every pass; the embedding that it is tied to stays float32."""
    student = student_model(tiny_model, windows)
    student.compute_dtype = torch.bfloat16
    head, embedding = student.model.get_output_embeddings(), student.model.get_input_embeddings()
    original = head.weight
    assert original is embedding.weight
    student.set_mode(Mode.TEACHER)
    with torch.no_grad():
        expected = student.logits(windows[0])
        student.begin()
        assert head.weight.dtype is torch.bfloat16
        assert embedding.weight is original
        assert torch.equal(student.logits(windows[0]), expected)
    student.end()
    assert head.weight is original
    student.compute_dtype = torch.float32
    student.begin()
    assert head.weight is original
    student.end()
    assert head.weight is original
