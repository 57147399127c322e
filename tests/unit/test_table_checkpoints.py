"""Checkpoints on table grids and on grids aimed at engines: written, read back by others, run, exported, refused."""

from __future__ import annotations

import shutil
from importlib.metadata import EntryPoint, PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_checkpoints import pack_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import dq_runtime
from dq_runtime.cli import main
from dq_runtime.errors import SpecError
from dq_runtime.export.check import check
from dq_runtime.export.run import export
from dq_runtime.levels import LEVELS
from dq_runtime.packing.checkpoint import open_checkpoint
from dq_runtime.runtime.load import load
from dq_runtime.spec import GridSpec, Override, QuantSpec, RoundingSpec

TOKENS = torch.arange(5, 45).view(1, -1)
FLOATS = ("mxfp4", "nvfp4")  # those that compressed-tensors has a format for


@pytest.fixture(scope="module")
def packed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model on every table, and on the grid of GGUF's Q4_0, at its nearest codes."""
    folder = tmp_path_factory.mktemp("tables")
    group = {"nf4": 64, "fp4": 32}
    specs = {name: QuantSpec(GridSpec.named(name, group_size=group.get(name))) for name in (*LEVELS, "gguf:q4_0")}
    return {name: pack_model(tiny_model, folder / name.replace(":", "-"), spec) for name, spec in specs.items()}


def logits_of(path: Path, decoder: str | None, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    if decoder is not None:
        monkeypatch.setenv("DQ_DECODER", decoder)
    return load(path, "cpu", torch.float32, exact=True).logits(TOKENS)[0]


def theirs(path: Path) -> Tensor:
    """transformers' logits of a directory, without us."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(input_ids=TOKENS).logits[0]


@pytest.mark.parametrize("name", LEVELS)
def test_decoders_agree_with_the_weights_multiplied_out(
    name: str, packed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = export(packed[name], "dense", tmp_path / "dense").notes
    assert notes
    dense = theirs(tmp_path / "dense")
    for decoder in ("torch", None):
        ours = logits_of(packed[name], decoder, monkeypatch)
        torch.testing.assert_close(ours, dense, rtol=0, atol=2e-4 * float(dense.abs().max()))


@pytest.mark.parametrize("name", FLOATS)
def test_compressed_tensors_reads_mxfp4_and_nvfp4(
    name: str, packed: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers with the library, which knows nothing of us, on the same directory: the same logits, and the
    library's own decompression the same weights, bit for bit."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor, unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    stored = load_file(packed[name] / "model.safetensors")
    source = open_checkpoint(packed[name])
    group = source.config["quantization_config"]["config_groups"]["group_0"]["weights"]
    packer: Any = MXFP4PackedCompressor if name == "mxfp4" else NVFP4PackedCompressor
    for layer, w in source.packed():
        values = unpack_fp4_from_uint8(stored[f"{layer}.weight_packed"], w.n, w.k, torch.float32)
        scale = packer._decompress_scale(stored[f"{layer}.weight_scale"], torch.float32)
        whole = stored.get(f"{layer}.weight_global_scale")
        read = dequantize(values, scale, args=QuantizationArgs(**group), global_scale=whole, dtype=torch.float32)
        assert torch.equal(read, w.decode())
    ours = logits_of(packed[name], None, monkeypatch)
    # The library multiplies out to bfloat16, which holds 3 bits of a level times 4 of a scale; then float32 as here.
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import CompressedTensorsConfig

    dense = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(packed[name], dtype=torch.bfloat16, quantization_config=dense)
    with torch.no_grad():
        other = model.float()(input_ids=TOKENS).logits[0]
    torch.testing.assert_close(ours, other, rtol=0, atol=2e-4 * float(other.abs().max()))


def test_a_grid_aimed_at_gguf_is_exported_without_a_change(packed: dict[str, Path], tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    for name, kind in (("gguf:q4_0", "Q4_0"), ("mxfp4", "MXFP4")):
        out = tmp_path / kind
        export(packed[name], "gguf", out)
        (file,) = out.glob("*.gguf")
        read = {t.name: t for t in gguf.GGUFReader(file).tensors}
        down = read["blk.0.ffn_down.weight"]
        assert down.tensor_type.name == kind
        wanted = dict(open_checkpoint(packed[name]).packed())
        values = torch.from_numpy(gguf.dequantize(down.data, down.tensor_type).copy())
        assert torch.equal(values, wanted["model.layers.0.mlp.down_proj"].decode())
        again = dict(open_checkpoint(file).packed())  # and our own reader keeps it packed
        assert again.keys() == wanted.keys()
        for layer, w in again.items():
            assert torch.equal(w.decode(), wanted[layer].decode()), layer
            assert w.form == wanted[layer].form


@pytest.mark.parametrize("form", ["gguf", "gptq", "mlx", "compressed-tensors"])
def test_other_formats_refuse_a_table_in_one_sentence(form: str, packed: dict[str, Path], tmp_path: Path) -> None:
    if form == "gguf":
        pytest.importorskip("gguf")
    with pytest.raises(SpecError, match=rf"{form} has no nf4, the grid of model\.layers\.0.*--grid"):
        export(packed["nf4"], form, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FLOATS)
def test_compressed_tensors_again_shares_the_global_scale(name: str, packed: dict[str, Path], tmp_path: Path) -> None:
    export(packed[name], "compressed-tensors", tmp_path / "out", {"tensor_parallel": 2})
    before, after = (dict(open_checkpoint(p).packed()) for p in (packed[name], tmp_path / "out"))
    assert all(torch.equal(w.decode(), after[layer].decode()) for layer, w in before.items())
    if name == "nvfp4":
        stored = load_file(tmp_path / "out" / "model.safetensors")
        layer = "model.layers.0.self_attn"
        assert len({stored[f"{layer}.{x}_proj.weight_global_scale"].item() for x in "qkv"}) == 1
    with pytest.raises(SpecError, match="cannot be shared by 16 ranks"):
        export(packed[name], "compressed-tensors", tmp_path / "far", {"tensor_parallel": 16})


def test_check_says_who_reads_a_table(packed: dict[str, Path]) -> None:
    assert check(packed["mxfp4"], "llama.cpp").loads
    assert check(packed["mxfp4"], "transformers").loads
    ours = check(packed["nf4"], "transformers")
    assert ours.loads
    assert "import dq_runtime.hf" in ours.verdicts[0].how
    assert "without it refuses" in ours.notes[0]
    for name, engine in (("nvfp4", "llama.cpp"), ("fp4", "mlx")):
        checked = check(packed[name], engine)
        assert not checked.loads
        assert name in checked.verdicts[0].change


def test_check_says_what_vllm_does_with_a_table(
    packed: dict[str, Path], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dq_runtime.export import check_tables

    how = {name: {v.how for v in check(packed[name], "vllm").verdicts} for name in LEVELS}
    assert how["nf4"] == how["fp4"] == {"our plugin: Triton from sm_80 on, C++ on CPUs"}
    assert "sm_100 on FlashInfer, which rounds activations" in how["mxfp4"].pop()
    assert "weights only" in how["nvfp4"].pop()
    assert all(check(packed[name], "vllm").loads for name in LEVELS)
    # 64 inputs of o_proj and 192 of down_proj on 2 ranks, in groups of 64.
    refused = {v.layer.rpartition(".")[2]: v.change for v in check(packed["nf4"], "vllm", 2).verdicts if not v.load}
    assert refused.keys() == {"o_proj", "down_proj"}
    assert "32 inputs a rank are no whole groups of 64" in refused["o_proj"]
    assert check(packed["fp4"], "vllm", 2).loads
    mixed = QuantSpec(GridSpec.named("nf4", group_size=64), overrides=(Override.parse("*.k_proj=4:32"),))
    refused = {
        v.layer: v.change for v in check(pack_model(tiny_model, tmp_path / "k", mixed), "vllm").verdicts if v.change
    }
    assert len(refused) == 3
    assert all("share their groups" in change for change in refused.values())
    path = tmp_path / "scaled"
    shutil.copytree(packed["nvfp4"], path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_global_scale"] /= 2
    save_file(tensors, path / "model.safetensors")
    (path / "SHA256SUMS").unlink()
    refused = {v.layer: v.change for v in check(path, "vllm").verdicts if not v.load}
    assert "largest of their global scales" in next(iter(refused.values()))

    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(check_tables, "version", absent)
    assert "vLLM is not installed here" in check(packed["nf4"], "vllm").notes[0]
    monkeypatch.setattr(check_tables, "version", lambda name: "0.33.0")
    monkeypatch.setattr(check_tables, "entry_points", lambda group: [])
    assert "vLLM 0.33.0 is installed here and does not find it" in check(packed["nf4"], "vllm").notes[0]
    ours = EntryPoint("dq", "dq_runtime.vllm_plugin:register", "vllm.general_plugins")
    monkeypatch.setattr(check_tables, "entry_points", lambda group: [ours])
    assert check(packed["nf4"], "vllm").notes[0].endswith("and finds it")
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert "VLLM_PLUGINS=other keeps it" in check(packed["nf4"], "vllm").notes[0]


def test_quantize_on_a_table_from_the_command_line(
    tiny_model: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [str(tiny_model), "--calibration", str(tiny_text), "--windows", "4", "--window-length", "32"]
    common += ["--held-out-windows", "1", "--json"]
    out = tmp_path / "out"
    assert main(["quantize", *common, "-o", str(out), "--grid", "nvfp4", "--rounding", "gptq"]) == 0
    capsys.readouterr()
    layers = open_checkpoint(out).layers.values()
    assert {(s.bits, s.group_size, s.form) for s in layers} == {(4, 16, "nvfp4")}
    assert main(["quantize", *common, "-o", str(tmp_path / "no"), "--grid", "nf4", "--rounding", "autoround"]) != 0
    said = capsys.readouterr().err
    assert "evenly spaced levels, which grid nf4 has not; use one of nearest, " in said
    assert "discquant-paper" in said
    assert main(["quantize", *common, "-o", str(tmp_path / "no"), "--grid", "mxfp4", "--bits", "3"]) != 0
    assert "grid mxfp4 means bits 4, got 3" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_the_size_of_block_scales_is_counted(tiny_model: Path, tmp_path: Path) -> None:
    for grid, bits in (("mxfp4", 4.25), ("nvfp4", 4.5), ("gguf:q4_0", 4.5)):
        spec = QuantSpec(GridSpec.named(grid), rounding=RoundingSpec("nearest"))
        report = dq_runtime.quantize(
            str(tiny_model), tmp_path / grid.replace(":", "-"), spec, window_length=16, held_out_windows=1
        )
        assert report["bits_per_weight"] == pytest.approx(bits)
