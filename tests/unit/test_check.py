"""dq check: verdicts worked out by hand from vLLM 0.33.0's can_implement, and what the exports really do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import build_tiny_model
from packed_checkpoints import pack_model

from dq_runtime.cli import main
from dq_runtime.errors import SpecError
from dq_runtime.export.check import check
from dq_runtime.export.engines import ENGINES, fused_groups, input_shards
from dq_runtime.export.run import export
from dq_runtime.packing.checkpoint import open_checkpoint
from dq_runtime.spec import GridSpec, Override, QuantSpec


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense Llama of one layer whose shapes a Hopper kernel takes: hidden 256, intermediate 512, 4 heads, 2 kv."""
    return build_tiny_model(
        tmp_path_factory.mktemp("wide") / "model", hidden_size=256, intermediate_size=512, num_hidden_layers=1
    )


def kernels(path: Path, ranks: int = 1) -> dict[str, str]:
    """Last part of a layer's name -> how it runs, of layers that load."""
    result = check(path, "vllm", ranks)
    return {v.layer.rpartition(".")[2]: v.how for v in result.verdicts if v.load}


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "hopper", "other", "cpu"),
    [
        (4, 128, True, "Machete", "Marlin", "CPUWNA16"),
        (4, 32, True, "Marlin", "Marlin", "CPUWNA16"),  # Machete has no groups of 32
        (4, 64, False, "Machete", "Marlin", "CPUWNA16"),
        (8, 64, True, "Machete", "Marlin", "none"),
        (8, 64, False, "Machete", "Humming", "none"),  # Marlin has no 8 bits with zero points
        (3, 64, True, "Humming", "Humming", "none"),
        (2, 64, False, "Humming", "Humming", "none"),
        (4, 16, True, "Humming", "Humming", "CPUWNA16"),
    ],
)
def test_the_kernel_of_each_grid(
    bits: int, group: int, symmetric: bool, hopper: str, other: str, cpu: str, wide: Path, tmp_path: Path
) -> None:
    path = pack_model(wide, tmp_path / "out", QuantSpec(GridSpec(bits=bits, group_size=group, symmetric=symmetric)))
    found = kernels(path)
    assert set(found) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(found.values()) == {f"Hopper: {hopper}, other CUDA (sm_75+): {other}, CPU: {cpu}"}
    assert check(path, "vllm").loads


def test_tensor_parallelism_changes_shapes_and_can_split_groups(wide: Path, tmp_path: Path) -> None:
    path = pack_model(wide, tmp_path / "out", QuantSpec(GridSpec(bits=4, group_size=128)))
    # 4 ranks: o_proj has 64 inputs each, half a group; qkv 512/4 = 128 outputs still fill Machete's tile.
    result = check(path, "vllm", 4)
    refused = {v.layer.rpartition(".")[2]: v.change for v in result.verdicts if not v.load}
    assert set(refused) == {"o_proj"}
    assert "64 inputs a rank are no whole groups of 128" in refused["o_proj"]
    assert "--set tensor_parallel=4" in refused["o_proj"]
    assert kernels(path, 4)["q_proj"].startswith("Hopper: Machete")
    export(path, "compressed-tensors", tmp_path / "fixed", {"tensor_parallel": 4})
    assert check(tmp_path / "fixed", "vllm", 4).loads, "the advice is sound"
    assert not check(path, "vllm", 3).loads
    assert "4 heads cannot be shared by 3 ranks" in check(path, "vllm", 3).verdicts[0].change


def test_fused_layers_and_the_dtype_of_scales(wide: Path, tmp_path: Path) -> None:
    spec = QuantSpec(GridSpec(bits=4, group_size=64), overrides=(Override.parse("*.k_proj=8"),))
    path = pack_model(wide, tmp_path / "mixed", spec)
    result = check(path, "vllm")
    refused = {v.layer.rpartition(".")[2] for v in result.verdicts if not v.load}
    assert refused == {"q_proj", "k_proj", "v_proj"}
    export(path, "compressed-tensors", tmp_path / "shared")
    assert check(tmp_path / "shared", "vllm").loads
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    (path / "SHA256SUMS").unlink()
    assert "would be rounded to float16" in check(path, "vllm").verdicts[-1].change


def test_a_dense_member_of_a_fused_matrix(wide: Path, tmp_path: Path) -> None:
    spec = QuantSpec(GridSpec(bits=4, group_size=64), overrides=(Override.parse("*.k_proj=dense"),))
    result = check(pack_model(wide, tmp_path / "half", spec), "vllm")
    refused = {v.layer.rpartition(".")[2]: v.change for v in result.verdicts if not v.load}
    assert refused.keys() == {"q_proj", "v_proj"}
    assert set(refused.values()) == {"k_proj, in one matrix with it there, is dense; pack both or neither"}


def test_fused_groups_and_shards_by_name() -> None:
    names = [f"model.layers.0.{n}_proj" for n in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up")]
    assert fused_groups(names) == [names[:3], names[3:]]
    assert input_shards("model.layers.0.mlp.down_proj")
    assert not input_shards(names[0])


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(4, 64, True), (3, 16, True), (8, 32, False), (7, 64, False)])
def test_what_the_check_says_of_gguf_and_mlx_is_what_the_exports_do(
    bits: int, group: int, symmetric: bool, tiny_model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    path = pack_model(
        tiny_model, tmp_path / "in", QuantSpec(GridSpec(bits=bits, group_size=group, symmetric=symmetric))
    )
    for engine, form in (("llama.cpp", "gguf"), ("mlx", "mlx")):
        said = check(path, engine)
        if said.loads:
            assert export(path, form, tmp_path / form).layers == len(open_checkpoint(path).layers)
        else:
            with pytest.raises(SpecError, match="quantize"):
                export(path, form, tmp_path / form)
    assert check(path, "transformers").loads


def test_the_command_prints_a_table_or_json_and_fails_where_a_layer_does_not_load(
    packed_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(packed_model), "--engine", "vllm", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["loads"] is True
    assert {v["count"] for v in result["verdicts"]} == {2}
    assert main(["check", str(packed_model), "--tensor-parallel", "3"]) == 1
    assert "cannot be shared by 3 ranks" in capsys.readouterr().out
    assert main(["check", str(packed_model), "--engine", "tgi"]) == 2
    assert "known: vllm, transformers, llama.cpp, onnxruntime, mlx" in capsys.readouterr().err
    assert len(ENGINES) == 5


def test_one_scale_a_row_runs_on_what_takes_it(wide: Path, tmp_path: Path) -> None:
    path = pack_model(wide, tmp_path / "rows", QuantSpec(GridSpec(bits=4, group_size=-1)))
    assert kernels(path)["down_proj"].startswith("Hopper: Machete")
    assert kernels(path, 2)["down_proj"].startswith("Hopper: Machete"), "a row's scale is repeated on every rank"
