"""Our server against llama.cpp's under the same load: tokens per second, waiting times, memory.

    python benchmarks/serve.py [--rounds 5] [--requests 24] [--output FILE] [--plot FILE]

SmolLM2-135M-Instruct at 4 bits on two threads, both servers with eight places, greedy completions of 256 tokens to
prompts of 20 to 130 from CPython's documentation, each prompt once: no server can reuse another's. The two take turns,
the other one idle, so that whatever else the machine does meets both. The clients run on the same cores. llama.cpp's
server is built from its source for this machine in build/rivals (10 minutes, once).
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import cpu_models
import httpx
import serve_load
import serve_rival

ROOT = Path(__file__).resolve().parents[1]
PLACES = 8  # of either server
CONCURRENCY = (1, 2, 4, 8)
TOKENS = 256
THREADS = 2
CONTEXT = 2048  # of each place
READY = 120.0  # seconds


@dataclass
class Server:
    """A running server: its address and its process."""

    name: str
    url: str
    process: subprocess.Popen[bytes]

    def peak_memory(self) -> int:
        """Bytes it has held at most so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@contextmanager
def running(name: str, command: Sequence[str], port: int) -> Iterator[Server]:
    """The server while it runs; ready when it says that it is healthy."""
    with open(ROOT / "build" / "serve" / f"{name.replace(' ', '_')}.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    server = Server(name, f"http://127.0.0.1:{port}", process)
    try:
        until = time.monotonic() + READY
        while not healthy(server.url):
            if process.poll() is not None or time.monotonic() > until:
                sys.exit(f"serve.py: {name} did not start; its output is in {log.name}")
            time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        process.wait(timeout=60)


def healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def prompts(count: int, seed: int) -> list[str]:
    """Pieces of the documentation that every CPython carries, of 80 to 400 characters, no two alike."""
    from pydoc_data.topics import topics

    text, pick = "\n\n".join(topics.values()), random.Random(seed)
    found = []
    for _ in range(count):
        size = pick.randrange(80, 400)
        start = pick.randrange(len(text) - size)
        found.append(text[start : start + size])
    return found


def commands(folder: Path, rival: serve_rival.Rival) -> list[tuple[str, list[str], int]]:
    """Name, command and port of the two."""
    gguf = cpu_models.smollm2()
    ours = cpu_models.once(folder / "dq-4", lambda path: cpu_models.make_smol(gguf, 4, path))
    quantize = [str(rival.quantizer), "--allow-requantize", str(gguf)]
    theirs = cpu_models.once(
        folder / "Q4_0.gguf",
        lambda path: subprocess.run([*quantize, str(path), "Q4_0"], check=True, capture_output=True),
    )
    port, other = free_port(), free_port()
    serve = [sys.executable, "-m", "dq_runtime", "serve", str(ours), "--port", str(port), "--device", "cpu"]
    kv = 2 * 30 * 3 * 64 * 2 * PLACES * CONTEXT  # keys and values, layers, heads, head_dim, float16: as theirs
    ours_options = ["--max-running", str(PLACES), "--max-model-len", str(CONTEXT), "--kv-memory", str(kv)]
    rival_options = ["-m", str(theirs), "-np", str(PLACES), "-c", str(PLACES * CONTEXT), "--port", str(other)]
    threads = ["-t", str(THREADS), "-tb", str(THREADS)]
    return [
        ("dq 4 bits", [*serve, *ours_options], port),
        ("llama.cpp Q4_0", [str(rival.server), *rival_options, *threads], other),
    ]


def measure(servers: Sequence[Server], rounds: int, requests: int) -> list[dict[str, Any]]:
    """Rows of every server and concurrency; the median round by tokens per second is kept, with the spread."""
    rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for server in servers:
        serve_load.load(server.url, prompts(4, seed=0), 2, 16)  # what is done once
    for turn in range(rounds):
        for concurrency in CONCURRENCY:
            texts = prompts(max(4, requests * concurrency // PLACES), seed=100 * turn + concurrency)
            for server in servers if turn % 2 == 0 else reversed(servers):
                row = serve_load.load(server.url, texts, concurrency, TOKENS)
                rows.setdefault((server.name, concurrency), []).append(row)
                print(server.name, {k: v for k, v in row.items() if k != "errors"}, flush=True)
                if row["errors"]:
                    sys.exit(f"serve.py: {server.name} failed: {row['errors'][0]}")
    found = []
    for (name, _), runs in rows.items():
        ordered = sorted(runs, key=lambda run: float(run["tokens_per_second"]))
        speeds = [run["tokens_per_second"] for run in ordered]
        middle = ordered[len(ordered) // 2]
        found.append({"engine": name, **middle, "errors": 0, "min": speeds[0], "max": speeds[-1], "rounds": rounds})
    return found


def ratios_of(rows: Sequence[dict[str, Any]], ours: str, theirs: str) -> dict[str, float]:
    """What the project promises, all from one run."""

    def figure(name: str, concurrency: int, key: str) -> float:
        return float(next(r[key] for r in rows if r["engine"] == name and r["concurrency"] == concurrency))

    speed, first = "tokens_per_second", "first_token_p95"
    most = CONCURRENCY[-1]
    return {
        f"throughput_{most}_over_1": figure(ours, most, speed) / figure(ours, 1, speed),
        f"theirs_{most}_over_1": figure(theirs, most, speed) / figure(theirs, 1, speed),
        f"throughput_{most}_over_theirs": figure(ours, most, speed) / figure(theirs, most, speed),
        "throughput_1_over_theirs": figure(ours, 1, speed) / figure(theirs, 1, speed),
        f"first_token_p95_{most}_over_theirs": figure(ours, most, first) / figure(theirs, most, first),
        f"between_tokens_p95_{most}_over_theirs": figure(ours, most, "between_tokens_p95")
        / figure(theirs, most, "between_tokens_p95"),
    }


def prefix_reuse(server: Server) -> dict[str, float]:
    """Time to first token of a question behind a long shared beginning, before and after somebody else sent it."""
    shared = "\n".join(prompts(25, seed=7))[:5000]
    times: dict[str, list[float]] = {"cold": [], "shared": []}
    for i in range(5):
        for kind, question in (("cold", "first"), ("shared", "second")):
            row = serve_load.load(server.url, [f"{i}: {shared}\n\nA {question} question?"], 1, 4)
            times[kind].append(row["first_token_p50"])
    found = {f"first_token_{kind}": statistics.median(values) for kind, values in times.items()}
    return found | {"speedup": found["first_token_cold"] / found["first_token_shared"]}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Throughput and waiting by concurrency."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for name in dict.fromkeys(r["engine"] for r in rows):
        mine = [r for r in rows if r["engine"] == name]
        at = [r["concurrency"] for r in mine]
        axes[0].plot(at, [r["tokens_per_second"] for r in mine], marker="o", label=name)
        axes[1].plot(at, [1000 * r["first_token_p95"] for r in mine], marker="o", label=name)
    for axis, title in zip(axes, ("tokens/s, all streams", "95% of first tokens within, ms"), strict=True):
        axis.set(title=title, xlabel="concurrent streams", ylim=(0, None), xticks=CONCURRENCY)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=24, help="of a round at the highest concurrency")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/serve.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/images/serve.png")
    options = parser.parse_args()
    rival = serve_rival.rival(ROOT / "build" / "rivals" / "llama-server")
    (ROOT / "build" / "serve").mkdir(parents=True, exist_ok=True)
    (ROOT / "build" / "cpu").mkdir(parents=True, exist_ok=True)
    (ours, command, port), (theirs, other_command, other_port) = commands(ROOT / "build" / "cpu", rival)
    with running(ours, command, port) as first, running(theirs, other_command, other_port) as second:
        rows = measure([first, second], options.rounds, options.requests)
        reuse = prefix_reuse(first)
        for row, server in ((r, s) for r in rows for s in (first, second) if r["engine"] == s.name):
            row["peak_memory_bytes"] = server.peak_memory()
    ratios = {name: round(value, 3) for name, value in ratios_of(rows, ours, theirs).items()}
    print(json.dumps({"ratios": ratios, "prefix_reuse": reuse}, indent=1))
    from dq_runtime.environment import device_name, versions

    result = {
        "device": device_name("cpu"),
        "threads": THREADS,
        "versions": {**versions(), "llama.cpp": rival.version(), "aiohttp": aiohttp.__version__},
        "date": datetime.now(UTC).isoformat(),
        "command": "make bench-serve",
        "ratios": ratios,
        "prefix_reuse": reuse,
        "rows": rows,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    draw(rows, options.plot)


if __name__ == "__main__":
    main()
