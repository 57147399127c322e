"""From measured cells to the table: rows with intervals and paired differences, as JSON and as Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dq_runtime.compare.cells import REFERENCE
from dq_runtime.evaluate.intervals import Interval, ci95, mean, paired_ci95
from dq_runtime.evaluate.perplexity import Perplexity
from dq_runtime.packing.atomic import replace_file

Row = dict[str, Any]
Result = dict[str, Any]


def table_of(cells: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> Result:
    """The result file: ``facts`` (protocol, command), ``rows`` by ascending KL, and what was ``excluded`` and why."""
    done = [cell for cell in cells if cell["kind"] == "done"]
    rows = [_row(cell) for cell in done]
    _compare_to_best(rows)
    rows.sort(key=lambda row: row["kl"])
    return {
        **facts,
        **{name: _one_or_all([cell[name] for cell in done]) for name in ("device", "threads", "versions")},
        "date": max((cell["date"] for cell in done), default=None),
        "rows": rows,
        "excluded": [
            {name: cell[name] for name in (*_IDENTITY, "kind", "reason")} for cell in cells if cell["kind"] != "done"
        ],
    }


_IDENTITY = ("label", "method", "transform", "bits", "group_size", "symmetric", "scale", "options")


def _row(cell: Mapping[str, Any]) -> Row:
    windows = cell["per_window"]
    reference = cell["method"] == REFERENCE
    row = {
        **{name: cell[name] for name in _IDENTITY},
        "learned_scales": cell["learned_scales"],
        "bpw": cell["bpw"],
        "kl": mean(windows["kl"]),
        "kl_ci95": ci95(windows["kl"]),
        "kl_nearest": cell["kl_nearest"],
        "held_out_perplexity": math.exp(mean(windows["nll"])),
        "top1": mean(windows["top1"]),
        "top1_ci95": None if reference else ci95(windows["top1"]),
        "perplexity": None,
        "perplexity_ci95": None,
        "tasks": {},
        **{name: cell[name] for name in _COSTS},
        "kl_windows": windows["kl"],
    }
    if "perplexity_windows" in cell:
        measured = Perplexity(cell["perplexity_windows"]["nll"], cell["perplexity_windows"]["tokens"])
        row |= {"perplexity": measured.value, "perplexity_ci95": measured.ci95}
    for name, answers in cell.get("tasks", {}).items():
        row["tasks"][name] = {"accuracy": mean(answers), "ci95": ci95(answers), "answers": answers}
    return row


_COSTS = ("seconds", "total_seconds", "resumed", "peak_memory_bytes", "moved_fraction", "compute_dtype", "all_options")


def _compare_to_best(rows: Sequence[Row]) -> None:
    """Against the row with the least KL at the same bits, group size and kind of zero point: the difference of every
    other with its paired interval. One whose interval begins above 0 is worse beyond the choice of the windows."""
    by_grid: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["method"] != REFERENCE:
            by_grid.setdefault((row["bits"], row["group_size"], row["symmetric"]), []).append(row)
    for same in by_grid.values():
        best = min(same, key=lambda row: row["kl"])
        for row in same:
            row["kl_minus_best"] = {
                "best": best["label"],
                "difference": row["kl"] - best["kl"],
                "ci95": None if row is best else paired_ci95(row["kl_windows"], best["kl_windows"]),
            }
            for name, task in row["tasks"].items():
                if row is not best and name in best["tasks"]:
                    task["minus_best_ci95"] = paired_ci95(task["answers"], best["tasks"][name]["answers"])


def _one_or_all(values: Sequence[Any]) -> Any:
    """What all cells have in common, else the list of what they have: then seconds are not to be compared."""
    distinct = [value for i, value in enumerate(values) if value not in values[:i]]
    return distinct[0] if len(distinct) == 1 else distinct


def _replace(file: Path, text: str) -> None:
    replace_file(file, lambda p: p.write_text(text, encoding="utf-8"))


def write_table(result: Result, directory: Path) -> None:
    """compare.json and compare.md."""
    plain = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    for name, text in (("compare.json", plain), ("compare.md", markdown(result))):
        _replace(directory / name, text)


COLUMNS = ("method", "bpw", "KL", "above the best", "perplexity", "top-1", "moved", "seconds", "peak memory")


def texts_of(row: Row) -> list[str]:
    """One row as text, in the order of COLUMNS."""
    moved, seconds, peak = row["moved_fraction"], row["seconds"], row["peak_memory_bytes"]
    return [
        name_of(row),
        "-" if row["bpw"] is None else f"{row['bpw']:.2f}",
        f"{row['kl']:.4f}{_half(row['kl_ci95'])}",
        _above(row.get("kl_minus_best")),
        f"{row['held_out_perplexity' if row['perplexity'] is None else 'perplexity']:.2f}",
        f"{row['top1']:.1%}",
        "-" if moved is None else f"{moved:.1%}",
        "-" if seconds is None else f"{seconds:.1f}" if seconds < 100 else f"{seconds:.0f}",
        "-" if peak is None else f"{peak / 1e9:.2f} GB",
    ]


def name_of(row: Row) -> str:
    """The method with everything about it that is not the default; a star where it moved the scales."""
    extra = [] if row["transform"] == "identity" else [row["transform"]]
    extra += [] if row["scale"] == "absmax" else [f"{row['scale']} scales"]
    extra += [f"{name}={value}" for name, value in row["options"].items()]
    return str(row["method"]) + "".join(f", {e}" for e in extra) + ("*" if row["learned_scales"] else "")


def _half(interval: Interval | None) -> str:
    return "" if interval is None else f" ± {(interval[1] - interval[0]) / 2:.4f}"


def _above(difference: Mapping[str, Any] | None) -> str:
    if difference is None:
        return "-"
    if difference["ci95"] is None:
        return "best"
    return f"{difference['difference']:.4f}{_half(difference['ci95'])}"


def grid_of(row: Row) -> str:
    """``3 bits, group 64``."""
    if row["method"] == REFERENCE:
        return "unquantized"
    group = "row" if row["group_size"] == "row" else f"group {row['group_size']}"
    return f"{row['bits']} bits, {group}" + ("" if row["symmetric"] else ", asymmetric")


def markdown(result: Result) -> str:
    """The table for people: one part for each grid, since differences are within one."""
    protocol, rows = result["protocol"], result["rows"]
    calibration, held = protocol["calibration"], protocol["held_out"]
    text = "the raw text" if "perplexity" in protocol else "the held-out windows"
    lines = [
        f"# {protocol['model']['name']}: rounding methods under one protocol",
        "",
        f"Calibration: {calibration['windows']} windows of {calibration['window_length']} tokens of "
        f"{calibration['file']}{_continued(calibration)}. Held out: {held['windows']} windows of "
        f"{held['window_length']} of {held['file'] or 'documents kept out of it'}. KL in nats per token against the "
        'unquantized model with its 95% interval over windows; "above the best" is the difference to the least KL on '
        f'the same grid, paired window by window. Perplexity is that of {text}. "moved" counts codes that are not '
        "nearest on the row's own scales, \\* marks scales that the method learned. Seconds are the rounding alone, on "
        f"{_plain(result['device'])} (threads: {_plain(result['threads'])}).",
    ]
    for grid in dict.fromkeys(grid_of(row) for row in sorted(rows, key=lambda r: (r["bpw"] or 99, r["kl"]))):
        lines += ["", f"## {grid}", "", _line(COLUMNS), _line(["---"] * len(COLUMNS))]
        lines += [_line(texts_of(row)).replace("*", "\\*") for row in rows if grid_of(row) == grid]
    names = sorted({name for row in rows for name in row["tasks"]})
    if names:
        lines += ["", "## Zero-shot accuracy", "", _line(["grid", "method", *names]), _line(["---"] * (len(names) + 2))]
        lines += [_line([grid_of(r), name_of(r), *(_task(r, n) for n in names)]) for r in rows if r["tasks"]]
    if result["excluded"]:
        lines += ["", "## Not in the table", ""]
        lines += [f"- {cell['label']} ({cell['kind']}): {cell['reason']}" for cell in result["excluded"]]
    return "\n".join([*lines, "", f"Made by `{result['command']}` ({result['date']}).", ""])


def _task(row: Row, name: str) -> str:
    task = row["tasks"].get(name)
    return "-" if task is None else f"{task['accuracy']:.1%}" + _percent_half(task["ci95"])


def _percent_half(interval: Interval | None) -> str:
    return "" if interval is None else f" ± {(interval[1] - interval[0]) / 2:.1%}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _continued(calibration: Mapping[str, Any]) -> str:
    count = calibration.get("continued_windows")
    return f" and {count} that the model wrote on from pieces of them" if count else ""


def _plain(value: Any) -> str:
    return " and ".join(map(str, value)) if isinstance(value, list) else str(value)
