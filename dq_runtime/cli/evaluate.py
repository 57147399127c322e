"""``dq eval``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

EPILOG = """
[bold]Examples[/bold]

dq eval out --reference ./model --text held-out.txt

dq eval out-gptq out-discquant --reference ./model --text held-out.txt --tasks piqa --tasks-data ./tasks
"""


def evaluate(
    checkpoints: Annotated[list[str], typer.Argument(help="Packed checkpoints (or models) of one tokenizer.")],
    text: Annotated[str, typer.Option(help="Text, .jsonl or hf:NAME[:CONFIG[:SPLIT]] to measure on.")],
    reference: Annotated[
        str | None, typer.Option(help="What KL and agreement compare with; default: the first checkpoint.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows of text.")] = 16,
    window_length: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    seed: Annotated[int, typer.Option(help="Order of the documents.")] = 0,
    tasks: Annotated[str | None, typer.Option(help="Zero-shot tasks through lm-eval, a comma between them.")] = None,
    tasks_data: Annotated[Path | None, typer.Option(help="The folder with a NAME.jsonl for every task.")] = None,
    task_items: Annotated[int, typer.Option(help="Items of each task, from its first.")] = 500,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Measure CHECKPOINTS on the same text: KL to a reference, perplexity, agreement, tasks, with 95% intervals."""
    from dq_runtime.cli.progress import Bars
    from dq_runtime.environment import resolve_device
    from dq_runtime.scores import Measurement, score

    names = tuple(part for part in (tasks or "").split(",") if part)
    measurement = Measurement(text, windows, window_length, seed, names, tasks_data, task_items)
    with Bars() as bars:
        scores = score(checkpoints, reference, measurement, resolve_device(device), bars.stage)
    if as_json:
        print(json.dumps([asdict(s) for s in scores]))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("", "KL", "perplexity", "top-1 agreement", "nats per token beside the first", *names)
    for s in scores:
        accuracies = [f"{s.tasks[name][0]:.1%}" + _interval(s.tasks[name][1]) for name in names]
        table.add_row(
            s.path,
            f"{s.kl:.4f}" + _interval(s.kl_ci95),
            f"{s.perplexity:.2f}",
            f"{s.top1:.1%}" + _interval(s.top1_ci95),
            "-" if s is scores[0] else f"{s.beside[0]:+.4f}" + _interval(s.beside[1]),
            *accuracies,
        )
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a file has no edge to break a row at
    console.print(table)


def _interval(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f" [{bounds[0]:.4f}, {bounds[1]:.4f}]"


def register(app: typer.Typer) -> None:
    app.command("eval", epilog=EPILOG)(evaluate)
