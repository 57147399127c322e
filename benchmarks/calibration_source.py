"""What does it cost to have no calibration text? discquant-paper on real text against text the model samples itself.

    python benchmarks/calibration_source.py MODEL --text FILE --held-out NAME=FILE ... --output benchmarks/results/...

Same model, grid, seed, number of windows and held-out text; only the calibration text differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import dq_runtime
from dq_runtime.cli.progress import Bars
from dq_runtime.spec import QuantSpec, RoundingSpec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="real calibration text")
    parser.add_argument("--held-out", required=True, help="text to measure on, from another source than --text")
    parser.add_argument("--windows", type=int, default=96)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    runs: dict[str, Any] = {}
    with Bars() as bars:
        for name, text in (("real", options.text), ("self_sampled", None)):
            out = Path(tempfile.mkdtemp()) / "checkpoint"
            report = dq_runtime.quantize(
                options.model,
                out,
                QuantSpec(rounding=RoundingSpec("discquant-paper")),
                calibration=text,
                held_out=options.held_out,
                windows=options.windows,
                listener=bars,
            )
            shutil.rmtree(out.parent)
            runs[name] = {k: v for k, v in report.items() if k not in ("layers", "history", "command")}
    arguments = [Path(a).name if Path(a).is_file() else a for a in sys.argv[1:]]  # names, not this machine's folders
    kl = {name: run["held_out"]["kl"]["discquant-paper"] for name, run in runs.items()}
    result = {
        "question": "held-out KL of discquant-paper calibrated on real text and on text sampled from the teacher",
        **{key: runs["real"][key] for key in ("device", "threads", "versions", "date")},
        "command": shlex.join(["python", "benchmarks/calibration_source.py", *arguments]),
        "sha256": {n: hashlib.sha256(Path(n).read_bytes()).hexdigest() for n in (options.text, options.held_out)},
        "kl": {"nearest": runs["real"]["held_out"]["kl"]["nearest"], **kl},
        "ratio_self_sampled_over_real": kl["self_sampled"] / kl["real"],
        "runs": runs,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["kl"]), f"ratio {result['ratio_self_sampled_over_real']:.3f}")


if __name__ == "__main__":
    main()
