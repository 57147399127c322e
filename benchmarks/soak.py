"""Ten minutes of mixed load on our server, with everything that clients do wrong, and what is left afterwards.

    python benchmarks/soak.py [--minutes 10] [--output FILE]

Clients stream, wait for whole answers, ask for JSON or several choices, hang up in the middle of a stream or before the
first token, read slowly, and send what must be refused. The memory of keys and values is small enough, and some answers
are long enough, that sequences are preempted. At the end no block may be held, no request may run or wait, every
refusal must have been the right one, and the process must not have grown: its memory is compared after the first and
the last fifth of the time. Exits with 1 where one of these fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cpu_models
import httpx
from serve import Server, free_port, prompts, running

ROOT = Path(__file__).resolve().parents[1]
CLIENTS = 12
# 20 blocks of 64 positions, 1.5 MB each on SmolLM2: too few for eight texts of three, enough for one of 1024 tokens.
KV_MEMORY = 20 * 64 * 2 * 30 * 3 * 64 * 2
PATIENCE = 120.0
GROWTH = 1.10  # of the resident memory, from the first fifth of the time to the last

Client = httpx.AsyncClient
Kind = Callable[[Client, random.Random], Awaitable[str]]

REFUSED: tuple[tuple[dict[str, Any] | bytes, int], ...] = (
    ({"prompt": "x", "temperature": -1}, 400),
    ({"prompt": "x", "max_tokens": -5}, 400),
    ({"prompt": "x", "top_p": 7}, 400),
    ({"prompt": ""}, 400),
    ({"prompt": "x", "model": "another"}, 404),
    ({"prompt": "word " * 20000}, 400),
    ({"prompt": "x", "response_format": {"type": "json_schema"}}, 400),
    (b'{"prompt": "\xff\xfe"}', 400),
    (b"[" * 50000, 400),
    (b"x" * (5 << 20), 413),
)


def body(pick: random.Random, **more: Any) -> dict[str, Any]:
    text = prompts(1, pick.randrange(2**31))[0]
    sampling = {"temperature": pick.choice([0, 0.7, 1.2]), "seed": pick.randrange(2**31)}
    return {"prompt": text, "max_tokens": pick.randrange(1, 160), **sampling, **more}


async def whole(client: Client, pick: random.Random) -> str:
    """A whole answer, or several choices of it."""
    response = await client.post("/v1/completions", json=body(pick, n=pick.choice([1, 1, 1, 3])))
    assert response.status_code == 200, response.text[:300]
    return "whole"


async def grown(client: Client, pick: random.Random) -> str:
    """A long answer to a few words: what a sequence needs at its end was not there to be counted when it was let in."""
    asked = {"prompt": "Once upon a time", "max_tokens": pick.randrange(300, 700), "seed": pick.randrange(2**31)}
    response = await client.post("/v1/completions", json={**asked, "ignore_eos": True})
    assert response.status_code == 200, response.text[:300]
    assert response.json()["usage"]["completion_tokens"] == asked["max_tokens"], "an answer was cut short"
    return "long"


async def streamed(client: Client, pick: random.Random) -> str:
    """A stream that is read to its end, sometimes slowly."""
    slow = pick.random() < 0.2
    done = False
    async with client.stream("POST", "/v1/completions", json=body(pick, stream=True)) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            done = done or line == "data: [DONE]"
            if slow:
                await asyncio.sleep(0.02)
    assert done, "a stream ended without [DONE]"
    return "streamed slowly" if slow else "streamed"


async def chatted(client: Client, pick: random.Random) -> str:
    """Turns of one conversation, each of which begins like the one before it."""
    messages: list[dict[str, str]] = [{"role": "system", "content": "You are a terse assistant. " * 20}]
    for _ in range(pick.randrange(1, 4)):
        messages.append({"role": "user", "content": prompts(1, pick.randrange(2**31))[0][:200]})
        response = await client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 40})
        assert response.status_code == 200, response.text[:300]
        messages.append({"role": "assistant", "content": response.json()["choices"][0]["message"]["content"] or "."})
    return "conversation"


async def as_json(client: Client, pick: random.Random) -> str:
    """A constrained answer, which must be JSON of the schema where it was not cut off."""
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}, "ok": {"type": "boolean"}},
        "required": ["n", "ok"],
        "additionalProperties": False,
    }
    asked = {"type": "json_schema", "json_schema": {"name": "pair", "schema": schema}}
    response = await client.post("/v1/completions", json=body(pick, response_format=asked))
    assert response.status_code == 200, response.text[:300]
    choice = response.json()["choices"][0]
    if choice["finish_reason"] == "stop":
        assert json.loads(choice["text"]).keys() == {"n", "ok"}
    return "constrained"


async def hung_up(client: Client, pick: random.Random) -> str:
    """Gone in the middle of a stream."""
    pieces = pick.randrange(1, 20)
    async with client.stream("POST", "/v1/completions", json=body(pick, stream=True, max_tokens=400)) as response:
        async for _ in response.aiter_lines():
            pieces -= 1
            if pieces == 0:
                break
    return "fault: hung up in the middle"


async def gave_up(client: Client, pick: random.Random) -> str:
    """Gone before anything came, whether it streams or not."""
    asked = body(pick, stream=pick.random() < 0.5, max_tokens=400)
    try:
        await client.post("/v1/completions", json=asked, timeout=httpx.Timeout(PATIENCE, read=pick.uniform(0.001, 0.3)))
    except httpx.ReadTimeout:
        return "fault: gave up waiting"
    return "whole"


async def refused(client: Client, pick: random.Random) -> str:
    """Something that must be refused, and with which status."""
    content, status = pick.choice(REFUSED)
    if isinstance(content, bytes):
        headers = {"content-type": "application/json"}
        try:
            response = await client.post("/v1/completions", content=content, headers=headers)
        except (httpx.WriteError, httpx.ReadError):  # the server hangs up on a body that is too large
            assert status == 413
            return "fault: refused"
    else:
        response = await client.post("/v1/completions", json=content)
    assert response.status_code == status, f"{status} expected, got {response.status_code}: {response.text[:300]}"
    assert response.json()["error"]["message"]
    return "fault: refused"


KINDS: tuple[tuple[Kind, int], ...] = (
    (streamed, 5),
    (whole, 4),
    (chatted, 2),
    (as_json, 1),
    (grown, 2),
    (hung_up, 4),
    (gave_up, 3),
    (refused, 3),
)


async def soak(server: Server, seconds: float) -> tuple[Counter[str], list[str], list[tuple[float, int]]]:
    """What was done how often, what went wrong, and resident memory by time."""
    done, wrong, memory = Counter[str](), list[str](), list[tuple[float, int]]()
    began = time.monotonic()
    limits = httpx.Limits(max_connections=4 * CLIENTS, max_keepalive_connections=CLIENTS)
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, limits=limits) as client:

        async def one(number: int) -> None:
            pick = random.Random(number)
            kinds, weights = [kind for kind, _ in KINDS], [weight for _, weight in KINDS]
            while time.monotonic() - began < seconds:
                kind = pick.choices(kinds, weights)[0]
                try:
                    done[await kind(client, pick)] += 1
                except (AssertionError, httpx.HTTPError, ValueError) as error:
                    wrong.append(f"{kind.__name__}: {type(error).__name__}: {error}")

        async def watch() -> None:
            while time.monotonic() - began < seconds:
                memory.append((time.monotonic() - began, resident(server)))
                left = max(0.0, seconds - (time.monotonic() - began))
                print(f"\r{left:4.0f} s left, {done.total()} requests, {len(wrong)} wrong ", end="", flush=True)
                await asyncio.sleep(min(5.0, left + 0.01))

        await asyncio.gather(watch(), *(one(number) for number in range(CLIENTS)))
    print()
    return done, wrong, memory


def resident(server: Server) -> int:
    """Bytes of memory that the server holds now."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


def metrics(server: Server) -> dict[str, float]:
    """The server's own numbers, those without labels."""
    lines = httpx.get(f"{server.url}/metrics", timeout=PATIENCE).text.splitlines()
    found = (re.fullmatch(r"(dq_\w+) (\S+)", line) for line in lines)
    return {match[1]: float(match[2]) for match in found if match}


def settled(server: Server) -> dict[str, float]:
    """The numbers once nothing runs any more, or after ten seconds."""
    until = time.monotonic() + 10
    while (now := metrics(server))["dq_running"] + now["dq_waiting"] > 0 and time.monotonic() < until:
        time.sleep(0.2)
    return now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/soak.json")
    options = parser.parse_args()
    (ROOT / "build" / "serve").mkdir(parents=True, exist_ok=True)
    (ROOT / "build" / "cpu").mkdir(parents=True, exist_ok=True)
    gguf = cpu_models.smollm2()
    model = cpu_models.once(ROOT / "build" / "cpu" / "dq-4", lambda path: cpu_models.make_smol(gguf, 4, path))
    port = free_port()
    command = [sys.executable, "-m", "dq_runtime", "serve", str(model), "--port", str(port), "--device", "cpu"]
    command += ["--max-running", "8", "--max-model-len", "1024", "--kv-memory", str(KV_MEMORY)]
    with running("soak", command, port) as server:
        done, wrong, memory = asyncio.run(soak(server, 60 * options.minutes))
        left, alive = settled(server), server.process.poll() is None
        fifth = len(memory) // 5
        start = max(held for _, held in memory[fifth // 2 : fifth + 1])
        end = max(held for _, held in memory[-fifth - 1 :])
        faults = {kind.removeprefix("fault: "): n for kind, n in done.items() if kind.startswith("fault: ")}
        failures = [*wrong[:20]]
        if left["dq_kv_blocks_used"]:
            failures.append(f"{left['dq_kv_blocks_used']:.0f} blocks are held though nothing runs")
        if left["dq_running"] + left["dq_waiting"]:
            failures.append("requests still run ten seconds after the last client left")
        if end > GROWTH * start:
            failures.append(f"the server grew from {start} to {end} bytes")
        if not left["dq_preemptions_total"]:
            failures.append("no sequence was preempted: the memory is not small enough to test that")
        if not alive:
            failures.append("the server died")
    from dq_runtime.environment import device_name, versions

    result = {
        "device": device_name("cpu"),
        "versions": {**versions(), "httpx": httpx.__version__},
        "date": datetime.now(UTC).isoformat(),
        "command": "make soak",
        "minutes": options.minutes,
        "clients": CLIENTS,
        "requests": done.total(),
        "requests_by_kind": dict(done),
        "faults_injected": sum(faults.values()),
        "unexpected": len(wrong),
        "failures": failures,
        "leaked_blocks": int(left["dq_kv_blocks_used"]),
        "memory_at_start": start,
        "memory_at_end": end,
        "server": {name: left[name] for name in sorted(left) if name.endswith("_total") or "blocks" in name},
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if failures:
        sys.exit(f"soak.py: {len(failures)} failures; the first: {failures[0]}")


if __name__ == "__main__":
    main()
