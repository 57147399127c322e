"""``dq quantize``."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dq_runtime.spec import QuantSpec

# Listed here because the registry's package imports torch, which --help should not wait for.
ROUNDING_NAMES = (
    "discquant, discquant-paper, nearest, obc, gptq, cdquant, gptaq, qronos, magr, adaround, adaquant, flexround, "
    "omniquant, autoround, gsq, yaqa, qat"
)
# As dq_runtime.spec.GRID_NAMES, which a test compares.
GRID_NAMES = ("int", "gguf:q4_0", "gguf:q8_0", "nf4", "fp4", "mxfp4", "nvfp4")
EPILOG = """
[bold]Examples[/bold]

dq quantize HuggingFaceTB/SmolLM2-135M -o out --bits 3 --calibration c4.txt

dq quantize model.gguf -o out --bits 4 --group-size 32 --asymmetric --rounding nearest

dq quantize ./model -o out --override 'model.layers.0.*=8' --override '*.down_proj=4:32' --set epochs=4

dq quantize ./model -o out --target-bpw 3.1 --bits-choices 2,3,4,8 --calibration c4.txt

dq quantize ./model -o out --grid gguf:q4_0 --calibration c4.txt

dq quantize ./model -o out --calibration c4.txt --resume
"""


def quantize(
    model: Annotated[str, typer.Argument(help="A model directory, a hub name, or a .gguf file.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The checkpoint directory to write.")],
    grid: Annotated[str, typer.Option(help=f"Which values weights may take: {', '.join(GRID_NAMES)}.")] = "int",
    bits: Annotated[int | None, typer.Option(help="Bits per code, 2 to 8; default 3, or what the grid has.")] = None,
    target_bpw: Annotated[
        float | None,
        typer.Option(help="Instead of --bits: mean bits per weight, scales included; each layer gets what it needs."),
    ] = None,
    bits_choices: Annotated[str, typer.Option(help="The bits that --target-bpw chooses from.")] = "2,3,4",
    unfused: Annotated[
        bool, typer.Option("--unfused", help="Let --target-bpw give q, k, v or gate, up different bits (not for vLLM).")
    ] = False,
    group_size: Annotated[
        str | None,
        typer.Option(help="Weights that share a scale: 16, 32, 64, 128 or row; default 64, or what the grid has."),
    ] = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="Give every group a zero point.")] = False,
    scale: Annotated[str, typer.Option(help="How scales are fitted: absmax or mse (a search).")] = "absmax",
    scale_dtype: Annotated[
        str | None,
        typer.Option(help="Serving dtype of scales: bfloat16 or float16; default bfloat16, or what the grid has."),
    ] = None,
    rounding: Annotated[str, typer.Option(help=f"The rounding method: {ROUNDING_NAMES}.")] = "discquant",
    transform: Annotated[
        str, typer.Option(help="The basis in which weights are rounded: identity, hadamard or spinquant.")
    ] = "identity",
    transform_option: Annotated[
        list[str] | None, typer.Option("--transform-set", help="An option of the transform, NAME=VALUE.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", help="An option of the method, NAME=VALUE; may be repeated.")
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(help="PATTERN=BITS[:GROUP] or PATTERN=dense for layers whose name matches; may be repeated."),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Leave layers that match this pattern dense; default lm_head.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="Text, .jsonl or hf:NAME[:CONFIG[:SPLIT]]. Without it the model writes its own text."),
    ] = None,
    held_out: Annotated[
        str | None, typer.Option(help="Text to measure on; default: documents kept out of --calibration.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Calibration windows.")] = 96,
    continued_windows: Annotated[
        int, typer.Option(help="So many windows more: pieces of those, and what the model writes after them.")
    ] = 0,
    window_length: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    calibration_select: Annotated[
        str,
        typer.Option(help="Which windows of --calibration: random, or coreset (a kernel walk over 4 times as many)."),
    ] = "random",
    held_out_windows: Annotated[int, typer.Option(help="Held-out windows to measure on.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the order of documents and of the start of rounding.")] = 0,
    compute_dtype: Annotated[str, typer.Option(help="Of the rounding loop: auto, float32 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    blockwise: Annotated[
        bool,
        typer.Option(
            "--blockwise", help="Hold one block at a time, read from disk; for methods that go block by block."
        ),
    ] = False,
    checkpoint_every: Annotated[float, typer.Option(help="Seconds between saved states.")] = 120.0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run of this command.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing checkpoint.")] = False,
    report: Annotated[Path | None, typer.Option(help="Also write report.json, .html and .png here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else.")] = False,
) -> None:
    """Round MODEL onto a low-bit grid and write a packed checkpoint with its measured quality."""
    from rich.console import Console
    from rich.table import Table

    from dq_runtime.cli.progress import Bars
    from dq_runtime.evaluate.report import table
    from dq_runtime.pipeline import quantize as run
    from dq_runtime.ranks import is_first_process
    from dq_runtime.request import Silent

    spec = spec_of(
        grid=grid,
        bits=bits,
        target_bpw=target_bpw,
        bits_choices=bits_choices,
        unfused=unfused,
        group_size=group_size,
        asymmetric=asymmetric,
        scale=scale,
        scale_dtype=scale_dtype,
        rounding=rounding,
        transform=transform,
        transform_option=transform_option,
        option=option,
        override=override,
        ignore=ignore,
        seed=seed,
    )
    with Bars() as bars:
        result = run(
            model,
            output,
            spec,
            calibration=calibration,
            held_out=held_out,
            windows=windows,
            window_length=window_length,
            held_out_windows=held_out_windows,
            continued_windows=continued_windows,
            calibration_select=calibration_select,
            compute_dtype=compute_dtype,
            device=device,
            checkpoint_every=checkpoint_every,
            resume=resume,
            overwrite=overwrite,
            blockwise=blockwise,
            report_directory=report,
            listener=Silent() if as_json else bars,
        )
    if not is_first_process():
        return
    if as_json:
        print(json.dumps(result))
        return
    console = Console()
    head, *rows = table(result)
    shown = Table(*head, title=f"{result['model']}, {result['bits_per_weight']:.2f} bits per weight")
    for column in shown.columns[1:]:
        column.justify = "right"
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    console.print(
        f"{result['quantized_weights'] / 1e6:.1f} M weights packed in {result['packed_bytes'] / 1e6:.1f} MB, "
        f"{result['moved_from_nearest']:.1%} of them not at the nearest value; "
        f"{result['unquantized_parameters'] / 1e6:.1f} M parameters left in 16 bits."
    )
    if result["allocation"] is not None:
        counts = Counter(layer["bits"] for layer in result["layers"])
        console.print("Chosen: " + ", ".join(f"{bits} bits for {n} layers" for bits, n in sorted(counts.items())) + ".")
    console.print(
        f"{result['seconds']:.0f} s, peak memory {result['peak_memory_bytes'] / 1e9:.2f} GB. "
        f"Checkpoint: {output}. Report: {(report or output) / 'report.html'}",
        soft_wrap=True,
    )


def spec_of(
    *,
    grid: str,
    bits: int | None,
    target_bpw: float | None,
    bits_choices: str,
    unfused: bool,
    group_size: str | None,
    asymmetric: bool,
    scale: str,
    scale_dtype: str | None,
    rounding: str,
    transform: str,
    transform_option: list[str] | None,
    option: list[str] | None,
    override: list[str] | None,
    ignore: list[str] | None,
    seed: int,
) -> QuantSpec:
    """The spec of these options of the command line."""
    from dq_runtime.errors import SpecError
    from dq_runtime.spec import PER_ROW, GridSpec, Override, QuantSpec, RoundingSpec, Target

    options, transform_options = (
        _pairs(flag, items or []) for flag, items in (("--set", option), ("--transform-set", transform_option))
    )
    if group_size not in (None, "row") and not group_size.isdecimal():
        raise SpecError(f"--group-size must be 16, 32, 64, 128 or row, got {group_size!r}")
    group = None if group_size is None else PER_ROW if group_size == "row" else int(group_size)
    symmetric = False if asymmetric else None
    return QuantSpec(
        grid=GridSpec.named(
            grid, bits=bits, group_size=group, symmetric=symmetric, scale=scale, scale_dtype=scale_dtype
        ),
        transform=transform,
        transform_options=transform_options,
        rounding=RoundingSpec(rounding, options),
        ignore=("lm_head",) if ignore is None else tuple(ignore),
        overrides=tuple(Override.parse(o) for o in override or []),
        target=None if target_bpw is None else Target(target_bpw, _bit_widths(bits_choices), not unfused),
        seed=seed,
    )


def _bit_widths(text: str) -> tuple[int, ...]:
    from dq_runtime.errors import SpecError

    try:
        return tuple(int(bits) for bits in text.split(","))
    except ValueError:
        raise SpecError(f"--bits-choices must be bit widths between commas, such as 2,3,4; got {text!r}") from None


def _pairs(flag: str, items: list[str]) -> dict[str, str]:
    """NAME=VALUE as often as it was given."""
    from dq_runtime.errors import SpecError

    pairs = {}
    for item in items:
        name, separator, value = item.partition("=")
        if not separator:
            raise SpecError(f"{flag} {item!r} is not NAME=VALUE")
        pairs[name] = value
    return pairs


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(quantize)
