"""``dq inspect``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

EPILOG = """
[bold]Examples[/bold]

dq inspect out

dq inspect out --json | jq .bits_per_weight

dq inspect model.gguf
"""


def describe(path: str) -> dict[str, Any]:
    """Layers, bits, bits per weight and sizes of a packed checkpoint of any format, fully validated."""
    from dq_runtime.packing.checkpoint import open_checkpoint
    from dq_runtime.runtime.hub import local_path

    checkpoint = open_checkpoint(local_path(path))
    layers: list[dict[str, Any]] = []
    for name, w in checkpoint.packed():
        layers.append(
            {
                "name": name,
                "bits": w.bits,
                "group_size": w.group_size,
                "symmetric": w.zero is None,
                "out_features": w.n,
                "in_features": w.k,
                "bytes": w.nbytes,
                "bits_per_weight": 8 * w.nbytes / (w.n * w.k),
            }
        )
    weights = sum(row["out_features"] * row["in_features"] for row in layers)
    packed_bytes = sum(row["bytes"] for row in layers)
    dense = [(array.values.size, array.nbytes) for _, array in checkpoint.arrays(list(checkpoint.dense))]
    files = [checkpoint.path] if checkpoint.path.is_file() else list(checkpoint.path.glob("*.safetensors"))
    return {
        "path": str(checkpoint.path),
        "model_type": checkpoint.config.get("model_type"),
        "quantized_weights": weights,
        "bits_per_weight": 8 * packed_bytes / weights if weights else None,
        "packed_bytes": packed_bytes,
        "dense_parameters": sum(size for size, _ in dense),
        "dense_bytes": sum(nbytes for _, nbytes in dense),
        "size_bytes": sum(f.stat().st_size for f in files),
        "layers": layers,
        "notes": list(checkpoint.notes),
    }


def inspect(
    checkpoint: Annotated[str, typer.Argument(help="A packed checkpoint: a directory, a .gguf file or a hub name.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Validate a packed CHECKPOINT and show its layers, bits per weight and sizes."""
    info = describe(checkpoint)
    if as_json:
        print(json.dumps(info))
        return
    from rich.console import Console
    from rich.table import Table

    shown = Table("layer", "shape (out x in)", "bits", "group", "zero point", "bits per weight", title=info["path"])
    for row in info["layers"]:
        shown.add_row(
            row["name"],
            f"{row['out_features']} x {row['in_features']}",
            str(row["bits"]),
            str(row["group_size"]),
            "middle" if row["symmetric"] else "per group",
            f"{row['bits_per_weight']:.3f}",
        )
    console = Console()
    console.print(shown)
    for note in info["notes"]:
        console.print(f"note: {note}", soft_wrap=True)
    bits = info["bits_per_weight"] or 0
    console.print(
        f"{info['model_type']}: {info['quantized_weights'] / 1e6:.1f} M weights at {bits:.3f} bits "
        f"({info['packed_bytes'] / 1e6:.1f} MB) + {info['dense_parameters'] / 1e6:.1f} M unquantized "
        f"({info['dense_bytes'] / 1e6:.1f} MB) = {info['size_bytes'] / 1e6:.1f} MB",
        soft_wrap=True,
    )


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(inspect)
