"""The documentation is executed: what it shows must work."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from dq_runtime.grids import GRIDS
from dq_runtime.rounding import ROUNDINGS, Job, Rounding
from dq_runtime.spec import GridSpec

ROOT = Path(__file__).parents[2]


class _Layer:
    def __init__(self) -> None:
        self.w = torch.randn(24, 128, generator=torch.Generator().manual_seed(0))
        self.grid = GRIDS.get("int")(GridSpec())
        self.scales = self.grid.fit(self.w)

    def weight(self) -> torch.Tensor:
        return self.w


def test_the_method_of_adding_a_method_rounds_to_neighbours_without_bias() -> None:
    page = (ROOT / "docs" / "adding-a-method.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert code is not None
    module = types.ModuleType("stochastic_example")
    sys.modules[module.__name__] = module  # dataclasses look their module up by name
    exec(compile(code.group(1), "adding-a-method.md", "exec"), module.__dict__)
    method: Rounding = module.Stochastic({})
    layer = _Layer()
    lo, hi = layer.grid.neighbours(layer.w, layer.scales)
    total = torch.zeros_like(layer.w)
    for seed in range(200):
        job = Job({"layer": layer}, None, seed, None, lambda *a, **k: None)  # type: ignore[arg-type]
        codes = method.round(job).codes["layer"]
        assert ((codes == lo) | (codes == hi)).all()
        total += codes
    y = layer.grid.position(layer.w, layer.scales) - lo
    free = hi > lo
    # 200 coin flips: the mean is within 5 standard errors, at most 5 * 0.5 / sqrt(200), of y.
    assert ((total / 200 - lo - y).abs()[free] < 5 * 0.5 / 200**0.5).all()


def test_every_command_line_option_in_the_readme_exists(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dq_runtime.cli import main

    monkeypatch.setenv("COLUMNS", "200")  # a narrow terminal would break long options in two
    readme = (ROOT / "README.md").read_text()
    flags = set(re.findall(r"(?<=\s)--[a-z][a-z-]+", readme))
    for command in (
        "quantize",
        "plan",
        "compare",
        "generate",
        "inspect",
        "backends",
        "serve",
        "chat",
        "export",
        "check",
        "eval",
    ):
        main([command, "--help"])
    known = capsys.readouterr().out + (ROOT / "benchmarks" / "calibration_source.py").read_text()
    assert {flag for flag in flags if flag not in known} == set()


def test_the_readme_table_is_the_committed_result() -> None:
    from dq_runtime.evaluate.report import table

    report = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    readme = (ROOT / "README.md").read_text()
    for row in table(report):
        assert "| " + " | ".join(row) + " |" in readme
    kl = report["held_out"]["kl"]
    assert f"{kl['discquant-paper'] / kl['nearest']:.2f}x nearest's KL" in readme
    assert f"only {report['moved_from_nearest']:.1%} of the weights" in readme
    for name in ("device", "versions", "date", "command"):
        assert report[name]


def test_the_figure_of_self_sampled_calibration_is_the_committed_result() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "calibration_source.json").read_text())
    readme = (ROOT / "README.md").read_text()
    for name in ("nearest", "real", "self_sampled"):
        assert f"{result['kl'][name]:.3f}" in readme


def test_the_gpu_figures_of_the_readme_are_the_committed_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_report

    readme = (ROOT / "README.md").read_text()
    (name,) = re.findall(r"benchmarks/results/(gpu_\w+[-\d]+\.json)", readme)
    report = json.loads((ROOT / "benchmarks" / "results" / name).read_text())
    assert "\n".join(gpu_report.table(report)) in readme
    alone = {row["bits"]: row for row in report["decode"] if row["batch"] == 1 and row["head_bits"] == 16}
    for bits in (3, 4):
        assert f"{alone[bits]['median_us'] / 1000:.2f} ms at {bits} bits" in readme
        assert f"{alone[bits]['fraction_of_copy']:.0%}" in readme
    plain, fused = report["discquant_step"]["rows"]
    assert fused["half_state"]
    seconds = (fused["seconds"]["median"] * 1000, plain["seconds"]["median"] * 1000)
    assert f"takes {seconds[0]:.0f} ms against {seconds[1]:.0f} ms" in readme
    assert f"with {fused['peak_memory_bytes'] / plain['peak_memory_bytes']:.0%}\nof its memory" in readme.replace(
        " of its memory", "\nof its memory"
    )


def test_the_cpu_figures_of_the_readme_are_the_committed_result() -> None:
    readme = (ROOT / "README.md").read_text()
    report = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text())
    for row in report["rows"]:
        if row.get("threads") == 2 and row.get("peak_bytes"):
            speeds = f"{row['prefill_tokens_per_second']:.0f} | {row['decode_tokens_per_second']:.0f}"
            assert f"| {row['candidate']} | {speeds} | {row['peak_bytes'] / 1e6:.0f} MB |" in readme
    ratios = report["ratios"]
    for name in ("decode_4bit", "decode_3bit", "prefill_4bit", "peak_memory"):
        assert f"{ratios[name]:.2f}x" in readme
    assert f"{ratios['cold_start']:.1f}x" in readme
    large = ratios["1B"]
    decoding = f"is {large['decode_4bit']:.2f}x Q4_0 there, at {large['decode_4bit_share_2_threads']:.0%} of the memory"
    assert decoding in readme
    slow = json.loads((ROOT / "benchmarks" / "results" / "cpu_slow_memory.json").read_text())["ratios"]
    assert (
        f"was {slow['decode_4bit']:.2f}x Q4_0, and {slow['1B']['decode_4bit']:.2f}x for the larger shape"
        in " ".join(readme.split())
    )
    speeds = (slow["read_gb_per_second_2_threads"], slow["1B"]["read_gb_per_second_2_threads"])
    assert [f"{speed:.0f}" for speed in speeds] == ["30", "30"]
    assert "with 30 GB/s throughout" in readme
    amx = json.loads((ROOT / "benchmarks" / "results" / "cpu_amx.json").read_text())["ratios"]
    decoding = f"decoding at 4 bits was {amx['decode_4bit']:.2f}x Q4_0"
    others = f"at 3 bits {amx['decode_3bit']:.2f}x the best of llama.cpp's, prefill {amx['prefill_4bit']:.2f}x"
    larger = f"the larger shape {amx['1B']['decode_4bit']:.2f}x and {amx['1B']['prefill_4bit']:.2f}x"
    assert all(words in " ".join(readme.split()) for words in (decoding, others, larger))


def test_the_serving_figures_are_the_committed_result() -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    report = json.loads((ROOT / "benchmarks" / "results" / "serve.json").read_text())
    rows = {(row["engine"], row["concurrency"]): row for row in report["rows"]}
    for concurrency in (1, 2, 4, 8):
        both = [rows[name, concurrency] for name in ("dq 4 bits", "llama.cpp Q4_0")]
        speeds = " | ".join(f"{row['tokens_per_second']:.0f}" for row in both)
        waits = ", ".join(f"{1000 * row['first_token_p95']:.0f} ms" for row in both)
        assert f"| {concurrency} | {speeds} | {waits} |" in readme
    ratios = report["ratios"]
    assert f"Eight streams get {ratios['throughput_8_over_theirs']:.2f}x what llama.cpp's get" in readme
    assert f"wait {ratios['first_token_p95_8_over_theirs']:.2f}x as long" in readme
    assert f"our own that is {ratios['throughput_8_over_1']:.2f}x" in readme
    older = json.loads((ROOT / "benchmarks" / "results" / "serve_zen4.json").read_text())["ratios"]
    assert f"which has no AMX, had {older['throughput_8_over_1']:.2f}x" in readme
    engine = " ".join((ROOT / "docs" / "engine.md").read_text().split())
    assert f"get {ratios['throughput_8_over_1']:.2f} times the tokens of one" in engine
    assert f"first token {report['prefix_reuse']['speedup']:.0f} times as soon" in engine


def test_the_rounding_times_of_the_readme_are_the_committed_results() -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    results = ROOT / "benchmarks" / "results"
    ratios = json.loads((results / "discquant_step_cpu.json").read_text())["ratios"]
    for method in ("discquant", "discquant-paper"):
        both = [ratios[f"{method}, {dtype}"]["speed"] for dtype in ("bfloat16", "float32")]
        assert f"a step of {method} {both[0]:.2f}x as fast as in plain PyTorch in bfloat16, {both[1]:.2f}x in" in readme
    kept = ratios["discquant, bfloat16"]["speed_with_kept_teacher"]
    assert f"eight passes run the original model once, which makes it {kept:.2f}x" in readme
    layers = [row["ratio"] for row in json.loads((results / "gptq_layer.json").read_text())["rows"]]
    assert f"GPTQ takes {min(layers):.1f} to {max(layers):.1f} times as long" in readme


def _kl(row: dict[str, Any]) -> str:
    """Of one row of a comparison, as the pages write it."""
    low, high = row["kl_ci95"]
    return f"{row['kl']:.3f} ± {(high - low) / 2:.3f}"


def test_the_table_of_methods_of_the_readme_is_the_committed_result() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    result = json.loads((ROOT / "benchmarks" / "results" / "compare_stories260k.json").read_text())
    grid = {"group_size": 64, "transform": "identity", "scale": "absmax"}
    ours = [row for row in result["rows"] if row["method"] in ROUNDINGS]  # the public tools' are in docs/compare.md
    found = [row for row in ours if all(row[key] == value for key, value in grid.items())]
    for row in found:
        if row["bits"] in (2, 3):
            name = row["method"] + ("\\*" if row["learned_scales"] else "")
            assert any(line.startswith(f"| {name} |") and _kl(row) in line for line in lines), name
    assert len({row["method"] for row in found}) == len(ROUNDINGS)


def test_smollm2s_table_of_methods_is_the_committed_result() -> None:
    """Both ways: every measured method has its line, and every figure of a line was measured."""
    readme = (ROOT / "README.md").read_text()
    rows = json.loads((ROOT / "benchmarks" / "results" / "compare_smollm2.json").read_text())["rows"]
    grid = {"group_size": 64, "transform": "identity", "scale": "absmax"}
    found = {(r["method"], r["bits"]): r for r in rows if all(r[key] == value for key, value in grid.items())}

    def kl(method: str, bits: int) -> str:
        row = found.get((method, bits))
        return _kl(row) if row else "-"

    reference = next(row for row in rows if row["method"] == "reference")
    lines = [f"| unquantized | 0 | {reference['perplexity']:.1f} | 100% | - | 0 |"]
    for row in sorted((row for (_, bits), row in found.items() if bits == 3), key=lambda row: float(row["kl"])):
        name = row["method"] + ("\\*" if row["learned_scales"] else "")
        cost = f"{row['perplexity']:.1f} | {row['top1']:.1%} | {row['seconds']:.0f}"
        lines.append(f"| {name} | {kl(row['method'], 3)} | {cost} | {kl(row['method'], 2)} |")
    assert {method for method, bits in found if bits == 2} <= {method for method, bits in found if bits == 3}
    table = readme.split("<!-- smollm2 -->\n")[1].split("\n<!-- end -->")[0].splitlines()
    assert table[2:] == lines
    ours, autoround, gptq = (found[method, 3]["kl"] for method in ("discquant", "autoround", "gptq"))
    assert f"`discquant` is {1 - ours / found['gsq', 3]['kl']:.0%} below gsq" in readme
    assert f"{1 - ours / autoround:.0%} below autoround and at {ours / gptq:.2f} of gptq" in readme


def test_the_windows_that_the_model_adds_are_the_committed_results() -> None:
    results = ROOT / "benchmarks" / "results"
    lines = []
    for method in ("gptq", "autoround", "discquant"):
        figures = []
        for bits in (3, 2):
            for name in ("compare_stories260k", "compare_stories260k_continued"):
                rows = json.loads((results / f"{name}.json").read_text())["rows"]
                grid = {"method": method, "bits": bits, "group_size": 64, "transform": "identity", "scale": "absmax"}
                (row,) = [r for r in rows if all(r[key] == value for key, value in grid.items())]
                figures.append(_kl(row))
        lines.append(f"| {method} | {' | '.join(figures)} |")
    page = (ROOT / "docs" / "discquant.md").read_text()
    table = page.split("<!-- continued -->\n")[1].split("\n<!-- end -->")[0].splitlines()
    assert table[2:] == lines


def test_what_signs_of_scales_bring_is_the_committed_result() -> None:
    def rows(name: str) -> dict[tuple[str, int], str]:
        found = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["rows"]
        grid = {"group_size": 64, "transform": "identity", "scale": "absmax"}
        return {(r["method"], r["bits"]): _kl(r) for r in found if all(r[key] == value for key, value in grid.items())}

    before, after = rows("compare_stories260k"), rows("compare_stories260k_signs")
    lines = [
        f"| {m} | {before[m, 3]} | {after[m, 3]} | {before[m, 2]} | {after[m, 2]} |"
        for m in ("autoround", "gsq", "discquant")
    ]
    page = (ROOT / "docs" / "discquant.md").read_text()
    assert page.split("<!-- signs -->\n")[1].split("\n<!-- end -->")[0].splitlines()[2:] == lines
    public = rows("compare_smollm2_public")
    names = ("autoround", "AutoRound 0.16.1", "gptq", "llm-compressor 0.14.0.1 GPTQ", "nearest")
    page = (ROOT / "docs" / "compare.md").read_text()
    table = page.split("<!-- smollm2 public -->\n")[1].split("\n<!-- end -->")[0].splitlines()
    assert table[2:] == [f"| {name} | {public[name, 3]} |" for name in names]
    readme = " ".join((ROOT / "README.md").read_text().split())
    first = {key: figure.split(" ")[0] for key, figure in {**after, **public}.items()}
    theirs, theirs_gptq = first["AutoRound 0.16.1", 3], first["llm-compressor 0.14.0.1 GPTQ", 3]
    assert f"AutoRound's own code is at {theirs} at 3 bits, llm-compressor's GPTQ at {theirs_gptq}" in readme
    assert f"ours at {first['discquant', 3]} and {first['discquant', 2]}" in readme


def test_the_public_tools_in_the_page_on_comparing_are_the_committed_result() -> None:
    page = (ROOT / "docs" / "compare.md").read_text()
    rows = json.loads((ROOT / "benchmarks" / "results" / "compare_stories260k.json").read_text())["rows"]
    found = [r for r in rows if r["group_size"] == 64 and r["transform"] == "identity" and r["scale"] == "absmax"]
    names = {"gptq", "llm-compressor 0.14.0.1 GPTQ", "autoround", "AutoRound 0.16.1"}
    assert {row["method"] for row in found} >= names
    for name in names:
        figures = {}
        for row in found:
            if row["method"] == name:
                figures[row["bits"]] = _kl(row)
        assert f"| {name} | {figures[2]} | {figures[3]} | {figures[4]} |" in page


def test_the_tables_of_the_page_on_discquant_are_the_committed_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import discquant_ablation
    import discquant_memory

    page = (ROOT / "docs" / "discquant.md").read_text()
    ablation, memory = (
        json.loads((ROOT / "benchmarks" / "results" / f"discquant_{name}.json").read_text())
        for name in ("ablation", "memory")
    )
    for table, lines in discquant_ablation.tables(ablation["rows"]).items():
        assert "\n".join([f"<!-- {table} -->", *lines, "<!-- end -->"]) in page
    assert "\n".join(["<!-- memory -->", *discquant_memory.table(memory), "<!-- end -->"]) in page
    assert "\n".join(["<!-- blockwise -->", *discquant_memory.blockwise_table(memory), "<!-- end -->"]) in page
    ours = next(row for row in memory["rows"] if row["method"] == "discquant")
    assert ours["state_bytes_per_weight"] < 5
    few, many = memory["blockwise"]
    assert many["layers"] == 3 * few["layers"]
    assert many["peak_bytes"] < 1.2 * few["peak_bytes"]
    whole = ours["original_bytes_per_weight"] + ours["peak_bytes_per_weight"]
    assert many["peak_bytes_per_weight"] < 0.4 * whole


def test_the_tables_of_the_plan_page_are_the_committed_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import plan

    result = json.loads((ROOT / "benchmarks" / "results" / "plan.json").read_text())
    page = (ROOT / "docs" / "plan.md").read_text()
    assert "\n".join(plan.table(result)) in page
    for each in result["llama_3_1_70b"]:
        assert "\n".join(plan.arithmetic(each)) in page
