"""Readers of other people's checkpoints: what the golden files do not show."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dq_runtime.cli.inspect import describe
from dq_runtime.errors import CheckpointError
from dq_runtime.packing import HostTensor, PackedWeight, pack_codes
from dq_runtime.packing.bridge import host_weight_of
from dq_runtime.packing.checkpoint import NotPackedError, open_checkpoint
from dq_runtime.packing.host import pack_rows, unpack_rows, words_per_row
from dq_runtime.packing.quant_config import Scheme, Targets, from_config
from dq_runtime.packing.readers.values import serving_scale
from dq_runtime.runtime import hub
from dq_runtime.runtime.dense import load_dense
from dq_runtime.runtime.generate import generate
from dq_runtime.runtime.load import load, load_for_text
from dq_runtime.runtime.transformers_model import TransformersModel

GOLDEN = Path(__file__).parents[1] / "golden"
TOKENS = torch.arange(1, 25).unsqueeze(0)


def copied(name: str, tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN / name, tmp_path / name)
    (tmp_path / name / "SHA256SUMS").unlink(missing_ok=True)
    return tmp_path / name


def edit(directory: Path, **changes: Any) -> None:
    """Tensors of model.safetensors replaced or added."""
    tensors = load_file(directory / "model.safetensors")
    tensors |= {name.replace("__", "."): t for name, t in changes.items()}
    save_file(tensors, directory / "model.safetensors")


def quantization(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= changes
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("k", [1, 31, 32, 33, 96, 100])
def test_rows_pack_as_the_layout_says(bits: int, k: int) -> None:
    codes = np.random.default_rng(k).integers(0, 2**bits, (5, k), dtype=np.uint8)
    packed = pack_rows(codes, bits)
    assert packed.shape == (5, words_per_row(k, bits))
    np.testing.assert_array_equal(packed, pack_codes(torch.from_numpy(codes), bits).numpy())
    np.testing.assert_array_equal(unpack_rows(packed, bits, k), codes)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [([1.5, -0.0, 2.0**-130], "bfloat16"), ([1 + 2**-10, 2.0**-20], "float16"), ([1 + 2**-12, 1.0], None)],
)
@pytest.mark.parametrize("wide", [np.float32, np.float64])
def test_scales_become_16_bits_where_that_loses_nothing(values: list[float], dtype: str | None, wide: Any) -> None:
    found = serving_scale(HostTensor(np.array([values], wide), np.dtype(wide).name))
    assert (found and found.dtype) == dtype
    if found is not None:
        np.testing.assert_array_equal(found.float32(), np.array([values], np.float32))
    assert serving_scale(HostTensor(np.array([[1 + 2.0**-40]]), "float64")) is None


@pytest.mark.skipif(os.environ.get("DQ_NATIVE") == "0", reason="DQ_NATIVE=0: built without the extension")
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("exact", [True, False])
def test_kernels_take_scales_of_either_sign_and_zero(bits: int, symmetric: bool, exact: bool) -> None:
    """AutoRound's and GGUF's scales are signed; a group of zeros has a scale of 0."""
    from dq_runtime.backends.cpu_prepared import Arena, Part, plan, prepare, qmm_prepared

    generator = torch.Generator().manual_seed(bits)
    n, k, group = 48, 192, 32
    scale = torch.randn(n, k // group, generator=generator).half()
    scale[:, 1] = 0
    scale[:, 2] = -0.0
    scale[:, 3] = 2.0**-24 * torch.randint(-9, 9, (n,), generator=generator)  # subnormal
    codes = torch.randint(0, 2**bits, (n, k), generator=generator).to(torch.uint8)
    zero = None if symmetric else torch.randint(0, 2**bits, scale.shape, generator=generator).to(torch.uint8)
    w = PackedWeight(pack_codes(codes, bits), scale, zero, bits, k)
    ready = plan([Part(host_weight_of(w))], n, exact)
    x = torch.randn(7, k, generator=generator)
    found = torch.from_numpy(qmm_prepared(x.numpy(), prepare(ready, Arena(ready.nbytes), 1), exact, 1))
    terms = x.abs() @ w.decode().abs().T
    # float32 sums of K terms; int8 activations are off by half a step, 1/254 of the largest of their group.
    bound = 2**-23 * k * terms if exact else (x.abs().amax(1, keepdim=True) / 127) @ w.decode().abs().sum(1)[None]
    assert ((found - x @ w.decode().T).abs() <= bound + 1e-6).all()


def test_the_golden_gptq_model_computes_the_same_on_every_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load(GOLDEN / "gptq-v2-8bit-per-row", "cpu", exact=True).logits(TOKENS)
    monkeypatch.setenv("DQ_DECODER", "torch")
    found = load(GOLDEN / "gptq-v2-8bit-per-row", "cpu", exact=True).logits(TOKENS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# --- GPTQ and AWQ ---------------------------------------------------------------------------------------------------


def test_older_files_beside_config_json(tmp_path: Path) -> None:
    """AutoGPTQ and AutoAWQ had files of their own, and names of their own for the weights."""
    for name, file, settings in (
        ("gptq-v1-4bit", "quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False, "sym": True}),
        ("awq-4bit", "quant_config.json", {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}),
    ):
        path = copied(name, tmp_path)
        expected = {layer: w.scale.values for layer, w in open_checkpoint(path).weights()}
        config = json.loads((path / "config.json").read_text())
        del config["quantization_config"]
        (path / "config.json").write_text(json.dumps(config))
        (path / file).write_text(json.dumps(settings))
        (path / "model.safetensors").rename(path / "gptq_model-4bit-32g.safetensors")
        found = {layer: w.scale.values for layer, w in open_checkpoint(path).weights()}
        assert found.keys() == expected.keys()
        for layer in found:
            np.testing.assert_array_equal(found[layer], expected[layer])


def test_auto_rounds_names_for_the_same_layouts(tmp_path: Path) -> None:
    """Its own packing keeps zero points as they are, that of AutoGPTQ one too small."""
    for name, packing in (
        ("gptq-v1-4bit", "auto_round:auto_gptq"),
        ("gptq-v2-2bit-asymmetric", "auto_round:exllamav2"),
        ("awq-4bit", "auto_round:auto_awq"),
    ):
        path = copied(name, tmp_path)
        expected = dict(open_checkpoint(path).weights())
        quantization(path, quant_method="auto-round", packing_format=packing, data_type="int", act_bits=16)
        found = dict(open_checkpoint(path).weights())
        for layer, w in expected.items():
            np.testing.assert_array_equal(found[layer].packed, w.packed)
            assert (found[layer].zero is None) == (w.zero is None)
            if w.zero is not None:
                np.testing.assert_array_equal(found[layer].zero, w.zero)  # type: ignore[arg-type]
    quantization(path, act_bits=8)
    with pytest.raises(CheckpointError, match="act_bits 8"):
        open_checkpoint(path)


def test_single_layers_of_other_bits_are_read_where_the_config_allows_them(tmp_path: Path) -> None:
    path = copied("gptq-v1-4bit", tmp_path)
    other = load_file(GOLDEN / "gptq-v1-3bit-asymmetric" / "model.safetensors")
    layer = "model.layers.0.mlp.up_proj"
    edit(path, **{name: t for name, t in other.items() if name.startswith(layer)})
    with pytest.raises(CheckpointError, match="has 3 bits and 2 groups of 64 in_features, but the config says 4"):
        open_checkpoint(path)
    quantization(path, dynamic={r"+:.*up_proj": {"bits": 3}})
    assert open_checkpoint(path).layers[layer] == Scheme(3, 32, True)


def test_biases_of_zeros_that_the_model_does_not_have_are_no_harm(tmp_path: Path) -> None:
    path = copied("gptq-v1-4bit", tmp_path)
    expected = load(path, "cpu", exact=True).logits(TOKENS)
    bias = "model.layers.0.mlp.up_proj.bias"
    edit(path, **{bias: torch.zeros(96).half(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)})
    assert torch.equal(load(path, "cpu", exact=True).logits(TOKENS), expected)
    edit(path, **{bias: torch.ones(96).half()})
    with pytest.raises(CheckpointError, match=r"up_proj\.bias is not part of the model"):
        load(path, "cpu")


@pytest.mark.parametrize("value", [-1, 2, 2**31 - 1])
def test_groups_that_do_not_exist(value: int, tmp_path: Path) -> None:
    path = copied("gptq-v1-4bit-act-order", tmp_path)
    name = "model.layers.0.mlp.up_proj.g_idx"
    edit(path, **{name: torch.full((64,), value, dtype=torch.int32)})
    with pytest.raises(CheckpointError, match="beyond the 2 there are"):
        open_checkpoint(path)


# --- compressed-tensors ---------------------------------------------------------------------------------------------


def test_columns_of_groups_out_of_order_are_dequantized(tmp_path: Path) -> None:
    """``actorder: group`` of compressed-tensors before it was deprecated."""
    path = copied("compressed-tensors-3bit", tmp_path)
    layer = "model.layers.0.mlp.up_proj"
    before = open_checkpoint(path)
    w = dict(before.packed())[layer]
    in_order = torch.arange(64) // 32
    edit(path, **{f"{layer}.weight_g_idx": in_order.int()})
    assert open_checkpoint(path).layers == before.layers
    groups = in_order.roll(5)
    edit(path, **{f"{layer}.weight_g_idx": groups.int()})
    opened = open_checkpoint(path)
    assert layer not in opened.layers
    assert "actorder" in opened.notes[0]
    weights = json.loads((path / "config.json").read_text())["quantization_config"]["config_groups"]
    weights["group_0"]["weights"]["actorder"] = "group"
    quantization(path, config_groups=weights)
    with pytest.raises(CheckpointError, match="weight_g_idx is missing"):  # of all the other layers
        open_checkpoint(path)
    quantization(
        path,
        config_groups=json.loads((GOLDEN / path.name / "config.json").read_text())["quantization_config"][
            "config_groups"
        ],
    )
    expected = (w.codes().float() - 4) * w.scale.float()[:, groups]
    ((_, found),) = opened.read([f"{layer}.weight"])
    assert torch.equal(found, expected)
    load(path, "cpu").logits(TOKENS)


def test_float32_scales(tmp_path: Path) -> None:
    """Of a float32 model: in 16 bits where they are representable, else dequantized."""
    path = copied("compressed-tensors-3bit", tmp_path)
    layer = "model.layers.0.mlp.up_proj"
    w = dict(open_checkpoint(path).packed())[layer]
    edit(path, **{f"{layer}.weight_scale": w.scale.float()})
    assert torch.equal(dict(open_checkpoint(path).packed())[layer].scale, w.scale)
    edit(path, **{f"{layer}.weight_scale": w.scale.float() / 3})
    opened = open_checkpoint(path)
    assert layer not in opened.layers
    assert "16 bits" in opened.notes[0]
    ((_, found),) = opened.read([f"{layer}.weight"])
    expected = (w.codes().float() - 4) * (w.scale.float() / 3).repeat_interleave(32, 1)
    assert torch.equal(found, expected)


GROUP = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def config_of(**changes: Any) -> dict[str, Any]:
    config = {"format": "pack-quantized", "config_groups": {"group_0": {"targets": ["Linear"], "weights": dict(GROUP)}}}
    return config | changes


def test_groups_with_a_format_of_their_own() -> None:
    config = config_of(format="mixed-precision")
    with pytest.raises(CheckpointError, match="'mixed-precision' is not read here"):
        from_config(config, "config.json")
    config["config_groups"]["group_0"]["format"] = "pack-quantized"
    assert from_config(config, "config.json") == {"Linear": Scheme(4, 32, True)}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kv_cache_scheme": {"num_bits": 8}}, "key-value cache"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        ({"transform_config": {"config_groups": {"R4": {"apply": [{"location": "input"}]}}}}, "transforms"),
    ],
)
def test_schemes_that_are_more_than_packed_weights(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        from_config(config_of(**changes), "config.json")


def test_folded_transforms_and_dense_sparsity_are_nothing_to_a_reader() -> None:
    folded = {"config_groups": {"R1": {"apply": [{"location": "weight_output"}, {"location": "weight_input"}]}}}
    config = config_of(transform_config=folded, sparsity_config={"format": "dense"}, kv_cache_scheme=None)
    assert from_config(config, "config.json") == {"Linear": Scheme(4, 32, True)}


def test_the_targets_that_are_published_are_read() -> None:
    expressions = [
        r"re:.*self_attn\.(q|k|v|o)_proj$",
        r"re:model\.layers\.(0|1|27)\.mlp\.(gate|up)_proj",
        r"re:.*\.mlp\.experts\.[0-9]+\.down_proj.*",
        r"re:^model\.embed_tokens$",
    ]
    targets = Targets({e: Scheme(2 + i, 32, True) for i, e in enumerate(expressions)}, "config.json")
    assert targets.match("model.layers.5.self_attn.k_proj").bits == 2
    assert targets.match("model.layers.27.mlp.up_proj").bits == 3
    assert targets.match("model.layers.2.mlp.experts.11.down_proj").bits == 4
    with pytest.raises(CheckpointError, match=r"lm_head is packed, but no config group targets it"):
        targets.match("lm_head")


# --- dense, and by name ---------------------------------------------------------------------------------------------


def test_a_dense_directory_runs_through_transformers_with_a_note(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for function in (load, load_for_text):
        caplog.clear()
        model = function(tiny_model, "cpu")
        assert isinstance(model, TransformersModel)
        assert "so it runs dense, through transformers" in caplog.text
        assert torch.equal(model.logits(TOKENS), load_dense(str(tiny_model)).logits(TOKENS))
    assert load(tiny_model, "cpu", torch.bfloat16).model.dtype is torch.bfloat16  # type: ignore[attr-defined]
    with pytest.raises(NotPackedError):
        open_checkpoint(tiny_model)


def test_a_hub_name_is_fetched_without_pickles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def fetched(name: str, **patterns: Any) -> str:
        asked.update(name=name, **patterns)
        return str(GOLDEN / "awq-4bit")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    assert load("organisation/model", "cpu").path == str(GOLDEN / "awq-4bit")
    assert asked["name"] == "organisation/model"
    assert not any(pattern.endswith((".bin", ".py", ".pt")) for pattern in asked["allow_patterns"])
    for local in (tmp_path, "missing", "./a/b", "a/b/c", "/a/b", "../a"):
        assert hub.local_path(local) == Path(local)

    def offline(name: str, **_: Any) -> str:
        raise OSError("no network\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"could not be fetched from the hub: no network$"):
        load("organisation/model", "cpu")


# --- GGUF -----------------------------------------------------------------------------------------------------------


def test_gguf_agrees_with_transformers(caplog: pytest.LogCaptureFixture) -> None:
    """transformers dequantizes all of it, and undoes the permutation of q and k in its own way."""
    pytest.importorskip("gguf")
    for name in ("gguf-q4_0", "gguf-q8_0"):
        file = GOLDEN / name / "model.gguf"
        theirs = load_dense(str(file)).logits(TOKENS)
        torch.testing.assert_close(load(file, "cpu", exact=True).logits(TOKENS), theirs, rtol=1e-4, atol=1e-4)
        assert "down_proj" in caplog.text


def test_gguf_of_other_architectures_runs_dense_through_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dq_runtime.packing.readers import gguf_model

    pytest.importorskip("gguf")
    monkeypatch.setattr(gguf_model, "ARCHITECTURES", {})
    file = GOLDEN / "gguf-q4_0" / "model.gguf"
    with pytest.raises(NotPackedError, match="its architecture 'llama' is not one of"):
        open_checkpoint(file)
    assert isinstance(load(file, "cpu"), TransformersModel)


def test_dq_inspect_describes_every_format() -> None:
    pytest.importorskip("gguf")
    for name, dequantized in (("gguf-q4_0/model.gguf", 1), ("gptq-v1-4bit-act-order", 7), ("awq-4bit", 0)):
        info = describe(str(GOLDEN / name))
        assert len(info["layers"]) == 7 - dequantized
        assert bool(info["notes"]) == bool(dequantized)
        assert info["dense_parameters"] + info["quantized_weights"] == 33_472
        assert (info["bits_per_weight"] is None) == (dequantized == 7)
        assert info["size_bytes"] > 10_000


@pytest.mark.real_model
def test_the_real_gguf_model_by_our_decoder(smollm2_gguf: Path, caplog: pytest.LogCaptureFixture) -> None:
    """SmolLM2's Q4_1 file: dequantized to the float as the gguf package does it, q and k put back in order, and it
    talks (with a wrong order of rows it would not)."""
    from gguf import GGUFReader, dequantize

    checkpoint = open_checkpoint(smollm2_gguf)
    assert (len(checkpoint.layers), len(checkpoint.dense)) == (0, 272)
    stored = {tensor.name: tensor for tensor in GGUFReader(smollm2_gguf).tensors}
    for name, theirs, heads in (("self_attn.k_proj", "attn_k", 3), ("mlp.up_proj", "ffn_up", None)):
        tensor = stored[f"blk.7.{theirs}.weight"]
        values = dequantize(tensor.data, tensor.tensor_type)
        if heads is not None:
            values = values.reshape(heads, 32, 2, 576).swapaxes(1, 2).reshape(-1, 576)
        np.testing.assert_array_equal(checkpoint.array(f"model.layers.7.{name}.weight").values, values)
    model = load_for_text(smollm2_gguf, "cpu")
    assert "210 weights" in caplog.text
    assert generate(model, "The capital of France is", max_tokens=3).text.startswith(" Paris")
    assert model.end_tokens() == {2}
