"""report.json, report.png and report.html of one quantization, and the model card that travels with the checkpoint."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dq_runtime.evaluate.metrics import Quality
from dq_runtime.packing.checkpoint import write_sums

Report = dict[str, Any]


def held_out_section(results: Mapping[str, Quality], source: str, windows: Sequence[int]) -> Report:
    """The ``held_out`` part of report.json; ``windows`` = [count, length]."""
    section: Report = {"source": source, "windows": windows[0], "window_length": windows[1]}
    rounded = {name: quality for name, quality in results.items() if name != "reference"}
    section["kl"] = {name: quality.kl for name, quality in rounded.items()}
    # One window has no standard error, and JSON no NaN.
    errors = {name: quality.kl_stderr for name, quality in rounded.items()}
    section["kl_stderr"] = {name: None if math.isnan(error) else error for name, error in errors.items()}
    section["perplexity"] = {name: quality.perplexity for name, quality in results.items()}
    section["top1_agreement"] = {name: quality.agreement for name, quality in rounded.items()}
    # Window by window, so that models can be compared on what differs between them (evaluate/intervals.py).
    section["per_window"] = {name: quality.per_window for name, quality in results.items()}
    return section


def table(report: Report) -> list[list[str]]:
    """Header and rows of the quality table, as text. The reference's size is that of all its tensors in 16 bits."""
    held = report["held_out"]
    rows = [["", "held-out KL", "perplexity", "top-1 agreement", "size on disk", "bits per weight"]]
    for name, perplexity in held["perplexity"].items():
        if name == "reference":
            kl, agreement, size, bpw = "0", "100%", report["reference_bytes"], 16.0
        else:
            error = held["kl_stderr"][name]
            kl = f"{held['kl'][name]:.4f}" + ("" if error is None else f" ± {error:.4f}")
            agreement = f"{held['top1_agreement'][name]:.1%}"
            size, bpw = report["size_bytes"], report["bits_per_weight"]
        rows.append([name, kl, f"{perplexity:.2f}", agreement, f"{size / 1e6:.1f} MB", f"{bpw:.2f}"])
    return rows


def write_report(report: Report, directory: Path) -> None:
    """report.json, report.png and report.html into ``directory`` (created if need be)."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    png = _plot(report)
    (directory / "report.png").write_bytes(png)
    (directory / "report.html").write_text(_html(report, png), encoding="utf-8")


def describe(report: Report, directory: Path, licence: str | None) -> None:
    """The report, the model card and SHA256SUMS into a checkpoint ``directory`` that has all else."""
    write_report(report, directory)
    (directory / "README.md").write_text(model_card(report, licence), encoding="utf-8")
    write_sums(directory)


def _plot(report: Report) -> bytes:
    from matplotlib.figure import Figure

    history, layers, held = report["history"], report["layers"], report["held_out"]
    method = report["spec"]["rounding"]["name"]
    figure = Figure(figsize=(12, 7), layout="constrained")
    loss, decided, quality, error = figure.subplots(2, 2).flat
    _plot_history(loss, decided, history, method)
    names = list(held["kl"])
    quality.bar(names, [held["kl"][n] for n in names], yerr=[held["kl_stderr"][n] or 0 for n in names], capsize=4)
    for i, name in enumerate(names):
        label = f"KL {held['kl'][name]:.3f}\nppl {held['perplexity'][name]:.1f}"
        quality.annotate(label, (i, held["kl"][name] / 2), ha="center", va="center", color="white")
    quality.set(title=f"Held-out KL (reference ppl {held['perplexity']['reference']:.1f})", ylabel="nats per token")
    error.plot([layer["relative_error"] for layer in layers], ".", markersize=4, label=method)
    error.plot([layer["relative_error_nearest"] for layer in layers], ".", markersize=4, label="nearest")
    error.set(title="Relative weight error by layer", xlabel="layer, in model order", ylabel="|W' - W|² / |W|²", ylim=0)
    error.legend()
    figure.suptitle(f"{report['model']}: {method}, {report['bits_per_weight']:.2f} bits per weight")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _plot_history(left: Any, right: Any, history: Sequence[Mapping[str, float]], method: str) -> None:
    """The two upper panels: a loop over the whole model shows its KL, one over layers each layer's objective, a method
    that has both, both. A loop over relaxed choices shows how many are decided."""
    kls = [h for h in history if "kl" in h]
    layers = [h for h in history if h.get("loss_nearest")]
    decided = [h for h in history if "rounded" in h]
    if kls:
        left.plot([h["step"] for h in kls], [h["kl"] for h in kls], color="tab:blue", linewidth=1)
        left.set(title="KL on calibration windows", xlabel="step", ylabel="nats per token", yscale="log")
    elif layers:
        _plot_layers(left, layers)
    else:
        left.text(0.5, 0.5, f"{method} has no steps", ha="center", transform=left.transAxes)
    if decided:
        right.plot([h["step"] for h in decided], [100 * h["rounded"] for h in decided], color="tab:green")
        right.set(title="Weights decided (x within 0.01 of a grid value)", xlabel="step", ylabel="%")
    elif kls and layers:
        _plot_layers(right, layers)
    else:
        right.text(0.5, 0.5, f"{method} relaxes nothing", ha="center", transform=right.transAxes)


def _plot_layers(axes: Any, rows: Sequence[Mapping[str, float]]) -> None:
    axes.plot([h["step"] for h in rows], [h["loss"] / h["loss_nearest"] for h in rows], ".", color="tab:blue")
    axes.set(title="Objective of each layer or block", xlabel="layer, in order", ylabel="of nearest's", ylim=0)


def _html(report: Report, png: bytes) -> str:
    head, *rows = table(report)
    cells = "".join(f"<th scope=col>{html.escape(c)}</th>" for c in head)
    body = "".join(
        f"<tr><th scope=row>{html.escape(r[0])}</th>" + "".join(f"<td>{html.escape(c)}</td>" for c in r[1:]) + "</tr>"
        for r in rows
    )
    layers = "".join(
        f"<tr><th scope=row>{html.escape(x['name'])}</th><td>{x['out_features']}×{x['in_features']}</td>"
        f"<td>{x['bits']}</td><td>{x['bits_per_weight']:.3f}</td><td>{x['relative_error']:.4f}</td>"
        f"<td>{x['relative_error_nearest']:.4f}</td><td>{x['moved']:.1%}</td></tr>"
        for x in report["layers"]
    )
    image = base64.b64encode(png).decode()
    title = html.escape(f"{report['model']}, {report['bits_per_weight']:.2f} bits per weight")
    facts = html.escape(
        f"Calibration: {report['calibration']['windows']} windows of {report['calibration']['window_length']} tokens "
        f"({report['calibration']['source']}). Held out: {report['held_out']['windows']} windows of "
        f"{report['held_out']['window_length']} ({report['held_out']['source']}). {report['seconds']:.0f} s, "
        f"peak memory {report['peak_memory_bytes'] / 1e9:.2f} GB."
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}}
table{{border-collapse:collapse;margin:1rem 0}}
th,td{{padding:.3rem .8rem;border-bottom:1px solid #ccc;text-align:right}}
th[scope=row]{{text-align:left}}img{{max-width:100%}}</style></head><body>
<h1>{title}</h1><p>{facts}</p>
<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>
<img alt="KL and share of decided weights over steps, held-out KL, relative weight error by layer"
 src="data:image/png;base64,{image}">
<details><summary>Layers</summary><table><thead><tr><th scope=col>layer</th><th scope=col>shape</th>
<th scope=col>bits</th><th scope=col>bits per weight</th><th scope=col>relative error</th>
<th scope=col>of nearest</th><th scope=col>moved from nearest</th></tr></thead><tbody>{layers}</tbody></table></details>
<details><summary>Everything (report.json)</summary><pre>{
        html.escape(json.dumps({k: v for k, v in report.items() if k not in ("history", "layers")}, indent=2))
    }</pre></details>
</body></html>
"""


def model_card(report: Report, licence: str | None) -> str:
    """README.md of the checkpoint, with the measured quality."""
    head, *rows = table(report)
    lines = ["| " + " | ".join(r) + " |" for r in (head, ["---"] * len(head), *rows)]
    spec, turned = report["spec"], report["transform"]
    basis = "" if turned["name"] == "identity" else f" in the bases of `{turned['name']}`, folded into the weights,"
    front = ["---", f"base_model: {report['model']}", "library_name: transformers", "pipeline_tag: text-generation"]
    front += [] if licence is None else [f"license: {licence}"]
    front += ["tags: [compressed-tensors, discquant, dq_runtime]", "---"]
    calibration = report["calibration"]
    return "\n".join(
        [
            *front,
            "",
            f"# {report['model']}, {report['bits_per_weight']:.2f} bits per weight",
            "",
            f"Rounded by `{spec['rounding']['name']}`{basis} onto the {spec['grid']['bits']}-bit block-scaled integer "
            f"grid (group size {spec['grid']['group_size']}) by dq_runtime {report['versions']['dq_runtime']}. "
            "The format is compressed-tensors `pack-quantized`.",
            "",
            f"Measured on {report['held_out']['windows']} held-out windows of {report['held_out']['window_length']} "
            f"tokens ({report['held_out']['source']}), in nats per token against the unquantized model:",
            "",
            *lines,
            "",
            f"Calibrated on {calibration['windows']} windows of {calibration['window_length']} tokens "
            f"({calibration['source']}). Full figures: `report.json`, `report.html`.",
            "",
            "```",
            "dq generate . 'Once upon a time'",
            "```",
            "",
        ]
    )
