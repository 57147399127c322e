"""What a run says about itself: report.json, the picture, the page, the model card; and the metrics behind them."""

from __future__ import annotations

import json
import math
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dq_runtime
from dq_runtime.evaluate.metrics import Quality, compare
from dq_runtime.evaluate.report import held_out_section, model_card, table, write_report
from dq_runtime.spec import QuantSpec, RoundingSpec


@pytest.fixture(scope="module")
def run(
    tiny_model: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, dict[str, Any]]:
    """(checkpoint, extra report directory, report) of a short DiscQuant run."""
    directory = tmp_path_factory.mktemp("report")
    report = dq_runtime.quantize(
        str(tiny_model),
        directory / "out",
        QuantSpec(rounding=RoundingSpec("discquant-paper", {"steps": 6})),
        calibration=str(tiny_text),
        windows=3,
        window_length=32,
        held_out_windows=3,
        report_directory=directory / "extra" / "report",
    )
    return directory / "out", directory / "extra" / "report", report


def _json(path: Path) -> dict[str, Any]:
    """Strict JSON: NaN and Infinity, which Python would read, are not part of it."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path} holds {constant}")

    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    return value


def test_report_json_has_what_the_issue_promises(run: tuple[Path, Path, dict[str, Any]]) -> None:
    output, extra, returned = run
    report = _json(output / "report.json")
    assert report == json.loads(json.dumps(returned))
    assert _json(extra / "report.json") == report
    held = report["held_out"]
    assert set(held["kl"]) == {"nearest", "discquant-paper"}
    assert set(held["perplexity"]) == {"reference", "nearest", "discquant-paper"}
    assert set(held["top1_agreement"]) == {"nearest", "discquant-paper"}
    assert all(v > 0 for v in held["kl"].values())
    assert all(v > 1 for v in held["perplexity"].values())
    assert all(0 <= v <= 1 for v in held["top1_agreement"].values())
    assert report["bits_per_weight"] == 3.25
    assert report["seconds"] > 0
    assert report["peak_memory_bytes"] > 10**7
    assert report["size_bytes"] == (output / "model.safetensors").stat().st_size
    assert [h["step"] for h in report["history"]] == list(range(1, 7))
    assert all(math.isfinite(h["kl"]) and 0 <= h["rounded"] <= 1 for h in report["history"])
    assert len(report["layers"]) == 14
    for layer in report["layers"]:
        assert layer["bits_per_weight"] == 3.25
        assert 0 < layer["relative_error_nearest"] <= layer["relative_error"] < 1
        assert 0 < layer["moved"] < 1
    assert report["spec"]["rounding"]["options"]["clamp"] == 0.5, "defaults are written down"


def test_the_held_out_kl_is_that_of_the_checkpoint_on_disk(
    run: tuple[Path, Path, dict[str, Any]], tiny_model: Path, tiny_text: Path
) -> None:
    """Recomputed from nothing but the two model directories and the text."""
    from dq_runtime.data import pack_windows, read_documents, split_documents
    from dq_runtime.runtime.dense import load_dense

    output, _, report = run
    original, written = load_dense(str(tiny_model)), dq_runtime.load(output, "cpu", exact=True)
    _, held = split_documents(read_documents(str(tiny_text)), 0)
    tokens = pack_windows(held, original.tokenizer, 3, 32, 1, "x").tokens
    with torch.no_grad():
        p = original.model(input_ids=tokens).logits[:, :-1].double().log_softmax(-1)
        q = written.logits(tokens)[:, :-1].double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    assert report["held_out"]["kl"]["discquant-paper"] == pytest.approx(kl, rel=1e-3)
    nll = torch.nn.functional.nll_loss(p.flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert report["held_out"]["perplexity"]["reference"] == pytest.approx(math.exp(nll), rel=1e-3)


def _png_size(data: bytes) -> tuple[int, int]:
    """Width and height, after checking signature, chunk lengths, every checksum and that the pixels inflate."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, kinds, pixels = 8, [], b""
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length)[0] == zlib.crc32(kind + body)
        kinds.append(kind)
        pixels += body if kind == b"IDAT" else b""
        at += 12 + length
    assert kinds[0] == b"IHDR"
    assert kinds[-1] == b"IEND"
    width, height = struct.unpack_from(">II", data, 16)
    assert len(zlib.decompress(pixels)) > width * height
    return width, height


def test_report_png_is_a_real_picture(run: tuple[Path, Path, dict[str, Any]]) -> None:
    width, height = _png_size((run[0] / "report.png").read_bytes())
    assert width > 800
    assert height > 400
    assert (run[1] / "report.png").exists()


def test_report_html_holds_the_numbers_and_needs_no_network(run: tuple[Path, Path, dict[str, Any]]) -> None:
    page = (run[0] / "report.html").read_text(encoding="utf-8")
    for row in table(run[2]):
        for cell in row:
            assert cell in page
    for layer in run[2]["layers"]:
        assert layer["name"] in page
    assert not re.search(r"https?://|//cdn|@import|<script|<link", page)
    assert re.findall(r"src=\"(data:image/png;base64,)", page) == ["data:image/png;base64,"]


def test_names_are_escaped_in_the_page(run: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    write_report(run[2] | {"model": "<b>&"}, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<b>&" not in page
    assert "&lt;b&gt;&amp;" in page


def test_the_model_card_s_table_is_the_report_s(run: tuple[Path, Path, dict[str, Any]]) -> None:
    card = (run[0] / "README.md").read_text(encoding="utf-8")
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in card.splitlines() if line.startswith("|")]
    assert [rows[0], *rows[2:]] == table(run[2])
    held = run[2]["held_out"]
    line = next(r for r in rows if r[0] == "discquant-paper")
    assert f"{held['kl']['discquant-paper']:.4f}" in line[1]
    assert f"{held['perplexity']['discquant-paper']:.2f}" == line[2]
    assert f"{held['top1_agreement']['discquant-paper']:.1%}" == line[3]
    assert card.startswith("---\nbase_model: ")
    assert "library_name: transformers" in card


def test_the_licence_is_stated_only_where_it_is_known(run: tuple[Path, Path, dict[str, Any]]) -> None:
    assert "license: mit\n" in model_card(run[2], "mit")
    assert "license" not in model_card(run[2], None)


def test_nearest_and_one_held_out_window_still_make_a_valid_report(
    tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    """No steps to plot, and no standard error over one window: JSON has no NaN to say so with."""
    report = dq_runtime.quantize(
        str(tiny_model),
        tmp_path / "out",
        QuantSpec(rounding=RoundingSpec("nearest")),
        calibration=str(tiny_text),
        window_length=32,
        held_out_windows=1,
    )
    read = _json(tmp_path / "out" / "report.json")
    assert read == json.loads(json.dumps(report))
    assert set(read["held_out"]["kl"]) == {"nearest"}
    assert "nan" not in (tmp_path / "out" / "README.md").read_text()
    _png_size((tmp_path / "out" / "report.png").read_bytes())


def test_compare_against_values_computed_by_hand() -> None:
    """Two windows of three tokens over a vocabulary of two. The reference always says (3/4, 1/4), the candidate
    (1/2, 1/2) at even positions and the reference's own answer at odd ones; the last position predicts nothing."""
    windows = torch.tensor([[0, 0, 1], [1, 1, 1]])
    sure, even = torch.tensor([0.75, 0.25]).log(), torch.tensor([0.5, 0.5001]).log()

    def reference(tokens: Tensor) -> Tensor:
        return sure.expand(3, 2).clone()

    def candidate(tokens: Tensor) -> Tensor:
        return torch.stack([even, sure, torch.tensor([99.0, -99.0])])

    results = compare(windows, reference, {"rounded": candidate})
    one = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert results["reference"].kl == 0
    assert results["reference"].agreement == 1
    assert results["rounded"].kl == pytest.approx(one / 2, abs=1e-4)
    assert results["rounded"].kl_stderr == pytest.approx(0, abs=1e-6)
    assert results["rounded"].agreement == 0.5
    # Window 0 asks for tokens 0 and 1, window 1 for 1 and 1; perplexity is the exponential of the mean over windows.
    first = -(math.log(0.75) + math.log(0.25)) / 2
    assert results["reference"].perplexity == pytest.approx(math.exp((first - math.log(0.25)) / 2), rel=1e-6)
    second = -(math.log(0.5) + math.log(0.25)) / 2
    assert results["rounded"].perplexity == pytest.approx(math.exp(second), rel=1e-3)


def test_quality_s_standard_error_is_over_windows() -> None:
    quality = Quality([0.1, 0.3, 0.2, 0.4], [0.0] * 4, [1.0] * 4)
    assert quality.kl == pytest.approx(0.25)
    deviation = math.sqrt(sum((v - 0.25) ** 2 for v in (0.1, 0.3, 0.2, 0.4)) / 3)
    assert quality.kl_stderr == pytest.approx(deviation / 2)


def test_held_out_section_orders_reference_first() -> None:
    quality = Quality([0.1, 0.2], [1.0, 1.0], [0.5, 0.5])
    section = held_out_section({"reference": quality, "nearest": quality}, "text", [2, 8])
    assert list(section["perplexity"]) == ["reference", "nearest"]
    assert list(section["kl"]) == ["nearest"]
    assert (section["windows"], section["window_length"], section["source"]) == (2, 8, "text")


def test_progress_is_reported_once_a_window() -> None:
    seen = []
    logits = torch.zeros(3, 2)
    windows = torch.zeros(4, 3, dtype=torch.int64)
    compare(windows, lambda t: logits, {}, lambda step, total: seen.append((step, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
