"""Measure which tile is fastest for how many tokens on this GPU, and write the table that table.py reads.

    python -m dq_kernels.tune --out FILE        (or `dq bench tune`, the same with a progress bar)

Every width and token bucket is timed on two shapes: 14336 x 4096, which has about a tile a processor at any M, and
4096 x 4096, where K must be split for that. A candidate that is wrong, or whose bits change within five runs, is thrown
out. What is left is held against decoding the weight and torch.mm: where that wins, the table ends.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dq_kernels import timing
from dq_kernels.dequant import dequantize
from dq_kernels.precompile import Launch, compile_all
from dq_kernels.qmm import qmm_decoded
from dq_kernels.stream import Tile, qmm_stream
from dq_kernels.stream_layout import ORDERS, StreamWeight, stream_weight
from dq_kernels.table import Row, Table, capability_of, read

K, GROUP = 4096, 64
LARGE_N, SMALL_N = 14336, 4096
BETWEEN_N = 8192  # what is cut into at least as many tiles as this N counts as large
BUCKETS = (16, 32, 64, 128, 256, 512, 1024, 2048)
RUNS = 5  # that must agree bit for bit
# (BM, BN, warps, stages) per bucket. BM covers a small bucket whole, so that a weight is decoded once; accumulators of
# more than 128 registers a thread would spill. Shared memory holds the words and the x of every stage.
FEW_TOKENS = ((64, 4, 3), (64, 4, 4), (128, 4, 3), (128, 4, 4), (128, 8, 4))
MANY_TOKENS = ((64, 4, 3), (64, 4, 4), (128, 8, 2), (128, 8, 3), (128, 8, 4))
MOST_TOKENS = ((128, 64, 4, 3), (128, 128, 8, 3), (128, 128, 8, 4), (256, 64, 4, 3), (256, 128, 8, 2), (256, 128, 8, 3))
TILES = {
    **{bucket: tuple((bucket, *rest) for rest in FEW_TOKENS) for bucket in (16, 32, 64)},
    128: tuple((128, *rest) for rest in MANY_TOKENS),
    256: (*((128, *rest) for rest in MANY_TOKENS), (256, 64, 4, 3), (256, 128, 8, 2), (256, 128, 8, 3)),
    **dict.fromkeys((512, 1024, 2048), MOST_TOKENS),
}
Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Measured:
    """One bucket and N: the best row and its microseconds (None: every candidate failed), those of decoding and
    torch.mm, and what was thrown out, by candidate."""

    bucket: int
    n: int
    best: Row | None
    best_us: float
    decoded_us: float
    rejected: dict[str, str] = field(default_factory=dict)

    @property
    def gain(self) -> float:
        """How many times as fast as decoding and torch.mm; 0 where nothing streams."""
        return self.decoded_us / self.best_us if self.best is not None else 0.0


def candidates(bucket: int, n: int, processors: int) -> list[Row]:
    """The rows to try: K unsplit (0 programs), or split for about one or two programs a processor, without repeats."""
    rows: dict[object, Row] = {}
    for BM, BN, warps, stages in TILES[bucket]:
        for programs in (processors, 2 * processors, 0):
            row = Row(bucket, BM, BN, warps, stages, programs)
            rows.setdefault(row.tile(bucket, n, K, 4), row)
    return list(rows.values())


def launches(bits: Iterable[int], processors: int) -> list[Launch]:
    """Everything that a tuning run of these widths launches."""
    return [Launch(K, width, GROUP) for width in bits] + [
        Launch(K, width, GROUP, row.tile(bucket, n, K, width))
        for width in bits
        for n in (LARGE_N, SMALL_N)
        for bucket in BUCKETS
        for row in candidates(bucket, n, processors)
    ]


def random_weight(n: int, k: int, bits: int, group: int, device: str = "cuda") -> tuple[StreamWeight, Tensor]:
    """A random symmetric weight in streaming order, and what it decodes to, float32 [N, K]."""
    if k * bits % 32:
        raise ValueError(f"random words are random codes only where a row fills its last word; K={k}, {bits} bits")
    words = torch.randint(0, 256, (n, k * bits // 8), dtype=torch.uint8, device=device).view(torch.int32)
    scale = (torch.rand(n, k // group, device=device) * 0.05 + 0.01).bfloat16()
    decoded = dequantize(words, scale, None, bits=bits, k=k, dtype=torch.float32)
    return stream_weight(words, scale, None, bits=bits, k=k), decoded


def copies_of(w: StreamWeight) -> list[StreamWeight]:
    """``w`` and as many clones as time_launches needs."""
    count = timing.copies_for(w.nbytes, timing.l2_bytes())
    clones = [replace(w, words=w.words.clone(), scale=w.scale.clone()) for _ in range(count - 1)]
    return [w, *clones]


def measure(x: Tensor, weights: list[StreamWeight], expected: timing.Expected, rows: list[Row]) -> Measured:
    """The best of ``rows`` for x [M, K] and (copies of) a weight, held against decoding it."""
    m, k = x.shape
    w = weights[0]
    best, best_us, rejected = None, float("inf"), {}
    for row in rows:
        tile = row.tile(m, w.n, k, w.bits)
        name = f"BM {tile.BM}, BN {tile.BN}, {tile.num_warps} warps, {tile.num_stages} stages, split {tile.split}"
        try:
            fault = timing.fault(partial(qmm_stream, x, w, tile), expected, x.dtype, RUNS)
        except Exception as error:  # the compiler's, or too much shared memory: a candidate less
            timing.alive()
            fault = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[-1]}"
        if fault is not None:
            rejected[name] = fault
            continue
        time_us = timing.time_launches(partial(_launch, x, weights, tile), len(weights)).median_us
        if time_us < best_us:
            best, best_us = row, time_us
    qmm_decoded(x, w)
    decoded_us = timing.time_launches(lambda i: qmm_decoded(x, weights[i]), len(weights)).median_us
    return Measured(m, w.n, best, best_us, decoded_us, rejected)


def _launch(x: Tensor, weights: list[StreamWeight], tile: Tile, i: int) -> None:
    qmm_stream(x, weights[i], tile)


def select(measured: Iterable[Measured]) -> tuple[Row, ...]:
    """The rows of one width. A reader takes the first row with M <= max_m that makes enough tiles, so a row of the
    small shape, which asks for none, also catches the large one: it may not return after it lost once, and where the
    large shape loses the table ends, unless the small one gains more than the large one loses."""
    by_bucket: dict[int, dict[int, Measured]] = {}
    for one in measured:
        by_bucket.setdefault(one.bucket, {})[one.n] = one
    rows: list[Row] = []
    small_streams = True
    for bucket, found in sorted(by_bucket.items()):
        large, small = found[LARGE_N], found[SMALL_N]
        small_streams = small_streams and small.gain > 1
        if large.gain <= 1 and not (small_streams and large.gain * small.gain > 1):
            break
        if large.best is not None:
            rows.append(replace(large.best, min_tiles=large.best.tiles(bucket, BETWEEN_N)))
        if small_streams and small.best is not None:
            rows.append(small.best)
    return tuple(rows)


def tune(
    compiling: Progress = lambda step, total: None, timed: Progress = lambda step, total: None
) -> tuple[Table, dict[int, list[Measured]]]:
    """The table of the current GPU, and what it was made from, by width. The two callbacks hear (step, total)."""
    processors = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    compile_all(launches(ORDERS, processors), capability_of(torch.device("cuda")), compiling)
    torch.manual_seed(0)
    found: dict[int, list[Measured]] = {}
    step, total = 0, len(ORDERS) * 2 * len(BUCKETS)
    with torch.inference_mode():
        for bits in ORDERS:
            for n in (LARGE_N, SMALL_N):
                w, decoded = random_weight(n, K, bits, GROUP)
                weights = copies_of(w)
                for bucket in BUCKETS:
                    x = torch.randn(bucket, K, device="cuda").bfloat16()
                    expected = timing.Expected.of(x, decoded)
                    rows = candidates(bucket, n, processors)
                    found.setdefault(bits, []).append(measure(x, weights, expected, rows))
                    step += 1
                    timed(step, total)
    return {bits: select(measured) for bits, measured in found.items()}, found


def to_json(table: Table, device: str) -> str:
    """``table`` as :func:`dq_kernels.table.read` takes it, a row a line."""
    order = ("max_m", "min_tiles", "BM", "BN", "num_warps", "num_stages", "programs")
    widths = []
    for bits, rows in table.items():
        lines = [f"   {json.dumps({name: getattr(row, name) for name in order})}" for row in rows]
        widths.append(f'  "{bits}": [\n' + ",\n".join(lines) + "\n  ]")
    return f'{{\n "measured_on": {json.dumps(device)},\n "rows": {{\n' + ",\n".join(widths) + "\n }\n}\n"


def write(path: Path, table: Table, device: str) -> None:
    """``table`` as JSON, moved over ``path`` when it is complete; raises OSError."""
    text = to_json(table, device)
    if read(text) != table:
        raise AssertionError("the table does not survive its own format")
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def summary(found: dict[int, list[Measured]]) -> Iterator[str]:
    """One line a width, N and bucket: the winner, its time and gain; and what was thrown out."""
    for bits, measured in found.items():
        for one in measured:
            head, won, r = f"{bits} bits, N {one.n:5}, M {one.bucket:4}", "nothing", one.best
            if r is not None:
                won = f"{r.BM:3} x {r.BN:3}, {r.num_warps} warps, {r.num_stages} stages, {r.programs:3} programs"
            yield f"{head}: {won:46} {one.best_us:7.1f} us, {one.gain:.2f}x decode + torch.mm"
            yield from (f"{head}: rejected {name}: {why}" for name, why in one.rejected.items())


def main() -> int:
    """Tune, print, write; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the table to write, for DQ_TILES or dq_kernels/tables")
    path: Path = parser.parse_args().out
    reason = timing.unusable()
    if reason is None and not path.parent.is_dir():
        reason = f"the folder of {path} does not exist"
    if reason is not None:
        print(f"tune: nothing was tuned: {reason}", file=sys.stderr)
        return 2

    def said(what: str) -> Progress:
        def say(step: int, total: int) -> None:
            if step * 10 // total > (step - 1) * 10 // total:
                print(f"{what}: {step}/{total}", file=sys.stderr, flush=True)

        return say

    table, found = tune(said("compiled"), said("timed"))
    print("\n".join(summary(found)))
    write(path, table, torch.cuda.get_device_name())
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
