"""dq plan against what runs really take: peak memory of whole (short) quantizations of SmolLM2 and stories260K.

    python benchmarks/plan.py --stories build/stories260k --stories-text tiny.txt [--model DIR] [--text FILE]

Every row is ``dq plan`` and, in a process of its own, ``dq quantize`` with the same options, few windows and few
iterations: memory does not depend on how many iterations there are, and windows are counted. Seconds are not compared
here (``dq plan --measure`` does that on a machine that does nothing else). Then the plans of Llama-3.1-70B, which
have not been run. Finished rows lie in build/theory/plan/ and are not made again.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from typing import Any

from theory_common import ROOT, Parts, Subject, options, rows_of, smol, stories, with_figure, write_result

from dq_runtime.cli import main as main_of_dq
from dq_runtime.packing.atomic import replace_file

# Of stories260K the inputs of down_proj are no multiple of a group.
STORIES = ["--override", "*.down_proj=3:row"]
FEW = ["--held-out-windows", "2", "--compute-dtype", "float32", "--bits", "3"]
STORIES_RUNS = [
    (["--rounding", "discquant", "--set", "iters=3", "--set", "epochs=2"], 16, 512),
    (["--rounding", "discquant-paper"], 16, 512),
    (["--rounding", "autoround", "--set", "iters=3"], 16, 512),
    (["--rounding", "gptq"], 16, 512),
    (["--rounding", "nearest"], 16, 512),
    (["--rounding", "autoround", "--set", "iters=3", "--blockwise"], 16, 512),
]
SMOL_RUNS = [
    (["--rounding", "discquant", "--set", "iters=1", "--set", "batch=4", "--set", "epochs=1"], 4, 256),
    (["--rounding", "autoround", "--set", "iters=1", "--set", "batch=4", "--blockwise"], 4, 256),
]
LLAMA = str(ROOT / "benchmarks" / "configs" / "llama-3.1-70b.json")
LLAMA_RUNS = {
    "1 x 80 GB, blockwise": ["--rounding", "autoround", "--blockwise", "--device", "cuda"],
    "8 x 80 GB, whole model": ["--rounding", "discquant", "--device", "cuda", "--gpus", "8", "--window-length", "256"],
}


def quantize(*arguments: str) -> dict[str, Any]:
    """The report of a run in a process of its own."""
    command = [sys.executable, "-m", "dq_runtime", "quantize", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def planned(*arguments: str) -> dict[str, Any]:
    """What ``dq plan`` prints, made in this process, whose resident memory counts as the baseline."""
    with redirect_stdout(io.StringIO()) as said:
        if code := main_of_dq(["plan", *arguments, "--tflops", "400", "--json"]):
            raise SystemExit(code)
    answer: dict[str, Any] = json.loads(said.getvalue())
    return answer


def row(
    parts: Parts, subject: Subject, method: list[str], windows: int, length: int, more: list[str]
) -> dict[str, Any]:
    """Predicted and measured."""
    sizes = ["--windows", str(windows), "--window-length", str(length), *FEW, *more]
    text = ["--calibration", subject.text] if subject.text else []
    output = parts.directory / f"out-{os.getpid()}"

    def measured() -> float:
        for left in (output, output.with_name("out.partial")):
            shutil.rmtree(left, ignore_errors=True)
        report = quantize(subject.path, "-o", str(output), *method, *sizes, *text)
        shutil.rmtree(output, ignore_errors=True)
        return float(report["peak_memory_bytes"])

    settings = {"model": subject.name, "options": [*method, *sizes]}
    peak = parts.get(f"{subject.name} {' '.join(method)}", settings, measured)
    plan = planned(subject.path, *method, *sizes)
    predicted = plan["peak"]["host"]
    return {
        "model": subject.name,
        "method": plan["setting"]["method"],
        "blockwise": plan["setting"]["blockwise"],
        "windows": windows,
        "window_length": length,
        "predicted_bytes": predicted["bytes"],
        "phase": predicted["phase"],
        "measured_bytes": peak,
        "ratio": predicted["bytes"] / peak,
        "baseline_bytes": plan["setting"]["baseline"],
        "phases": {phase["name"]: phase["bytes"]["host"] for phase in plan["phases"]},
    }


def llama(name: str, arguments: list[str]) -> dict[str, Any]:
    """A plan of Llama-3.1-70B on GPUs that are not here."""
    plan = planned(LLAMA, *arguments, "--gpu-memory", "80", "--host-memory", "2000")
    return {"name": name, "arguments": arguments, **{k: v for k, v in plan.items() if k not in ("limits", "seconds")}}


def table(result: dict[str, Any]) -> list[str]:
    """In markdown."""
    head = ["model", "method", "mode", "predicted", "measured", "predicted / measured", "peak in"]
    lines = []
    for r in result["rows"]:
        sizes = [f"{r[key] / 1e6:.0f} MB" for key in ("predicted_bytes", "measured_bytes")]
        mode = "blockwise" if r["blockwise"] else "whole model"
        lines.append([r["model"], r["method"], mode, *sizes, f"{r['ratio']:.2f}", r["phase"]])
    return rows_of(head, lines)


def arithmetic(plan: dict[str, Any]) -> list[str]:
    """The GPU's peak phase of a plan, in markdown."""
    peak = plan["peak"]["GPU"]
    phase = next(p for p in plan["phases"] if p["name"] == peak["phase"])
    lines = [
        [c["name"], c["how"], f"{c['size'] / plan['weights']:.3f}", f"{c['size'] / 1e9:.2f}"]
        for c in phase["components"]
        if c["place"] == "GPU"
    ]
    lines.append(
        [f"together, in {peak['phase']}", "", f"{peak['bytes'] / plan['weights']:.3f}", f"{peak['bytes'] / 1e9:.2f}"]
    )
    return rows_of([plan["name"], "arithmetic", "bytes a weight", "GB"], lines)


def main() -> None:
    chosen = options(__doc__)
    parts, rows = Parts("plan"), list[dict[str, Any]]()
    plans = [llama(name, arguments) for name, arguments in LLAMA_RUNS.items()]
    runs = [(subject, run, STORIES) for subject in stories(chosen) for run in STORIES_RUNS]
    runs += [(smol(chosen), run, []) for run in SMOL_RUNS]
    for subject, run, more in runs:
        rows.append(row(parts, subject, *run, more))
        write(chosen, rows, plans)


def write(chosen: Any, rows: list[dict[str, Any]], plans: list[dict[str, Any]]) -> None:
    """The rows there are: an interrupted run shows what it has."""
    result = {
        "question": "peak memory of dq quantize, predicted by dq plan from the config and measured",
        "rows": rows,
        "llama_3_1_70b": plans,
    }
    written = write_result(chosen.results / "plan.json", "plan", result)
    page = chosen.docs / "plan.md"
    text = with_figure(page.read_text(encoding="utf-8"), "measured", table(written))
    for plan, name in zip(written["llama_3_1_70b"], ("one_gpu", "eight_gpus"), strict=True):
        text = with_figure(text, name, arithmetic(plan))
    replace_file(page, lambda path: path.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
