"""dq eval: figures against the definition, paired intervals, refusals."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from packed_checkpoints import pack_model

from dq_runtime.cli import main
from dq_runtime.data import pack_windows
from dq_runtime.data.documents import read_documents
from dq_runtime.errors import DQError
from dq_runtime.evaluate.intervals import paired_ci95
from dq_runtime.export.run import export
from dq_runtime.runtime.dense import load_dense
from dq_runtime.runtime.load import load
from dq_runtime.scores import Measurement, score
from dq_runtime.spec import GridSpec, QuantSpec


@pytest.fixture(scope="module")
def pair(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The tiny model at 3 and at 8 bits."""
    folder = tmp_path_factory.mktemp("pair")
    return tuple(  # type: ignore[return-value]
        str(pack_model(tiny_model, folder / f"{bits}", QuantSpec(GridSpec(bits=bits, group_size=64))))
        for bits in (3, 8)
    )


def test_scores_are_what_their_definitions_say(pair: tuple[str, str], tiny_model: Path, tiny_text: Path) -> None:
    low, high = score(pair, str(tiny_model), Measurement(str(tiny_text), 3, 32), "cpu")
    original = load_dense(str(tiny_model))
    windows = pack_windows(read_documents(str(tiny_text)), original.tokenizer, 3, 32, 0, "text").tokens
    nll: dict[str, list[float]] = {}
    for path, figures in zip(pair, (low, high), strict=True):
        model = load(path, "cpu", torch.float32, exact=True)
        kls, losses = [], []
        for ids in windows:
            p = original.logits(ids[None])[0, :-1].double().log_softmax(-1)
            q = torch.as_tensor(model.logits(ids[None]))[0, :-1].double().log_softmax(-1)
            kls.append((p.exp() * (p - q)).sum(-1).mean().item())
            losses.append(-q.gather(1, ids[1:, None]).mean().item())
        nll[path] = losses
        assert figures.kl == pytest.approx(sum(kls) / 3, rel=1e-3)
        assert figures.perplexity == pytest.approx(torch.tensor(losses).mean().exp().item(), rel=1e-4)
        assert figures.kl_ci95 is not None
        assert figures.kl_ci95[0] < figures.kl < figures.kl_ci95[1]
    assert high.kl < 0.1 * low.kl
    assert low.beside[0] == 0.0
    wanted = paired_ci95(nll[pair[1]], nll[pair[0]])
    assert wanted is not None
    assert high.beside[1] == pytest.approx(wanted, rel=1e-3, abs=1e-5)


def test_without_a_reference_the_first_checkpoint_is_it(pair: tuple[str, str], tiny_text: Path) -> None:
    first, second = score(pair, None, Measurement(str(tiny_text), 2, 32), "cpu")
    assert first.kl == pytest.approx(0, abs=1e-6)
    assert first.top1 == 1.0
    assert second.kl > 0.01


def test_the_command(pair: tuple[str, str], tiny_text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", *pair, "--text", str(tiny_text), "--windows", "2", "--window-length", "32", "--device", "cpu"]
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [s["path"] for s in printed] == list(pair)
    assert main(arguments) == 0
    assert "top-1 agreement" in capsys.readouterr().out


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_tasks_run_on_the_packed_model(pair: tuple[str, str], tiny_text: Path, tmp_path: Path) -> None:
    items = [{"query": f"Question: is {i} even?", "choices": ["yes", "no"], "gold": i % 2} for i in range(4)]
    (tmp_path / "parity.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    measurement = Measurement(str(tiny_text), 2, 32, tasks=("parity",), tasks_data=tmp_path, task_items=4)
    (result,) = score(pair[:1], None, measurement, "cpu")
    accuracy, interval = result.tasks["parity"]
    assert accuracy in (0.0, 0.25, 0.5, 0.75, 1.0)
    assert interval is not None


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_a_table_checkpoint_is_measured_packed_and_as_its_dense_export_is(
    tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    path = pack_model(tiny_model, tmp_path / "nf4", QuantSpec(GridSpec.named("nf4", group_size=64)))
    export(path, "dense", tmp_path / "dense")
    items = [{"query": f"Question: is {i} even?", "choices": ["yes", "no"], "gold": i % 2} for i in range(4)]
    (tmp_path / "parity.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    measurement = Measurement(str(tiny_text), 2, 32, tasks=("parity",), tasks_data=tmp_path, task_items=4)
    table, dense = score([str(path), str(tmp_path / "dense")], str(tiny_model), measurement, "cpu")
    assert table.kl > 0.01
    assert table.kl == pytest.approx(dense.kl, rel=1e-3)
    assert table.perplexity == pytest.approx(dense.perplexity, rel=1e-3)
    assert table.tasks == dense.tasks


def test_bad_requests_are_refused_in_one_sentence(
    pair: tuple[str, str], tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    cases = [
        ((pair[0], pair[0]), Measurement(str(tiny_text)), "given twice"),
        (pair, Measurement(str(tiny_text), 0), "at least 1 window"),
        (pair, Measurement(str(tmp_path / "no.txt")), "is not a file"),
        (pair, Measurement(str(tiny_text), tasks=("piqa",)), "--tasks-data"),
        ((str(tmp_path / "nowhere"),), Measurement(str(tiny_text)), "nowhere"),
    ]
    for paths, measurement, message in cases:
        with pytest.raises(DQError, match=message):
            score(paths, None, measurement, "cpu")
