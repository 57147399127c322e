"""Round a model with somebody else's public tool, on exactly the tokens that our methods see.

    python benchmarks/public_tools.py autoround MODEL --calibration c4.txt -o build/public/autoround-3
    python benchmarks/public_tools.py gptq MODEL --calibration c4.txt -o build/public/gptq-3
    dq compare MODEL ... --checkpoint 'AutoRound 0.16.1=build/public/autoround-3@3:64'

``autoround`` is AutoRound's own package, ``gptq`` the GPTQ of llm-compressor (vLLM's); each is installed in an
environment of its own below build/rivals, once. The windows are packed here, by the same code and seed as in
``dq quantize`` and ``dq compare``, and handed over as token ids: the tools' own data sets are never read. What comes
out is a directory of dense float32 weights, rounded and expanded again, which `dq compare --checkpoint` scores with the
evaluator of every other row. ``made.json`` beside it says with which versions, options and seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # runs from a bare clone too

from dq_runtime.compare.protocol import Protocol  # noqa: E402
from dq_runtime.data import pack_windows  # noqa: E402
from dq_runtime.errors import DQError  # noqa: E402
from dq_runtime.runtime.dense import load_dense  # noqa: E402

TOOLS = {"autoround": "auto-round==0.16.1", "gptq": "llmcompressor==0.14.0.1"}


def environment(tool: str) -> Path:
    """The interpreter that has ``tool``, installed if nobody did it yet."""
    folder = ROOT / "build" / "rivals" / tool
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        print(f"installing {TOOLS[tool]} in {folder} (once)", flush=True)
        venv.create(folder, with_pip=True)
        # The CPU build of torch: what a plain `torch` brings is 3 GB of CUDA.
        subprocess.run([python, "-m", "pip", "install", "-q", "torch==2.13.0", TOOLS[tool]], check=True)
        (folder / ".ready").touch()
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("model", help="a Hugging Face directory or a GGUF file")
    parser.add_argument("--calibration", required=True, help="the text, as for dq quantize")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--row-layers", nargs="*", default=[], help="ends of names of layers with one scale a row")
    parser.add_argument("--iters", type=int, default=200, help="of autoround, whose own default it is")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--python", type=Path, help="an interpreter that has the tool; default: build/rivals/TOOL")
    parser.add_argument("-o", "--output", type=Path, required=True)
    chosen = parser.parse_args()
    if chosen.output.exists():
        sys.exit(f"{chosen.output} exists; choose another name or remove it")
    protocol = Protocol(chosen.model, chosen.calibration, windows=chosen.windows, window_length=chosen.window_length)
    calibration, _ = protocol.texts()
    original = load_dense(chosen.model)
    if original.tokenizer is None:
        sys.exit(f"{chosen.model} has no tokenizer to read {chosen.calibration} with")
    windows = pack_windows(
        calibration.documents, original.tokenizer, chosen.windows, chosen.window_length, protocol.seed, "calibration"
    )
    python = chosen.python or environment(chosen.tool)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        original.model.save_pretrained(folder / "original")
        original.tokenizer.save_pretrained(folder / "original")
        del original  # the tool needs the memory
        job = {
            "tool": chosen.tool,
            "bits": chosen.bits,
            "group_size": chosen.group_size,
            "row_layers": chosen.row_layers,
            "iters": chosen.iters,
            "threads": chosen.threads,
            "model": str(folder / "original"),
            "output": str(chosen.output.resolve()),
            "calibration_sha256": windows.fingerprint(),
        }
        (folder / "job.json").write_text(json.dumps(job))
        (folder / "windows.json").write_text(json.dumps(windows.tokens.tolist()))
        worker = Path(__file__).with_name("public_tools_worker.py")
        done = subprocess.run([python, str(worker), str(folder)], check=False)
    if done.returncode:
        sys.exit(f"{TOOLS[chosen.tool]} failed (exit {done.returncode}); its own message is above")
    grid = f"{chosen.bits}:{chosen.group_size}"
    print(f"{chosen.output}: score it with dq compare --checkpoint NAME={chosen.output}@{grid}")


if __name__ == "__main__":
    try:
        main()
    except DQError as error:
        sys.exit(str(error))
