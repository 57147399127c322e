"""docs/theory.md shows what is in benchmarks/results/theory_*.json, and the experiments measure what they say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from dq_runtime.errors import DataError

ROOT = Path(__file__).parents[2]
FIGURES = ("toy", "gradients", "first_order", "loss_choice", "coreset", "task_data")


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def script(figure: str) -> ModuleType:
    return importlib.import_module(f"theory_{figure}")


@pytest.mark.parametrize("figure", FIGURES)
def test_the_page_shows_the_committed_result(figure: str) -> None:
    page = (ROOT / "docs" / "theory.md").read_text()
    file = ROOT / "benchmarks" / "results" / f"theory_{figure}.json"
    if not file.exists():
        assert f"<!-- {figure} -->\nNo result yet.\n<!-- end -->" in page
        return
    found: dict[str, Any] = json.loads(file.read_text())
    lines = "\n".join(script("common").block(figure, found, script(figure).table))
    assert f"<!-- {figure} -->\n{lines}\n<!-- end -->" in page
    assert (ROOT / "docs" / "theory" / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    for name in ("device", "versions", "date", "command", "question"):
        assert found[name]
    assert script(figure).draw(found).axes, "a picture is drawn from the file alone"


def test_a_table_goes_where_the_page_wants_it() -> None:
    common = script("common")
    page = "a\n<!-- x -->\nold\n<!-- end -->\nb\n<!-- y -->\n<!-- end -->\n"
    now = common.with_figure(page, "x", common.rows_of(["h"], [[1]]))
    assert now == page.replace("old\n", "| h |\n| --- |\n| 1 |\n")
    with pytest.raises(DataError, match="table of z"):
        common.with_figure(page, "z", [])


def test_a_finished_part_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = script("common")
    monkeypatch.setattr(common, "BUILD", tmp_path)
    parts, calls = common.Parts("figure"), []

    def compute() -> list[float]:
        calls.append(1)
        return [1.5]

    assert [common.Parts("figure").get("a part", {"n": n}, compute) for n in (1, 1, 2)] == [[1.5]] * 3
    assert len(calls) == 2, "other settings are another part"

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        parts.get("a part", {"n": 3}, interrupted)
    assert parts.get("a part", {"n": 3}, compute) == [1.5]


def test_spectra_are_those_of_the_whole_covariance(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = script("gradients")
    monkeypatch.setattr(gradients, "COLUMNS", 256)
    rows = np.random.default_rng(0).standard_normal((12, 40)).astype(np.float32)
    whole = np.linalg.eigvalsh(rows.T.astype(np.float64) @ rows / 12)[::-1][:12]
    np.testing.assert_allclose(gradients.spectrum(rows), whole, rtol=1e-5, atol=1e-8)
    wide = np.random.default_rng(1).standard_normal((4, 600)).astype(np.float32)
    products, kept = wide @ wide.T, (p := gradients.projected(wide, 0)) @ p.T
    scale = np.sqrt(np.outer(np.diagonal(products), np.diagonal(products)))
    # Each product is a mean of 2048 terms whose standard deviation is at most sqrt(2) of the two lengths.
    assert (np.abs(kept - products) / scale < 6 * np.sqrt(2 / gradients.PROJECTED)).all()
    assert gradients.exponent([k**-1.3 for k in range(1, 65)]) == pytest.approx(1.3)


@pytest.fixture
def lab(tiny_model: Path) -> Any:
    windows = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(0))
    return script("rounding").Lab(str(tiny_model), 3, windows, script("loss_choice").MixedLoss)


def test_slopes_are_derivatives_of_the_loss(lab: Any) -> None:
    """<g, dW> against a central difference of the loss along dW, in float32: its rounding of 1e-6 over a step of
    1e-2 and its cubic term of 1e-4 of the change."""
    first = script("first_order")
    packed = lab.round("nearest", 0)
    change = first.differences(lab, packed)
    slopes = first.Slopes(lab, {"nearest": change})
    windows = torch.randint(0, 250, (3, 24), generator=torch.Generator().manual_seed(1))
    found = [slopes.of(window)["nearest"] for window in windows]

    def loss(window: torch.Tensor, t: float) -> float:
        for name, layer in lab.layers.items():
            layer.mode = script("first_order").Mode.CANDIDATE
            layer.candidate = lambda name=name, layer=layer: layer.weight() + t * change[name]()
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(lab.student.logits(window)[:-1], window[1:]).item()

    for window, slope in zip(windows, found, strict=True):
        difference = (loss(window, 0.01) - loss(window, -0.01)) / 0.02
        assert slope == pytest.approx(difference, abs=2e-3, rel=1e-2)
    table = slopes.table()
    assert table["mean_of_squares"] > 0
    assert table["square_of_mean"] < table["mean_of_squares"]
    codes = first.unpack_codes(packed["model.layers.0.mlp.up_proj"].packed, 3, 64)
    layer = lab.layers["model.layers.0.mlp.up_proj"]
    torch.testing.assert_close(
        change["model.layers.0.mlp.up_proj"](), layer.grid.decode(codes, layer.scales) - layer.weight()
    )


def test_a_mixture_of_losses_is_their_sum(lab: Any) -> None:
    student = lab.student
    student.begin()
    with torch.no_grad():
        for number, layer in enumerate(lab.layers.values()):
            generator = torch.Generator().manual_seed(number)
            layer.x.copy_(torch.rand(layer.x.shape, generator=generator) * layer.free)

    def run(weights: tuple[float, float, float]) -> tuple[float, list[torch.Tensor]]:
        student.weights = weights
        loss = student.kl_backward(0).item()
        gradients = []
        for layer in lab.layers.values():
            gradients.append(layer.x.grad.clone())
            layer.x.grad = None
        return loss, gradients

    singles = [run((1.0, 0.0, 0.0)), run((0.0, 1.0, 0.0)), run((0.0, 0.0, 1.0))]
    loss, gradients = run((0.5, 0.25, 2.0))
    assert loss == pytest.approx(0.5 * singles[0][0] + 0.25 * singles[1][0] + 2 * singles[2][0], rel=1e-5)
    for mixed, kl, ce, mse in zip(gradients, *(g for _, g in singles), strict=True):
        torch.testing.assert_close(mixed, 0.5 * kl + 0.25 * ce + 2 * mse, rtol=1e-3, atol=1e-5)
    plain = super(type(student), student).kl_backward(0).item()
    assert plain == pytest.approx(singles[0][0], rel=1e-5)


def test_gsm8k_is_read_or_asked_for(tmp_path: Path) -> None:
    task = script("task_data")
    with pytest.raises(DataError, match="grade_school_math"):
        task.problems(None, "train")
    with pytest.raises(DataError, match="grade_school_math"):
        task.problems(tmp_path, "train")
    row = {"question": "How many?", "answer": "48/2 = <<48/2=24>>24 clips.\n#### 24"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    assert task.problems(tmp_path, "train") == ["Question: How many?\nAnswer: 48/2 = 24 clips.\n#### 24"]


def test_choices_of_equal_size_are_compared() -> None:
    coreset = script("coreset")
    assert coreset.sizes(512) == [8, 16, 32, 64, 128, 256]
    kernel = np.eye(40)
    for how in ("random", "coreset"):
        chosen = coreset.choose(kernel, how, 10, 3)
        assert len(set(chosen.tolist())) == 10


def test_the_toy_knows_what_is_left_of_the_variance() -> None:
    toy = script("toy")
    assert toy.known_eigenvectors(0.0, 256) == pytest.approx(2 * (1 - 256 / toy.N))
    assert toy.known_eigenvectors(2.0, 64) < toy.known_eigenvectors(1.5, 64) < 1
