"""Mutated checkpoints against every reader: nothing but an answer or a refusal in one sentence may come out.

    python benchmarks/fuzz.py --output benchmarks/results/fuzz.json [--inputs 110000] [--seed 0]

The seeds are the golden checkpoints of tests/golden, cut down to two packed linears where that is possible. An input
is a seed with one file mutated one to four times: bits flipped, bytes overwritten with extreme numbers, parts cut out,
repeated or replaced, the end cut off, or, where it is or begins with JSON, a value of it replaced. It is opened, its
config understood and every tensor read, in a process that may use 2 GiB, and 5 s an input. Counted as a crash is any
exception but the refusal (``DQError`` with a message of one line), any signal, and any use of memory beyond the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shlex
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from dq_runtime.errors import DQError
from dq_runtime.packing.checkpoint import open_checkpoint
from dq_runtime.runtime.decoder import read_config

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
SECONDS, MEMORY, MOST_CHARACTERS = 5, 2 * 2**30, 1000
KEPT = ("self_attn.k_proj", "self_attn.v_proj", "layernorm")
EXTREME = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1)
VALUES = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    2**64,
    1e308,
    "",
    "x",
    "../../etc/passwd",
    "re:(a+)+$",
    [],
    {},
    [[]],
    [-1],
)


class HangError(BaseException):
    """An input took too long; not an Exception, so that no reader can swallow it."""


def seed_files(name: str) -> dict[str, bytes]:
    """The files of one golden checkpoint, small enough for thousands of inputs a second."""
    files = {}
    for file in (GOLDEN / name).iterdir():
        if file.name == "model.safetensors":
            files[file.name] = _fewer_tensors(file.read_bytes())
        elif file.name in ("config.json", "model.gguf"):
            files[file.name] = file.read_bytes()
    return files


def _fewer_tensors(content: bytes) -> bytes:
    header, values = split(content)
    tensors = json.loads(header)
    kept: dict[str, Any] = {}
    data = b""
    for key, entry in tensors.items():
        if any(part in key for part in KEPT):
            begin, end = entry["data_offsets"]
            kept[key] = entry | {"data_offsets": [len(data), len(data) + end - begin]}
            data += values[begin:end]
    return joined(json.dumps(kept).encode(), data)


def split(content: bytes) -> tuple[bytes, bytes]:
    """Header and values of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    return content[8 : 8 + length], content[8 + length :]


def joined(header: bytes, values: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + values


def mutated(name: str, content: bytes, choose: random.Random) -> bytes:
    """One mutation of one file."""
    if not content:
        return content
    is_json, is_tensors = name.endswith(".json"), name.endswith(".safetensors")
    if (is_json or is_tensors) and choose.random() < 0.5:
        header, values = (content, b"") if is_json else split(content)
        try:
            changed = _json_mutated(header, choose)
        except (ValueError, RecursionError):  # no longer JSON
            changed = _bytes_mutated(header, choose, len(header)) if header else header
        return changed if is_json else joined(changed, values)
    # Most of a file is values, of which few can be wrong: three of four mutations go where the header is.
    within = min(len(content), 2048) if choose.random() < 0.75 else len(content)
    return _bytes_mutated(content, choose, within)


def _json_mutated(content: bytes, choose: random.Random) -> bytes:
    parsed = json.loads(content)
    places: list[tuple[Any, Any]] = []
    left = [parsed]
    while left:
        value = left.pop()
        keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        places += ((value, key) for key in keys)
        left += (value[key] for key in keys)
    if not places:
        return content
    owner, key = choose.choice(places)
    action = choose.randrange(5)
    if action == 0:
        del owner[key]
    elif action == 1:
        owner[key] = choose.choice(VALUES)
    elif action == 2 and isinstance(owner[key], int):
        owner[key] += choose.choice((-1, 1, 7, 2**31))
    elif action == 3 and isinstance(owner, dict):
        owner[str(key) + choose.choice(("x", ".weight", "_packed", ".g_idx"))] = owner.pop(key)
    else:
        other, there = choose.choice(places)
        owner[key] = json.loads(json.dumps(other[there])) if there in (other if isinstance(other, dict) else ()) else []
    return json.dumps(parsed).encode()


def _bytes_mutated(content: bytes, choose: random.Random, within: int) -> bytes:
    data = bytearray(content)
    at = choose.randrange(max(1, within))
    length = choose.choice((1, 2, 4, 8, 16, 64, 256))
    action = choose.randrange(6)
    if action == 0:
        for _ in range(choose.choice((1, 1, 2, 8))):
            data[choose.randrange(max(1, within))] ^= 1 << choose.randrange(8)
    elif action == 1:
        number = choose.choice(EXTREME)
        form = choose.choice("<BHIQ"[1:])
        packed = struct.pack("<Q", number)[: struct.calcsize("<" + form)]
        data[at : at + len(packed)] = packed
    elif action == 2:
        del data[at : at + length]
    elif action == 3:
        data[at:at] = data[at : at + length] * choose.choice((1, 1, 2, 50))
    elif action == 4:
        data[at : at + length] = choose.randbytes(length)
    else:
        del data[choose.randrange(len(data)) :]
    return bytes(data)


def read_everything(path: Path) -> None:
    """What loading would read, without a model."""
    checkpoint = open_checkpoint(path)
    read_config(checkpoint.config)
    for _, weight in checkpoint.weights():
        np.add.reduce(weight.packed, axis=None, dtype=np.int64)
    for _, tensor in checkpoint.arrays(list(checkpoint.dense)):
        if tensor.values.size:
            tensor.values.reshape(-1)[[0, -1]].tolist()


def outcome(path: Path) -> str:
    """``accepted``, ``refused``, ``hang``, or a traceback."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        read_everything(path)
    except DQError as e:
        if "\n" in str(e).strip() or len(str(e)) > MOST_CHARACTERS:
            return f"a message of {len(str(e))} characters or several lines: {str(e)[:200]!r}"
        return "refused"
    except HangError:
        return "hang"
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "accepted"


def work(name: str, first: int, last: int) -> None:
    """In a process of its own: inputs ``first:last`` of a seed; a line of JSON a failure, and one at the end."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    def hang(*_: Any) -> None:
        raise HangError

    signal.signal(signal.SIGALRM, hang)
    files = seed_files(name)
    counted: Counter[str] = Counter()
    fast = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=fast) as folder:
        for file, content in files.items():
            (Path(folder) / file).write_bytes(content)
        target = Path(folder) / "model.gguf" if "model.gguf" in files else Path(folder)
        if outcome(target) != "accepted":
            raise SystemExit(f"the seed {name} is not read: {outcome(target)}")
        for number in range(first, last):
            choose = random.Random(f"{name} {number}")
            file = choose.choice(sorted(files))
            content = files[file]
            for _ in range(choose.randint(1, 4)):
                content = mutated(file, content, choose)
            (Path(folder) / file).write_bytes(content)
            print(json.dumps({"at": number}), flush=True)
            found = outcome(target)
            known = found in ("accepted", "refused", "hang")
            counted[found if known else "crash"] += 1
            if found not in ("accepted", "refused"):
                print(json.dumps({"number": number, "file": file, "what": found}), flush=True)
            (Path(folder) / file).write_bytes(files[file])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"done": counted, "peak_mb": round(peak)}), flush=True)


def fuzz(name: str, first: int, last: int) -> dict[str, Any]:
    """One seed, in a process that is started again behind an input that ended it."""
    row: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    peak, started = 0, time.monotonic()
    at = first
    while at < last:
        command = [sys.executable, __file__, "--work", name, "--first", str(at), "--last", str(last)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.endswith("}")]
        failures += [line for line in lines if "what" in line]
        if lines and "done" in lines[-1]:
            row.update(lines[-1]["done"])
            peak = max(peak, lines[-1]["peak_mb"])
            break
        reached = max((line["at"] for line in lines if "at" in line), default=None)
        if reached is None:
            raise SystemExit(f"{name}: the worker did not start: {done.stderr[-500:]}")
        failures.append({"number": reached, "what": f"the process ended with {done.returncode}: {done.stderr[-300:]}"})
        row.update({"crash": 1, "lost": reached - at})
        at = reached + 1
    for failure in failures[:5]:
        print(f"{name} {failure['number']}: {failure['what'][-600:]}", file=sys.stderr)
    return {
        "reader": name,
        "inputs": sum(row.values()),
        "accepted": row["accepted"],
        "refused": row["refused"],
        "crashes": row["crash"],
        "hangs": row["hang"],
        "peak_mb": peak,
        "seconds": round(time.monotonic() - started, 1),
        "failures": failures[:5],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    parser.add_argument("--inputs", type=int, default=110_000, help="of all readers together")
    parser.add_argument("--seed", type=int, default=0, help="another one is another set of inputs")
    parser.add_argument("--only", nargs="*", help="golden checkpoints to start from; all of them by default")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--last", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work, args.first, args.last)
        return
    if platform.system() != "Linux":
        parser.error("the limits of memory and time need Linux")
    names = args.only or sorted(p.parent.name for p in GOLDEN.glob("*/expected.json"))
    each = -(-args.inputs // len(names))
    rows = []
    for name in names:
        rows.append(fuzz(name, args.seed * 10_000_000, args.seed * 10_000_000 + each))
        print({key: value for key, value in rows[-1].items() if key != "failures"}, flush=True)
    total = {key: round(sum(row[key] for row in rows), 1) for key in ("inputs", "crashes", "hangs", "seconds")}
    from dq_runtime.environment import device_name, versions  # torch, which the workers need not import

    result = {
        "question": "mutated checkpoints of every format read: exceptions, signals, hangs",
        "device": device_name("cpu"),
        "versions": versions() | {"numpy": np.__version__},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/fuzz.py", *sys.argv[1:]]),
        "limits": {"seconds": SECONDS, "memory_mb": MEMORY >> 20},
        "total": total,
        "rows": rows,
    }
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(total)
    sys.exit(1 if total["crashes"] or total["hangs"] else 0)


if __name__ == "__main__":
    main()
