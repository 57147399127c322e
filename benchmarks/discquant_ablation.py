"""Why `discquant` is as it is: stories260K rounded with one thing changed at a time. Writes docs/discquant.md's tables.

    python benchmarks/discquant_ablation.py --stories build/stories260k --stories-text tiny.txt

The protocol is that of benchmarks/compare_stories260k.toml: 128 calibration windows of 256 tokens, 32 held-out windows,
symmetric grid, float32, one thread. Every row sees the same calibration windows; those of the second stage see each
window ``epochs`` times. Seconds are those of the stages alone, the first one's measured once and counted in every row
that begins with it. ``--stories`` is what benchmarks/stories260k.py makes. Parts that are done lie in
build/theory/discquant_ablation and are not computed again; results are written after every row, so that a run that is
stopped shows what it has.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from theory_common import Parts, options, original, rows_of, run, with_figure, write_result
from theory_rounding import Lab
from torch import Tensor

from dq_runtime.data import pack_windows, read_texts
from dq_runtime.errors import DataError
from dq_runtime.grids import Scales
from dq_runtime.modules.student_linear import StudentLinear
from dq_runtime.modules.surgery import replace_module
from dq_runtime.packing.atomic import replace_file, save_tensors
from dq_runtime.rounding import ROUNDINGS, Choice, Job, LayerProblem, Needs, Rounded
from dq_runtime.rounding.base import Student, choices_from_tensors, choices_to_tensors
from dq_runtime.rounding.block_loop import Lion, SignSGD
from dq_runtime.rounding.discquant import Recipe, distil, usual_rate
from dq_runtime.rounding.discquant_paper import DiscQuantPaper
from dq_runtime.rounding.latent import Latent
from dq_runtime.rounding.straight_through import LearnedScales, codes, snap

WINDOWS, HELD_OUT, LENGTH = 128, 32, 256
OPTIMISERS: dict[str, Any] = {
    "adam": lambda groups: torch.optim.AdamW(groups, eps=1e-16, weight_decay=0.0),
    "lion": Lion,
    "sign": SignSGD,
}
FREE = 1e9  # a room without walls


@dataclass(frozen=True)
class Row:
    """One run. ``start`` is the first stage's method; ``epochs`` 0: nothing after it. ``state`` is the second stage's:
    ``bytes`` (the method's own, 4 bytes a weight) or ``float32`` (12), which alone has other optimisers and learned
    scales. ``paper``: the second stage is discquant-paper from the start's choice, with its own rates. Rates are in
    grid steps a step, that of scales relative; 0 is the method's own rate, or no learning."""

    table: str
    what: str
    bits: int = 3
    group: int = 64
    start: str = "autoround"
    epochs: int = 4
    lr: float = 0.0
    room: float = 0.45
    state: str = "bytes"
    optimiser: str = "adam"
    scale_lr: float = 0.0
    paper: bool = False
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """What the figures depend on."""
        settings = {key: value for key, value in asdict(self).items() if key not in ("table", "what")}
        return settings | {"lr": self.lr or usual_rate(self.bits)}  # the usual rate by its number is the same run


ROWS = [
    *(Row("state", f"{s}, seed {seed}", state=s, seed=seed) for seed in range(3) for s in ("bytes", "float32")),
    *(Row("state", f"{s}, seed 0", bits=2, state=s) for s in ("bytes", "float32")),
    *(Row("first stage", f"{start}, then KL", start=start) for start in ("nearest", "autoround", "gsq")),
    *(Row("first stage", f"{start} alone", start=start, epochs=0) for start in ("nearest", "autoround", "gsq")),
    *(Row("paper", f"discquant-paper, epochs {e}", start="none", paper=True, epochs=e) for e in (1, 4)),
    *(Row("paper", f"autoround, then discquant-paper, epochs {e}", paper=True, epochs=e) for e in (1, 4)),
    Row("paper", "autoround, then the second stage, epochs 4"),
    *(Row("rate", f"lr {lr}", bits=3, lr=lr) for lr in (0.001, 0.002, 0.004, 0.01)),
    *(Row("rate", f"lr {lr}", bits=2, lr=lr) for lr in (0.002, 0.004, 0.008)),
    *(Row("rate", f"lr {lr}", bits=4, lr=lr) for lr in (0.0005, 0.001, 0.002)),
    *(Row("rate", f"lr {lr}", group=32, lr=lr) for lr in (0.001, 0.002, 0.004)),
    Row("initialisation", "at the middle of the code's cell", room=0.0),
    Row("initialisation", "original weight, within 0.25 of the middle", room=0.25),
    Row("initialisation", "original weight, within 0.45 of the middle"),
    Row("initialisation", "original weight, anywhere in the cell", room=0.5),
    Row("initialisation", "original weight, no walls (the first stage's codes are lost)", room=FREE, state="float32"),
    *(Row("epochs", f"{epochs}", epochs=epochs) for epochs in (1, 2, 4, 8, 16)),
    Row("scales", "fixed", state="float32"),
    *(Row("scales", f"learned, rate {rate}", state="float32", scale_lr=rate) for rate in (1e-4, 1e-3)),
    Row("optimiser", "Adam", state="float32"),
    *(Row("optimiser", f"Lion, lr {lr}", state="float32", optimiser="lion", lr=lr) for lr in (2e-4, 5e-4, 1e-3)),
    *(Row("optimiser", f"signs, lr {lr}", state="float32", optimiser="sign", lr=lr) for lr in (2e-4, 1e-3)),
]  # fmt: skip


class WideLatent:
    """What :class:`Latent` is, with 32-bit numbers, any optimiser and scales that may learn."""

    def __init__(self, layer: LayerProblem, choice: Choice, row: Row) -> None:
        self.bits, self.lr = layer.grid.spec.bits, 0.0
        start = choice.scales or layer.scales
        self._scales, self._s0 = LearnedScales(layer.grid, start), start.scale.float().unsqueeze(-1)
        level = choice.codes.float() - 2.0 ** (self.bits - 1)
        w = layer.weight()
        off = (w.view(*start.scale.shape, -1) / self._s0).view(w.shape) - level
        self._u = (level + off.clamp(-row.room, row.room)).requires_grad_()
        self._peak = row.lr
        parts = [(self._u, 1.0)] + [(end, row.scale_lr) for end in self._scales.parameters]
        self._optimisers = []
        for leaf, rate in parts:
            optimiser = OPTIMISERS[row.optimiser]([{"params": [leaf], "lr": 1.0}])
            self._optimisers.append(optimiser)
            leaf.register_post_accumulate_grad_hook(lambda leaf, o=optimiser, r=rate: self._step(leaf, o, r))

    def _step(self, leaf: Tensor, optimiser: torch.optim.Optimizer, rate: float) -> None:
        # The rate of a scale is its own, on the same schedule: lr is the share of the schedule times the peak.
        optimiser.param_groups[0]["lr"] = self.lr if rate == 1.0 else self.lr / self._peak * rate
        optimiser.step()
        leaf.grad = None
        self._scales.confine()

    def _w(self) -> Tensor:
        return (self._u.view(*self._s0.shape[:2], -1) * self._s0).view(self._u.shape)

    def weight(self) -> Tensor:
        return snap(self._w(), *self._scales.now(), self._scales.top)

    @torch.no_grad()
    def choice(self) -> Choice:
        s, z = self._scales.now()
        return Choice(codes(self._w(), s, z, self._scales.top), self._scales.held(s, z))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What is held between steps."""
        held = [leaf for optimiser in self._optimisers for group in optimiser.param_groups for leaf in group["params"]]
        held += [t for optimiser in self._optimisers for state in optimiser.state.values() for t in state.values()]
        return {f"{name}.{i}": tensor for i, tensor in enumerate(held)}


class StartedPaper(DiscQuantPaper):
    """discquant-paper that starts at a choice."""

    choices: Mapping[str, Choice]

    def _start(self, student: Student, seed: int) -> None:
        with torch.no_grad():
            for name, layer in student.layers.items():
                up = self.choices[name].codes.float() - layer.lo.float()
                assert 0 <= up.min() <= up.max() <= 1, "AutoRound's codes are neighbours of the weight on its scales"
                layer.x.copy_(up * layer.free)


class _Fixed:
    """A grid that fits the scales that it is given."""

    def __init__(self, grid: Any, scales: Scales) -> None:
        self._grid, self._scales = grid, scales

    def fit(self, w: Tensor) -> Scales:
        return self._scales

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)


class Bench:
    """The texts, and what the first stages made."""

    def __init__(self, path: str, text: str, parts: Parts) -> None:
        self.path, self.text, self.parts = path, text, parts
        train, held = read_texts(text, None, 0)
        assert train is not None
        assert held is not None
        tokenizer = original(path).tokenizer
        self.train = pack_windows(train.documents, tokenizer, WINDOWS, LENGTH, 0, train.source)
        self.held = pack_windows(held.documents, tokenizer, HELD_OUT, LENGTH, 1, held.source)

    def figures(self, row: Row) -> dict[str, Any]:
        """Of one row, from the disk where it was run before."""
        first = 0.0 if row.start == "none" else self.first_stage(row)
        second = self.parts.get(*self._part(row), lambda: self._second(row))
        return {**asdict(row), **second, "seconds": second["seconds"] + first}

    def finished(self, row: Row) -> bool:
        """Whether it was run before."""
        return self.parts.has(*self._part(row))

    def _part(self, row: Row) -> tuple[str, dict[str, Any]]:
        texts = {"train": self.train.fingerprint(), "held": self.held.fingerprint()}
        return f"{row.bits} bits {row.start} {row.state} {row.optimiser} epochs {row.epochs}", row.settings() | texts

    def first_stage(self, row: Row) -> float:
        """Its seconds; what it chose is kept in a file."""
        file = self._file(row)
        seconds = file.with_suffix(".seconds.json")
        if not file.exists():
            lab = self._lab(row)
            method = ROUNDINGS.get(row.start)({})
            began = time.perf_counter()
            choices = lab.choices(method.round, method.needs, 0)
            took = time.perf_counter() - began
            replace_file(seconds, lambda path: path.write_text(json.dumps(took)))
            replace_file(file, lambda path: save_tensors(path, choices_to_tensors(choices), {}))
        return float(json.loads(seconds.read_text()))

    def _file(self, row: Row) -> Path:
        return self.parts.directory / f"{row.start}-{row.bits}-{row.group}-{self.train.fingerprint()[:10]}.safetensors"

    def _lab(self, row: Row) -> Lab:
        return Lab(self.path, row.bits, self.train.tokens, group=row.group, dtype=torch.float32)

    def _second(self, row: Row) -> dict[str, Any]:
        lab = self._lab(row)
        choices = {} if row.start == "none" else choices_from_tensors(load_file(self._file(row)))
        began = time.perf_counter()
        if row.paper:
            choices = self._paper(lab, row, choices)
        elif row.epochs:
            choices = dict(lab.choices(lambda job: _distilled(job, choices, row), Needs.STUDENT, row.seed))
        seconds = time.perf_counter() - began
        found = lab.quality(self.held.tokens, {"rounded": lab.pack(choices)})["rounded"]
        return {"kl": found.kl, "kl_stderr": found.kl_stderr, "seconds": seconds}

    def _paper(self, lab: Lab, row: Row, choices: Mapping[str, Choice]) -> dict[str, Choice]:
        method = DiscQuantPaper({"steps": row.epochs * WINDOWS})
        if choices:
            for name, layer in list(lab.layers.items()):
                # A new layer, whose lo, y and free are those of the first stage's scales.
                grid: Any = _Fixed(layer.grid, choices[name].scales or layer.scales)
                lab.layers[name] = StudentLinear(layer.weight(), layer.bias, grid)
                replace_module(lab.student.model, name, lab.layers[name])
            method = StartedPaper(method.options())
            method.choices = choices
        return dict(lab.choices(method.round, method.needs, row.seed))


def _distilled(job: Job, choices: Mapping[str, Choice], row: Row) -> Rounded:
    """The second stage of ``row``."""
    recipe = Recipe(epochs=row.epochs, lr=row.lr, room=min(row.room, 0.5))
    latents: dict[str, Any] = {}
    for i, (name, layer) in enumerate(job.layers.items()):
        if row.state == "bytes":
            latents[name] = Latent.start(layer, choices[name], row.room, row.seed * 1_000_003 + i)
        else:
            latents[name] = WideLatent(layer, choices[name], replace(row, lr=row.lr or usual_rate(row.bits)))
    distil(job, None, latents, recipe, [])
    return Rounded({name: latent.choice() for name, latent in latents.items()}, [])


def tables(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Each table in markdown."""
    found: dict[str, list[str]] = {}
    for table in dict.fromkeys(row["table"] for row in rows):
        chosen = [row for row in rows if row["table"] == table]
        head = ["bits", "group", table, "held-out KL", "seconds"]
        lines = [
            [
                row["bits"],
                row["group"],
                row["what"],
                f"{row['kl']:.4f} ± {row['kl_stderr']:.4f}",
                f"{row['seconds']:.0f}",
            ]
            for row in chosen
        ]
        found[table.replace(" ", "_")] = rows_of(head, lines)
    return found


def write(bench: Bench, results: Path, docs: Path) -> None:
    """The rows that are finished."""
    rows = [bench.figures(row) for row in ROWS if bench.finished(row)]
    result = {
        "question": "held-out KL of stories260K, one choice of discquant changed at a time",
        "protocol": {"windows": WINDOWS, "held_out_windows": HELD_OUT, "window_length": LENGTH, "dtype": "float32"},
        "calibration_sha256": bench.train.fingerprint(),
        "held_out_sha256": bench.held.fingerprint(),
        "finished": f"{len(rows)} of {len(ROWS)} rows",
        "rows": rows,
    }
    written = write_result(results / "discquant_ablation.json", "discquant_ablation", result)
    file = docs / "discquant.md"
    page = file.read_text(encoding="utf-8")
    for table, lines in tables(written["rows"]).items():
        page = with_figure(page, table, lines)
    replace_file(file, lambda path: path.write_text(page, encoding="utf-8"))


def main() -> None:
    chosen = options(__doc__)
    if not chosen.stories or not chosen.stories_text:
        raise DataError("give --stories DIR and --stories-text FILE: this experiment is about that model")
    torch.set_num_threads(1)  # its matrices are too small for more
    bench = Bench(chosen.stories, chosen.stories_text, Parts("discquant_ablation"))
    write(bench, chosen.results, chosen.docs)
    for row in ROWS:
        if not bench.finished(row):
            bench.figures(row)
            write(bench, chosen.results, chosen.docs)


if __name__ == "__main__":
    run(main)
