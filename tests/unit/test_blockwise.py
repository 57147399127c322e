"""Rounding block by block from disk gives what rounding a model held whole gives, in less memory, and resumes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_model
from decoder_models import transformers_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dq_runtime
from dq_runtime.blockwise import BlockwiseRun
from dq_runtime.cli import main
from dq_runtime.errors import DQError, Interrupted, SpecError
from dq_runtime.modules import hidden_states
from dq_runtime.modules.hidden_states import HiddenStates
from dq_runtime.modules.streamed_model import StreamedStudent
from dq_runtime.spec import GridSpec, QuantSpec, RoundingSpec, Target

SIZES: dict[str, Any] = {"windows": 3, "window_length": 32, "held_out_windows": 2, "compute_dtype": "float32"}
Undisturbed = tuple[str, dict[str, torch.Tensor], list[Any]]
METHODS = {
    "nearest": RoundingSpec("nearest"),
    "gptq": RoundingSpec("gptq"),
    "autoround": RoundingSpec("autoround", {"iters": 4, "batch": 2}),
}


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as f:
            found |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    return found


def _same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def _sharded(source: Path, directory: Path) -> Path:
    """The same model in bfloat16, in several files."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(directory, max_shard_size="60KB")
    AutoTokenizer.from_pretrained(source).save_pretrained(directory)
    assert len(list(directory.glob("*.safetensors"))) > 3
    return directory


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 layers, grouped queries, biases, an untied head, bfloat16, in several files."""
    directory = tmp_path_factory.mktemp("models")
    changes = {"num_hidden_layers": 3, "tie_word_embeddings": False, "attention_bias": True}
    return _sharded(build_tiny_model(directory / "whole", **changes), directory / "sharded")


@pytest.mark.parametrize(
    ("method", "kind"), [("nearest", "tied"), ("gptq", "tied"), ("gptq", "untied"), ("autoround", "untied")]
)
def test_it_gives_what_a_model_held_whole_gives(
    method: str, kind: str, tiny_model: Path, untied: Path, tiny_text: Path, tmp_path: Path
) -> None:
    model = tiny_model if kind == "tied" else untied
    spec = QuantSpec(GridSpec(bits=3, symmetric=kind == "tied"), rounding=METHODS[method])
    reports = [
        dq_runtime.quantize(
            str(model), tmp_path / name, spec, calibration=str(tiny_text), blockwise=name == "blocks", **SIZES
        )
        for name in ("whole", "blocks")
    ]
    _same(_tensors(tmp_path / "blocks"), _tensors(tmp_path / "whole"))
    for file in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "blocks" / file).read_bytes()
    a, b = reports
    assert a["history"] == b["history"]
    for name in a["held_out"]["kl"]:
        assert b["held_out"]["kl"][name] == pytest.approx(a["held_out"]["kl"][name], rel=1e-3)
    assert b["held_out"]["perplexity"] == pytest.approx(a["held_out"]["perplexity"], rel=1e-3)
    for key in ("layers", "packed_bytes", "quantized_weights", "unquantized_parameters", "reference_bytes",
                "learned_scales", "moved_from_nearest"):  # fmt: skip
        assert a[key] == b[key], key
    assert sorted(p.name for p in tmp_path.iterdir()) == ["blocks", "whole"]
    dq_runtime.load(tmp_path / "blocks")
    json.dumps(b)


def _run(model: Path, text: Path, output: Path, method: str, **changes: Any) -> Any:
    spec = QuantSpec(GridSpec(bits=3), rounding=METHODS[method])
    settings = {"calibration": str(text), "blockwise": True, **SIZES, **changes}
    return dq_runtime.quantize(str(model), output, settings.pop("spec", spec), **settings)


@pytest.fixture(scope="module", params=["gptq", "autoround"])
def undisturbed(request: Any, untied: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """A method, what it gives when nobody disturbs it, and its history."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    report = _run(untied, tiny_text, output, request.param)
    return request.param, _tensors(output), report["history"]


def test_one_block_is_held_at_a_time(untied: Path, tiny_text: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Of the original, and of the checkpoint while it is measured: weights, and dense parameters."""
    most: dict[str, int] = {"layers": 0, "parameters": 0}
    students: list[StreamedStudent] = []
    made, loaded = StreamedStudent.__init__, StreamedStudent._load

    def make(self: Any, *arguments: Any) -> None:
        made(self, *arguments)
        students.append(self)

    def load(self: Any, part: Any) -> None:
        loaded(self, part)
        for student in students:
            held = [p for p in student.blocks if any(len(layer._lo) or layer.packed for layer in p.layers.values())]
            most["layers"] = max(most["layers"], len(held))
            real = sum(p.numel() for p in student.model.parameters() if not p.is_meta)
            most["parameters"] = max(most["parameters"], real)

    monkeypatch.setattr(StreamedStudent, "__init__", make)
    monkeypatch.setattr(StreamedStudent, "_load", load)
    _run(untied, tiny_text, tmp_path / "out", "gptq")
    assert len(students) == 2
    assert most["layers"] == 1
    embedding, norms = 300 * 64, 3 * 64
    assert most["parameters"] <= embedding + norms  # never the embedding and the untied head together


@pytest.mark.parametrize("undisturbed", ["gptq"], indirect=True)
def test_many_activations_lie_in_a_file(
    undisturbed: Undisturbed, untied: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, expected, _ = undisturbed
    monkeypatch.setattr(hidden_states, "IN_MEMORY", 0)
    _run(untied, tiny_text, tmp_path / "out", method)
    _same(_tensors(tmp_path / "out"), expected)


def test_a_disk_without_room_for_activations_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hidden_states, "IN_MEMORY", 0)
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(DQError, match=r"0\.0 GB of activations: No space left on device; free some space"):
        HiddenStates(2, torch.zeros(1, 4, 8), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_stopped_again_and_again_it_gives_the_same(
    undisturbed: Undisturbed,
    untied: Path,
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """gptq stops between two layers of a block as well, AutoRound between two blocks."""
    method, expected, history = undisturbed
    after = iter((1, 4, 5, 3, 1000))

    @contextmanager
    def interruptible() -> Iterator[Any]:
        asked = iter(range(next(after) - 1))
        yield lambda: next(asked, None) is None

    monkeypatch.setattr("dq_runtime.blockwise.interruptible", interruptible)
    said = []
    while not (tmp_path / "out").exists():
        try:
            report = _run(untied, tiny_text, tmp_path / "out", method, resume=True)
        except Interrupted as stop:
            said.append(str(stop))
    steps = {"gptq": (1, 5, 9, 12), "autoround": (7,)}[method]
    assert said == [f"stopped after step {n} of 21; run the same command with --resume to continue" for n in steps]
    _same(_tensors(tmp_path / "out"), expected)
    assert report["history"] == history
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_finished_blocks_are_not_rounded_again(
    untied: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while it measures what it wrote: nothing of that is left, every block is."""

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BlockwiseRun, "measure", killed)
        with pytest.raises(KeyboardInterrupt):
            _run(untied, tiny_text, tmp_path / "out", "gptq")
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]
    monkeypatch.setattr("dq_runtime.rounding.gptq.Gptq.round", None)  # rounding again would fail
    _run(untied, tiny_text, tmp_path / "out", "gptq", resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("undisturbed", ["autoround"], indirect=True)
def test_killed_in_the_middle_of_a_block_it_gives_the_same(
    undisturbed: Undisturbed, untied: Path, tiny_text: Path, tmp_path: Path
) -> None:
    sizes = ["--windows", "3", "--window-length", "32", "--held-out-windows", "2", "--compute-dtype", "float32"]
    method = ["--rounding", "autoround", "--set", "iters=4", "--set", "batch=2", "--bits", "3", "--blockwise"]
    command = ["quantize", str(untied), "-o", str(tmp_path / "out"), "--calibration", str(tiny_text), *sizes, *method]
    process = subprocess.Popen(
        [sys.executable, "-m", "dq_runtime", *command],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    first = tmp_path / "out.partial" / "blocks" / "block-00000.safetensors"
    while process.poll() is None and not first.exists():
        time.sleep(0.002)
    assert process.poll() is None, "the run ended before it could be killed"
    process.kill()
    process.communicate()
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]
    assert main([*command, "--resume"]) == 0
    _same(_tensors(tmp_path / "out"), undisturbed[1])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_resuming_it_the_other_way_is_refused(
    untied: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def interruptible() -> Iterator[Any]:
        yield lambda: True

    monkeypatch.setattr("dq_runtime.blockwise.interruptible", interruptible)
    with pytest.raises(Interrupted):
        _run(untied, tiny_text, tmp_path / "out", "gptq")
    with pytest.raises(SpecError, match=r"was made with a different .*--blockwise"):
        _run(untied, tiny_text, tmp_path / "out", "gptq", blockwise=False, resume=True)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"spec": QuantSpec(rounding=RoundingSpec("discquant"))}, "runs the whole model at every step.*autoround"),
        ({"spec": QuantSpec(rounding=RoundingSpec("yaqa"))}, "runs the whole model at every step"),
        ({"spec": QuantSpec(transform="hadamard", rounding=RoundingSpec("gptq"))}, "turns the whole model"),
        ({"spec": QuantSpec(target=Target(3.1), rounding=RoundingSpec("gptq"))}, "measures the whole model"),
        ({"calibration_select": "coreset"}, "runs the whole model"),
        ({"calibration": None}, "add --calibration TEXT"),
        ({"spec": QuantSpec(rounding=RoundingSpec("gptq"), ignore=())}, "lm_head is in none; leave it dense"),
    ],
    ids=["discquant", "yaqa", "transform", "target", "coreset", "no text", "head"],
)
def test_what_needs_the_whole_model_is_refused_in_one_sentence(
    changes: dict[str, Any], sentence: str, untied: Path, tiny_text: Path, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=sentence) as caught:
        _run(untied, tiny_text, tmp_path / "out", "gptq", **changes)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_not_safetensors_and_names_of_others_are_refused(
    tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(SpecError, match=r"reads safetensors, and .* is a file"):
        _run(file, tiny_text, tmp_path / "out", "gptq")
    other = shutil.copytree(tiny_model, tmp_path / "other")
    weights = {name.replace("q_proj", "query"): t for name, t in load_file(other / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        DQError, match=r"holds no model\.layers\.0\.self_attn\.q_proj\.weight: .* leave --blockwise out"
    ):
        _run(other, tiny_text, tmp_path / "out", "gptq")
    weights = load_file(tiny_model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DQError, match=r"model\.layers\.1\.mlp\.up_proj\.weight of the model holds NaN"):
        _run(other, tiny_text, tmp_path / "out", "gptq")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.gguf", "other"]


@pytest.mark.parametrize("kind", ["gemma3", "gpt2"])
def test_other_architectures(kind: str, tiny_model: Path, tiny_text: Path, tmp_path: Path) -> None:
    """Scaled embeddings, masks that differ from block to block, norms of heads and capped logits; learned positions and
    transposed linears, stored without the name that the model has before all of its own."""
    from transformers import AutoModelForCausalLM, GPT2Config

    vocabulary = {"vocab_size": 300, "max_position_embeddings": 128}
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=64, n_layer=2, n_head=4)
    config = config if kind == "gpt2" else transformers_config(kind, **vocabulary)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    source = tmp_path / "source"
    shutil.copytree(tiny_model, source, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    model.save_pretrained(source)
    if kind == "gpt2":
        weights = {n.removeprefix("transformer."): t for n, t in load_file(source / "model.safetensors").items()}
        save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    spec = QuantSpec(GridSpec(bits=3, group_size=32), rounding=METHODS["gptq"])
    whole = _run(source, tiny_text, tmp_path / "whole", "gptq", spec=spec, blockwise=False)
    blocks = _run(source, tiny_text, tmp_path / "blocks", "gptq", spec=spec)
    _same(_tensors(tmp_path / "blocks"), _tensors(tmp_path / "whole"))
    assert blocks["held_out"]["kl"]["gptq"] == pytest.approx(whole["held_out"]["kl"]["gptq"], rel=1e-3)
