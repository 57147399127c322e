"""How long GPTQ takes for a layer, against its matrix products and its Cholesky factorisation alone.

    python benchmarks/gptq_layer.py [--threads 2] [--seconds 3] [--output FILE]

SmolLM2-135M's four shapes of layers, 3 bits, groups of 64, random weights and inputs. ``layer`` is everything from the
weight and the second moments of its inputs to codes and both losses: ``Gptq.layer``. ``products`` runs, on the same
tensors and nothing else, its Cholesky factorisation, the products of the lazy blocks and those of the two losses. Both
take turns, so that a change of the machine's speed meets both; figures are medians, the ratio that of each turn.

``moments`` is the largest product of the method, that of the second moments X^T X over the calibration tokens, window
by window as `dq quantize` adds them up, divided by the layers that share an input. ``ratio_whole`` has it on both
sides.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # runs from a bare clone too

from dq_runtime.environment import device_name, versions  # noqa: E402
from dq_runtime.grids import GRIDS, Grid, Scales  # noqa: E402
from dq_runtime.rounding import feedback  # noqa: E402
from dq_runtime.rounding.base import Gram  # noqa: E402
from dq_runtime.rounding.gptq import Gptq  # noqa: E402
from dq_runtime.spec import GridSpec  # noqa: E402

# [N, K] and how many layers share its input: q (and o, alone), k and v, gate and up, down
SHAPES = ((576, 576, 3), (192, 576, 3), (1536, 576, 2), (576, 1536, 1))
WINDOWS, TOKENS = 128, 512  # of calibration
LIMIT = 2.0  # what the whole ratio may be


class Layer:
    """A ``LayerProblem`` of a random weight."""

    def __init__(self, w: Tensor) -> None:
        self.grid: Grid = GRIDS.get("int")(GridSpec(bits=3, group_size=64))
        self.scales: Scales = self.grid.fit(w)
        self._w = w

    def weight(self) -> Tensor:
        return self._w


def products(w: Tensor, hessian: Tensor) -> None:
    """The factorisation and every matrix product of one layer."""
    k = w.shape[1]
    factor = torch.linalg.cholesky_ex(hessian)[0]
    for begin in range(feedback.BLOCK, k, feedback.BLOCK):
        part = slice(begin, min(begin + feedback.BLOCK, k))
        torch.addmm(w[:, part], w[:, :begin], factor[:begin, part])
    w @ factor  # the loss of what was found
    w @ factor  # and of nearest


def seconds_of(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(n: int, k: int, sharing: int, seconds: float) -> dict[str, Any]:
    """One row: medians in milliseconds over as many turns as fit into ``seconds``."""
    g = torch.Generator().manual_seed(n + k)
    w = 0.05 * torch.randn(n, k, generator=g)
    x = torch.randn(2 * k, k, generator=g) @ (torch.randn(k, k, generator=g) / k**0.5 + torch.eye(k))
    gram = Gram(x.T @ x / len(x), None, len(x))
    layer, method, generator = Layer(w), Gptq({}), torch.Generator()
    hessian = gram.inputs + 0.01 * gram.inputs.diagonal().mean() * torch.eye(k)
    window, sums = torch.randn(TOKENS, k, generator=g), torch.zeros(k, k)
    whole: list[float] = []
    bare: list[float] = []
    moments: list[float] = []
    end = time.perf_counter() + seconds
    for turn in range(10_000):
        a = seconds_of(lambda: method.layer(layer, gram, generator))
        b = seconds_of(lambda: products(w, hessian))
        c = seconds_of(lambda: sums.addmm_(window.T, window)) * WINDOWS / sharing
        if turn >= 2:  # warm caches and thread pools
            whole.append(a)
            bare.append(b)
            moments.append(c)
        if time.perf_counter() > end and len(whole) >= 5:
            break
    return {
        "n": n,
        "k": k,
        "layer_ms": 1e3 * statistics.median(whole),
        "products_ms": 1e3 * statistics.median(bare),
        "moments_ms": 1e3 * statistics.median(moments),
        "ratio": statistics.median(a / b for a, b in zip(whole, bare, strict=True)),
        "ratio_whole": statistics.median((a + c) / (b + c) for a, b, c in zip(whole, bare, moments, strict=True)),
        "turns": len(whole),
    }


def main() -> int:
    """Measure, print, write the JSON; 1 if a ratio is above its limit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3, help="per shape")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gptq_layer.json")
    options = parser.parse_args()
    if feedback._native is None:
        print("gptq_layer: the C++ extension is not built; run `pip install -e .` first", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    rows = [measure(*shape, options.seconds) for shape in SHAPES]
    for row in rows:
        print(
            f"[{row['n']:5}, {row['k']:5}]  {row['layer_ms']:7.2f} ms a layer, its products and Cholesky "
            f"{row['products_ms']:7.2f} ms: {row['ratio']:.2f}x; with second moments ({row['moments_ms']:.0f} ms) "
            f"{row['ratio_whole']:.2f}x ({row['turns']} turns)"
        )
    report = {
        "question": "rounding a layer by gptq, 3 bits, group 64, against its matrix products and Cholesky alone",
        "device": device_name("cpu"),
        "threads": options.threads,
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(
            ["python", "benchmarks/gptq_layer.py", "--threads", str(options.threads), "--seconds", str(options.seconds)]
        ),
        "limit_whole": LIMIT,
        "rows": rows,
    }
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {options.output}")
    return 0 if all(row["ratio_whole"] <= LIMIT for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
