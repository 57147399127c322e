"""``dq compare``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

EPILOG = """
[bold]Examples[/bold]

dq compare ./model -o cmp --bits 2,3,4 --calibration c4.txt

dq compare ./model -o cmp --methods gptq,discquant-paper,discquant --transforms identity,hadamard --calibration c4.txt
--held-out other.txt --wikitext wiki.test.raw --set discquant-paper.clamp=1.0

dq compare ./model -o cmp --cells cells.toml --calibration c4.txt --checkpoint 'autoround=./theirs@3:64'
"""


def compare(
    model: Annotated[str, typer.Argument(help="A model directory, a hub name, or a .gguf file.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder of the comparison, resumed if it exists.")],
    calibration: Annotated[str, typer.Option(help="Text, .jsonl or hf:NAME[:CONFIG[:SPLIT]].")],
    held_out: Annotated[
        str | None, typer.Option(help="Text to measure on; default: documents kept out of --calibration.")
    ] = None,
    cells: Annotated[
        Path | None, typer.Option(help="A TOML list of cells (docs/compare.md), instead of the options below.")
    ] = None,
    bits: Annotated[str | None, typer.Option(help="Bits per code, a comma between them; default 3.")] = None,
    group_size: Annotated[str | None, typer.Option(help="Group sizes, also row; default 64.")] = None,
    methods: Annotated[str | None, typer.Option(help="Rounding methods; default all.")] = None,
    transforms: Annotated[str | None, typer.Option(help="Transforms; default identity.")] = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="Give every group a zero point.")] = False,
    scale: Annotated[str | None, typer.Option(help="How scales are fitted: absmax (the default) or mse.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", help="An option of a method, METHOD.NAME=VALUE; may be repeated.")
    ] = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(help="NAME=DIR, made elsewhere, is scored too; dense weights: NAME=DIR@BITS:GROUP."),
    ] = None,
    row_layer: Annotated[
        list[str] | None,
        typer.Option(help="A pattern of layers that get one scale a row, because no group size divides them."),
    ] = None,
    windows: Annotated[int | None, typer.Option(help="Calibration windows; default 128.")] = None,
    window_length: Annotated[int | None, typer.Option(help="Tokens per window; default 512.")] = None,
    held_out_windows: Annotated[int | None, typer.Option(help="Held-out windows; default 24.")] = None,
    continued_windows: Annotated[
        int | None, typer.Option(help="Calibration windows that the model adds, going on from the text's; default 0.")
    ] = None,
    wikitext: Annotated[
        str | None, typer.Option(help="wiki.test.raw: perplexity of the raw text is measured too.")
    ] = None,
    wikitext_windows: Annotated[int | None, typer.Option(help="Of its windows the first so many; default all.")] = None,
    wikitext_stride: Annotated[
        int | None, typer.Option(help="Tokens from one of its windows to the next; default the window length.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Zero-shot tasks through lm-eval, a comma between them.")] = None,
    tasks_data: Annotated[str | None, typer.Option(help="The folder with a NAME.jsonl for every task.")] = None,
    task_items: Annotated[int | None, typer.Option(help="Items of each task, from its first; default 500.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything; default 0.")] = None,
    compute_dtype: Annotated[
        str | None, typer.Option(help="Of the rounding loop: auto (the default), float32 or bfloat16.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto (the default), cpu or cuda.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep every cell's checkpoint in OUTPUT/work.")] = False,
) -> None:
    """Round MODEL by every method on every grid under one protocol; write JSON, a Markdown table and plots.

    Every cell runs in its own process and is measured once: the same command continues where it was stopped.
    """
    from dq_runtime.cli.compare_bars import ComparisonBars
    from dq_runtime.compare.cells import checkpoint_cell, grid_cells, group_of, read_cells
    from dq_runtime.compare.protocol import protocol_from
    from dq_runtime.compare.runner import compare as run
    from dq_runtime.errors import SpecError

    chosen: dict[str, Any] = {
        "--bits": bits,
        "--group-size": group_size,
        "--methods": methods,
        "--transforms": transforms,
    }
    chosen |= {"--asymmetric": asymmetric or None, "--scale": scale, "--set": option}
    in_file: dict[str, Any] = {}
    if cells is not None:
        if given := [name for name, value in chosen.items() if value is not None]:
            raise SpecError(f"{given[0]} and --cells contradict each other: {cells} says which cells to run")
        in_file, todo = read_cells(cells)
    else:
        todo = grid_cells(
            _names(methods or "all"),
            [_number("--bits", b) for b in _names(bits or "3")],
            [group_of(g) for g in _names(group_size or "64")],
            _names(transforms or "identity"),
            not asymmetric,
            scale or "absmax",
            _options(option or []),
        )
    todo += [checkpoint_cell(text) for text in checkpoint or []]
    settings = protocol_from(
        in_file,
        {
            "model": model,
            "calibration": calibration,
            "held_out": held_out,
            "wikitext": wikitext,
            "tasks_data": tasks_data,
            "windows": windows,
            "window_length": window_length,
            "held_out_windows": held_out_windows,
            "continued_windows": continued_windows,
            "seed": seed,
            "compute_dtype": compute_dtype,
            "device": device,
            "row_layers": row_layer or None,
            "wikitext_windows": wikitext_windows,
            "wikitext_stride": wikitext_stride,
            "tasks": None if tasks is None else _names(tasks),
            "task_items": task_items,
        },
    )
    with ComparisonBars() as bars:
        result = run(settings, todo, output, bars, keep)
    _show(result, output)


def _names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _number(flag: str, text: str) -> int:
    from dq_runtime.errors import SpecError

    if not text.isdecimal():
        raise SpecError(f"{flag} takes numbers with a comma between them, got {text!r}")
    return int(text)


def _options(items: list[str]) -> dict[str, dict[str, Any]]:
    """METHOD.NAME=VALUE, by method."""
    from dq_runtime.errors import SpecError

    options: dict[str, dict[str, Any]] = {}
    for item in items:
        name, separator, value = item.partition("=")
        method, dot, key = name.partition(".")
        if not separator or not dot:
            raise SpecError(f"--set {item!r} is not METHOD.NAME=VALUE")
        options.setdefault(method, {})[key] = value
    return options


def _show(result: Mapping[str, Any], output: Path) -> None:
    """The whole table, best first, and where the files are."""
    from rich.console import Console
    from rich.table import Table

    from dq_runtime.compare.results import COLUMNS, grid_of, texts_of

    table = Table("grid", *COLUMNS, title=f"{result['protocol']['model']['name']}, by held-out KL", pad_edge=False)
    for i, column in enumerate(table.columns):
        column.no_wrap = True
        column.justify = "left" if i < 2 else "right"
    for row in result["rows"]:
        table.add_row(grid_of(row), *texts_of(row))
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a file has no edge to break a row at
    console.print(table)
    for cell in result["excluded"]:
        console.print(f"not in the table: {cell['label']} ({cell['kind']}): {cell['reason']}", soft_wrap=True)
    console.print(f"{output / 'compare.md'}, compare.json, compare_bpw.png, compare_seconds.png", soft_wrap=True)


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(compare)
