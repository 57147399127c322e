"""Put the parts that the GPU benchmarks wrote into one result file, and draw its plots. Needs no GPU.

    python benchmarks/gpu_report.py PARTS [--results benchmarks/results] [--images docs/images]

PARTS is a folder with any of tests.json, matmul.json, decode.json, discquant_step.json, all from one device.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import gpu_part
import gpu_plots

NAMES = ("tests", "matmul", "decode", "discquant_step")
HEAD = ("device", "capability", "driver", "versions")


def merged(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One report of all parts; a part that is missing is null. Raises ValueError where they are of several devices."""
    devices = sorted({part["device"] for part in parts.values()})
    if len(devices) != 1:
        raise ValueError(f"the parts come from {len(devices)} devices ({', '.join(devices)}); keep those of one")
    heads = [parts[name] for name in NAMES if name in parts]
    report: dict[str, Any] = {key: next((h[key] for h in heads if key in h), None) for key in HEAD}
    report["date"] = max(part["date"] for part in parts.values())
    report["command"] = "benchmarks/gpu.sh"
    report["parts"] = {name: {key: part[key] for key in ("command", "date")} for name, part in parts.items()}
    # Where both ran, the matmul's copies; each row's fraction is of its own part's.
    report["copy_gb_s"] = next((h["copy_gb_s"] for h in heads if "copy_gb_s" in h), None)
    report["matmul"] = parts.get("matmul", {}).get("matmul")
    for key in ("skipped", "limits", "group_size"):
        report[f"matmul_{key}"] = parts.get("matmul", {}).get(key)
    report["decode"] = parts.get("decode", {}).get("decode")
    for key in ("model", "context"):
        report[f"decode_{key}"] = parts.get("decode", {}).get(key)
    report["cut_short"] = {name: part["cut_short"] for name, part in parts.items() if "cut_short" in part}
    report["wrong"] = [line for part in parts.values() for line in part.get("wrong", [])]
    step = parts.get("discquant_step")
    report["discquant_step"] = None if step is None else {k: v for k, v in step.items() if k not in (*HEAD, "date")}
    report["tests"] = parts.get("tests", {}).get("tests")
    return report


def table(report: dict[str, Any]) -> list[str]:
    """The README's table of the plot's shape: microseconds by tokens, and how many times as fast as torch's bf16."""
    rows = [row for row in report["matmul"] or () if (row["n"], row["k"]) == gpu_plots.SHAPE]
    times = {(row["method"], row["bits"], row["m"]): row for row in rows}
    widths = [("torch-bf16", 16), ("dq", 4), ("dq", 3), ("dq", 2), ("dq", 8), ("torch-int4", 4)]
    lines = ["| tokens | torch bf16 | 4 bits | 3 bits | 2 bits | 8 bits | torch int4 |", "|---" * 7 + "|"]
    for m in sorted({row["m"] for row in rows}):
        cells = []
        for method, bits in widths:
            row = times.get((method, bits, m))
            ratio = "" if row is None or bits == 16 else f" ({row['speedup_over_bf16']:.2f}x)"
            cells.append("-" if row is None else f"{row['median_us']:.1f}{ratio}")
        lines.append(f"| {m} | {' | '.join(cells)} |")
    return lines


def file_name(device: str, date: str) -> str:
    """``gpu_nvidia_h100_80gb_hbm3_2026-01-31.json``."""
    return f"gpu_{re.sub('[^a-z0-9]+', '_', device.lower()).strip('_')}_{date[:10]}.json"


def main() -> int:
    """Merge, write, draw; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", type=Path)
    parser.add_argument("--results", type=Path, default=gpu_part.ROOT / "benchmarks" / "results")
    parser.add_argument("--images", type=Path, default=gpu_part.ROOT / "docs" / "images")
    args = parser.parse_args()
    found = {name: args.parts / f"{name}.json" for name in NAMES if (args.parts / f"{name}.json").exists()}
    if not found:
        print(f"gpu_report: {args.parts} holds none of {', '.join(f'{name}.json' for name in NAMES)}", file=sys.stderr)
        return 2
    try:
        report = merged({name: json.loads(path.read_text(encoding="utf-8")) for name, path in found.items()})
    except (ValueError, KeyError) as error:
        print(f"gpu_report: {args.parts} is not what the GPU benchmarks write: {error}", file=sys.stderr)
        return 2
    path = args.results / file_name(report["device"], report["date"])
    gpu_part.write(path, report)
    print(f"wrote {path}")
    for image in gpu_plots.draw(report, args.images):
        print(f"wrote {image}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
