"""Time and peak memory of one step of DiscQuant: the fused kernels against the same step in plain PyTorch.

    python benchmarks/discquant_step.py [--device cuda|cpu] [--window TOKENS] [--steps COUNT] [--output FILE]

A random Llama is rounded by the method itself: ``DiscQuantPaper.round`` and, on a CPU, the second stage of
``discquant`` too, in two passes over the windows, of which only the first runs the original model. On a GPU the model
has 1B shape and a window of 2048 tokens; on a CPU that of SmolLM2-135M and 512, once in bfloat16, which is the
default where the chip multiplies it, and once in float32. Each implementation runs in its own process
(``DQ_TRAINING``), from the same seed; no speed is reported unless the KL of their first steps agree. On a CPU the two
take turns step by step, so that whatever else the machine does meets both.
With ``--device cuda`` and no usable GPU: one sentence and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # runs from a bare clone too

from dq_runtime.backends.triton_cuda import TritonCuda  # noqa: E402
from dq_runtime.environment import device_name, flushed_denormals, peak_memory, versions  # noqa: E402
from dq_runtime.errors import DQError  # noqa: E402

# Steps that are not timed. On a GPU they compile kernels and record the graph, on a CPU they fill caches of memory.
WARM_UP = {"cuda": 3, "cpu": 1}
STEPS = {"cuda": 12, "cpu": 6}
WINDOW = {"cuda": 2048, "cpu": 512}
PASSES = 2  # of discquant's second stage over the windows, here
EPOCHS = 8  # and by default
SHAPE = {
    "cuda": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
    "cpu": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
}
# Of the first step's KL: bf16 keeps 2^-9 of an activation, 16 or 30 layers in another order of sums; float32 2^-24.
KL_TOLERANCE = {"bfloat16": 0.02, "float32": 1e-4}


class NoState:
    """A ``StateStore`` that never saves and never stops."""

    def due(self) -> bool:
        return False

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], extra: Mapping[str, Any]) -> None:
        raise AssertionError("nothing asked for a save")

    def load(self) -> None:
        return None

    def stop_requested(self) -> bool:
        return False

    def stop(self, step: int, total: int) -> None:
        raise AssertionError("nothing asked to stop")


def seconds_of(times: Sequence[float]) -> dict[str, Any]:
    """Of some steps."""
    return {"median": statistics.median(times), "min": min(times), "max": max(times), "steps": len(times)}


def measure(
    method: str,
    device: str,
    dtype: str,
    window: int,
    steps: int,
    step_done: Callable[[float], object],
    ready: Callable[[], object],
) -> dict[str, Any]:
    """Round the model in this process; one row of figures. ``ready`` is called before each step, ``step_done`` after it
    with its seconds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from dq_runtime.grids import GRIDS
    from dq_runtime.modules.student import StudentModel
    from dq_runtime.modules.student_linear import StudentLinear
    from dq_runtime.modules.surgery import linears, replace_module, weight_of
    from dq_runtime.rounding import Choice, Job
    from dq_runtime.rounding.discquant import Recipe, distil
    from dq_runtime.rounding.discquant_paper import DiscQuantPaper
    from dq_runtime.rounding.latent import Latent
    from dq_runtime.spec import GridSpec

    torch.manual_seed(0)
    spec = GridSpec(bits=3, group_size=64)
    shape = SHAPE[device]
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=window, tie_word_embeddings=True)).eval()
    layers = {}
    for name, module in linears(model).items():
        # Four times the initialisation's spread: logits that the rounding of the weights can disturb.
        layers[name] = StudentLinear(4 * weight_of(module), None, GRIDS.get(spec.name)(spec))
        replace_module(model, name, layers[name])
        module.weight = None
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    paper = method == "discquant-paper"
    count = steps if paper else steps // PASSES
    windows = torch.randint(0, shape["vocab_size"], (count, window), generator=torch.Generator().manual_seed(1))
    student = StudentModel(model, layers, windows, getattr(torch, dtype))
    student.begin(relaxed=paper)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()  # from here on: the warm-up has the peak, and a graph shows it only then
    times: list[float] = []

    def monitor(step: int, total: int, **figures: float) -> None:
        nonlocal begin
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
        step_done(times[-1])
        if step < total:
            ready()
        begin = time.perf_counter()

    job = Job(layers, student, 0, NoState(), monitor)
    latents = {}
    for i, (name, layer) in enumerate({} if paper else layers.items()):
        nearest = Choice(layer.grid.nearest(layer.weight(), layer.scales))
        latents[name] = Latent.start(layer, nearest, Recipe.room, i, student.compute_dtype)
    ready()
    begin = time.perf_counter()
    with flushed_denormals():  # as the pipeline
        if paper:
            history = DiscQuantPaper({"steps": steps}).round(job).history
        else:
            history = distil(job, None, latents, Recipe(epochs=PASSES), [])
    return {
        "method": method,
        "implementation": os.environ.get("DQ_TRAINING", "auto"),
        "dtype": dtype,
        "half_state": all(layer.half_state for layer in layers.values()),
        "quantized_weights": weights,
        "seconds": seconds_of(times[WARM_UP[device] : count]),
        **({} if paper else {"seconds_later": seconds_of(times[count:])}),
        "peak_memory_bytes": peak_memory(device),
        "kl": [row["kl"] for row in history],
    }


class Worker:
    """:func:`measure` in a fresh process that may use ``implementation`` only, its state in ``state`` bits. It waits
    for :meth:`go` before each step."""

    def __init__(
        self, implementation: str, state: str, method: str, device: str, dtype: str, window: int, steps: int
    ) -> None:
        self.implementation = implementation
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", method, device, dtype, str(window), str(steps)],
            env={**os.environ, "DQ_TRAINING": implementation, "DQ_TRAINING_STATE": state},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()  # nothing to do for one that has ended
        self.process.wait()

    def answer(self) -> Any:
        """Its next line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise DQError(f"the {self.implementation} run ended early; what it said stands above")
        return json.loads(line)

    def go(self) -> float:
        """One step; its seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.answer())


def taking_turns(
    runs: list[tuple[str, str]], method: str, device: str, dtype: str, window: int, steps: int
) -> list[dict[str, Any]]:
    """The row of each (implementation, bits of state), their steps interleaved."""
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(*run, method, device, dtype, window, steps)) for run in runs]
        for worker in workers:
            worker.answer()  # it has built its model
        for _ in range(steps):
            for worker in workers:
                worker.go()
        return [dict(worker.answer()) for worker in workers]


def work(method: str, device: str, dtype: str, window: str, steps: str) -> None:
    """The other end of :class:`Worker`."""
    told = iter(sys.stdin)
    said_so = []

    def ready() -> None:
        if not said_so:
            said_so.append(True)
            print(json.dumps("ready"), flush=True)
        next(told)

    def done(seconds: float) -> None:
        print(json.dumps(seconds), flush=True)

    row = measure(method, device, dtype, int(window), int(steps), done, ready)
    print(json.dumps(row), flush=True)


def compare(plain: Mapping[str, Any], fused: Mapping[str, Any]) -> dict[str, float]:
    """How many times as fast, and with which share of the memory; raises where the first KL differ. Where there are
    later passes: ``speed_with_kept_teacher`` is that of the method's own number of passes against plain steps that all
    run the original model."""
    apart = abs(fused["kl"][0] / plain["kl"][0] - 1)
    if apart > KL_TOLERANCE[plain["dtype"]]:
        raise DQError(f"the first KL differ by {apart:.1%} in {plain['dtype']}: {plain['kl'][0]}, {fused['kl'][0]}")
    ratios = {
        "speed": plain["seconds"]["median"] / fused["seconds"]["median"],
        "peak_memory": fused["peak_memory_bytes"] / plain["peak_memory_bytes"],
    }
    if "seconds_later" in fused:
        first, later = fused["seconds"]["median"], fused["seconds_later"]["median"]
        of_all = (first + (EPOCHS - 1) * later) / EPOCHS
        ratios["speed_with_kept_teacher"] = plain["seconds"]["median"] / of_all
    return ratios


def show(row: Mapping[str, Any]) -> None:
    state, seconds = 16 if row["half_state"] else 32, row["seconds"]
    median, low, high = (1e3 * seconds[which] for which in ("median", "min", "max"))
    print(
        f"{row['method']} {row['implementation']:9} {row['dtype']:8} {state}-bit state  "
        f"{median:7.1f} ms a step ({low:.1f} .. {high:.1f}), peak "
        f" {row['peak_memory_bytes'] / 2**30:5.2f} GiB, KL {row['kl'][0]:.5f} -> {row['kl'][-1]:.5f}"
    )


def on_gpu(window: int, steps: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and ratios of the GPU, one process at a time: they would share its memory."""
    runs = [("reference", "32"), ("triton", "32"), ("triton", "16")]
    rows = [row for run in runs for row in taking_turns([run], "discquant-paper", "cuda", "bfloat16", window, steps)]
    return rows, compare(rows[0], rows[1])


def on_cpu(window: int, steps: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and, for each method and dtype, ratios of the CPU."""
    rows, ratios = [], {}
    for method in ("discquant", "discquant-paper"):
        for dtype in ("bfloat16", "float32"):
            pair = taking_turns([("reference", "32"), ("native", "32")], method, "cpu", dtype, window, steps)
            rows += pair
            ratios[f"{method}, {dtype}"] = compare(*pair)
    return rows, ratios


def main() -> int:
    """Measure, print, write the JSON; returns the exit code."""
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--window", type=int, help="tokens a step (default: 2048 on a GPU, 512 on a CPU)")
    parser.add_argument(
        "--steps", type=int, help="of which the first 3 (GPU) or 1 (CPU) are not timed; of discquant half a pass"
    )
    parser.add_argument(
        "--output", type=Path, help="result file (default: benchmarks/results/discquant_step_DEVICE.json)"
    )
    options = parser.parse_args()
    device = options.device
    window, steps = options.window or WINDOW[device], options.steps or STEPS[device]
    if steps <= PASSES * WARM_UP[device]:
        parser.error(f"--steps must be more than {PASSES * WARM_UP[device]}")
    if device == "cuda":
        reason = TritonCuda().available()
        if reason is not None or not torch.cuda.is_available():
            why = reason or "TRITON_INTERPRET is set"
            print(f"discquant_step: nothing was timed, no usable GPU: {why}", file=sys.stderr)
            return 2
    try:
        rows, ratios = (on_gpu if device == "cuda" else on_cpu)(window, steps)
    except DQError as error:
        print(f"discquant_step: {error}", file=sys.stderr)
        return 1
    for row in rows:
        show(row)
    for name, ratio in ({"fused": ratios} if device == "cuda" else ratios).items():
        print(f"{name}: {ratio['speed']:.2f}x as fast with {ratio['peak_memory']:.0%} of the memory")
    label = "".join(c if c.isalnum() else "_" for c in device_name(device).lower()) if device == "cuda" else "cpu"
    output = options.output or ROOT / "benchmarks" / "results" / f"discquant_step_{label}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    fused = {"cuda": torch.version.cuda, "triton": version("triton")} if device == "cuda" else {}
    report = {
        "question": "one step of DiscQuant, 3 bits, group 64, batch 1: fused kernels against plain PyTorch",
        "device": device_name(device),
        **({"threads": torch.get_num_threads()} if device == "cpu" else {}),
        "versions": {**versions(), **fused},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python benchmarks/discquant_step.py --device {device} --window {window} --steps {steps}",
        "model": SHAPE[device],
        "window": window,
        "rows": rows,
        "ratios": ratios,
    }
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
