"""How fast is y[M, N] = x[M, K] @ decode(w)[N, K].T on this GPU: ours at 2, 3, 4, 8 bits, torch's bf16, and rivals.

    python benchmarks/gpu_matmul.py --out FILE [--seconds 200] [--quick]

Symmetric weights, bf16 activations and scales, groups of 64. Every row is timed as dq_kernels/timing.py says, after its
result was right; ours also after two runs gave the same bits in every element. GB/s counts the weight, x and y once.
What would not fit ``--seconds`` is left out, and said so.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gpu_part
import gpu_rivals
import torch
from torch import Tensor

from dq_kernels import timing
from dq_kernels.precompile import Launch, compile_all
from dq_kernels.qmm import qmm_prepared
from dq_kernels.table import capability_of, choose
from dq_kernels.tune import copies_of, random_weight

# (N, K): an 8B model's up projection, and squares of two sizes; SmolLM2-135M's attention, up and down projections.
LARGE = ((14336, 4096), (8192, 8192), (4096, 4096))
SMALL = ((576, 576), (1536, 576), (576, 1536))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
BITS = (4, 3, 2, 8)  # what has rivals first
GROUP = 64
# gemlite searches for its tiles at the first call of a shape, and takes minutes for all of ours.
SEARCHED = {"gemlite": (((14336, 4096), (4096, 4096)), (1, 16, 64, 256))}
# gemlite's published charts have torch's int4 kernel at 0.07 of fp16's speed by M = 256, and no better beyond.
MAX_TOKENS = {"torch-int4": 256}
RIVAL_SECONDS = 60.0  # for each, over all shapes
COPY_SECONDS = 3.0  # most time to spend on making the copies of one rival's weight


class Rows:
    """The rows so far and the bf16 times they are held against; prints each, and keeps the file up to date."""

    def __init__(self, out: Path, copy_gb_s: float) -> None:
        self.out, self.copy_gb_s = out, copy_gb_s
        self.rows: list[dict[str, Any]] = []
        self.skipped: list[dict[str, Any]] = []
        self.wrong: list[str] = []
        self.bf16_us: dict[tuple[int, int, int], float] = {}
        self.spent: dict[str, float] = {}
        self.head = {**gpu_part.environment(), "group_size": GROUP, "copy_gb_s": copy_gb_s}
        self.head["limits"] = {name: f"timed up to M={m}" for name, m in MAX_TOKENS.items()}

    def add(
        self, n: int, k: int, m: int, method: str, bits: int, nbytes: int, timed: timing.Timing, **more: Any
    ) -> None:
        """One measured row; ``nbytes`` of weight are read a launch."""
        us = timed.median_us
        if method == "torch-bf16":
            self.bf16_us[n, k, m] = us
        bf16_us = self.bf16_us.get((n, k, m))
        gb_s = (nbytes + 2 * m * (n + k)) / us / 1e3
        row = {
            **{"n": n, "k": k, "m": m, "method": method, "bits": bits},
            **asdict(timed),
            "gb_s": gb_s,
            "fraction_of_copy": gb_s / self.copy_gb_s,
            "speedup_over_bf16": None if bf16_us is None else bf16_us / us,
            **more,
        }
        self.rows.append(row)
        ratio = "" if bf16_us is None else f"  {bf16_us / us:5.2f}x bf16"
        eager = "" if timed.not_captured is None else "  (launched from Python)"
        print(
            f"N={n:5} K={k:4} M={m:4} {method:10} {bits:2}-bit  {us:8.1f} us ({timed.min_us:.1f} .. "
            f"{timed.max_us:.1f})  {gb_s:7.1f} GB/s{ratio}{eager}",
            flush=True,
        )

    def skip(self, n: int, k: int, method: str, bits: int, reason: str) -> None:
        """Nothing was timed there, and why."""
        self.skipped.append({"n": n, "k": k, "method": method, "bits": bits, "reason": reason})
        print(f"N={n:5} K={k:4}        {method:10} {bits:2}-bit  skipped: {reason}", flush=True)

    def save(self) -> None:
        """The file as it stands."""
        gpu_part.write(self.out, {**self.head, "matmul": self.rows, "skipped": self.skipped, "wrong": self.wrong})


def compile_ours(shapes: tuple[tuple[int, int], ...], tokens: tuple[int, ...]) -> None:
    """Every kernel of ours that will be timed, into Triton's cache. Past the end of a table (M = 2^20) weights are
    decoded, and preparing one needs the same kernels."""
    device = torch.device("cuda", torch.cuda.current_device())
    launches = []
    for n, k in shapes:
        for bits in BITS:
            launches += [Launch(k, bits, GROUP, choose(m, n, k, bits, device)) for m in (*tokens, 2**20)]
    for launch, complaint in compile_all(launches, capability_of(device)).items():
        print(f"not compiled ahead: {launch}: {complaint}", flush=True)


def time_ours(rows: Rows, n: int, k: int, tokens: dict[int, Tensor], bits: int) -> None:
    """Our kernel for one weight, with the tile of the shipped table or the one that DQ_TILES names."""
    w, decoded = random_weight(n, k, bits, GROUP)
    weights = copies_of(w)
    for m, x in tokens.items():
        expected = timing.Expected.of(x, decoded)
        fault = timing.fault(lambda out, x=x: qmm_prepared(x, w, out), expected, x.dtype, 2)
        if fault is not None:
            rows.wrong.append(f"our {bits}-bit kernel at N={n} K={k} M={m}: {fault}")
            print(f"WRONG, not timed: {rows.wrong[-1]}", flush=True)
            continue
        measured = timing.time_launches(lambda i, x=x: qmm_prepared(x, weights[i]), len(weights))
        tile = choose(m, n, k, bits, x.device)
        rows.add(n, k, m, "dq", bits, w.nbytes, measured, bit_equal=True, tile=None if tile is None else asdict(tile))


def time_rival(rows: Rows, rival: Any, n: int, k: int, tokens: dict[int, Tensor], bits: int) -> None:
    """One rival for one weight; what it cannot do, or takes too long to, is skipped with its reason."""
    shapes, searched = SEARCHED.get(rival.name, (None, TOKENS))
    ms = tuple(m for m in tokens if m in searched and m <= MAX_TOKENS.get(rival.name, max(TOKENS)))
    spent = rows.spent.get(rival.name, 0.0)
    reason = rival.supports(bits, GROUP, n, k, ms[0])
    if reason is None and shapes is not None and (n, k) not in shapes:
        reason = "searches for its tiles for too long; timed on fewer shapes"
    if reason is None and spent > RIVAL_SECONDS:
        reason = f"its {RIVAL_SECONDS:.0f} s are spent"
    if reason is None:
        started = time.perf_counter()
        try:
            reason = _time_rival(rows, rival, n, k, {m: tokens[m] for m in ms}, bits)
        except Exception as error:  # a library's own
            timing.alive()
            reason = gpu_rivals.described(error)
        rows.spent[rival.name] = spent + time.perf_counter() - started
    if reason is not None:
        rows.skip(n, k, rival.name, bits, reason)


def _time_rival(rows: Rows, rival: Any, n: int, k: int, tokens: dict[int, Tensor], bits: int) -> str | None:
    weight = torch.randn(n, k, device="cuda").bfloat16() * 0.02
    first = gpu_rivals.trial(rival, weight, bits, GROUP, tuple(tokens))
    if isinstance(first, str):
        return first
    count = timing.copies_for(first.nbytes, timing.l2_bytes())
    copies = [first]
    started = time.perf_counter()
    while len(copies) < count:
        copies.append(rival.prepare(weight.clone(), bits, GROUP))
        torch.cuda.synchronize()
        each = (time.perf_counter() - started) / (len(copies) - 1)
        if len(copies) == 4 and each * count > COPY_SECONDS:
            return f"preparing the {count} copies to rotate over would take {each * count:.0f} s"
    for m, x in tokens.items():
        same = torch.equal(first(x), first(x))
        measured = timing.time_launches(lambda i, x=x: copies[i](x), count)
        rows.add(n, k, m, rival.name, bits, first.nbytes, measured, bit_equal=same)
    return None


def work(shapes: tuple[tuple[int, int], ...], tokens: tuple[int, ...], rows: Rows) -> Iterator[Callable[[], None]]:
    """What to time, in order of interest: bf16 and ours everywhere, then torch's int4, then the libraries."""
    dense, *others = gpu_rivals.RIVALS
    xs = {k: {m: torch.randn(m, k, device="cuda").bfloat16() for m in tokens} for k in {k for _, k in shapes}}
    for n, k in shapes:
        yield lambda n=n, k=k: time_rival(rows, dense, n, k, xs[k], 16)
        for bits in BITS:
            yield lambda n=n, k=k, bits=bits: time_ours(rows, n, k, xs[k], bits)
    for n, k in shapes:
        for rival in others:
            for bits in BITS:
                yield lambda n=n, k=k, rival=rival, bits=bits: time_rival(rows, rival, n, k, xs[k], bits)


def main() -> int:
    """Measure, print, write; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="result file")
    parser.add_argument("--seconds", type=float, default=200.0, help="nothing new is begun after that many")
    parser.add_argument("--quick", action="store_true", help="one shape, M = 1 and 64")
    args = parser.parse_args()
    reason = gpu_part.unusable()
    if reason is not None:
        print(f"gpu_matmul: nothing was timed: {reason}", file=sys.stderr)
        return 2
    started = time.perf_counter()
    shapes, tokens = (LARGE[:1], (1, 64)) if args.quick else ((*LARGE, *SMALL), TOKENS)
    torch.manual_seed(0)
    with torch.inference_mode():
        compile_ours(shapes, tokens)
        rows = Rows(args.out, timing.copy_gb_s())
        print(f"copies run at {rows.copy_gb_s:.0f} GB/s", flush=True)
        for number, step in enumerate(work(shapes, tokens, rows)):
            if time.perf_counter() - started > args.seconds:
                print(f"gpu_matmul: out of time after {number} steps; the rest was left out", flush=True)
                rows.head["cut_short"] = f"nothing new was begun after {args.seconds:.0f} s"
                break
            step()
            rows.save()
    rows.save()
    print(f"wrote {args.out}, {time.perf_counter() - started:.0f} s")
    return 1 if rows.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
