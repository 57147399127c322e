"""``dq export``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

EPILOG = """
[bold]Examples[/bold]

dq export out --to gguf -o out-gguf

dq export out --to gptq --set version=1 -o out-gptq

dq export out --to compressed-tensors --set dtype=float16 --set tensor_parallel=4 -o out-vllm
"""


def export(
    checkpoint: Annotated[str, typer.Argument(help="A packed checkpoint directory.")],
    to: Annotated[str, typer.Option("--to", help="compressed-tensors, gptq, gguf, mlx, onnx or dense.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The directory to write.")],
    option: Annotated[
        list[str] | None, typer.Option("--set", help="An option of the format, NAME=VALUE; may be repeated.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> None:
    """Write a packed CHECKPOINT in another engine's format: exactly the same weights, or nothing."""
    from dq_runtime.cli.progress import Bars
    from dq_runtime.errors import SpecError
    from dq_runtime.export.run import export as run

    options = {}
    for item in option or []:
        name, separator, value = item.partition("=")
        if not separator:
            raise SpecError(f"--set {item!r} is not NAME=VALUE")
        options[name] = value
    with Bars() as bars:
        result = run(checkpoint, to, output, options, overwrite=overwrite, stage=bars.stage)
    if as_json:
        print(json.dumps(asdict(result)))
        return
    print(f"{result.output}: {result.layers} packed layers, {result.size_bytes / 1e6:.1f} MB, {result.seconds:.1f} s")
    for note in result.notes:
        print(f"  {note}")


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(export)
