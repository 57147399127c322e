"""Architectures other than the plain Llama: Conv1D, biases, an untied head, experts; and exceptions by layer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dq_runtime
from dq_runtime.errors import CheckpointError, SpecError
from dq_runtime.export.check import check
from dq_runtime.modules.quant_linear import QuantLinear
from dq_runtime.modules.surgery import is_conv1d, linears
from dq_runtime.packing.checkpoint import open_checkpoint
from dq_runtime.runtime.dense import load_dense
from dq_runtime.runtime.language_model import LeanModel
from dq_runtime.runtime.skeleton import load_through_transformers
from dq_runtime.runtime.transformers_model import TransformersModel
from dq_runtime.spec import GridSpec, Override, QuantSpec, RoundingSpec

TOKENS = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(0))

LLAMA = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def _build(directory: Path, config: Any) -> Path:
    """A random model of that configuration, its weights large enough for logits that differ, without a tokenizer."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter *= 6
                elif "bias" in name:
                    parameter.normal_(0, 0.3)
    model.save_pretrained(directory)
    return directory


def _llama(directory: Path, **changes: Any) -> Path:
    from transformers import LlamaConfig

    return _build(directory, LlamaConfig(**(LLAMA | {"tie_word_embeddings": False} | changes)))


def _quantize(model: Path, output: Path, **changes: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {"grid": GridSpec(group_size=32), "rounding": RoundingSpec("nearest")}
    report: dict[str, Any] = dq_runtime.quantize(
        str(model), output, QuantSpec(**(spec | changes)), windows=2, window_length=16, held_out_windows=1
    )
    return report


def _check_against_dense(source: Path, output: Path) -> None:
    """Our logits, loaded either way, are those of the original model with the decoded weights in place of its own."""
    dense = load_dense(str(source)).model
    packed = dict(open_checkpoint(output).packed())
    dtype = getattr(torch, json.loads((output / "config.json").read_text())["dtype"])
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.copy_(parameter.to(dtype).float())  # everything unquantized is stored in the serving dtype
        for name, w in packed.items():
            module = dense.get_submodule(name)
            decoded = w.decode()
            module.weight.copy_(decoded.t() if is_conv1d(module) else decoded)
        expected = dense(input_ids=TOKENS).logits
    skeleton = load_through_transformers(open_checkpoint(output), "cpu", torch.float32)
    served = [m for m in skeleton.model.modules() if isinstance(m, QuantLinear)]
    assert len(served) == len(packed)
    assert expected.std() > 0.1
    for loaded in (skeleton, dq_runtime.load(output, "cpu", exact=True)):
        torch.testing.assert_close(loaded.logits(TOKENS), expected, rtol=1e-4, atol=1e-4)


def test_gpt2_conv1d(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GPT2Config

    config = GPT2Config(vocab_size=96, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    source = _build(tmp_path / "gpt2", config)
    report = _quantize(source, tmp_path / "out")
    names = {row["name"]: (row["out_features"], row["in_features"]) for row in report["layers"]}
    assert names["transformer.h.0.attn.c_attn"] == (192, 64)
    assert names["transformer.h.1.mlp.c_proj"] == (64, 256)
    assert len(names) == 8
    _check_against_dense(source, tmp_path / "out")
    assert isinstance(dq_runtime.load(tmp_path / "out", "cpu"), TransformersModel)

    # compressed-tensors readers know no Conv1D: transformers would fill in random weights, so it must refuse.
    config_json = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config_json["quantization_config"]["quant_method"] == "dq"
    with pytest.raises(Exception, match=r"dq_gpt2|transposed linears"):  # as another test may have imported ours
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    import_module("dq_runtime.hf")
    with pytest.raises(CheckpointError, match=r"transposed linears run through dq_runtime\.load"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    checked = check(tmp_path / "out", "transformers")
    assert not checked.loads
    assert "export to dense" in checked.verdicts[0].change


def test_gpt2_rounded_by_discquant(tmp_path: Path) -> None:
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=96, n_positions=64, n_embd=64, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0)
    source = _build(tmp_path / "gpt2", config)
    report = _quantize(source, tmp_path / "out", rounding=RoundingSpec("discquant-paper", {"steps": 3}))
    assert all(row["moved"] > 0 for row in report["layers"])
    _check_against_dense(source, tmp_path / "out")


def test_qwen2_with_biases(tmp_path: Path) -> None:
    from transformers import Qwen2Config

    source = _build(tmp_path / "qwen2", Qwen2Config(**LLAMA, tie_word_embeddings=True))
    _quantize(source, tmp_path / "out", grid=GridSpec(bits=4, group_size=16, symmetric=False))
    biases = [n for n in open_checkpoint(tmp_path / "out").dense if n.endswith("_proj.bias")]
    assert len(biases) == 6
    loaded = load_through_transformers(open_checkpoint(tmp_path / "out"), "cpu", torch.float32).model
    assert loaded.get_submodule("model.layers.0.self_attn.q_proj").bias.abs().max() > 0.1
    _check_against_dense(source, tmp_path / "out")


def test_an_untied_head_stays_dense_unless_asked(tmp_path: Path) -> None:
    source = _llama(tmp_path / "llama")
    report = _quantize(source, tmp_path / "out")
    assert "lm_head" not in {row["name"] for row in report["layers"]}
    assert "lm_head.weight" in open_checkpoint(tmp_path / "out").dense
    assert isinstance(dq_runtime.load(tmp_path / "out", "cpu"), LeanModel)
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignored == ["lm_head"]
    _check_against_dense(source, tmp_path / "out")

    report = _quantize(source, tmp_path / "all", ignore=())
    assert "lm_head" in {row["name"] for row in report["layers"]}
    assert "lm_head.weight_packed" not in open_checkpoint(tmp_path / "all").dense
    _check_against_dense(source, tmp_path / "all")


def test_a_tied_head_is_never_quantized(tmp_path: Path) -> None:
    source = _llama(tmp_path / "llama", tie_word_embeddings=True)
    report = _quantize(source, tmp_path / "out", ignore=())
    assert "lm_head" not in {row["name"] for row in report["layers"]}
    assert "lm_head.weight" not in open_checkpoint(tmp_path / "out").dense
    _check_against_dense(source, tmp_path / "out")


def test_float16_scales(tmp_path: Path) -> None:
    source = _llama(tmp_path / "llama")
    _quantize(source, tmp_path / "out", grid=GridSpec(group_size=32, scale_dtype="float16"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    assert {w.scale.dtype for _, w in open_checkpoint(tmp_path / "out").packed()} == {torch.float16}
    _check_against_dense(source, tmp_path / "out")


def test_weights_too_large_for_float16_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = _llama(tmp_path / "llama")
    weights = load_file(source / "model.safetensors")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        changed = weights | {name: weights[name] * 1e7}
        save_file(changed, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(SpecError, match=r"use scale.dtype bfloat16"):
            _quantize(source, tmp_path / "out", grid=GridSpec(group_size=32, scale_dtype="float16"))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["llama"]


def test_overrides_by_pattern(tmp_path: Path) -> None:
    source = _llama(tmp_path / "llama")
    overrides = (Override("model.layers.0.*", 8), Override("*.down_proj", 4, 128), Override("*.o_proj", 0))
    report = _quantize(source, tmp_path / "out", overrides=overrides)
    made = {row["name"]: (row["bits"], row["group_size"]) for row in report["layers"]}
    assert made["model.layers.0.self_attn.q_proj"] == (8, 32)
    assert made["model.layers.1.self_attn.q_proj"] == (3, 32)
    assert made["model.layers.0.mlp.down_proj"] == (4, 128)
    assert not any(name.endswith("o_proj") for name in made)
    assert "model.layers.0.self_attn.o_proj.weight" in open_checkpoint(tmp_path / "out").dense
    _check_against_dense(source, tmp_path / "out")


def test_transformers_reads_mixed_widths_to_the_same_logits(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = _llama(tmp_path / "llama")
    overrides = (Override("model.layers.0.*", 8), Override("*.down_proj", 4, 128), Override("*.o_proj", 0))
    _quantize(source, tmp_path / "out", overrides=overrides)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(input_ids=TOKENS).logits
    logits = dq_runtime.load(tmp_path / "out", "cpu", exact=True).logits(TOKENS)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overrides": (Override("*.no_such", 4),)}, r"override pattern '\*\.no_such' matches no layer"),
        ({"overrides": (Override("lm_head", 8),)}, r"override pattern 'lm_head' matches"),
        ({"overrides": (Override("*", 0),)}, "no linear layer is left to quantize"),
        ({"ignore": ("*",)}, "no linear layer is left to quantize"),
        ({"overrides": (Override("*.down_proj", 4, 64),), "grid": GridSpec(group_size=128)}, "q_proj: in_features 64"),
    ],
    ids=["matches nothing", "only what is ignored", "all dense", "all ignored", "group does not fit"],
)
def test_overrides_that_cannot_be_meant(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    source = _llama(tmp_path / "llama")
    with pytest.raises(SpecError, match=message) as caught:
        _quantize(source, tmp_path / "out", **changes)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama"]


def _mixtral() -> Any:
    from transformers import MixtralConfig

    return MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False)


def _qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        **LLAMA,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        decoder_sparse_step=1,
        tie_word_embeddings=False,
    )


@pytest.mark.parametrize("config", [_mixtral, _qwen3_moe], ids=["mixtral", "qwen3-moe"])
def test_experts_that_are_no_linears_stay_dense_and_the_rest_is_packed(
    tmp_path: Path, config: Callable[[], Any]
) -> None:
    source = _build(tmp_path / "moe", config())
    report = _quantize(source, tmp_path / "out")
    names = {row["name"] for row in report["layers"]}
    assert {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj"} <= names
    assert names <= set(linears(load_dense(str(source)).model))
    _check_against_dense(source, tmp_path / "out")


@pytest.mark.parametrize("rule", ["absmax", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_layer_of_zeros_and_one_of_constants(tmp_path: Path, rule: str, symmetric: bool) -> None:
    from safetensors.torch import load_file, save_file

    source = _llama(tmp_path / "llama")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"].zero_()
    weights["model.layers.1.mlp.up_proj.weight"].fill_(0.5)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    grid = GridSpec(group_size=32, scale=rule, symmetric=symmetric)
    _quantize(source, tmp_path / "out", grid=grid, rounding=RoundingSpec("discquant-paper", {"steps": 2}))
    packed: dict[str, Tensor] = {n: w.decode() for n, w in open_checkpoint(tmp_path / "out").packed()}
    assert not packed["model.layers.0.mlp.up_proj"].any()
    assert bool(torch.isfinite(packed["model.layers.1.mlp.up_proj"]).all())
    _check_against_dense(source, tmp_path / "out")


def test_licence_and_generation_config_travel(tmp_path: Path) -> None:
    source = _llama(tmp_path / "llama")
    (source / "LICENSE.txt").write_text("as is")
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    settings = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [0, 5], "temperature": 0.5}))
    _quantize(source, tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "as is"
    assert "license: apache-2.0" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [0, 5]
    assert dq_runtime.load(tmp_path / "out", "cpu").end_tokens() == {0, 5}
    shutil.rmtree(source)
    dq_runtime.load(tmp_path / "out", "cpu")  # needs nothing of where it came from
