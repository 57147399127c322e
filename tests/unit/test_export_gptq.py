"""GPTQ tensors against AutoRound's reader (its answers are kept as hashes) and by the format's own definition."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gptq_cases import CASES, GROUP, K, gptq_case, integers, read_by_autoround, sha256
from packed_checkpoints import pack_model
from safetensors.torch import load_file

from dq_runtime.errors import SpecError
from dq_runtime.export.gptq import gptq_tensors
from dq_runtime.export.run import export
from dq_runtime.packing import PackedWeight, pack_codes
from dq_runtime.packing.checkpoint import open_checkpoint
from dq_runtime.spec import GridSpec, Override, QuantSpec

GOLDEN = json.loads((Path(__file__).parent / "golden_export" / "gptq.json").read_text())


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("bits", "symmetric"), CASES)
def test_our_bytes_are_those_that_autoround_reads_as_our_integers(bits: int, symmetric: bool, version: int) -> None:
    w = gptq_case(bits, symmetric)
    tensors = gptq_tensors("layer", w, version)
    golden = GOLDEN["cases"][f"{bits} bits, {'symmetric' if symmetric else 'asymmetric'}, version {version}"]
    assert sha256(tensors["layer.qweight"]) == golden["qweight"]
    assert sha256(tensors["layer.qzeros"]) == golden["qzeros"]
    assert sha256(integers(w)) == golden["integers"]
    assert torch.equal(tensors["layer.scales"], w.scale.t())
    assert torch.equal(tensors["layer.g_idx"], (torch.arange(K) // GROUP).int())


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("bits", "symmetric"), CASES)
def test_autoround_reads_our_integers(bits: int, symmetric: bool, version: int) -> None:
    pytest.importorskip("auto_round_extension", reason="auto-round is not installed; its answers are kept as hashes")
    w = gptq_case(bits, symmetric)
    assert torch.equal(read_by_autoround(gptq_tensors("layer", w, version), "layer", bits, version), integers(w))


def test_version_1_refuses_the_zero_point_that_would_carry_into_its_neighbour() -> None:
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    zero = torch.ones(32, 1, dtype=torch.uint8)
    zero[3] = 0
    w = PackedWeight(pack_codes(codes, 4), torch.ones(32, 1, dtype=torch.float16), zero, 4, 32)
    with pytest.raises(SpecError, match=r"layer has zero points of 0.*--set version=2"):
        gptq_tensors("layer", w, 1)
    assert gptq_tensors("layer", w, 2)["layer.qzeros"].shape == (1, 4)


def test_shapes_that_fill_no_whole_words_are_refused() -> None:
    codes = torch.zeros(5, 32, dtype=torch.uint8)
    w = PackedWeight(pack_codes(codes, 4), torch.ones(5, 1, dtype=torch.float16), None, 4, 32)
    with pytest.raises(SpecError, match=r"layer is 5 x 32; leave it dense"):
        gptq_tensors("layer", w, 2)


def test_a_scale_that_float16_cannot_hold_is_refused() -> None:
    scale = torch.full((32, 1), 1e-9).to(torch.bfloat16)
    w = PackedWeight(pack_codes(torch.zeros(32, 32, dtype=torch.uint8), 4), scale, None, 4, 32)
    with pytest.raises(SpecError, match=r"scale of layer .* float16 cannot represent exactly; quantize with"):
        gptq_tensors("layer", w, 2)


def test_the_config_says_every_grid_and_what_is_dense(tiny_model: Path, tmp_path: Path) -> None:
    overrides = tuple(Override.parse(o) for o in ("*.0.mlp.up_proj=8:32", "*.o_proj=dense", "*.1.mlp.down_proj=5:64"))
    source = pack_model(tiny_model, tmp_path / "in", QuantSpec(GridSpec(bits=4, group_size=32), overrides=overrides))
    result = export(source, "gptq", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config == {"quant_method": "gptq"} | json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (4, 32, True, False)
    assert config["checkpoint_format"] == "gptq_v2"
    assert config["dynamic"] == {
        r"-:^model\.layers\.0\.self_attn\.o_proj(\.|$)": {},
        r"-:^model\.layers\.1\.self_attn\.o_proj(\.|$)": {},
        r"+:^model\.layers\.0\.mlp\.up_proj(\.|$)": {"bits": 8, "group_size": 32, "sym": True},
        r"+:^model\.layers\.1\.mlp\.down_proj(\.|$)": {"bits": 8, "group_size": 64, "sym": True},
    }
    assert any("1 layers of 5 to 7 bits take 8" in note for note in result.notes)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {n.rpartition(".")[0] for n in stored if n.endswith("qweight")} == set(open_checkpoint(source).layers)
    assert "model.layers.0.self_attn.o_proj.weight" in stored


def test_what_we_export_we_read_back_to_the_same_weights(tiny_model: Path, tmp_path: Path) -> None:
    source = pack_model(tiny_model, tmp_path / "in", QuantSpec(GridSpec(bits=3, group_size=64)))
    wanted = {name: w.decode() for name, w in open_checkpoint(source).packed()}
    for version in (1, 2):
        export(source, "gptq", tmp_path / "out", {"version": version}, overwrite=True)
        again = {name: w.decode() for name, w in open_checkpoint(tmp_path / "out").packed()}
        assert again.keys() == wanted.keys()
        assert all(torch.equal(again[name], wanted[name]) for name in wanted)
