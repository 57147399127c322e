"""``dq plan``: what ``dq quantize`` with the same options will take, printed before anything runs."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dq_runtime.cli.quantize import quantize, spec_of

if TYPE_CHECKING:
    from rich.console import Console

    from dq_runtime.planning.plan import Plan

EPILOG = """
[bold]Examples[/bold]

dq plan ./model --bits 3 --calibration c4.txt

dq plan ./model --measure

dq plan config.json --device cuda --gpus 8 --gpu-memory 80
"""


def plan(
    model: Annotated[str, typer.Argument(help="A config.json, a model directory, a .gguf file, or a cached hub name.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Where it would be written: the disk to ask.")
    ] = Path(),
    blockwise: Annotated[bool, typer.Option("--blockwise", help="One block in memory, the others on disk.")] = False,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that share the whole model, one process each.")] = 1,
    gpu_memory: Annotated[float, typer.Option(min=0, help="GB of each GPU; default: of the GPU here.")] = 0,
    host_memory: Annotated[float, typer.Option(min=0, help="GB of the machine; default: what is free here.")] = 0,
    tflops: Annotated[
        float,
        typer.Option(min=0, help="TFLOP/s of matrix products; default: measured here, assumed for a GPU elsewhere."),
    ] = 0,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run the first phases in a process of their own, and compare.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON and nothing else.")] = False,
    **options: Any,
) -> None:
    """Predict memory, time and disk of a quantization from MODEL's config alone. Takes every option of dq quantize."""
    from rich.console import Console

    from dq_runtime.environment import resolve_device
    from dq_runtime.planning.plan import Question, make_plan

    known = inspect.signature(spec_of).parameters
    spec = spec_of(**{name: options[name] for name in known})
    device = options["device"]
    question = Question(
        model=model,
        spec=spec,
        windows=options["windows"] + options["continued_windows"],
        window_length=options["window_length"],
        held_out_windows=options["held_out_windows"],
        compute_dtype=options["compute_dtype"],
        device=resolve_device(device) if device == "auto" else device,
        blockwise=blockwise,
        gpus=gpus,
        gpu_memory=int(gpu_memory * 1e9),
        host_memory=int(host_memory * 1e9),
        flops=tflops * 1e12,
        output=output,
    )
    found = make_plan(question)
    measured = None
    if measure:
        from dq_runtime.planning.measured import measured_phases

        measured = measured_phases(question, found)
    if as_json:
        print(json.dumps(found.to_json() | ({} if measured is None else {"measured": measured})))
        return
    console = Console()
    _show(console, found)
    if measured is not None:
        _compare(console, found, measured)


def _show(console: Console, plan: Plan) -> None:
    """Phase by phase, the arithmetic, then time, disk and the verdict."""
    from rich.table import Table

    from dq_runtime.planning.memory import HOST

    shape, setting = plan.shape, plan.setting
    console.print(
        f"{shape.name}: W = {shape.weights / 1e9:.3f} G weights to round in {len(shape.layers)} layers, D = "
        f"{shape.dense / 1e9:.3f} G dense; H {shape.hidden}, F {shape.intermediate}, V {shape.vocab}; "
        f"{setting.method}, {'blockwise' if setting.blockwise else 'whole model'} on {setting.device}"
        + (f" x {setting.world}" if setting.world > 1 else "")
    )
    for place in plan.places:
        table = Table("phase", "component", "arithmetic", "B a weight", "GB", title=f"Memory: {place}")
        for column in table.columns[3:]:
            column.justify = "right"
        for phase in plan.phases:
            total = phase.total(place)
            for component in phase.components:
                if component.place == place and component.size >= 5e5:
                    each = f"{component.size / shape.weights:.2f}"
                    table.add_row("", component.name, component.how, each, f"{component.size / 1e9:.3f}")
            peak = " <- peak" if phase is plan.peak(place) else ""
            table.add_row(
                f"[bold]{phase.name}[/bold]", f"[bold]together{peak}[/bold]", "", f"{total / shape.weights:.2f}",
                f"[bold]{total / 1e9:.3f}[/bold]", end_section=True,
            )  # fmt: skip
        console.print(table)
    table = Table("time", "steps", "seconds a step", "hours", "of", title=f"Time ({plan.rates})")
    for d in plan.durations:
        table.add_row(d.name, str(d.steps), f"{d.seconds:.3g}", f"{d.total / 3600:.3f}", d.how)
    table.add_row("together", "", "", f"{sum(d.total for d in plan.durations) / 3600:.3f}", "")
    console.print(table)
    lines = ", ".join(f"{c.name} {c.size / 1e9:.2f}" for c in plan.disk)
    console.print(f"Disk, at most: {sum(c.size for c in plan.disk) / 1e9:.2f} GB ({lines}).")
    for place in plan.places:
        each = " of each GPU" if place != HOST and setting.world > 1 else ""
        there = f" of {plan.limits[place] / 1e9:.1f}" if place in plan.limits else ""
        processes = f" in {setting.world} processes" if place == HOST and setting.world > 1 else ""
        console.print(
            f"{place}{each}: {plan.needed(place) / 1e9:.2f}{there} GB{processes}, in {plan.peak(place).name}."
        )
    console.print("It fits." if not plan.short() else "It does not fit: " + "; ".join(plan.advice) + ".")


def _compare(console: Console, plan: Plan, measured: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("phase", "predicted GB", "measured GB", "predicted s a step", "measured s a step", title="Measured")
    for row in measured["phases"]:
        cells = [row["name"]]
        for key in ("predicted_bytes", "bytes"):
            cells.append(f"{row[key] / 1e9:.3f}")
        for key in ("predicted_seconds", "seconds"):
            cells.append("" if row.get(key) is None else f"{row[key]:.3g}")
        table.add_row(*cells)
    console.print(table)


def _with_options_of(command: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, whose ``**options`` the command line sees as the options of ``command`` that it does not have."""
    own = dict(inspect.signature(function, eval_str=True).parameters)
    own.pop("options")
    others = inspect.signature(command, eval_str=True).parameters
    keyword = inspect.Parameter.KEYWORD_ONLY
    merged = [*own.values(), *(p for name, p in others.items() if name not in own)]
    function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(kind=keyword) for p in merged], return_annotation=None
    )
    return function


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(_with_options_of(quantize, plan))
