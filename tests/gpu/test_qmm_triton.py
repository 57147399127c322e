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
from dq_runtime.errors import BackendError
from dq_runtime.levels import GROUP_SIZE, INT, LEVELS
from dq_runtime.packing import PackedWeight, pack_codes, words_per_row

ROOT = Path(__file__).resolve().parents[2]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
M_VALUES = (1, 2, 3, 16, 17, 64, 65)  # both sides of every tile's edge, and of the fused kernel's
FLOAT32_ROUNDOFF = 2.0**-24


@dataclass(frozen=True)
class Case:
    """One weight and its activations. ``group``: weights a scale, K for the whole row; ``form``: "int" or a table."""

    bits: int
    symmetric: bool
    n: int
    k: int
    group: int
    m: int
    dtype: torch.dtype
    form: str = INT

    def __str__(self) -> str:
        zero, dtype = "sym" if self.symmetric else "asym", str(self.dtype).removeprefix("torch.")
        kind = f"{self.bits}bit-{zero}" if self.form == INT else self.form
        return f"{kind}-N{self.n}-K{self.k}-g{self.group}-M{self.m}-{dtype}"


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


# N = 50 is a multiple of no tile; K = 96 and 160 end inside a K-block of the streaming order.
SMALL = [(50, 96, 32), (50, 128, 64), (34, 256, 128), (50, 160, 160)]
RAGGED = [(192, 576, 64), (192, 576, 576)]
INTERPRETED = [  # the interpreter takes a second a case
    *cases([(50, 96, 32)], M_VALUES, (BF16, FP16), (2, 3, 4, 8), each=1),
    *cases([(34, 256, 128), (50, 160, 160)], (65, 1, 16, 2), (FP16, BF16), (2, 3, 4, 8), each=1)[::2],
    *cases(RAGGED[:1], (3, 17), (FP16, BF16), (3, 4), each=1)[1:3],
    *cases([(50, 96, 32)], (3,), (BF16,), (5, 6)),
]
ON_GPU = [
    *cases(SMALL, M_VALUES, (BF16, FP16, BF16), (2, 3, 4, 8), each=1),  # each new tile of a weight compiles for ~1 s
    *cases(RAGGED, M_VALUES, (BF16, FP16, BF16), (2, 3, 4, 8), each=3),
    *cases([(1536, 576, 64), (576, 1536, 128)], (1, 16, 32, 64), (BF16, FP16), (3, 4), each=2),
    *cases([(50, 96, 32)], (3, 65), (BF16, FP16), (5, 6, 7)),
]
SERVED = [  # every row of the table: tokens up to each limit, and past the last one
    *cases([(4096, 4096, 64)], (1, 32, 64, 128, 256, 300), (BF16,), (2, 3, 4, 8)),
    *cases([(9000, 1024, 64)], (16, 32, 64, 128, 256), (FP16, BF16), (3, 8)),
    *cases([(14336, 4096, 128)], (7, 200), (BF16,), (3,)),
]
NOT_STREAMED = [
    *cases(
        [(50, 96, 16), (50, 50, 50)], (3, 17), (BF16, FP16), (3, 4), each=1
    ),  # groups of 16, and K not a multiple of 32
    *cases([(50, 96, 32)], (3,), (FP32,), (3,)),
]
DENSE = [
    *cases([(50, 96, 32), (50, 50, 50)], (0,), (BF16, FP16, FP32), (2, 3, 4, 5, 6, 7, 8)),
    *cases([(192, 576, 64)], (0,), (BF16, FP16), (3,)),
]


def table_cases(shapes: list[tuple[int, int, int]], ms: tuple[int, ...], forms: tuple[str, ...]) -> list[Case]:
    """Tables x (N, K, group) x M, the dtypes taking turns; mxfp4 and nvfp4 at the group they have by definition."""
    turn = cycle((BF16, FP16))
    return [
        Case(4, True, n, k, GROUP_SIZE.get(form, group), m, next(turn), form)
        for (n, k, group), form, m in product(shapes, forms, ms)
    ]


TABLES_INTERPRETED = [
    *table_cases([(50, 96, 32), (34, 160, 160)], (3,), ("nf4",)),
    *table_cases([(34, 160, 160)], (17, 3), ("fp4",)),
    *table_cases([(50, 96, 0)], (2,), ("nvfp4",)),
]
TABLES_ON_GPU = [  # both sides of the 64 tokens beyond which a table is decoded before it is multiplied
    *table_cases([(50, 96, 32), (50, 160, 160)], (1, 17, 65), ("nf4", "fp4")),
    *table_cases([(192, 576, 64)], (1, 16, 64, 65), tuple(LEVELS)),
    *table_cases([(4096, 4096, 64)], (1, 33, 64, 300, 2100), ("nf4", "mxfp4")),
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
        case.form,
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
    """The canonical order, decoded anew, and the streaming order as served: right, inside the output, bit-equal."""
    from dq_kernels.stream import Tile, decode_stream, qmm_stream
    from dq_kernels.stream_layout import stream_weight

    x, w = make(case, device)
    backend = TritonCuda()
    assert backend.available() is None
    assert backend.can_run(Call.qmm(x, w)) is None
    decoded, rounded = w.decode(), w.decode(dtype=case.dtype)
    roundoff = torch.finfo(case.dtype).eps / 2
    y = backend.qmm(x, w)
    assert y.dtype == case.dtype
    assert_within(y, x, decoded, roundoff)
    assert_within(Reference().qmm(x, w), x, decoded)

    prepared = backend.prepare(w, case.dtype)
    assert prepared is not None
    # One scale a row multiplies the sums, in float32; so does the interpreter with bf16 weights, which it cannot round.
    weight = decoded if case.group == case.k or (device == "cpu" and case.dtype == BF16) else rounded
    if device == "cuda":
        assert_within(backend.qmm_prepared(x, prepared), x, weight)
    streamed = stream_weight(w.packed, w.scale, w.zero, bits=w.bits, k=w.k)
    dense = poisoned(case.n, case.k, x)
    decode_stream(streamed, dense[1:-1])
    assert torch.equal(dense[1:-1], rounded), "the streaming order does not decode to the bits of PackedWeight.decode"
    assert torch.isnan(dense[[0, -1]]).all(), "decoding wrote outside its output"
    for split in (1, 3) if device == "cuda" else (2,):
        outs = [poisoned(case.m, case.n, x) for _ in range(2)]
        for out in outs:
            qmm_stream(
                x,
                streamed,
                Tile(BM=16, BN=16 if device == "cpu" else 64, num_warps=4, num_stages=3, split=split),
                out[1:-1],
            )
        assert_within(outs[0][1:-1], x, weight)
        assert torch.equal(outs[0][1:-1], outs[1][1:-1]), "two runs differ"
        assert torch.isnan(outs[0][[0, -1]]).all(), "wrote outside its output"


def check_served(case: Case, device: str) -> None:
    """What the shipped table launches, eight times on poisoned outputs: a racy kernel was right 7 times in 10."""
    from dq_kernels.qmm import qmm_prepared
    from dq_kernels.stream_layout import stream_weight

    x, w = make(case, device)
    streamed = stream_weight(w.packed, w.scale, w.zero, bits=w.bits, k=w.k)
    outs = [poisoned(case.m, case.n, x) for _ in range(8)]
    for out in outs:
        qmm_prepared(x, streamed, out[1:-1])
    # Decoded for torch.mm a row's scale is applied before the one rounding; streamed, to the float32 sums.
    row = torch.finfo(case.dtype).eps / 2 if case.group == case.k else 0.0
    assert_within(outs[0][1:-1], x, w.decode(dtype=case.dtype), row)
    assert all(torch.equal(out[1:-1], outs[0][1:-1]) for out in outs), "two runs differ"
    assert torch.isnan(outs[0][[0, -1]]).all(), "wrote outside its output"


def check_not_streamed(case: Case, device: str) -> None:
    """Weights that the streaming order does not hold are multiplied from the canonical one."""
    x, w = make(case, device)
    backend = TritonCuda()
    assert backend.prepare(w, case.dtype) is None
    assert_within(backend.qmm(x, w), x, w.decode(), torch.finfo(case.dtype).eps / 2)


def check_dense(case: Case, device: str) -> None:
    """The dequantise kernel, bit for bit."""
    from dq_kernels.dequant import dequantize

    x, w = make(case, device)
    out = poisoned(case.n, case.k, x)
    dequantize(w.packed, w.scale, w.zero, bits=w.bits, k=w.k, dtype=case.dtype, out=out[1:-1])
    assert torch.equal(out[1:-1], w.decode(dtype=case.dtype)), "not the bits of PackedWeight.decode"
    assert torch.isnan(out[[0, -1]]).all(), "wrote outside its output"


def check_table(case: Case, device: str) -> None:
    """A table's weights: both orders decode bit for bit, and their products are right, decoded and streamed."""
    from dq_kernels.dequant import dequantize
    from dq_kernels.qmm import qmm_prepared
    from dq_kernels.stream import Tile, decode_stream, qmm_stream
    from dq_kernels.stream_layout import stream_weight

    x, w = make(case, device)
    backend, roundoff = TritonCuda(), torch.finfo(case.dtype).eps / 2
    assert backend.can_run(Call.qmm(x, w)) is None
    dense = poisoned(case.n, case.k, x)
    dequantize(w.packed, w.scale, None, bits=4, k=w.k, dtype=case.dtype, out=dense[1:-1], form=w.form)
    assert torch.equal(dense[1:-1], w.decode(dtype=case.dtype)), "not the bits of PackedWeight.decode"
    assert torch.isnan(dense[[0, -1]]).all(), "wrote outside its output"
    assert_within(backend.qmm(x, w), x, w.decode(), roundoff)
    prepared = backend.prepare(w, case.dtype)
    if case.group < 32:
        assert prepared is None
        return
    assert prepared is not None
    # Registers hold levels in x's dtype, in which nf4's are rounded (the interpreter has no bf16), then the product is.
    compute = FP32 if device == "cpu" and case.dtype == BF16 else case.dtype
    levels = torch.tensor(LEVELS[case.form], device=device).to(compute).float()[w.codes().long()]
    values = levels * w.scale.float().repeat_interleave(case.group, 1)
    rounded = values.to(case.dtype)
    streamed = stream_weight(w.packed, w.scale, None, bits=4, k=w.k, form=w.form)
    dense = poisoned(case.n, case.k, x)
    decode_stream(streamed, dense[1:-1])
    assert torch.equal(dense[1:-1], rounded), "the streaming order decodes to other values"
    assert torch.isnan(dense[[0, -1]]).all(), "decoding wrote outside its output"
    row = case.group == case.k
    tile = Tile(BM=16, BN=16 if device == "cpu" else 64, num_warps=4, num_stages=3, split=2)
    outs = [poisoned(case.m, case.n, x) for _ in range(2)]
    for out in outs:
        qmm_stream(x, streamed, tile, out[1:-1])
    assert_within(outs[0][1:-1], x, values if row or compute == FP32 else rounded)
    assert torch.equal(outs[0][1:-1], outs[1][1:-1]), "two runs differ"
    assert torch.isnan(outs[0][[0, -1]]).all(), "wrote outside its output"
    if device == "cuda":  # the tables of tiles are those of chips
        out = poisoned(case.m, case.n, x)
        qmm_prepared(x, streamed, out[1:-1])
        assert_within(out[1:-1], x, rounded, roundoff if row else 0.0)
        assert torch.isnan(out[[0, -1]]).all(), "wrote outside its output"
        assert torch.equal(out[1:-1], backend.qmm_prepared(x, prepared)), "the backend does something else"


def check_dispatch(case: Case, device: str) -> None:
    """x [2, M, K] through the dispatcher with DQ_BACKEND=triton."""
    from dq_runtime.backends import dispatch

    x, w = make(case, device)
    os.environ["DQ_BACKEND"] = "triton"
    y = dispatch.qmm(torch.stack([x, -x]), w)
    assert y.shape == (2, case.m, case.n)
    assert_within(y[0], x, w.decode(), torch.finfo(case.dtype).eps / 2)
    assert torch.equal(y[0], -y[1])
    prepared = dispatch.prepare(w, case.dtype)
    assert prepared is not None
    assert prepared.backend == "triton"
    z = dispatch.qmm_prepared(torch.stack([x, -x]), prepared)
    assert_within(z[0], x, w.decode(), torch.finfo(case.dtype).eps / 2)
    assert torch.equal(z[0], -z[1])
    with pytest.raises(BackendError, match=r"prepared for .* activations, got"):
        dispatch.qmm_prepared(x.half(), prepared)


DISPATCHED = Case(3, True, 50, 96, 32, 3, BF16)
CHECKS: dict[str, tuple[Callable[[Case, str], None], list[Case]]] = {
    "matmul": (check_matmul, INTERPRETED),
    "dense": (check_dense, DENSE),
    "not-streamed": (check_not_streamed, NOT_STREAMED),
    "table": (check_table, TABLES_INTERPRETED),
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
@pytest.mark.parametrize("case", SERVED, ids=str)
def test_served_on_gpu(case: Case, cuda: str) -> None:
    check_served(case, cuda)


@pytest.mark.gpu
@pytest.mark.parametrize("case", NOT_STREAMED, ids=str)
def test_not_streamed_on_gpu(case: Case, cuda: str) -> None:
    check_not_streamed(case, cuda)


@pytest.mark.gpu
@pytest.mark.parametrize("case", DENSE, ids=str)
def test_dense_on_gpu(case: Case, cuda: str) -> None:
    check_dense(case, cuda)


@pytest.mark.gpu
@pytest.mark.parametrize("case", TABLES_ON_GPU, ids=str)
def test_tables_on_gpu(case: Case, cuda: str) -> None:
    check_table(case, cuda)


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


@pytest.mark.gpu
def test_a_graph_captures_split_tiles_only_after_a_first_run(cuda: str) -> None:
    """Captured launches share arrival counters made outside: replays stay right, and alternate with eager calls."""
    from dq_kernels import stream
    from dq_kernels.stream_layout import stream_weight

    x, w = make(Case(3, True, 256, 4096, 64, 5, BF16), cuda)
    streamed = stream_weight(w.packed, w.scale, w.zero, bits=3, k=4096)
    tile = stream.Tile(16, 64, 4, 3, split=8)
    eager = stream.qmm_stream(x, streamed, tile)
    out = torch.full_like(eager, float("nan"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stream.qmm_stream(x, streamed, tile, out)
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(stream.qmm_stream(x, streamed, tile), eager)
        assert torch.equal(out, eager)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 33])
def test_torch_compile_and_opcheck_on_gpu(tokens: int, cuda: str) -> None:
    from dq_runtime.modules.quant_linear import QuantLinear

    x, w = make(Case(3, True, 256, 512, 64, tokens, BF16), cuda)
    linear = QuantLinear(w, None)
    linear.prepare(BF16)
    with torch.inference_mode():
        want = linear(x)
        assert torch.equal(torch.compile(linear, fullgraph=True)(x), want)
    p = linear.prepared
    assert p is not None
    args = (x, list(p.tensors), p.backend, p.n, p.k, p.bits, p.group_size, p.symmetric, p.x_dtype)
    torch.library.opcheck(torch.ops.dq_runtime.qmm_prepared.default, args)


if __name__ == "__main__":
    print(json.dumps(interpret_everything()))
