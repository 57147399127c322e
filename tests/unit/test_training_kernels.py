"""The training ops: their plain definition against autograd in float64, the seam, the operator, and the Triton kernels.

The kernels run on triton's interpreter. TRITON_INTERPRET counts when @triton.jit decorates, so they run in one
subprocess that has it set (tests/gpu/training_cases.py as a script), which prints one verdict a check and case.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dq_runtime.backends import training
from dq_runtime.backends.training import Lerp, TrainingCall, pack_flags, unpack_flags
from dq_runtime.backends.training_reference import ReferenceTraining, lerp_weight, stochastic_round
from dq_runtime.backends.training_triton import TritonTraining
from dq_runtime.errors import BackendError
from dq_runtime.modules import training_ops
from dq_runtime.packing import pack_codes
from dq_runtime.rounding.base import AdamStep

ROOT = Path(__file__).resolve().parents[2]


def _uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def _lerp(n: int, k: int, group: int, bits: int = 3, symmetric: bool = True) -> Lerp:
    generator = torch.Generator().manual_seed(n + k)
    lo = torch.randint(0, 2**bits - 1, (n, k), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(n, k // group, generator=generator) * 0.05 + 0.01).bfloat16()
    zero = None if symmetric else torch.randint(0, 2**bits, scale.shape, dtype=torch.uint8, generator=generator)
    return Lerp(lo, scale, zero, bits, k)


def _packed(w: Lerp) -> Lerp:
    return replace(w, lo=pack_codes(w.lo, w.bits))


def test_everything_the_interpreter_ran_is_right() -> None:
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    environment.pop("DQ_TRAINING", None)
    script = ROOT / "tests" / "gpu" / "training_cases.py"
    done = subprocess.run(
        [sys.executable, script], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    verdicts = json.loads(done.stdout.splitlines()[-1])
    assert len(verdicts) > 20
    assert {name: verdict for name, verdict in verdicts.items() if verdict != "ok"} == {}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 64])
def test_the_definition_of_lerp_mm_has_the_gradients_that_gradcheck_finds(group: int, symmetric: bool) -> None:
    w = _lerp(6, 64, group, symmetric=symmetric)
    inputs = torch.randn(3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    x = _uniform(6, 64, seed=2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda i, x: training_ops.lerp_mm(i, x, w, torch.float64), (inputs, x))


def test_packed_and_unpacked_lo_are_the_same_weight() -> None:
    for bits in (2, 3, 4, 8):
        w, x = _lerp(10, 96, 32, bits, symmetric=False), _uniform(10, 96)
        assert torch.equal(lerp_weight(w, x, torch.float32), lerp_weight(_packed(w), x, torch.float32))
        assert torch.equal(_packed(w).codes(), w.codes())


@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True), (False, False)])
def test_only_the_gradients_that_are_needed_are_made(needs: tuple[bool, bool]) -> None:
    w = _lerp(10, 96, 32)
    grads = ReferenceTraining().lerp_mm_backward(
        torch.ones(3, 10), torch.ones(3, 96), _uniform(10, 96), w, needs, torch.bfloat16
    )
    assert tuple(g is not None for g in grads) == needs
    assert grads[1] is None or grads[1].dtype is torch.bfloat16


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operator_passes_opcheck_and_equals_the_eager_function(packed: bool, dtype: torch.dtype) -> None:
    w = _lerp(10, 96, 32, symmetric=False)
    w = _packed(w) if packed else w
    inputs = torch.randn(3, 96, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    x = _uniform(10, 96).requires_grad_()
    arguments = (inputs, x, w.lo, w.scale, w.zero, w.bits, torch.float32)
    torch.library.opcheck(torch.ops.dq_runtime.lerp_mm.default, arguments)
    upstream = torch.randn(3, 10, generator=torch.Generator().manual_seed(2)).to(dtype)
    results = []
    for y in (torch.ops.dq_runtime.lerp_mm(*arguments), training_ops.lerp_mm(inputs, x, w, torch.float32)):
        results.append((y, *torch.autograd.grad(y, (inputs, x), upstream)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_traced_layer_holds_the_operator() -> None:
    w = _lerp(10, 96, 32)
    graphs = []

    def keep(graph: torch.fx.GraphModule, example: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda i, x: training_ops.lerp_mm(i, x, w, torch.float32), backend=keep, fullgraph=True)
    inputs, x = torch.ones(3, 96), _uniform(10, 96)
    assert torch.equal(compiled(inputs, x), training_ops.lerp_mm(inputs, x, w, torch.float32))
    assert "dq_runtime.lerp_mm" in graphs[0].code


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 64), (5, 9)])
def test_flags_survive_packing(shape: tuple[int, int]) -> None:
    flags = _uniform(*shape) > 0.4
    packed = pack_flags(flags)
    assert packed.numel() == (flags.numel() + 7) // 8
    assert torch.equal(unpack_flags(packed, flags.shape), flags)
    assert int(pack_flags(torch.tensor([[True, False, True]]))) == 0b101


def test_stochastic_rounding_is_unbiased_and_leaves_exact_values_alone() -> None:
    exact = torch.tensor([0.0, -0.0, 1.0, -1.5, 2.0**-130])
    dice = torch.full(exact.shape, 0xFFFF)
    assert torch.equal(stochastic_round(exact, dice, 16), exact)
    noise = torch.randint(0, 2**16, (200_000,), generator=torch.Generator().manual_seed(0))
    for value in (1 + 2.0**-10, -3.001, 1e-5, 0.3):
        rounded = stochastic_round(torch.full(noise.shape, value), noise, 16)
        assert torch.equal(rounded, rounded.bfloat16().float())
        spacing = float(rounded.max() - rounded.min())
        assert 0 < spacing <= abs(value) * 2**-7
        assert abs(rounded.double().mean().item() - value) < 5 * spacing / 2 / 200_000**0.5
    halves = stochastic_round(torch.full(noise.shape, 0.3), noise, 13)
    assert torch.equal(halves, halves.half().float())


def test_a_16_bit_state_follows_the_float32_state_where_rounding_to_nearest_would_stand_still() -> None:
    """v after 500 steps of g^2 = 1 is 1 - 0.999^500 = 0.39; rounded to nearest it stops at 0.25, where 0.1% of 1 - v
    falls below half the spacing of bfloat16."""
    n = 4096
    x, y = torch.full((1, n), 0.5), torch.zeros(1, n)
    half = [x.half(), torch.zeros(1, n).bfloat16(), torch.zeros(1, n).bfloat16()]
    full = [x.clone(), torch.zeros(1, n), torch.zeros(1, n)]
    nearest = torch.zeros(()).bfloat16()
    for step in range(1, 501):
        hyper = AdamStep(step, 1e-4, 1.0, 0.5, 0.9, 0.999, 0.0)
        for state in (half, full):
            grad = torch.zeros(1, n, dtype=state[1].dtype)
            ReferenceTraining().projected_adam(
                state[0], grad, state[1], state[2], y, torch.ones(1, n, dtype=torch.bool), hyper
            )
        nearest = (nearest.float() * 0.999 + 0.001).bfloat16()
    assert float(full[2][0, 0]) == pytest.approx(1 - 0.999**500, rel=1e-3)
    assert float(half[2].float().mean()) == pytest.approx(float(full[2][0, 0]), rel=0.01)
    assert float(nearest) < 0.3
    assert float(half[0].float().mean()) == pytest.approx(float(full[0].mean()), abs=2e-3)


@pytest.fixture
def fresh() -> Iterator[None]:
    """Forget who was chosen, before and after."""
    training._choose.cache_clear()
    yield
    training._choose.cache_clear()


CALL = TrainingCall("lerp_mm", "cpu", torch.float32, 3, 64, 576, True)


@pytest.mark.usefixtures("fresh")
def test_the_seam_chooses_by_device_and_obeys_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DQ_TRAINING", raising=False)
    assert training.choose(CALL).name != "triton"
    monkeypatch.setenv("DQ_TRAINING", "reference")
    assert training.choose(CALL).name == "reference"
    assert not training.holds_compactly(torch.device("cpu"))
    monkeypatch.setattr(TritonTraining, "available", lambda self: None)
    monkeypatch.delenv("DQ_TRAINING")
    assert training.choose(replace(CALL, device="cuda")).name == "triton"
    assert training.holds_compactly(torch.device("cuda"))
    monkeypatch.setenv("DQ_TRAINING", "triton")
    with pytest.raises(BackendError, match=r"^DQ_TRAINING=triton cannot run .*tensors must be on cuda, got cpu$"):
        training.choose(CALL)
    monkeypatch.setenv("DQ_TRAINING", "magic")
    with pytest.raises(BackendError, match=r"'magic' is not a training implementation; known: triton, .*reference"):
        training.choose(CALL)


@pytest.mark.usefixtures("fresh")
def test_nobody_can_run_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DQ_TRAINING", raising=False)
    with pytest.raises(BackendError, match=r"no training implementation can run .*reference: lerp_mm takes floating"):
        training.choose(replace(CALL, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cpu"}, "must be on cuda, got cpu"),
        ({"dtype": torch.float64}, "got torch.float64"),
        ({"packed": False}, "lo must be packed"),
        ({"bits": 9}, "bits must be 2 to 8"),
        ({"group_size": 48}, "got 48"),
        ({"group_size": 8}, "got 8"),
        ({"k": 2**30, "group_size": 2**30}, "32-bit bit offsets"),
    ],
    ids=str,
)
def test_triton_gives_a_reason(change: dict[str, object], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    good = replace(CALL, device="cuda")
    assert TritonTraining().can_run(good) is None
    assert TritonTraining().can_run(replace(good, group_size=576)) is None
    assert reason in (TritonTraining().can_run(replace(good, **change)) or "")  # type: ignore[arg-type]
