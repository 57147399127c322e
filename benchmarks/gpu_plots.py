"""Draw the plots of a GPU result file. Needs no GPU.

python benchmarks/gpu_plots.py benchmarks/results/gpu_DEVICE_DATE.json [--images docs/images]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

SHAPE = (14336, 4096)  # (N, K) of the matmul plot
STYLES = {"dq": "-", "torch-int4": ":", "gemlite": "--", "humming": "-."}
COLOURS = {2: "tab:green", 3: "tab:red", 4: "tab:blue", 8: "tab:purple", 16: "black"}


def save(figure: Figure, path: Path) -> Path:
    """As PNG without the software's name and date in it: the same figures give the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=110, metadata={"Software": None})
    return path


def frame(report: dict[str, Any], title: str, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """An empty plot that says on which device."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(f"{title}\n{report['device']}, {report['date'][:10]}", fontsize=10)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    return figure, axes


def speedups(report: dict[str, Any]) -> Figure | None:
    """Speedup over torch's bf16 against M, a line a width and method; None where nothing of SHAPE was measured."""
    lines: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for row in report["matmul"] or ():
        if (row["n"], row["k"]) == SHAPE and row["bits"] != 16 and row["speedup_over_bf16"] is not None:
            lines.setdefault((row["method"], row["bits"]), []).append((row["m"], row["speedup_over_bf16"]))
    if not lines:
        return None
    title = f"x[M, {SHAPE[1]}] times packed weights [{SHAPE[0]}, {SHAPE[1]}], groups of {report['matmul_group_size']}"
    figure, axes = frame(report, title, "tokens M", "speed, torch bf16 = 1")
    tokens = sorted({m for points in lines.values() for m, _ in points})
    for (method, bits), points in sorted(lines.items(), key=lambda line: (list(STYLES).index(line[0][0]), line[0][1])):
        at = dict(points)
        axes.plot(
            tokens,
            [at.get(m, math.nan) for m in tokens],  # a gap where nothing was timed
            STYLES[method],
            color=COLOURS[bits],
            marker="o" if method == "dq" else None,
            markersize=3,
            label=f"{'dq_runtime' if method == 'dq' else method}, {bits} bits",
        )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [str(m) for m in tokens])
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return figure


def decoding(report: dict[str, Any]) -> Figure | None:
    """Tokens a second of a whole decode step, a group of bars a batch; None where none was measured."""
    rows = report["decode"]
    if not rows:
        return None
    variants = sorted({(row["bits"], row["head_bits"]) for row in rows}, reverse=True)
    batches = sorted({row["batch"] for row in rows})
    model = report["decode_model"]
    title = (
        f"decode step of {model['num_hidden_layers']} layers, hidden {model['hidden_size']}, context "
        f"{report['decode_context']}, random weights"
    )
    figure, axes = frame(report, title, "sequences in the batch", "tokens a second")
    width = 0.8 / len(variants)
    for place, (bits, head) in enumerate(variants):
        chosen = {row["batch"]: row for row in rows if (row["bits"], row["head_bits"]) == (bits, head)}
        at = [batches.index(batch) + (place - (len(variants) - 1) / 2) * width for batch in chosen]
        name = "bf16" if bits == 16 else f"{bits} bits, head in {'bf16' if head == 16 else f'{head} bits'}"
        bars = axes.bar(
            at,
            [row["tokens_per_second"] for row in chosen.values()],
            width * 0.95,
            label=name,
            color=COLOURS[bits],
            alpha=0.6 if head == 16 and bits != 16 else 1.0,
        )
        shown = [row["speedup_over_bf16"] for row in chosen.values()]
        axes.bar_label(bars, ["" if ratio is None or bits == 16 else f"{ratio:.1f}x" for ratio in shown], fontsize=7)
    axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axes.set_yscale("log")
    axes.legend(fontsize=8)
    return figure


def draw(report: dict[str, Any], images: Path) -> list[Path]:
    """The plots that the report has rows for: gpu_matmul.png, gpu_decode.png."""
    figures = {"gpu_matmul.png": speedups(report), "gpu_decode.png": decoding(report)}
    return [save(figure, images / name) for name, figure in figures.items() if figure is not None]


def main() -> int:
    """Draw; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument(
        "--images", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "images", help="folder"
    )
    args = parser.parse_args()
    try:
        report = json.loads(args.result.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(f"gpu_plots: {args.result} cannot be read: {error}", file=sys.stderr)
        return 2
    for path in draw(report, args.images):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
