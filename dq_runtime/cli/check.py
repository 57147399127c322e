"""``dq check``."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

EPILOG = """
[bold]Examples[/bold]

dq check out --engine vllm --tensor-parallel 4

dq check out --engine llama.cpp --json
"""


def check(
    checkpoint: Annotated[str, typer.Argument(help="A packed checkpoint directory.")],
    engine: Annotated[str, typer.Option(help="vllm, transformers, llama.cpp, onnxruntime or mlx.")] = "vllm",
    tensor_parallel: Annotated[int, typer.Option(help="Ranks that share the model (vllm).")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Say whether ENGINE will load every layer of a packed CHECKPOINT, on which kernel, and what to change.

    The exit code is 1 where some layer will not load.
    """
    from dq_runtime.export.check import check as run

    result = run(checkpoint, engine, tensor_parallel)
    if as_json:
        print(json.dumps({**asdict(result), "loads": result.loads}))
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table("layer", "layers", "stored as", "loads", "how it runs, or what to change", title=result.engine)
        for v in result.verdicts:
            table.add_row(
                v.layer, str(v.count), v.grid, "yes" if v.load else "no", "; ".join(filter(None, (v.how, v.change)))
            )
        console = Console()
        if not console.is_terminal:
            console.width = 200  # a file has no edge to break a row at
        console.print(table)
        for note in result.notes:
            console.print(note, soft_wrap=True)
    if not result.loads:
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(check)
