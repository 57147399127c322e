"""Should the calibration text be of the task? The share of GSM8K in it, against held-out KL on GSM8K and on other text.

The total of windows stays the same; a share of them is GSM8K's training problems with their solutions, the rest
``--text``. Judged on GSM8K's test problems and on held-out documents of the other text (the paper's section 5.3, there
by task accuracy and on models that can do the task; here by KL, which needs no such ability).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from theory_common import NO_GSM8K, Parts, Subject, finish, options, original, panels, rows_of, run, smol
from theory_rounding import LEAST_STEPS, ROUNDING_DTYPE, Lab
from torch import Tensor

from dq_runtime.data import pack_windows
from dq_runtime.errors import DataError

BITS = 3
METHODS = ("nearest", "gptq", "discquant-paper")
SHARES = (0.0, 0.5, 1.0)
WINDOWS, HELD_OUT, TOKENS = 64, 8, 128


def problems(directory: Path | None, split: str) -> list[str]:
    """Question and answer of each problem of ``split``.jsonl, the calculator's marks left out."""
    if directory is None or not (directory / f"{split}.jsonl").is_file():
        raise DataError(NO_GSM8K)
    lines = (directory / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [f"Question: {row['question']}\nAnswer: {_plain(row['answer'])}" for row in rows]


def _plain(answer: str) -> str:
    """``48/2 = <<48/2=24>>24`` -> ``48/2 = 24``."""
    parts = answer.split("<<")
    return parts[0] + "".join(part.split(">>", 1)[1] for part in parts[1:])


def windows(subject: Subject, directory: Path | None, share: float) -> tuple[Tensor, dict[str, Tensor]]:
    """(calibration windows, held-out windows by text). Task and other windows take turns: some see them in order."""
    tokenizer = original(subject.path).tokenizer
    other, held_out = subject.windows([WINDOWS, HELD_OUT], TOKENS)
    task = pack_windows(problems(directory, "train"), tokenizer, WINDOWS, TOKENS, 0, "GSM8K train").tokens
    test = pack_windows(problems(directory, "test"), tokenizer, HELD_OUT, TOKENS, 0, "GSM8K test").tokens
    count = round(share * WINDOWS)
    mixed = torch.cat([task[:count], other[: WINDOWS - count]])
    order = torch.randperm(WINDOWS, generator=torch.Generator().manual_seed(0))
    return mixed[order], {"GSM8K": test, "other text": held_out}


def measure(subject: Subject, directory: Path | None, share: float) -> list[dict[str, Any]]:
    train, held_out = windows(subject, directory, share)
    lab = Lab(subject.path, BITS, train)
    packed = {method: lab.round(method, 0) for method in METHODS if share == 0 or method != "nearest"}
    rows = []
    for text, tokens in held_out.items():
        for method, quality in lab.quality(tokens, packed).items():
            if method != "reference":
                row = {"method": method, "share": share, "text": text, "kl": quality.kl, "kl_stderr": quality.kl_stderr}
                rows.append(row | {"perplexity": quality.perplexity})
    return rows


def draw(result: dict[str, Any]) -> Any:
    figure, found = panels(2, 4.8, 4.0)
    colours = {"nearest": "black", "gptq": "tab:blue", "discquant-paper": "tab:orange"}
    for text, axes in zip(("GSM8K", "other text"), found, strict=True):
        for method, colour in colours.items():
            rows = [row for row in result["rows"] if (row["method"], row["text"]) == (method, text)]
            if method == "nearest":
                axes.axhline(rows[0]["kl"], color=colour, linestyle="--", label=method)
                continue
            share, kl = [100 * row["share"] for row in rows], [row["kl"] for row in rows]
            error = [row["kl_stderr"] for row in rows]
            axes.errorbar(share, kl, yerr=error, color=colour, marker="o", capsize=2, label=method)
        axes.set(xlabel="GSM8K in the calibration windows, %", title=f"held out: {text}")
    found[0].set_ylabel("held-out KL, nats per token")
    found[0].legend(fontsize=8)
    title = f"{result['model']}, {result['bits']} bits, {result['windows']} windows of {result['tokens']} tokens"
    figure.suptitle(title, fontsize=10)
    return figure


def table(result: dict[str, Any]) -> list[str]:
    """A line a method and share."""
    lines = []
    for method in METHODS:
        for share in sorted({row["share"] for row in result["rows"] if row["method"] == method}):
            same = [row for row in result["rows"] if (row["method"], row["share"]) == (method, share)]
            kl = {row["text"]: f"{row['kl']:.3f} ± {row['kl_stderr']:.3f}" for row in same}
            lines.append([method, "-" if method == "nearest" else f"{share:.0%}", kl["GSM8K"], kl["other text"]])
    return rows_of(["method", "GSM8K in calibration", "KL on GSM8K", "KL on other text"], lines)


def main() -> None:
    chosen, parts = options(__doc__), Parts("task_data")
    subject = smol(chosen)
    problems(chosen.gsm8k, "test")  # a missing file is said before anything is computed
    rows: list[dict[str, Any]] = []
    for share in SHARES:
        case = {
            "counts": [WINDOWS, HELD_OUT, TOKENS],
            "bits": BITS,
            "dtype": str(ROUNDING_DTYPE),
            "text": subject.sha256(),
            "share": share,
        }
        rows += parts.get(f"share {share}", case, lambda share=share: measure(subject, chosen.gsm8k, share))
    result = {
        "question": "held-out KL by the share of GSM8K in the calibration windows",
        "model": subject.name,
        "bits": BITS,
        "rounding_dtype": str(ROUNDING_DTYPE),
        "discquant_steps_at_least": LEAST_STEPS,
        "windows": WINDOWS,
        "held_out_windows": HELD_OUT,
        "tokens": TOKENS,
        "other_text": subject.text_name(),
        "text_sha256": subject.sha256(),
        "rows": rows,
    }
    finish("task_data", chosen, result, draw, table)


if __name__ == "__main__":
    run(main)
