"""The C++ passes over a four-byte latent against their PyTorch definitions."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dq_runtime.errors import SpecError
from dq_runtime.grids import GRIDS, Scales
from dq_runtime.rounding import latent_native
from dq_runtime.rounding.base import Choice
from dq_runtime.rounding.byte_moments import ByteMoments
from dq_runtime.rounding.latent import Latent
from dq_runtime.spec import PER_ROW, GridSpec

pytestmark = pytest.mark.skipif(os.environ.get("DQ_NATIVE") == "0", reason="DQ_NATIVE=0: built without the extension")

DTYPES = [torch.float32, torch.bfloat16]
LAYERS = [
    (192, 576, {"bits": 3, "group_size": 64}),
    (67, 96, {"bits": 2, "group_size": 32, "symmetric": False}),
    (5, 33, {"bits": 4, "group_size": PER_ROW, "scale_dtype": "float16"}),
    (1, 7, {"bits": 8, "group_size": PER_ROW, "symmetric": False}),
    (3, 40000, {"bits": 5, "group_size": 16}),
]


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def latent(n: int, k: int, grid: dict[str, Any], dtype: torch.dtype) -> Latent:
    built, w = GRIDS.get("int")(GridSpec(**grid)), normal(n, k, seed=n + k)
    scales: Scales = built.fit(w)
    layer: Any = SimpleNamespace(weight=w.clone, grid=built, scales=scales)
    return Latent.start(layer, Choice(built.nearest(w, scales)), 0.45, 3, dtype)


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k", "grid"), LAYERS)
@pytest.mark.usefixtures("threads")
def test_weights_are_bit_equal(
    n: int, k: int, grid: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = latent(n, k, grid, dtype)
    one.u = torch.randint(-(2**15), 2**15, (n, k), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    assert latent_native.runs(one.u, dtype)
    found = one.decoded()
    monkeypatch.setenv("DQ_TRAINING", "reference")
    assert not latent_native.runs(one.u, dtype)
    expected = one.decoded()
    assert found.dtype is expected.dtype is dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k", "grid"), LAYERS)
@pytest.mark.usefixtures("threads")
def test_steps_are_the_reference_s(
    n: int, k: int, grid: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step from the same state. Both floor x + r with r the same float, and x differs by a few roundings of its
    own magnitude: 8 eps of up to 2^15 units in u, of 127 in m, and of one mantissa in v is the chance that a floor
    falls on the other side, and then by one."""
    one, other = latent(n, k, grid, dtype), latent(n, k, grid, dtype)
    sizes = 10.0 ** (1.5 * normal(n, k, seed=6)).clamp(-3, 3)  # gradients over six orders of magnitude, some zeros
    sizes[:, ::5] = 0
    unequal, compared = torch.zeros(3), 0
    for step in range(1, 9):
        gradient = (1e-6 * sizes * normal(n, k, seed=10 + step)).to(dtype)
        one.lr = other.lr = 0.02 * step
        one.step(gradient)
        with monkeypatch.context() as patch:
            patch.setenv("DQ_TRAINING", "reference")
            other.step(gradient)
        assert torch.equal(one.moments.bound, other.moments.bound)
        assert one.moments.steps == other.moments.steps == step
        pairs = ((one.u, other.u), (one.moments.m, other.moments.m), (one.moments.v, other.moments.v))
        for i, (a, b) in enumerate(pairs):
            off = (a.int() - b.int()).abs()
            assert int(off.max()) <= 1
            unequal[i] += int(off.sum())
            a.copy_(b)
        compared += n * k
    eps = 2.0**-23
    chances = torch.tensor([8 * eps * 2**15, 8 * eps * 127 * 8, 8 * eps * 8])
    assert (unequal <= 5 + 2 * chances * compared).all(), (unequal, chances * compared)


def test_a_step_writes_nothing_beyond_its_rows_and_columns() -> None:
    """The state lies in the middle of poisoned memory."""
    n, k = 5, 33
    one = latent(n, k, {"bits": 3, "group_size": PER_ROW}, torch.float32)
    wide = [torch.full((n + 2, k), 77, dtype=t.dtype) for t in (one.u, one.moments.m, one.moments.v)]
    for all_rows, held in zip(wide, (one.u, one.moments.m, one.moments.v), strict=True):
        all_rows[1:-1] = held
    one.u = wide[0][1:-1]
    one.moments = ByteMoments(wide[1][1:-1], wide[2][1:-1], one.moments.bound)
    one.lr = 0.3
    before = one.u.clone()
    one.step(normal(n, k, seed=1))
    assert not torch.equal(one.u, before)
    for all_rows in wide:
        assert bool((all_rows[[0, -1]] == 77).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_is_refused_and_changes_nothing(bad: float, dtype: torch.dtype) -> None:
    one = latent(5, 33, {"bits": 3, "group_size": PER_ROW}, dtype)
    one.lr = 0.1
    one.step(normal(5, 33, seed=0).to(dtype))
    before = {name: tensor.clone() for name, tensor in one.tensors("a").items()}
    gradient = normal(5, 33, seed=1).to(dtype)
    gradient[-1, -1] = bad
    with pytest.raises(SpecError, match="not finite"):
        one.step(gradient)
    for name, tensor in one.tensors("a").items():
        assert torch.equal(tensor, before[name]), name


def test_every_instruction_set() -> None:
    """The same tests in a process whose kernels are another set's."""
    if os.environ.get("DQ_ISA"):
        return
    for isa in ("scalar", "avx2"):
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "DQ_ISA": isa}, check=False)
        if "this CPU lacks" in done.stdout or "not compiled in" in done.stdout:
            continue
        assert done.returncode == 0, done.stdout[-3000:]
        assert "passed" in done.stdout
