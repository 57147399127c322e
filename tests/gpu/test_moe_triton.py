"""The grouped kernel against the definition, on the chip and, on triton's interpreter, on the CPU.

Run as a script with TRITON_INTERPRET=1 it prints one verdict a check and case: the variable counts when @triton.jit
decorates, so tests/unit/test_moe.py runs it in a subprocess.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor

from dq_runtime.backends import dispatch
from dq_runtime.backends.triton_cuda import TritonCuda
from dq_runtime.packing import PackedWeight, pack_codes

BF16, FP16 = torch.bfloat16, torch.float16
FLOAT32_ROUNDOFF = 2.0**-24


@dataclass(frozen=True)
class Case:
    """One layer of experts [N, K] and the tokens routed to them. ``routing``: "mixed", all to expert "one", or none to
    expert "skip". ``group``: weights a scale, K for the whole row."""

    bits: int
    symmetric: bool
    n: int
    k: int
    group: int
    experts: int
    top_k: int
    tokens: int
    dtype: torch.dtype
    routing: str = "mixed"

    def __str__(self) -> str:
        zero, dtype = "sym" if self.symmetric else "asym", str(self.dtype).removeprefix("torch.")
        return (
            f"{self.bits}bit-{zero}-E{self.experts}-N{self.n}-K{self.k}-g{self.group}-T{self.tokens}x{self.top_k}-"
            f"{dtype}-{self.routing}"
        )


# N = 50 is a multiple of no tile, K = 96 of no step; 17 tokens are 9 pairs an expert, and 40 of 2 experts take BM = 64.
INTERPRETED = [
    Case(2, False, 50, 96, 32, 4, 2, 5, BF16),
    Case(3, True, 50, 96, 32, 4, 2, 1, BF16),
    Case(3, False, 50, 96, 32, 4, 2, 17, FP16),
    Case(4, True, 50, 96, 32, 4, 2, 17, BF16, "skip"),
    Case(4, False, 50, 96, 96, 4, 2, 17, FP16, "one"),
    Case(4, True, 50, 192, 64, 2, 2, 40, FP16),
    Case(8, True, 50, 96, 32, 4, 2, 5, FP16),
]
ON_GPU = [
    *INTERPRETED,
    *(Case(b, s, 192, 576, 64, 4, 2, t, BF16) for b, s, t in product((2, 3, 4, 8), (True, False), (1, 5, 17))),
    *(Case(b, False, 192, 576, 576, 4, 2, t, FP16) for b, t in product((2, 3, 4, 8), (17, 130))),
    *(Case(b, s, 4096, 4096, 64, 8, 2, t, BF16) for b, s, t in product((3, 4), (True, False), (1, 16, 300))),
    *(Case(b, True, 2048, 768, 128, 128, 8, t, BF16) for b, t in product((3, 4), (1, 33, 700))),
    Case(3, True, 4096, 4096, 64, 8, 2, 300, FP16, "one"),
    Case(4, False, 4096, 4096, 64, 8, 2, 300, BF16, "skip"),
    Case(4, True, 1536, 2048, 2048, 8, 2, 64, FP16),
    Case(5, False, 50, 96, 32, 4, 2, 17, BF16),
]
# (pairs, experts, rows a tile, routing): fewer pairs than experts, exact tiles, many experts, more than one pass.
ALIGNED = [(1, 4, 16, "mixed"), (34, 4, 16, "mixed"), (64, 2, 16, "one"), (100, 3, 64, "one"), (1100, 9, 32, "skip")]


def route(pairs: int, experts: int, routing: str) -> Tensor:
    """int64 [pairs]: the expert of each pair."""
    drawn = torch.randint(0, experts, (pairs,), generator=torch.Generator().manual_seed(pairs + experts))
    if routing == "one":
        return torch.full_like(drawn, experts - 1)
    return torch.where(drawn == 1, 0, drawn) if routing == "skip" else drawn


def weights(case: Case, device: str) -> list[PackedWeight]:
    """One weight an expert, all different, with every code in use."""
    generator = torch.Generator().manual_seed(7 * case.n + case.k + case.bits)
    shape, groups = (case.experts, case.n), case.k // case.group
    codes = torch.randint(0, 2**case.bits, (*shape, case.k), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(*shape, groups, generator=generator) * 0.05 + 0.01).to(case.dtype)
    zero = torch.randint(0, 2**case.bits, (*shape, groups), dtype=torch.uint8, generator=generator)
    packed = pack_codes(codes.flatten(0, 1), case.bits).view(*shape, -1)
    return [
        PackedWeight(p.to(device), s.to(device), None if case.symmetric else z.to(device), case.bits, case.k)
        for p, s, z in zip(packed, scale, zero, strict=True)
    ]


def check_align(pairs: int, experts: int, bm: int, routing: str, device: str) -> None:
    """The tiles are those of a stable sort, padded expert by expert, and the bound holds."""
    from dq_kernels.grouped import align

    expert_of = route(pairs, experts, routing)
    rows, expert_of_tile = (t.cpu() for t in align(expert_of.to(device), experts, bm))
    want_rows: list[int] = []
    want_tiles: list[int] = []
    for e in range(experts):
        mine = (expert_of == e).nonzero().squeeze(1).tolist()
        tiles = -(-len(mine) // bm)
        want_rows += mine + [pairs] * (tiles * bm - len(mine))
        want_tiles += [e] * tiles
    used = len(want_tiles)
    assert expert_of_tile[:used].tolist() == want_tiles
    assert (expert_of_tile[used:] == -1).all()
    assert rows[: used * bm].tolist() == want_rows


def assert_within(y: Tensor, x: Tensor, weight: Tensor, extra: float) -> None:
    """y against x @ weight.T in float64, element by element: two roundings to y's dtype, K additions in float32 in any
    order, and ``extra`` relative error of each weight."""
    exact = x.double() @ weight.double().t()
    magnitude = x.double().abs() @ weight.double().abs().t()
    info = torch.finfo(y.dtype)
    bound = info.eps * exact.abs() + info.tiny + (2 * x.shape[1] * FLOAT32_ROUNDOFF + extra) * magnitude
    worst = ((y.double() - exact).abs() / bound).nan_to_num(nan=torch.inf).max().item()
    assert worst <= 1, f"error is {worst:.3g} times the bound"


def check_matmul(case: Case, device: str) -> None:
    """Each expert's rows, from [T, K] and from [P, K], twice: right, complete, inside the output, and bit-equal."""
    from dq_kernels.grouped import ExpertWeight, qmm_grouped

    pairs = case.tokens * case.top_k
    experts = weights(case, device)
    expert_of = route(pairs, case.experts, case.routing)
    x = torch.randn(case.tokens, case.k, generator=torch.Generator().manual_seed(1)).to(device, case.dtype)
    backend = TritonCuda()
    assert backend.available() is None
    ready = backend.prepare_experts(experts, case.dtype)
    assert ready is not None
    y = backend.qmm_grouped(x, ready, expert_of.to(device))
    assert y.shape == (pairs, case.n)
    assert y.dtype == case.dtype
    by_pair = x.repeat_interleave(case.top_k, 0)
    # bf16 runs in float32 on the interpreter, so only there no weight is rounded.
    extra = 0.0 if device == "cpu" and case.dtype == BF16 else torch.finfo(case.dtype).eps / 2
    for e in expert_of.unique().tolist():
        mine = (expert_of == e).to(device)
        assert_within(y[mine], by_pair[mine], experts[e].decode(), extra)

    zero = None if case.symmetric else ready.tensors[2]
    group = 0 if case.group == case.k else case.group
    weight = ExpertWeight(*ready.tensors[:2], zero, case.bits, case.k, group, case.dtype)
    out = torch.full((pairs + 2, case.n), float("nan"), dtype=case.dtype, device=device)
    qmm_grouped(by_pair, weight, expert_of.to(device, torch.int32), out=out[1:-1])
    assert torch.equal(out[1:-1], y), "two runs differ"
    assert torch.isnan(out[[0, -1]]).all(), "wrote outside its output"


def check_dispatch(case: Case, device: str) -> None:
    """Prepared and expert by expert from the canonical order, through the dispatcher."""
    experts, expert_of = weights(case, device), route(case.tokens * case.top_k, case.experts, case.routing).to(device)
    x = torch.randn(case.tokens, case.k, generator=torch.Generator().manual_seed(1)).to(device, case.dtype)
    ready = dispatch.prepare_experts(experts, case.dtype)
    assert ready is not None
    assert ready.backend == "triton"
    y = dispatch.qmm_grouped_prepared(x, ready, case.experts, expert_of)
    by_pair = x.repeat_interleave(case.top_k, 0)
    extra = torch.finfo(case.dtype).eps / 2
    for result, e in product((y, dispatch.qmm_grouped(x, experts, expert_of)), expert_of.unique().tolist()):
        assert_within(result[expert_of == e], by_pair[expert_of == e], experts[e].decode(), extra)


def check_refusals(device: str) -> None:
    """Shapes and dtypes that do not fit raise; no tokens are no error."""
    from dq_kernels.grouped import ExpertWeight, qmm_grouped

    case = INTERPRETED[1]
    ready = TritonCuda().prepare_experts(weights(case, device), case.dtype)
    assert ready is not None
    weight = ExpertWeight(*ready.tensors[:2], None, case.bits, case.k, case.group, case.dtype)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    assert qmm_grouped(torch.empty(0, case.k, dtype=BF16, device=device), weight, none).shape == (0, case.n)
    two = torch.zeros(2, dtype=torch.int64, device=device)
    for shape, dtype in (
        ((3, case.k), BF16),
        ((2, case.k + 1), BF16),
        ((0, case.k), BF16),
        ((2, case.k), torch.float32),
    ):
        with pytest.raises(ValueError, match=r"got (\[|torch)"):
            qmm_grouped(torch.zeros(shape, dtype=dtype, device=device), weight, two)


DISPATCHED = INTERPRETED[3]


def interpret_everything() -> dict[str, str]:
    """Every check on the CPU: verdict ("ok" or the failure) by check and case."""
    torch.set_num_threads(1)
    checks: dict[str, Callable[[str], None]] = {"refusals": check_refusals}
    checks |= {f"align {case}": partial(check_align, *case) for case in ALIGNED}
    checks |= {f"matmul {case}": partial(check_matmul, case) for case in INTERPRETED}
    checks[f"dispatch {DISPATCHED}"] = partial(check_dispatch, DISPATCHED)
    verdicts = {}
    for name, check in checks.items():
        try:
            check(device="cpu")  # type: ignore[call-arg]
            verdicts[name] = "ok"
        except Exception as error:
            verdicts[name] = f"{type(error).__name__}: {error}"
    return verdicts


@pytest.fixture
def cuda() -> str:
    reason = TritonCuda().available()
    if reason is None and not torch.cuda.is_available():
        reason = "only the interpreter is available (TRITON_INTERPRET is set)"
    if reason is not None:
        pytest.skip(f"no GPU to test on: {reason}")
    return "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*ALIGNED, (16384, 128, 64, "mixed"), (16384, 8, 128, "skip")], ids=str)
def test_align_on_gpu(case: tuple[int, int, int, str], cuda: str) -> None:
    check_align(*case, cuda)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_GPU, ids=str)
def test_matmul_on_gpu(case: Case, cuda: str) -> None:
    check_matmul(case, cuda)


@pytest.mark.gpu
def test_dispatch_on_gpu(cuda: str) -> None:
    check_dispatch(DISPATCHED, cuda)


@pytest.mark.gpu
def test_refusals_on_gpu(cuda: str) -> None:
    check_refusals(cuda)


@pytest.mark.gpu
def test_a_captured_graph_follows_the_routing(cuda: str) -> None:
    """A wait for the device would end the capture; replayed with other experts, the graph must use those."""
    case = Case(3, True, 512, 1024, 64, 8, 2, 17, BF16)
    experts = weights(case, cuda)
    ready = TritonCuda().prepare_experts(experts, case.dtype)
    assert ready is not None
    x = torch.randn(case.tokens, case.k, device=cuda, dtype=BF16)
    expert_of = route(34, 8, "mixed").to(cuda)
    TritonCuda().qmm_grouped(x, ready, expert_of)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = TritonCuda().qmm_grouped(x, ready, expert_of)
    for routing in ("one", "skip", "mixed"):
        expert_of.copy_(route(34, 8, routing))
        graph.replay()
        assert torch.equal(y, TritonCuda().qmm_grouped(x, ready, expert_of)), routing


@pytest.mark.gpu
def test_offsets_beyond_2_to_31_on_gpu(cuda: str) -> None:
    """40 experts of 28672 x 4096 at 8 bits are 2.3e9 words (4.7 GB): a 32-bit offset would wrap in the last ones."""
    from dq_kernels.grouped import ExpertWeight, qmm_grouped
    from dq_kernels.stream import decode_stream

    if torch.cuda.mem_get_info()[0] < 8e9:
        pytest.skip("needs 8 GB of free GPU memory")
    e, n, k = 40, 28672, 4096
    words = torch.randint(-(2**15), 2**15, (e, k // 64, 1, n, 32), dtype=torch.int16, device=cuda)
    ones = torch.full((e, k // 128, n, 2), 0.01, dtype=BF16, device=cuda)
    weight = ExpertWeight(words, ones.view(torch.int32).squeeze(-1), None, 8, k, 64, BF16)
    x = torch.randn(3, k, dtype=BF16, device=cuda)
    y = qmm_grouped(x, weight, torch.tensor([0, e - 1, e // 2], device=cuda))
    for row, expert in enumerate((0, e - 1, e // 2)):
        for start in (0, n - 32):
            dense = decode_stream(weight.expert(expert), torch.empty(32, k, dtype=BF16, device=cuda), start, start + 32)
            assert_within(y[row : row + 1, start : start + 32], x[row : row + 1], dense, 0.0)


if __name__ == "__main__":
    print(json.dumps(interpret_everything()))
