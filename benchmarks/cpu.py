"""Text generation on the CPU against llama.cpp and torch, all in one run. ``make bench-cpu``.

    python benchmarks/cpu.py [--rounds 5] [--threads 1 2] [--output FILE] [--plot FILE] [--rival-python PYTHON]

Two models (cpu_models.py): SmolLM2-135M-Instruct, and one with the shapes of Llama-3.2-1B and random weights; llama.cpp
is built from its source for this machine in build/rivals (minutes, once). Every contender is a process that has loaded
its model and waits; a round asks each in turn for a prompt of 512 tokens and some after it, so that a change of the
machine's speed meets all of them; the memory's read bandwidth is a contender like the others. Figures are medians over
the rounds; ratios are medians of the ratios within a round, above 1 where we are better. Then cold starts, and how far
our integer activations are from exact ones (cpu_accuracy.py). The 1B contenders together need 8 GB of memory, their
files 5 GB.
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
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cpu_accuracy
import cpu_models
from cpu_models import once
from rival_source import PACKAGE, source

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # runs from a bare clone too

PROMPT = 512
SMOL = "SmolLM2-135M"
MEMORY_BYTES, MEMORY_READS = 2**29, 4  # cpu_worker.Memory
COLD_RIVAL = """
import sys, llama_cpp
m = llama_cpp.Llama(sys.argv[1], n_ctx=1024, n_threads=int(sys.argv[2]), verbose=False)
print(m.create_completion("hi", max_tokens=1)["choices"][0]["text"])
"""


def apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """``work`` in a process of its own: this one must stay small, because a child's peak memory starts at what its
    parent had when it was born."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def rival_python(requested: Path | None, folder: Path) -> Path:
    """The interpreter of an environment that has llama-cpp-python, made if nobody made it yet."""
    if requested is not None:
        return requested
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"building {PACKAGE} from source in {folder} (several minutes, once)", flush=True)
        venv.create(folder, with_pip=True)
    built = subprocess.run([str(python), "-c", "import llama_cpp"], capture_output=True, check=False)
    if built.returncode:
        install = [str(python), "-m", "pip", "install", "-q", "--no-cache-dir", str(source(folder))]
        # The sdist's default is -march=native, which is what makes it fast here; a wheel in pip's cache may be of
        # another machine.
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

    def row(self, model: str, threads: int) -> dict[str, Any]:
        return {
            "candidate": self.name,
            "model": model,
            "threads": threads,
            "prompt": PROMPT,
            "decoded": self.decode,
            "prefill_tokens_per_second": round(PROMPT / statistics.median(self.prefill_seconds), 1),
            "decode_tokens_per_second": round(1 / statistics.median(self.decode_seconds), 1),
            "prefill_seconds": summary(self.prefill_seconds),
            "decode_seconds_per_token": summary(self.decode_seconds),
            "peak_bytes": self.peak if self.measures_memory else None,
        }


def summary(seconds: list[float]) -> dict[str, float]:
    """Of one measure over all rounds."""
    return {
        "median": round(statistics.median(seconds), 6),
        "min": round(min(seconds), 6),
        "max": round(max(seconds), 6),
        "n": len(seconds),
    }


@dataclass(frozen=True)
class Suite:
    """One model, its contenders' files, and how many tokens each decodes a round: what takes long decodes few."""

    model: str
    ours: dict[int, Path]  # by bits
    theirs: dict[str, Path]  # GGUF files by type
    dense: Path | None  # what eager torch runs
    decode: int
    torch_decode: int = 16

    def contenders(self, rival: Path, threads: int) -> list[Contender]:
        worker = str(Path(__file__).with_name("cpu_worker.py"))
        python, t = sys.executable, str(threads)
        found = [
            Contender(f"dq {bits} bits", [python, worker, "ours", str(path), t], self.decode)
            for bits, path in self.ours.items()
        ]
        found += [
            Contender(f"llama.cpp {name}", [str(rival), worker, "llama", str(path), t], self.decode)
            for name, path in self.theirs.items()
        ]
        int4 = [python, worker, "int4pack", self.model, t]
        found.append(Contender("torch int4pack, linears only", int4, self.torch_decode, False))
        for dtype in ("float32", "bfloat16") if self.dense else ():
            command = [python, worker, "torch", str(self.dense), t, dtype]
            found.append(Contender(f"torch {dtype}", command, self.torch_decode))
        return found

    def run(self, rival: Path, threads: int, rounds: int, ids: list[int]) -> tuple[list[Contender], list[float]]:
        """The contenders after ``rounds`` rounds, and the seconds each round's read of memory took per byte."""
        found = self.contenders(rival, threads)
        worker = str(Path(__file__).with_name("cpu_worker.py"))
        memory = Contender("memory", [sys.executable, worker, "memory", str(threads)], MEMORY_READS)
        per_byte = []
        for _ in range(rounds):
            for contender in found:
                contender.round(ids)
            per_byte.append(memory.ask(decode=MEMORY_READS) / MEMORY_READS / MEMORY_BYTES)
        for contender in (*found, memory):
            contender.close()
        return found, per_byte


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


def cold_starts(four: Path, q4_0: Path, rival: Path, threads: int, rounds: int) -> list[dict[str, Any]]:
    """From the command to the first token, ours at 4 bits and llama.cpp at Q4_0, in turns, after one of each that only
    brings the files into the page cache."""
    ours = [sys.executable, "-m", "dq_runtime", "generate", str(four), "hi", "--max-tokens", "1"]
    theirs = [str(rival), "-c", COLD_RIVAL, str(q4_0), str(threads)]
    for command in (ours, theirs):
        cold(command)
    measured: dict[str, list[tuple[float, int]]] = {"dq 4 bits": [], "llama.cpp Q4_0": []}
    for _ in range(rounds):
        for name, command in zip(measured, (ours, theirs), strict=True):
            measured[name].append(cold(command))
    return [
        {
            "candidate": name,
            "cold_seconds": summary([seconds for seconds, _ in runs]),
            "cold_median": round(statistics.median(seconds for seconds, _ in runs), 3),
            "cold_peak_bytes": max(peak for _, peak in runs),
        }
        for name, runs in measured.items()
    ]


def gain(ours: Contender, theirs: list[Contender], what: str) -> float:
    """Median over the rounds of (their best seconds / our seconds)."""
    columns = [getattr(t, what) for t in theirs]
    return round(statistics.median(min(t) / o for o, *t in zip(getattr(ours, what), *columns, strict=True)), 3)


def ratios_of(found: list[Contender]) -> dict[str, float]:
    by_name = {c.name: c for c in found}
    four, q4_0 = by_name["dq 4 bits"], by_name["llama.cpp Q4_0"]
    small = [c for c in found if c.name.startswith("llama.cpp Q") and c.name != "llama.cpp Q8_0"]
    return {
        "decode_4bit": gain(four, [q4_0], "decode_seconds"),
        "decode_3bit": gain(by_name["dq 3 bits"], small, "decode_seconds"),
        "prefill_4bit": gain(four, [q4_0], "prefill_seconds"),
        "peak_memory": round(four.peak / q4_0.peak, 3),
    }


def draw(rows: list[dict[str, Any]], threads: int, path: Path) -> None:
    """Two bar charts, one colour a family: blue ours, grey theirs."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = [
        r for r in rows if r.get("model") == SMOL and r["threads"] == threads and "linears only" not in r["candidate"]
    ]
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.36 * len(shown) + 1.2), sharey=True)
    labels = [r["candidate"] for r in shown]
    colours = ["#2a6fbb" if name.startswith("dq") else "#9a9a9a" for name in labels]
    for axis, key, title in zip(
        axes,
        ("decode_tokens_per_second", "prefill_tokens_per_second"),
        (f"decode, after {PROMPT} tokens", f"prompt of {PROMPT} tokens"),
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


def suites(folder: Path, rival: Path) -> tuple[Suite, Suite]:
    """The two models, their files made if they are not there."""
    gguf = cpu_models.smollm2()
    ours = {
        bits: once(folder / f"dq-{bits}", lambda path, bits=bits: apart(cpu_models.make_smol, gguf, bits, path))
        for bits in (2, 3, 4, 8)
    }
    theirs = {
        kind: once(folder / f"{kind}.gguf", lambda path, kind=kind: cpu_models.make_smol_gguf(rival, gguf, kind, path))
        for kind in cpu_models.SMOL_TYPES
    }
    small = Suite(SMOL, ours, {**theirs, "Q4_1": gguf}, gguf, decode=128)
    large_ours = {
        bits: once(folder / f"1b-dq-{bits}", lambda path, bits=bits: apart(cpu_models.make_1b, bits, path))
        for bits in (2, 3, 4)
    }
    large_theirs = {
        kind: once(folder / f"1b-{kind}.gguf", lambda path, kind=kind: apart(cpu_models.make_1b_gguf, kind, path))
        for kind in cpu_models.BLOCKS
    }
    return small, Suite("1B", large_ours, large_theirs, None, decode=32, torch_decode=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/cpu.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/images/cpu.png")
    parser.add_argument("--rival-python", type=Path, help="an interpreter that has llama-cpp-python already")
    options = parser.parse_args()
    if importlib.util.find_spec("dq_runtime._native") is None:
        sys.exit("cpu.py: dq_runtime._native is not built; run `pip install -e .` where a C++17 compiler is installed")
    folder = ROOT / "build" / "cpu"
    rival = rival_python(options.rival_python, ROOT / "build" / "rivals")
    folder.mkdir(parents=True, exist_ok=True)
    small, large = suites(folder, rival)
    rows: list[dict[str, Any]] = []
    ratios: dict[str, Any] = {}
    for suite in (small, large):
        # No text for random weights: any ids will do.
        ids = apart(cpu_accuracy.prompt_ids, small.ours[4], PROMPT) if suite is small else list(range(PROMPT))
        for threads in options.threads:
            found, per_byte = suite.run(rival, threads, options.rounds, ids)
            for contender in found:
                rows.append(contender.row(suite.model, threads))
                print({k: v for k, v in rows[-1].items() if "seconds" not in k or "per_second" in k}, flush=True)
            bandwidth = {f"read_gb_per_second_{threads}_threads": round(1e-9 / statistics.median(per_byte), 2)}
            if suite is large:
                nbytes = cpu_models.bytes_per_token_1b(4, PROMPT + suite.decode // 2)
                four = next(c for c in found if c.name == "dq 4 bits")
                shares = [nbytes * b / s for s, b in zip(four.decode_seconds, per_byte, strict=True)]
                bandwidth[f"decode_4bit_share_{threads}_threads"] = round(statistics.median(shares), 3)
            ratios.setdefault(suite.model, {}).update(ratios_of(found) | bandwidth)  # the last thread count's stay
    cold_rows = cold_starts(small.ours[4], small.theirs["Q4_0"], rival, options.threads[-1], options.rounds)
    cold_ratio = cold_rows[0]["cold_median"] / cold_rows[1]["cold_median"]
    ratios = {**ratios[small.model], "cold_start": round(cold_ratio, 3), "1B": ratios[large.model]}
    accuracy = apart(cpu_accuracy.measure, small.ours[4], folder / "discquant-3", cpu_models.smollm2())
    print(json.dumps({"cold": cold_rows, "ratios": ratios, "accuracy": accuracy}, indent=1))
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
        "prompt": "CPython's language reference; the 1B shape has random weights",
        "ratios": ratios,
        "accuracy": accuracy,
        "rows": rows + cold_rows,
    }
    options.output.write_text(json.dumps(result, indent=4) + "\n")
    draw(rows, options.threads[-1], options.plot)


if __name__ == "__main__":
    main()
