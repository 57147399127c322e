"""How long a run takes: its arithmetic over the rate of this machine, and the passes over weights that are none.

A matrix product of a [N, K] layer with t tokens is 2 N K t operations; a forward and backward pass is three of them.
What the update of a weight costs (building w_hat, Adam, snapping) is bound by memory, and measured on one layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dq_runtime.grids import GRIDS, Scales
from dq_runtime.planning.memory import Setting
from dq_runtime.planning.shapes import ModelShape
from dq_runtime.rounding.autoround import Offsets
from dq_runtime.rounding.autoround import Recipe as AutoRoundRecipe
from dq_runtime.rounding.base import Choice
from dq_runtime.rounding.block_loop import JUDGED, SNAPSHOTS
from dq_runtime.rounding.latent import Latent
from dq_runtime.spec import GridSpec

# Dense bfloat16 products in practice, and bytes a second: of an H100 SXM, 989 TFLOP/s and 3.35 TB/s on paper. Assumed
# where no GPU is here to be measured.
ASSUMED_FLOPS, ASSUMED_BYTES = 4e14, 2e12
# Bytes that the passes over a weight read and write: 2 of w_hat and one of Adam, each some reads and writes.
LATENT_BYTES, SNAP_BYTES = 60, 60
# Passes of all windows through a block beside the steps: targets, both streams, second moments, the judged snapshots.
PASSES = 4
CHOICES = SNAPSHOTS + 2  # judged: nearest and the start as well


@dataclass(frozen=True)
class Rates:
    """``flops`` a second of products in the loop's dtype; seconds of a step's passes over one weight: ``latent`` of
    discquant's second stage, ``snap`` of AutoRound, ``relaxed`` of discquant-paper; ``source`` in words."""

    flops: float
    latent: float
    snap: float
    relaxed: float
    source: str


@dataclass(frozen=True)
class Duration:
    """``steps`` of ``seconds`` each."""

    name: str
    steps: int
    seconds: float
    how: str

    @property
    def total(self) -> float:
        return self.steps * self.seconds


def measured_rates(setting: Setting, tokens: int, flops: float | None) -> Rates:
    """Of this machine, in about a second; assumed for a GPU that is not here. ``flops``: instead of measuring."""
    if setting.device != "cpu" and not torch.cuda.is_available():
        rate = flops or ASSUMED_FLOPS
        said = f"assumed: {rate / 1e12:.0f} TFLOP/s, {ASSUMED_BYTES / 1e12:.0f} TB/s (no GPU is here)"
        latent = LATENT_BYTES / ASSUMED_BYTES
        return Rates(rate, latent, SNAP_BYTES / ASSUMED_BYTES, latent, said)
    device = torch.device(setting.device)
    dtype = torch.bfloat16 if setting.loop == 2 else torch.float32
    a = torch.randn(min(tokens, 1024), 1024, device=device).to(dtype)
    b = torch.randn(1024, 1024, device=device).to(dtype)
    rate = flops or 2 * a.shape[0] * 1024 * 1024 / _seconds(lambda: a @ b, device)
    latent, snap = _per_weight(device)
    said = f"{rate / 1e9:.0f} GFLOP/s in {str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads"
    return Rates(rate, latent, snap, latent / 3, ("given: " if flops else "measured: ") + said)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The median of some runs, after one."""
    times = list[float]()
    begin = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - begin < 0.25 and len(times) < 50):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return sorted(times[1:])[len(times[1:]) // 2]


class _Layer:
    """A ``LayerProblem`` of noise."""

    def __init__(self, device: torch.device) -> None:
        spec = GridSpec(bits=3, group_size=64)
        self._w = torch.randn(256, 1024, device=device)
        self.grid = GRIDS.get(spec.name)(spec)
        self.scales: Scales = self.grid.fit(self._w)

    def weight(self) -> torch.Tensor:
        return self._w


def _per_weight(device: torch.device) -> tuple[float, float]:
    """Seconds a weight and step of the latent (built twice, one step) and of AutoRound's offsets (both ways, one
    step)."""
    layer = _Layer(device)
    weights = layer.weight().numel()
    latent = Latent.start(layer, Choice(layer.grid.nearest(layer.weight(), layer.scales)), 0.45, 0)
    latent.lr = 0.002
    gradient = torch.randn_like(layer.weight())

    def second() -> None:
        latent.decoded()
        latent.decoded()
        latent.step(gradient)

    offsets = Offsets(layer, layer.scales, AutoRoundRecipe())

    def first() -> None:
        offsets.weight().backward(gradient)  # type: ignore[no-untyped-call]
        offsets.v.grad = None

    return _seconds(second, device) / weights, _seconds(first, device) / weights


def durations(shape: ModelShape, setting: Setting, rates: Rates) -> list[Duration]:
    """The parts of a run that take time, steps and seconds a step. Data parallel processes share windows."""
    world, t = setting.world, setting.length
    head = shape.vocab * shape.hidden
    attention = 4 * shape.blocks * t * shape.heads * shape.head_dim  # of a token: scores and sums, both products
    forward = 2 * (shape.weights + head) * t + attention * t
    found = []
    options, blocks = setting.options, max(1, shape.blocks)
    if setting.method in ("discquant", "autoround"):
        batch = min(int(options["batch"]), max(1, setting.windows))
        block = 2 * shape.weights / blocks * t
        step = 3 * block * batch / rates.flops / world + rates.snap * shape.weights / blocks
        iters, forward_passes = int(options["iters"]), PASSES * setting.windows + CHOICES * JUDGED
        found.append(Duration("blocks", blocks * iters, step, f"{iters} a block, of {batch} windows"))
        seconds = forward_passes * block / rates.flops
        found.append(Duration("blocks, forward", blocks, seconds, f"{forward_passes} windows through each"))
    if setting.method == "gptq":
        k = sum(layer.k * layer.k for layer in shape.layers)
        cubic = sum(4 * layer.k**3 + 2 * layer.n * layer.k * layer.k for layer in shape.layers)
        each = len(shape.layers)
        grams = setting.windows * t * (2 * k + 10 * shape.weights)
        seconds = (grams + cubic) / rates.flops / each
        found.append(Duration("layers", each, seconds, "second moments, Cholesky, walk"))
    if setting.method == "discquant":
        batch = int(options.get("model_batch", 1))
        steps = max(1, int(options["epochs"]) * setting.windows // batch)
        once = setting.windows / (steps * batch)  # the original runs on a window once, and then its head alone
        runs = 3 * forward + once * forward + (1 - once) * 2 * head * t
        seconds = runs * -(-batch // world) / rates.flops + rates.latent * shape.weights / world
        found.append(Duration("whole model", steps, seconds, "original, student forward and backward, update"))
    if setting.method == "discquant-paper":
        steps = int(options["steps"]) or max(1, setting.windows // int(options["batch"]))
        seconds = 4 * forward * int(options["batch"]) / rates.flops + rates.relaxed * shape.weights
        found.append(Duration("whole model", steps, seconds, "teacher, student forward and backward, update"))
    found.append(Duration("evaluation", setting.held, 3 * forward / rates.flops, "original, nearest, the checkpoint"))
    return found
