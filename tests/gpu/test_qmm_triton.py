"""The Triton kernels against PackedWeight.decode and the Reference backend.

Without a GPU the kernels run on triton's interpreter. TRITON_INTERPRET counts when @triton.jit decorates, so the cases
run in one subprocess that has it set (this file as a script), which prints one verdict a case. The tests marked ``gpu``
run the same checks, and real shapes, on the chip.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import cycle, product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dq_runtime.backends.base import Call
from dq_runtime.backends.reference import Reference
from dq_runtime.backends.triton_cuda import TritonCuda
from dq_runtime.packing import PackedWeight, pack_codes, words_per_row

ROOT = Path(__file__).resolve().parents[2]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
M_VALUES = (1, 2, 3, 16, 17, 64, 65)  # both sides of every tile's edge, and of the fused kernel's
FLOAT32_ROUNDOFF = 2.0**-24


@dataclass(frozen=True)
class Case:
    """One weight and its activations. ``group``: weights a scale, K for the whole row."""

    bits: int
    symmetric: bool
    n: int
    k: int
    group: int
    m: int
    dtype: torch.dtype

    def __str__(self) -> str:
        zero, dtype = "sym" if self.symmetric else "asym", str(self.dtype).removeprefix("torch.")
        return f"{self.bits}bit-{zero}-N{self.n}-K{self.k}-g{self.group}-M{self.m}-{dtype}"


def cases(
    shapes: list[tuple[int, int, int]],
    ms: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    bits: tuple[int, ...],
    each: int | None = None,
) -> list[Case]:
    """bits x sym/asym x (N, K, group) x M; the dtypes take turns, one a weight, and so do the M, ``each`` a weight."""
    turn, m_turn = cycle(dtypes), cycle(ms)
    weights = [(b, sym, *shape, next(turn)) for shape, sym, b in product(shapes, (True, False), bits)]
    return [
        Case(b, sym, n, k, group, next(m_turn), dtype)
        for b, sym, n, k, group, dtype in weights
        for _ in range(each or len(ms))
    ]


# N = 50 is a multiple of no tile; K = 50 (one scale a row) leaves a tail in every tile and in the last word.
SMALL = [(50, 96, 16), (50, 96, 32), (50, 50, 50), (50, 128, 64), (34, 256, 128)]
RAGGED = [(192, 576, 64), (192, 576, 576)]
INTERPRETED = [
    *cases(SMALL, M_VALUES, (BF16, FP16, FP32), (2, 3, 4, 8), each=2),  # 80 of 280: the interpreter is slow
    *cases(RAGGED, (3, 65, 17), (FP16, FP32, BF16, FP16), (2, 3, 4, 8), each=1),
    *cases([(50, 96, 32)], (3,), (BF16,), (5, 6, 7)),
]
ON_GPU = [
    *cases(SMALL, M_VALUES, (BF16, FP16, BF16), (2, 3, 4, 8), each=3),  # each new tile of a weight compiles for ~0.7 s
    *cases(RAGGED, M_VALUES, (BF16, FP16, BF16), (2, 3, 4, 8)),
    *cases([(1536, 576, 64), (576, 1536, 128)], (1, 16, 64, 256), (BF16, FP16), (2, 3, 4, 8)),
    *cases([(4096, 4096, 64), (14336, 4096, 128)], (1, 16, 64, 256), (BF16, FP16), (3, 4)),
    *cases([(50, 96, 32)], (3, 65), (BF16, FP16, FP32), (5, 6, 7)),
]
DENSE = [
    *cases([(50, 96, 32), (50, 50, 50)], (0,), (BF16, FP16, FP32), (2, 3, 4, 5, 6, 7, 8)),
    *cases([(192, 576, 64)], (0,), (BF16, FP16), (3,)),
]


def guarded(inner: Tensor, poison: float) -> Tensor:
    """``inner`` as rows 1 .. -1 of a larger tensor of poison: a read outside shows up as NaN or as a wrong code.

    It also takes away the 16-byte alignment that a fresh tensor has.
    """
    outer = torch.full((inner.shape[0] + 2, *inner.shape[1:]), poison, dtype=inner.dtype, device=inner.device)
    outer[1:-1] = inner
    return outer[1:-1]


def make(case: Case, device: str) -> tuple[Tensor, PackedWeight]:
    """x [M, K] and a weight with every code in use, each inside a guard of poison."""
    generator = torch.Generator().manual_seed(7 * case.n + case.k + case.bits)
    codes = torch.randint(0, 2**case.bits, (case.n, case.k), dtype=torch.uint8, generator=generator)
    groups = case.k // case.group
    scale_dtype = FP16 if case.dtype == FP16 else BF16
    scale = (torch.rand(case.n, groups, generator=generator) * 0.05 + 0.01).to(scale_dtype)
    zero = torch.randint(0, 2**case.bits, (case.n, groups), dtype=torch.uint8, generator=generator)
    x = torch.randn(case.m, case.k, generator=generator).to(case.dtype)
    weight = PackedWeight(
        guarded(pack_codes(codes, case.bits).to(device), -1),
        guarded(scale.to(device), float("nan")),
        None if case.symmetric else guarded(zero.to(device), 255),
        case.bits,
        case.k,
    )
    assert weight.packed.shape[1] == words_per_row(case.k, case.bits)
    return guarded(x.to(device), float("nan")), weight


def poisoned(rows: int, columns: int, like: Tensor) -> Tensor:
    """A [rows + 2, columns] tensor of NaN in ``like``'s dtype; a kernel writes into [1:-1]."""
    return torch.full((rows + 2, columns), float("nan"), dtype=like.dtype, device=like.device)


def assert_within(y: Tensor, x: Tensor, weight: Tensor, extra: float = 0.0) -> None:
    """y against x @ weight.T in float64, element by element, by the bounds of floating-point arithmetic.

    Two roundings to y's dtype, K additions in float32 in any order, and ``extra`` relative error of each weight.
    """
    exact = x.double() @ weight.double().t()
    magnitude = x.double().abs() @ weight.double().abs().t()
    info = torch.finfo(y.dtype)
    bound = info.eps * exact.abs() + info.tiny + (2 * x.shape[1] * FLOAT32_ROUNDOFF + extra) * magnitude
    error = (y.double() - exact).abs()
    assert torch.isfinite(y).all(), "not finite"
    worst = (error / bound).max().item()
    assert worst <= 1, f"error is {worst:.3g} times the bound, {error.max().item():.3g} absolute"


def check_matmul(case: Case, device: str) -> None:
    """The backend and both kernel paths, each twice: right, inside its output, and bit-equal."""
    from dq_kernels.qmm import fused_max_m, qmm_dense, qmm_fused

    x, w = make(case, device)
    decoded, rounded = w.decode(), w.decode(dtype=case.dtype)
    roundoff = torch.finfo(case.dtype).eps / 2
    backend = TritonCuda()
    assert backend.available() is None
    assert backend.can_run(Call.qmm(x, w)) is None
    # Past the fused kernel's M the weights are rounded to x's dtype first.
    y = backend.qmm(x, w)
    assert y.dtype == case.dtype
    assert_within(y, x, decoded, roundoff if case.m > fused_max_m(case.dtype) else 0.0)
    assert_within(Reference().qmm(x, w), x, decoded)

    for run, weight in ((qmm_fused, decoded), (qmm_dense, rounded)):
        if run is qmm_dense and case.m not in (3, 65, 256):
            continue  # its only kernel does not see M
        if device == "cpu" and run is qmm_fused and case.m <= fused_max_m(case.dtype) and case.m != 3:
            continue  # the backend just ran it, and the interpreter is slow
        outs = [poisoned(case.m, case.n, x) for _ in range(2)]
        for out in outs:
            run(x, w.packed, w.scale, w.zero, bits=w.bits, out=out[1:-1])
        assert_within(outs[0][1:-1], x, weight, roundoff if run is qmm_dense and device == "cuda" else 0.0)
        assert torch.equal(outs[0][1:-1], outs[1][1:-1]), "two runs differ"
        assert torch.isnan(outs[0][[0, -1]]).all(), "wrote outside its output"


def check_dense(case: Case, device: str) -> None:
    """The dequantise kernel, bit for bit."""
    from dq_kernels.dequant import dequantize

    x, w = make(case, device)
    out = poisoned(case.n, case.k, x)
    dequantize(w.packed, w.scale, w.zero, bits=w.bits, k=w.k, dtype=case.dtype, out=out[1:-1])
    assert torch.equal(out[1:-1], w.decode(dtype=case.dtype)), "not the bits of PackedWeight.decode"
    assert torch.isnan(out[[0, -1]]).all(), "wrote outside its output"


def check_dispatch(case: Case, device: str) -> None:
    """x [2, M, K] through the dispatcher with DQ_BACKEND=triton."""
    from dq_runtime.backends import dispatch

    x, w = make(case, device)
    os.environ["DQ_BACKEND"] = "triton"
    y = dispatch.qmm(torch.stack([x, -x]), w)
    assert y.shape == (2, case.m, case.n)
    assert_within(y[0], x, w.decode())
    assert torch.equal(y[0], -y[1])


DISPATCHED = Case(3, True, 50, 96, 32, 3, BF16)
CHECKS: dict[str, tuple[Callable[[Case, str], None], list[Case]]] = {
    "matmul": (check_matmul, INTERPRETED),
    "dense": (check_dense, DENSE),
    "dispatch": (check_dispatch, [DISPATCHED]),
}


def interpret_everything() -> dict[str, str]:
    """Every check on every case on the CPU: verdict ("ok" or the failure) by "check case"."""
    torch.set_num_threads(1)
    verdicts = {}
    for name, (check, todo) in CHECKS.items():
        for case in todo:
            try:
                check(case, "cpu")
                verdicts[f"{name} {case}"] = "ok"
            except Exception as error:
                verdicts[f"{name} {case}"] = f"{type(error).__name__}: {error}"
    return verdicts


@pytest.fixture(scope="module")
def verdicts() -> dict[str, str]:
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    environment.pop("DQ_BACKEND", None)
    done = subprocess.run(
        [sys.executable, __file__], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("key", [f"{name} {case}" for name, (_, todo) in CHECKS.items() for case in todo])
def test_interpreted(key: str, verdicts: dict[str, str]) -> None:
    assert verdicts[key] == "ok"


def test_import_starts_neither_triton_nor_cuda() -> None:
    code = (
        "import sys, torch, dq_runtime.backends.triton_cuda as t; b = t.TritonCuda(); b.available()\n"
        "bad = [m for m in ('triton', 'dq_kernels.qmm') if m in sys.modules]; assert not bad, bad\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=True)


def test_available_gives_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "dq_runtime.backends.triton_cuda"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(f"{module}.find_spec", lambda name: None)
    assert TritonCuda().available() == "triton is not installed"
    monkeypatch.setattr(f"{module}.find_spec", lambda name: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert TritonCuda().available() == "this torch is built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert TritonCuda().available() == "no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert TritonCuda().available() == "cuda:0 (T4) is sm_75, older than sm_80"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setenv("CC", "cc")
    assert TritonCuda().available() is None
    monkeypatch.delenv("CC")
    monkeypatch.setattr(f"{module}.shutil.which", lambda name: None)
    assert "C compiler" in (TritonCuda().available() or "")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert TritonCuda().available() is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"op": "pack"}, "no pack"),
        ({"device": "cpu"}, "must be on cuda, got cpu"),
        ({"x_dtype": torch.float64}, "got torch.float64"),
        ({"scale_dtype": torch.float32}, "got torch.float32"),
        ({"bits": 9}, "bits must be 2 to 8"),
        ({"group_size": 48}, "got 48"),
        ({"group_size": 8}, "got 8"),
        ({"k": 96, "group_size": 64}, "dividing K"),
        ({"k": 2**30, "group_size": 2**30}, "32-bit bit offsets"),
    ],
)
def test_can_run_gives_a_reason(change: dict[str, object], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    good = {
        "op": "qmm", "device": "cuda", "m": 1, "n": 50, "k": 576, "bits": 3, "group_size": 64, "symmetric": True,
        "x_dtype": BF16, "scale_dtype": BF16,
    }  # fmt: skip
    build: Callable[..., Call] = partial(Call, **good)
    assert TritonCuda().can_run(build()) is None
    assert reason in (TritonCuda().can_run(build(**change)) or "")


@pytest.fixture
def cuda() -> str:
    reason = TritonCuda().available()
    if reason is None and not torch.cuda.is_available():
        reason = "only the interpreter is available (TRITON_INTERPRET is set)"
    if reason is not None:
        pytest.skip(f"no GPU to test on: {reason}")
    return "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_GPU, ids=str)
def test_matmul_on_gpu(case: Case, cuda: str) -> None:
    check_matmul(case, cuda)


@pytest.mark.gpu
@pytest.mark.parametrize("case", DENSE, ids=str)
def test_dense_on_gpu(case: Case, cuda: str) -> None:
    check_dense(case, cuda)


@pytest.mark.gpu
def test_dispatch_on_gpu(cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DQ_BACKEND", "triton")
    check_dispatch(DISPATCHED, cuda)


@pytest.mark.gpu
def test_offsets_beyond_2_to_31_on_gpu(cuda: str) -> None:
    """70000 x 32768 outputs are 2.3e9 elements (4.6 GB): a 32-bit offset would wrap in the last rows."""
    from dq_kernels.dequant import dequantize

    n, k = 70000, 32768
    if torch.cuda.mem_get_info()[0] < 8e9:
        pytest.skip("needs 8 GB of free GPU memory")
    packed = torch.randint(-(2**31), 2**31, (n, k // 16), dtype=torch.int64, device=cuda).to(torch.int32)
    scale = torch.rand(n, 1, device=cuda).bfloat16()
    dense = dequantize(packed, scale, None, bits=2, k=k, dtype=BF16)
    for rows in (slice(0, 8), slice(65530, 65540), slice(n - 8, n)):
        want = PackedWeight(packed[rows], scale[rows], None, 2, k).decode(dtype=BF16)
        assert torch.equal(dense[rows], want)


if __name__ == "__main__":
    print(json.dumps(interpret_everything()))
