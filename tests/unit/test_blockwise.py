"""Rounding block by block from disk gives what rounding a model held whole gives, in less memory, and resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_model
from safetensors import safe_open

import dq_runtime
from dq_runtime.spec import GridSpec, QuantSpec, RoundingSpec

SIZES: dict[str, Any] = {"windows": 3, "window_length": 32, "held_out_windows": 2, "compute_dtype": "float32"}
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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["tied", "untied"])
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
    whole, blocks = (_tensors(tmp_path / name) for name in ("whole", "blocks"))
    assert whole.keys() == blocks.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, blocks[name]), name
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
