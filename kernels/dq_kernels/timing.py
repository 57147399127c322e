"""Time and check kernels on an NVIDIA GPU: what `dq bench tune` and the benchmarks share, so that rows can be compared.

A kernel is launched in a CUDA graph, over and over on copies of its weight which together are more than COPIES_OVER_L2
times the L2: every launch then reads its weight from memory, as a layer of a model does, and Python's launch cost (5 to
50 us, more than most of these kernels run) is not measured. Both packed 4096 x 14336 weights would fit an H100's L2.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

COPIES_OVER_L2 = 3  # the L2 of recent chips is two halves that mirror each other: twice its size could still half hit
REPLAYS = 11
MIN_ROTATIONS = 2  # of the copies in a graph
MIN_GRAPH_US = 400.0  # a graph starts in about 4 us: 1% of this
FLOAT32_ROUNDOFF = 2.0**-24


@dataclass(frozen=True)
class Timing:
    """Microseconds a launch: median, fastest and slowest replay. ``not_captured``: why no CUDA graph could be made, so
    that launches from Python were timed; None if one was."""

    median_us: float
    min_us: float
    max_us: float
    launches: int
    copies: int
    not_captured: str | None


@dataclass(frozen=True)
class Expected:
    """What y = x @ W.T must be: the product in float64, and the same of the magnitudes."""

    exact: Tensor
    magnitude: Tensor
    k: int

    @classmethod
    def of(cls, x: Tensor, weight: Tensor) -> Expected:
        """x [M, K] in any dtype, ``weight`` [N, K] as decoded in float32."""
        a, b = x.double(), weight.double().t()
        exact = a @ b
        return cls(exact, a.abs() @ b.abs(), x.shape[1])

    def worst(self, y: Tensor) -> float:
        """The largest error of y [M, N] as a multiple of its bound; above 1 (or NaN, given as infinity) it is wrong.

        Two roundings to y's dtype (the pieces' sum, the result), one of each weight to that dtype, and K additions in
        float32 in any order.
        """
        info = torch.finfo(y.dtype)
        share = info.eps / 2 + 2 * self.k * FLOAT32_ROUNDOFF
        bound = info.eps * self.exact.abs() + share * self.magnitude + info.tiny
        worst = float(((y.double() - self.exact).abs() / bound).max())
        return worst if math.isfinite(worst) else math.inf


def fault(run: Callable[[Tensor], object], expected: Expected, dtype: torch.dtype, times: int) -> str | None:
    """None if ``run(out)`` writes the expected y [M, N] into ``out`` (16-bit ``dtype``, NaN before), and the same bits
    ``times`` times; else one clause saying what is wrong.

    Triton 3.6 has made kernels of legal source whose result changes from run to run: times is 5 where one is chosen.
    """
    outs = [torch.full_like(expected.exact, float("nan"), dtype=dtype) for _ in range(times)]
    for out in outs:  # back to back, as in use: one launch must not find what another left behind
        run(out)
    worst = expected.worst(outs[0])
    if worst > 1:
        return f"its error is {worst:.3g} times the bound"
    same = all(torch.equal(out.view(torch.int16), outs[0].view(torch.int16)) for out in outs[1:])
    return None if same else f"{times} runs gave different bits"


def copies_for(nbytes: int, l2: int) -> int:
    """How many copies of a weight of ``nbytes`` to rotate over, at least two."""
    return max(2, math.ceil(COPIES_OVER_L2 * l2 / nbytes))


def l2_bytes() -> int:
    """Size of the current GPU's L2."""
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)


def time_launches(launch: Callable[[int], object], copies: int) -> Timing:
    """Time ``launch(i)``, which launches the kernel on copy i of its weight, for i = 0, 1, ..., copies - 1, 0, ...

    ``launch`` must have run before: what it compiles, tunes or allocates on its first call is not to be captured.
    """
    stream = _side_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            launch(0)
    stream.synchronize()
    rotations, not_captured = MIN_ROTATIONS, None
    try:
        run = _captured(launch, copies, rotations, stream)
        once = _elapsed_us(run)
        if once < MIN_GRAPH_US:
            rotations = math.ceil(rotations * MIN_GRAPH_US / max(once, 1.0))
            run = _captured(launch, copies, rotations, stream)
    except Exception as error:  # other libraries raise anything when a call of theirs cannot be captured
        alive()
        not_captured = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:160]}"
        rotations = MIN_ROTATIONS

        def run() -> None:
            for i in range(rotations * copies):
                launch(i % copies)

    _elapsed_us(run)
    count = rotations * copies
    times = [_elapsed_us(run) / count for _ in range(REPLAYS)]
    return Timing(statistics.median(times), min(times), max(times), count, copies, not_captured)


def alive() -> None:
    """Raises if an earlier launch crashed (an illegal address, say): nothing runs in this process any more then."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One stream for all captures of a device: cuBLAS keeps a workspace for every stream it has seen."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _captured(
    launch: Callable[[int], object], copies: int, rotations: int, stream: torch.cuda.Stream
) -> Callable[[], None]:
    """A graph of ``rotations`` times all copies, warm; replayed by calling it."""
    graph = torch.cuda.CUDAGraph()
    # The outer context restores the current stream: torch's own does not where a capture fails.
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for i in range(rotations * copies):
            launch(i % copies)
    graph.replay()
    return graph.replay


def _elapsed_us(run: Callable[[], object]) -> float:
    """Microseconds the GPU took for what ``run`` launched."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def copy_gb_s(nbytes: int = 2**30) -> float:
    """GB/s (1e9 bytes read and written) of copying ``nbytes`` on the device: the bandwidth that rows are held against,
    since no kernel reaches the data sheet's."""
    source = torch.zeros(nbytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    return 2 * nbytes / statistics.median(_elapsed_us(lambda: target.copy_(source)) for _ in range(REPLAYS)) / 1e3


def unusable() -> str | None:
    """Why nothing can be timed here, in one clause; None if it can."""
    if triton.knobs.runtime.interpret:
        return "TRITON_INTERPRET is set, so kernels would be interpreted on the CPU"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than sm_80"
    return None
