"""Time and peak memory of one DiscQuant step on a GPU: the fused kernels against the same step in plain PyTorch.

    python benchmarks/discquant_step.py [--vocab 32000] [--window 2048] [--steps 12] [--output FILE]

A random Llama of 1B shape (hidden 2048, 16 layers, intermediate 8192, 32 heads, 8 of keys and values) is rounded by the
method itself, ``DiscQuant.round``: teacher forward, student forward and backward, KL, update. Each implementation runs
in its own process (``DQ_TRAINING``), from the same seed; no speed is reported unless the KL of the two agree.
Without a usable GPU: one sentence and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # runs from a bare clone too

from dq_runtime.backends.triton_cuda import TritonCuda  # noqa: E402
from dq_runtime.environment import versions  # noqa: E402
from dq_runtime.errors import DQError  # noqa: E402

WARM_UP = 3  # steps that compile kernels and record the graph
KL_TOLERANCE = 0.02  # of the first step's KL: bf16 keeps 2^-9 of an activation, 16 layers in another order of sums
SHAPE = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


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


def measure(vocabulary: int, window: int, steps: int) -> dict[str, Any]:
    """Round the model in this process; one row of figures."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from dq_runtime.grids import GRIDS
    from dq_runtime.modules.student import StudentModel
    from dq_runtime.modules.student_linear import StudentLinear
    from dq_runtime.modules.surgery import linears, replace_module, weight_of
    from dq_runtime.rounding import Job
    from dq_runtime.rounding.discquant import DiscQuant
    from dq_runtime.spec import GridSpec
    from dq_runtime.transforms import TRANSFORMS

    torch.manual_seed(0)
    spec = GridSpec(bits=3, group_size=64)
    with torch.device("cuda"):
        model = LlamaForCausalLM(
            LlamaConfig(**SHAPE, vocab_size=vocabulary, max_position_embeddings=window, tie_word_embeddings=True)
        ).eval()
    layers = {}
    for name, module in linears(model).items():
        # Four times the initialisation's spread: logits that the rounding of the weights can disturb.
        layers[name] = StudentLinear(
            4 * weight_of(module), None, GRIDS.get(spec.name)(spec), TRANSFORMS.get("identity")()
        )
        replace_module(model, name, layers[name])
        module.weight = None
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    windows = torch.randint(0, vocabulary, (steps, window), generator=torch.Generator().manual_seed(1))
    student = StudentModel(model, layers, windows, torch.bfloat16)
    student.begin()
    torch.cuda.reset_peak_memory_stats()  # from here on: the warm-up has the peak too, and a graph shows it only then
    ends: list[float] = []

    def step_done(step: int, total: int, **figures: float) -> None:
        torch.cuda.synchronize()
        ends.append(time.perf_counter())

    job = Job(layers, student, 0, NoState(), step_done)
    history = DiscQuant({"steps": steps}).round(job).history
    times = [b - a for a, b in zip(ends[WARM_UP - 1 :], ends[WARM_UP:], strict=False)]
    return {
        "implementation": os.environ.get("DQ_TRAINING", "auto"),
        "half_state": all(layer.half_state for layer in layers.values()),
        "quantized_weights": weights,
        "seconds": {"median": statistics.median(times), "min": min(times), "max": max(times), "steps": len(times)},
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
        "kl": [row["kl"] for row in history],
    }


def shape_of(options: argparse.Namespace) -> list[str]:
    """The arguments that decide what is measured."""
    return ["--vocab", str(options.vocab), "--window", str(options.window), "--steps", str(options.steps)]


def in_own_process(implementation: str, state: str, options: argparse.Namespace) -> dict[str, Any]:
    """:func:`measure` in a fresh process that may use ``implementation`` only, its state in ``state`` bits."""
    done = subprocess.run(
        [sys.executable, __file__, "--worker", *shape_of(options)],
        env={**os.environ, "DQ_TRAINING": implementation, "DQ_TRAINING_STATE": state},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise DQError(f"the {implementation} run failed: {done.stderr.strip()[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    """Measure both, print, write the JSON; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--window", type=int, default=2048, help="tokens a step")
    parser.add_argument("--steps", type=int, default=12, help=f"the first {WARM_UP} are not timed")
    parser.add_argument(
        "--output", type=Path, help="result file (default: benchmarks/results/discquant_step_DEVICE.json)"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps <= WARM_UP:
        parser.error(f"--steps must be more than {WARM_UP}")
    if options.worker:
        print(json.dumps(measure(options.vocab, options.window, options.steps)))
        return 0
    reason = TritonCuda().available()
    if reason is not None or not torch.cuda.is_available():
        print(
            f"discquant_step: nothing was timed, no usable GPU: {reason or 'TRITON_INTERPRET is set'}", file=sys.stderr
        )
        return 2
    runs = (("reference", "32"), ("triton", "32"), ("triton", "16"))
    rows = [in_own_process(name, state, options) for name, state in runs]
    plain, fused = rows[:2]
    apart = abs(fused["kl"][0] / plain["kl"][0] - 1)
    if apart > KL_TOLERANCE:
        print(
            f"discquant_step: the first KL differ by {apart:.1%}: {plain['kl'][0]}, {fused['kl'][0]}", file=sys.stderr
        )
        return 1
    ratios = {
        "speed": plain["seconds"]["median"] / fused["seconds"]["median"],
        "peak_memory": fused["peak_memory_bytes"] / plain["peak_memory_bytes"],
    }
    for row in rows:
        state = 16 if row["half_state"] else 32
        print(
            f"{row['implementation']:9} {state}-bit state  {1e3 * row['seconds']['median']:7.1f} ms a step "
            f"({1e3 * row['seconds']['min']:.1f} .. {1e3 * row['seconds']['max']:.1f}), "
            f"peak {row['peak_memory_bytes'] / 2**30:5.2f} GiB, KL {row['kl'][0]:.5f} -> {row['kl'][-1]:.5f}"
        )
    print(f"fused is {ratios['speed']:.2f}x as fast with {ratios['peak_memory']:.0%} of the memory")
    device = torch.cuda.get_device_name()
    name = "".join(c if c.isalnum() else "_" for c in device.lower())
    output = options.output or ROOT / "benchmarks" / "results" / f"discquant_step_{name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "question": "one DiscQuant step, 3 bits, group 64, batch 1: fused kernels against plain PyTorch",
        "device": device,
        "versions": {**versions(), "cuda": torch.version.cuda, "triton": version("triton")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/discquant_step.py", *shape_of(options)]),
        "model": {**SHAPE, "vocab_size": options.vocab},
        "window": options.window,
        "rows": rows,
        "ratios": ratios,
    }
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
