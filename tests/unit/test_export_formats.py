"""Each export against an independent reader of its format, weight by weight and, where it is an engine, by logits.

The readers are the gguf library's dequantizer, MLX, ONNX Runtime and compressed-tensors in transformers; GPTQ stands in
test_export_gptq.py. llama.cpp itself takes minutes to build: benchmarks/interop.py runs it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_tiny_model
from packed_checkpoints import pack_model
from safetensors.torch import load_file
from torch import Tensor

from dq_runtime.cli import main
from dq_runtime.errors import DQError, SpecError
from dq_runtime.export import EXPORTERS
from dq_runtime.export.run import export
from dq_runtime.packing.checkpoint import open_checkpoint
from dq_runtime.runtime.load import load
from dq_runtime.spec import GridSpec, Override, QuantSpec

TOKENS = torch.arange(5, 45).view(1, -1)
Pack = Callable[..., Path]


@pytest.fixture(scope="module")
def pack(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """The tiny model on a grid, once per grid: bits, group size, symmetric, and what else a GridSpec takes."""
    made: dict[str, Path] = {}

    def once(bits: int, group: int, symmetric: bool = True, overrides: tuple[str, ...] = (), **more: Any) -> Path:
        key = repr((bits, group, symmetric, overrides, more))
        if key not in made:
            grid = GridSpec(bits=bits, group_size=group, symmetric=symmetric, **more)
            spec = QuantSpec(grid, overrides=tuple(Override.parse(o) for o in overrides))
            made[key] = pack_model(tiny_model, tmp_path_factory.mktemp("packed") / "tiny", spec)
        return made[key]

    return once


@pytest.fixture(autouse=True)
def _gguf_is_here(request: pytest.FixtureRequest) -> None:
    """The export itself needs the gguf package, not only its reader."""
    if request.node.name.startswith("test_gguf"):
        pytest.importorskip("gguf")


def our_logits(path: Path) -> Tensor:
    return load(path, "cpu", torch.float32, exact=True).logits(TOKENS)[0]


def decoded(path: Path) -> dict[str, Tensor]:
    return {name: w.decode() for name, w in open_checkpoint(path).packed()}


# --- gguf -----------------------------------------------------------------------------------------------------------


def gguf_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str], Any]:
    """(dequantized by the gguf library, type of each, the reader)."""
    import gguf

    (file,) = path.glob("*.gguf")
    reader = gguf.GGUFReader(file)
    values = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    return values, {t.name: t.tensor_type.name for t in reader.tensors}, reader


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of a rotated projection in llama.cpp's order: the two halves of a head become pairs."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "kinds"),
    [
        (4, 32, True, {"Q4_0"}),
        (2, 64, True, {"Q4_0"}),
        (3, 64, True, {"Q4_0"}),
        (8, 32, True, {"Q8_0"}),
        (6, 64, True, {"Q8_0"}),
        (4, 64, False, {"Q4_1", "Q8_0"}),
    ],
)
def test_gguf_blocks_dequantize_to_our_weights(
    bits: int, group: int, symmetric: bool, kinds: set[str], pack: Pack, tmp_path: Path
) -> None:
    source = pack(bits, group, symmetric)
    result = export(source, "gguf", tmp_path / "out")
    values, types, _ = gguf_tensors(tmp_path / "out")
    wanted = decoded(source)
    assert result.layers == len(wanted) == 14
    for layer in range(2):
        for ours, theirs in (
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("mlp.down_proj", "ffn_down"),
        ):
            name = f"blk.{layer}.{theirs}.weight"
            weight = wanted[f"model.layers.{layer}.{ours}"]
            if theirs != "ffn_down":
                weight = interleaved(weight, 4 if theirs == "attn_q" else 2)
            assert torch.equal(values[name], weight), name
            assert types[name] in kinds
    dense = dict(open_checkpoint(source).read(["model.embed_tokens.weight", "model.norm.weight"]))
    assert torch.equal(values["token_embd.weight"].float(), dense["model.embed_tokens.weight"].float())
    assert torch.equal(values["output_norm.weight"], dense["model.norm.weight"].float())
    assert types["output_norm.weight"] == "F32"


def test_gguf_in_float32_holds_the_same_values(pack: Pack, tmp_path: Path) -> None:
    source = pack(4, 16, False)  # a grid that no block type holds
    export(source, "gguf", tmp_path / "out", {"weights": "float32"})
    values, types, _ = gguf_tensors(tmp_path / "out")
    wanted = decoded(source)["model.layers.1.self_attn.k_proj"]
    assert types["blk.1.attn_k.weight"] == "F32"
    assert torch.equal(values["blk.1.attn_k.weight"], interleaved(wanted, 2))


def test_gguf_carries_the_tokenizer_and_the_chat_template(pack: Pack, tmp_path: Path) -> None:
    source = pack(4, 32)
    export(source, "gguf", tmp_path / "out")
    _, _, reader = gguf_tensors(tmp_path / "out")
    fields = {
        name: field.contents() for name, field in reader.fields.items() if name.startswith(("tokenizer", "llama"))
    }
    described = json.loads((source / "tokenizer.json").read_text())
    tokens = fields["tokenizer.ggml.tokens"]
    assert {text: i for i, text in enumerate(tokens)} == described["model"]["vocab"]
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert [m.split(" ") for m in fields["tokenizer.ggml.merges"]] == [
        m.split(" ") if isinstance(m, str) else m for m in described["model"]["merges"]
    ]
    assert tokens[fields["tokenizer.ggml.eos_token_id"]] == "<|endoftext|>"
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == (source / "chat_template.jinja").read_text()
    kinds = fields["tokenizer.ggml.token_type"]
    assert kinds[tokens.index("<|user|>")] == 3, "a control token"
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.rope.freq_base"] == 10000.0


def test_gguf_refuses_what_it_would_have_to_round(pack: Pack, tmp_path: Path) -> None:
    cases = {
        r"groups of 16; quantize with --group-size 32, 64 or 128": pack(4, 16),
        r"no 8-bit type with zero points.*--bits 7": pack(8, 32, False),
    }
    for message, source in cases.items():
        with pytest.raises(SpecError, match=message):
            export(source, "gguf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == [], "nothing is left of a refused export"


def test_gguf_refuses_a_tokenizer_that_llama_cpp_has_no_name_for(pack: Pack, tmp_path: Path) -> None:
    import shutil

    source = tmp_path / "model"
    shutil.copytree(pack(4, 32), source)
    (source / "SHA256SUMS").unlink()
    described = json.loads((source / "tokenizer.json").read_text())
    described["pre_tokenizer"] = {"type": "Whitespace"}
    (source / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(SpecError, match=r"no known name in llama\.cpp \(Whitespace\)"):
        export(source, "gguf", tmp_path / "out")


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_gguf_of_architectures_without_reordered_rows(model_type: str, tmp_path: Path) -> None:
    import transformers

    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}
    name = {"qwen2": "Qwen2", "qwen3": "Qwen3"}[model_type]
    config = getattr(transformers, f"{name}Config")(**sizes, **heads)
    dense = build_tiny_model(tmp_path / "llama", vocab_size=300)  # for its tokenizer
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(dense)
    source = pack_model(dense, tmp_path / "packed", QuantSpec(GridSpec(bits=4, group_size=32)))
    export(source, "gguf", tmp_path / "out")
    values, _, reader = gguf_tensors(tmp_path / "out")
    assert torch.equal(values["blk.0.attn_q.weight"], decoded(source)["model.layers.0.self_attn.q_proj"])
    assert reader.fields["general.architecture"].contents() == model_type
    extra = "blk.0.attn_q.bias" if model_type == "qwen2" else "blk.0.attn_q_norm.weight"
    assert values[extra].shape[0] in (16, 64)


def test_gguf_says_how_llama_3_stretches_its_rotation(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    scaling = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    dense = build_tiny_model(tmp_path / "dense", num_hidden_layers=1, rope_parameters=scaling)
    source = pack_model(dense, tmp_path / "packed", QuantSpec(GridSpec(bits=4, group_size=32)))
    export(source, "gguf", tmp_path / "out")
    values, _, _ = gguf_tensors(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(dense).model.rotary_emb.inv_freq
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(plain / values["rope_freqs.weight"], theirs, rtol=1e-5, atol=0)
    assert values["rope_freqs.weight"].max() == 8


# --- mlx ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"),
    [(b, 64, True) for b in (2, 3, 4, 5, 6, 7, 8)] + [(4, 32, False), (3, 64, False), (8, 32, False), (4, -1, True)],
)
def test_mlx_dequantizes_and_multiplies_to_our_weights(
    bits: int, group: int, symmetric: bool, pack: Pack, tmp_path: Path
) -> None:
    mx = pytest.importorskip("mlx.core")
    source = pack(bits, group, symmetric)
    export(source, "mlx", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    stored = mx.load(str(tmp_path / "out" / "model.safetensors"))
    for name, wanted in decoded(source).items():
        grid = {"group_size": config["quantization"]["group_size"], "bits": config["quantization"]["bits"]}
        grid = config["quantization"].get(name, grid)
        weight, scales, biases = (stored[f"{name}.{part}"] for part in ("weight", "scales", "biases"))
        values = mx.dequantize(weight, scales.astype(mx.float32), biases.astype(mx.float32), **grid)
        assert torch.equal(torch.from_numpy(np.array(values)), wanted), name
        x = torch.randn(3, wanted.shape[1], generator=torch.Generator().manual_seed(0))
        y = mx.quantized_matmul(mx.array(x.numpy()), weight, scales, biases, transpose=True, **grid)
        y = torch.from_numpy(np.array(y.astype(mx.float32)))
        bound = x.abs() @ wanted.abs().T * wanted.shape[1] * 2.0**-24 * 4  # scale * code + bias is rounded too
        bound += x.abs().sum(1, keepdim=True) * biases.abs().max().item() * 2.0**-22
        assert ((y - x @ wanted.T).abs() <= bound).all(), name


@pytest.mark.parametrize("kind", ["default", "llama3"])
def test_readers_of_older_configs_find_the_rotation(kind: str, tmp_path: Path) -> None:
    """mlx-lm reads rope_theta and rope_scaling, transformers 5 writes rope_parameters; nobody may read another."""
    rope = {"rope_type": kind, "rope_theta": 500.0}
    if kind == "llama3":
        rope |= {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    dense = build_tiny_model(tmp_path / "original", num_hidden_layers=1, rope_parameters=rope)
    source = pack_model(dense, tmp_path / "packed", QuantSpec(GridSpec(bits=4, group_size=64)))
    for form in ("mlx", "gptq", "compressed-tensors", "dense"):
        export(source, form, tmp_path / form)
        config = json.loads((tmp_path / form / "config.json").read_text())
        assert config["rope_theta"] == 500.0
        assert (config["rope_scaling"] or {"rope_type": "default"})["rope_type"] == kind
    for form in ("compressed-tensors", "dense"):
        torch.testing.assert_close(their_logits(tmp_path / form), our_logits(source), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(their_logits(source), our_logits(source), rtol=1e-4, atol=1e-4)


def test_mlx_gives_every_layer_its_own_grid(pack: Pack, tmp_path: Path) -> None:
    source = pack(4, 64, overrides=("*layers.0.*=8:32", "*.o_proj=dense"))
    export(source, "mlx", tmp_path / "out")
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert {"group_size": 64, "bits": 4, "mode": "affine"}.items() <= quantization.items() or quantization["bits"] == 8
    differing = {name for name in quantization if name.startswith("model.")}
    assert differing in (
        {n for n in open_checkpoint(source).layers if ".0." in n},
        {n for n in open_checkpoint(source).layers if ".1." in n},
    )
    with pytest.raises(SpecError, match=r"mlx cannot hold .*--group-size 32 or 64 or 128"):
        export(pack(4, 16), "mlx", tmp_path / "other")


# --- onnx -----------------------------------------------------------------------------------------------------------


def test_onnxruntime_computes_our_logits(pack: Pack, tmp_path: Path) -> None:
    """One export for all widths, because building a graph takes 5 s on an idle core; benchmarks/interop.py has more."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxruntime_genai")
    source = pack(4, 32, overrides=("*.down_proj=8:64", "*.o_proj=3:32"))
    result = export(source, "onnx", tmp_path / "out", {"accuracy_level": 1})
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    feeds: dict[str, Any] = {"input_ids": TOKENS.numpy(), "attention_mask": np.ones(TOKENS.shape, np.int64)}
    for wanted in session.get_inputs():
        if wanted.name.startswith("past"):
            feeds[wanted.name] = np.zeros((1, 2, 0, 16), np.float32)
    logits = torch.from_numpy(session.run(["logits"], feeds)[0])[0]
    torch.testing.assert_close(logits, our_logits(source), rtol=1e-4, atol=1e-4)
    assert "2 layers take the next width that MatMulNBits has (4 or 8 bits)" in result.notes
    assert not (tmp_path / "out" / ".gptq").exists()
    assert (tmp_path / "out" / "genai_config.json").exists()


# --- dense and compressed-tensors -----------------------------------------------------------------------------------


def their_logits(path: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        logits: Tensor = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(input_ids=TOKENS).logits[0]
    return logits


def test_dense_float32_is_exact_and_16_bits_say_that_they_round(pack: Pack, tmp_path: Path) -> None:
    source = pack(3, 64, False)
    exact = export(source, "dense", tmp_path / "f32")
    stored = load_file(tmp_path / "f32" / "model.safetensors")
    for name, wanted in decoded(source).items():
        assert torch.equal(stored[f"{name}.weight"], wanted)
    assert exact.notes == ("every value is exact in float32",)
    torch.testing.assert_close(their_logits(tmp_path / "f32"), our_logits(source), rtol=1e-4, atol=1e-4)
    rounded = export(source, "dense", tmp_path / "bf16", {"dtype": "bfloat16"})
    assert "rounded to bfloat16, as asked" in rounded.notes[0]


def test_fused_layers_come_to_share_one_scheme_without_a_changed_weight(pack: Pack, tmp_path: Path) -> None:
    overrides = ("*.q_proj=3:64", "*.k_proj=5:32", "*.1.mlp.up_proj=8:16", "*.o_proj=2:row")
    source = pack(4, 64, overrides=overrides)
    result = export(source, "compressed-tensors", tmp_path / "out", {"tensor_parallel": 2})
    made = open_checkpoint(tmp_path / "out")
    for name, wanted in decoded(source).items():
        assert torch.equal(decoded(tmp_path / "out")[name], wanted), name
    for layer in range(2):
        block = f"model.layers.{layer}"
        schemes = {made.layers[f"{block}.self_attn.{p}_proj"] for p in "qkv"}
        assert len(schemes) == 1
        assert schemes.pop().bits == 5
        assert made.layers[f"{block}.mlp.gate_proj"] == made.layers[f"{block}.mlp.up_proj"]
        assert made.layers[f"{block}.self_attn.o_proj"].group_size == 32, "64 inputs over 2 ranks"
    assert any("to share a scheme" in note for note in result.notes)
    torch.testing.assert_close(their_logits(tmp_path / "out"), our_logits(source), rtol=1e-4, atol=1e-4)


def test_the_serving_dtype_changes_exactly_or_not_at_all(tmp_path: Path, pack: Pack) -> None:
    source = pack(4, 64, overrides=("*.mlp.*=dense", "*_proj=4:64"))
    export(source, "compressed-tensors", tmp_path / "same")
    assert {w.scale.dtype for _, w in open_checkpoint(tmp_path / "same").packed()} == {torch.bfloat16}
    halves = pack(4, 64, scale_dtype="float16")
    with pytest.raises(SpecError, match=r"which bfloat16 cannot represent exactly; choose the other dtype"):
        export(halves, "compressed-tensors", tmp_path / "other", {"dtype": "bfloat16"})
    assert not (tmp_path / "other").exists()


# --- what all have in common ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "mlx", "dense"])
def test_the_papers_travel_along_and_the_directory_is_whole(form: str, pack: Pack, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    result = export(
        pack(4, 64), form, tmp_path / "out", stage=lambda title: lambda i, n, **figures: steps.append((i, n))
    )
    names = {f.name for f in (tmp_path / "out").iterdir()}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert names >= {"config.json", "README.md", "SHA256SUMS"}
    assert "## Export" in (tmp_path / "out" / "README.md").read_text()
    assert steps == [(i, 14) for i in range(1, 15)]
    assert result.size_bytes == sum(f.stat().st_size for f in (tmp_path / "out").iterdir())
    with pytest.raises(SpecError, match="exists already"):
        export(pack(4, 64), form, tmp_path / "out")
    export(pack(4, 64), form, tmp_path / "out", overwrite=True)


def test_the_command(pack: Pack, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", str(pack(4, 64)), "--to", "gptq", "-o", str(tmp_path / "out"), "--set", "version=1"]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["format"], result["layers"]) == ("gptq", 14)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["checkpoint_format"] == "gptq"
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    assert "14 packed layers" in capsys.readouterr().out
    assert main([*arguments[:-1], "version", "--overwrite"]) == 2
    assert "--set 'version' is not NAME=VALUE" in capsys.readouterr().err


def test_unknown_formats_and_options_are_refused_in_one_sentence(pack: Pack, tmp_path: Path) -> None:
    for form, options, message in [
        ("exl3", {}, "unknown export format 'exl3'; known: compressed-tensors, gptq, gguf, mlx, onnx, dense"),
        ("gptq", {"version": 3}, "must be 1 or 2"),
        ("gptq", {"bits": 4}, "has no option 'bits'; known: version"),
        ("gguf", {"weights": "int8"}, "must be packed or float32"),
        ("dense", {"dtype": "int8"}, "dtype must be one of"),
        ("compressed-tensors", {"tensor_parallel": 0}, "at least 1"),
    ]:
        with pytest.raises(DQError, match=message):
            export(pack(4, 64), form, tmp_path / "out", options)
    assert set(EXPORTERS) == {"compressed-tensors", "gptq", "gguf", "mlx", "onnx", "dense"}
    assert list(tmp_path.iterdir()) == []
