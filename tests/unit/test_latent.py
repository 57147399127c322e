"""The four-byte latent: its moments and its step against float64 Adam, its codes, and its rounding on average."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dq_runtime.grids import GRIDS, Scales
from dq_runtime.rounding.base import Choice
from dq_runtime.rounding.byte_moments import REACH, ByteMoments
from dq_runtime.rounding.dither import Dither, chunks
from dq_runtime.rounding.latent import Latent
from dq_runtime.spec import PER_ROW, GridSpec

CPU = torch.device("cpu")


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _layer(w: Tensor, **grid: Any) -> Any:
    built = GRIDS.get("int")(GridSpec(**grid))
    return SimpleNamespace(weight=lambda: w.clone(), grid=built, scales=built.fit(w))


def _nearest(layer: Any) -> Choice:
    return Choice(layer.grid.nearest(layer.weight(), layer.scales))


GRIDS_TO_TRY = [
    (1, 16, {"bits": 2, "group_size": 16}),
    (5, 65, {"bits": 3, "group_size": PER_ROW}),
    (17, 96, {"bits": 4, "group_size": 32, "symmetric": False}),
    (3, 128, {"bits": 8, "group_size": 128, "scale_dtype": "float16"}),
    (9, 64, {"bits": 5, "group_size": 64, "symmetric": False}),
]


@pytest.mark.parametrize("room", [0.0, 0.45, 0.5])
@pytest.mark.parametrize(("n", "k", "grid"), GRIDS_TO_TRY)
def test_it_starts_with_the_codes_of_the_choice_as_near_to_the_weight_as_it_may(
    n: int, k: int, grid: dict[str, Any], room: float
) -> None:
    layer = _layer(_normal(n, k), **grid)
    codes = torch.randint(0, 2 ** grid["bits"], (n, k), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    latent = Latent.start(layer, Choice(codes), room, 0)
    assert torch.equal(latent.choice().codes, codes)
    assert torch.equal(latent.decoded(), layer.grid.decode(codes, layer.scales))
    position = (latent.u.double() + 2**15) / 2 ** (16 - grid["bits"]) - 0.5  # in codes
    wanted = codes + (layer.grid.position(layer.weight(), layer.scales) - codes).clamp(-room, room)
    # floor takes away less than one unit; the last one of the cell where room is 0.5.
    assert float((position - wanted).abs().max()) <= 2 / 2 ** (16 - grid["bits"])


def test_it_takes_the_scales_of_the_choice() -> None:
    layer = _layer(_normal(4, 32), bits=3, group_size=16, symmetric=False)
    scales = Scales(layer.scales.scale * 2, layer.scales.zero)
    codes = layer.grid.nearest(layer.weight(), scales)
    latent = Latent.start(layer, Choice(codes, scales), 0.5, 0)
    assert latent.choice().scales is scales
    assert torch.equal(latent.weight().detach(), layer.grid.decode(codes, scales))


@pytest.mark.parametrize(("n", "k", "grid"), GRIDS_TO_TRY)
def test_twenty_steps_follow_adam_in_float64(n: int, k: int, grid: dict[str, Any]) -> None:
    """m is held in steps of 4/127 of sqrt(v) and v to an eighth, both without bias: a step of Adam is off by some
    percent, and over 20 steps that averages out to less than a tenth of the way that Adam at most goes."""
    layer = _layer(_normal(n, k), **grid)
    latent = Latent.start(layer, _nearest(layer), 0.0, 3)
    unit = 2 ** (16 - grid["bits"])
    # A middle code: the walls are another test's.
    latent.u = torch.full((n, k), unit // 2, dtype=torch.int16)
    begin, lr, drift = latent.u.double(), 0.02, _normal(n, k, seed=5)
    sizes = 10.0 ** (1.5 * _normal(n, k, seed=6)).clamp(-1.5, 1.5)  # gradients over three orders of magnitude
    m = v = torch.zeros(n, k, dtype=torch.float64)
    moved = torch.zeros(n, k, dtype=torch.float64)
    for step in range(1, 21):
        gradient = sizes * (drift + _normal(n, k, seed=10 + step)) * 1e-6
        latent.lr = lr
        latent.step(gradient)
        m = 0.9 * m + 0.1 * gradient.double()
        v = 0.999 * v + 0.001 * gradient.double().square()
        moved -= lr * (m / (1 - 0.9**step)) / (v / (1 - 0.999**step)).sqrt()
    off = (latent.u.double() - begin) / unit - moved
    # Of a walk of at most 20 * lr = 0.4 steps; floor and dither add less than a unit a step, at random.
    assert float(off.square().mean().sqrt()) < 0.03 * 20 * lr + 5 / unit
    assert float(off.mean().abs()) < 0.01 * 20 * lr + 1 / unit


def test_a_gradient_that_reaches_the_weight_makes_the_step_and_is_gone() -> None:
    layer = _layer(_normal(4, 32), bits=3, group_size=32)
    latent, alone = (Latent.start(layer, _nearest(layer), 0.45, 7) for _ in range(2))
    latent.lr = alone.lr = 0.3
    factors = _normal(4, 32, seed=2)
    (factors * latent.weight()).sum().backward()
    alone.step(factors)
    assert latent.moments.steps == alone.moments.steps == 1
    assert torch.equal(latent.u, alone.u)
    assert latent._leaf.grad is None
    assert not torch.equal(latent.u, Latent.start(layer, _nearest(layer), 0.45, 7).u)


def test_a_step_goes_against_the_gradient_where_a_scale_is_negative_too() -> None:
    """Both groups of the mirrored weight say the same with other codes: after a step too."""
    w = _normal(4, 32)
    layer, scales = _layer(w, bits=3, group_size=16), _layer(w, bits=3, group_size=16).scales.scale
    signs = torch.tensor([1.0, -1.0]).bfloat16()
    codes = torch.randint(2, 6, (4, 32), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    mirrored = codes.clone()
    mirrored[:, 16:] = 8 - codes[:, 16:]
    one, other = (
        Latent.start(layer, Choice(c, Scales(s)), 0.0, 7) for c, s in ((codes, scales), (mirrored, scales * signs))
    )
    assert torch.equal(one.decoded(), other.decoded())
    for latent in (one, other):
        latent.lr = 1.0  # of a whole code
        latent.step(_normal(4, 32, seed=2))
    assert not torch.equal(one.codes(), codes)
    torch.testing.assert_close(one.decoded(), other.decoded(), rtol=0, atol=0)


def test_a_weight_used_twice_makes_one_step_with_the_sum() -> None:
    layer = _layer(_normal(4, 32), bits=3, group_size=32)
    latent, alone = (Latent.start(layer, _nearest(layer), 0.45, 7) for _ in range(2))
    latent.lr = alone.lr = 0.3
    factors = _normal(2, 4, 32, seed=2)
    (factors[0] * latent.weight() + factors[1] * latent.weight()).sum().backward()
    alone.step(factors[0] + factors[1])
    assert latent.moments.steps == 1
    assert torch.equal(latent.u, alone.u)


def test_gradients_of_one_step_are_added_up_until_the_last_has_come() -> None:
    layer = _layer(_normal(4, 32), bits=3, group_size=32)
    latent, alone = (Latent.start(layer, _nearest(layer), 0.45, 7) for _ in range(2))
    latent.lr = alone.lr = 0.3
    begin, factors = latent.u.clone(), _normal(3, 4, 32, seed=2)
    for i, factor in enumerate(factors):
        assert torch.equal(latent.u, begin)
        latent.awaited = 2 - i
        (factor * latent.weight()).sum().backward()
    alone.step(factors[0] + factors[1] + factors[2])
    assert torch.equal(latent.u, alone.u)
    latent.settle()  # nothing is left
    assert latent.moments.steps == 1
    latent.awaited = 1  # an expert that the last window does not reach
    (factors[0] * latent.weight()).sum().backward()
    latent.settle()
    alone.step(factors[0])
    assert torch.equal(latent.u, alone.u)


def test_it_stops_at_the_ends_of_the_grid_and_comes_back() -> None:
    layer = _layer(_normal(2, 32), bits=2, group_size=32)
    latent = Latent.start(layer, _nearest(layer), 0.5, 0)
    latent.lr = 10.0
    latent.step(torch.ones(2, 32))
    assert not latent.codes().any()
    assert latent.u.unique().tolist() == [-(2**15)]
    for _ in range(30):
        latent.step(-torch.ones(2, 32))
    assert latent.codes().unique().tolist() == [3]


def test_no_gradient_and_a_gradient_of_zeros_change_nothing() -> None:
    layer = _layer(_normal(4, 32), bits=3, group_size=32)
    latent = Latent.start(layer, _nearest(layer), 0.45, 0)
    before = latent.u.clone()
    latent.lr = 1.0
    latent.step(torch.zeros(4, 32))
    assert torch.equal(latent.u, before)
    dead = torch.ones(4, 32)
    dead[:, :16] = 0  # inputs that are always 0
    for _ in range(5):
        latent.step(dead)
    # What is left is the rounding of exact numbers: floor(u + r) is u.
    assert torch.equal(latent.u[:, :16], before[:, :16])
    assert not torch.equal(latent.u[:, 16:], before[:, 16:])


def test_it_continues_from_what_it_saved_bit_for_bit() -> None:
    layer = _layer(_normal(6, 48), bits=3, group_size=16, symmetric=False)
    latent = Latent.start(layer, _nearest(layer), 0.45, 9)
    for step in range(3):
        latent.lr = 0.05
        latent.step(_normal(6, 48, seed=step))
    saved = {name: tensor.clone() for name, tensor in latent.tensors("a.b").items()}
    resumed = Latent.resumed(layer, "a.b", saved, 9)
    for one in (latent, resumed):
        for step in range(3, 6):
            one.lr = 0.05
            one.step(_normal(6, 48, seed=step))
    assert torch.equal(latent.u, resumed.u)
    assert latent.choice().scales is not None
    for key, tensor in latent.tensors("x").items():
        assert torch.equal(tensor, resumed.tensors("x")[key]), key


def test_it_takes_four_bytes_a_weight() -> None:
    layer = _layer(_normal(64, 256), bits=3, group_size=64)
    latent = Latent.start(layer, _nearest(layer), 0.45, 0)
    held = sum(tensor.numel() * tensor.element_size() for tensor in latent.tensors("a").values())
    assert held <= (4 + 2 / 64) * 64 * 256 + 16
    assert latent._leaf.untyped_storage().nbytes() == 4


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6])
def test_moments_are_held_without_bias(scale: float) -> None:
    """Encoded 400 times with fresh dither, the mean is the number itself: to 5 standard errors of a coin's
    toss between two codes, which are 4/127 apart for m / sqrt(v), and an eighth of v at most."""
    shape, rows, times = torch.Size([8, 64]), slice(0, 8), 400
    v = scale * torch.rand(shape, generator=torch.Generator().manual_seed(0)).clamp_(min=1e-6).square()
    share = 2 * _normal(8, 64, seed=1).clamp(-1.9, 1.9)
    bound = v.max()
    means = torch.zeros(2, *shape, dtype=torch.float64)
    for i in range(times):
        dither = Dither(shape, 2, i, CPU)
        moments = ByteMoments.zeros(shape, CPU)
        moments.encode(rows, share, v, bound, (dither.of(0, rows), dither.of(1, rows)))
        moments.bound = bound
        m_held, v_held = moments.decode(rows)
        means += torch.stack([m_held / v_held.sqrt(), v_held / v]).double() / times
    error = 5 * 0.5 / times**0.5
    assert float((means[0] - share).abs().max()) < error * REACH / 127
    assert float((means[1] - 1).abs().max()) < error / 8


def test_dither_is_uniform_and_pairs_are_independent() -> None:
    shape = torch.Size([300, 200])
    r = Dither(shape, 2, 1, CPU).of(1, slice(0, 300))
    assert float(r.min()) >= 0
    assert float(r.max()) < 1
    # 300 + 200 random numbers are behind it: 5 standard errors of the mean of 200 uniform numbers.
    assert abs(float(r.mean()) - 0.5) < 5 / (12 * 200) ** 0.5
    inside = torch.stack([((r >= a / 10) & (r < (a + 1) / 10)).float().mean() for a in range(10)])
    assert float((inside - 0.1).abs().max()) < 0.02
    sums = (r - 0.5).sum(1)  # of 200 numbers that share their row's a
    assert float(sums.square().mean()) == pytest.approx(200 / 12, rel=0.5)
    assert not torch.equal(r, Dither(shape, 2, 2, CPU).of(1, slice(0, 300)))


def test_chunks_cover_every_row_once() -> None:
    for n, k in ((1, 1), (7, 70000), (1000, 576), (3, 0)):
        rows = [i for part in chunks(torch.Size([n, k]), CPU) for i in range(n)[part]]
        assert rows == list(range(n))
