"""``dq bench``: measurements on this machine that the runtime then uses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EPILOG = """
[bold]Examples[/bold]

dq bench tune --out tiles.json

DQ_TILES=tiles.json dq generate out "hi"
"""


def tune(
    out: Annotated[Path, typer.Option(help="The table to write (JSON).")] = Path("tiles.json"),
) -> None:
    """Find the fastest tiles of the GPU matmul for the NVIDIA GPU of this machine: about two minutes.

    Tables for A100 and H100 are built in. DQ_TILES=FILE makes every dq command use another.
    """
    from dq_runtime.backends.triton_cuda import TritonCuda
    from dq_runtime.cli.progress import Bars
    from dq_runtime.errors import BackendError, SpecError

    reason = TritonCuda().available()
    if reason is None:
        from dq_kernels import timing

        reason = timing.unusable()
    if reason is not None:
        raise BackendError(f"nothing was tuned, there is no usable NVIDIA GPU here: {reason}")
    if out.is_dir() or not out.parent.is_dir():
        raise SpecError(f"--out {out} must be a file in a folder that exists")

    import torch

    from dq_kernels.tune import summary, write
    from dq_kernels.tune import tune as run

    with Bars() as bars:
        table, found = run(bars.stage("compiling"), bars.stage("timing"))
    for line in summary(found):
        print(line)
    write(out, table, torch.cuda.get_device_name())
    print(f"wrote {out}; DQ_TILES={out} makes dq use it")


def register(app: typer.Typer) -> None:
    group = typer.Typer(name="bench", help="Measure this machine.")
    group.command(epilog=EPILOG)(tune)
    app.add_typer(group)
