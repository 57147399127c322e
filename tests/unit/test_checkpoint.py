"""The checkpoint on disk: others read ours, we read theirs, and whatever is damaged is refused in one sentence."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dq_runtime
from dq_runtime.errors import CheckpointError, DQError
from dq_runtime.packing import PackedWeight, checkpoint, pack_codes
from dq_runtime.packing.checkpoint import open_checkpoint, packed_tensors, write_json, write_sums, write_weights
from dq_runtime.packing.quant_config import Scheme, to_config
from dq_runtime.runtime.load import load_for_text
from dq_runtime.spec import GridSpec, Override, QuantSpec, RoundingSpec

TOKENS = torch.arange(3, 27).unsqueeze(0)
LAYER = "model.layers.1.mlp.up_proj"


def quantized(model: Path, text: Path, output: Path, grid: GridSpec, overrides: tuple[Override, ...] = ()) -> Path:
    spec = QuantSpec(grid, rounding=RoundingSpec("nearest"), overrides=overrides)
    dq_runtime.quantize(
        str(model), output, spec, calibration=str(text), windows=1, window_length=32, held_out_windows=1
    )
    return output


def our_logits(path: Path) -> torch.Tensor:
    return dq_runtime.load(path, "cpu", torch.float32, exact=True).logits(TOKENS)


@torch.no_grad()
def their_logits(path: Path, **kwargs: Any) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **kwargs)
    logits: torch.Tensor = model(input_ids=TOKENS).logits
    return logits


# --- what we write, others read -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16"])
def test_transformers_gives_the_logits_we_give(
    bits: int, scale_dtype: str, tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    path = quantized(tiny_model, tiny_text, tmp_path / "out", GridSpec(bits=bits, scale_dtype=scale_dtype))
    torch.testing.assert_close(our_logits(path), their_logits(path), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_transformers_reads_asymmetric_checkpoints(
    bits: int, tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    from transformers import CompressedTensorsConfig

    from dq_runtime.runtime.skeleton import load_through_transformers

    path = quantized(tiny_model, tiny_text, tmp_path / "out", GridSpec(bits=bits, symmetric=False))
    # transformers 5.23 keeps only symmetric weights compressed; dequantizing rounds each weight to the scale's dtype.
    theirs = their_logits(path, quantization_config=CompressedTensorsConfig(dequantize=True))
    ours = load_through_transformers(open_checkpoint(path), "cpu", torch.float32).model
    for name, w in open_checkpoint(path).packed():
        dense = torch.nn.Linear(w.k, w.n, bias=False)
        dense.weight = torch.nn.Parameter(w.decode(dtype=torch.bfloat16).float())
        ours.set_submodule(name, dense)
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=TOKENS).logits, theirs, rtol=1e-4, atol=1e-4)


def test_overrides_dense_layers_and_whole_rows_load_in_transformers(
    tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    overrides = tuple(
        Override.parse(o) for o in ("*layers.0.*=8", "*.1.mlp.down_proj=dense", "*.o_proj=3:row", "*.k_proj=4:16")
    )
    path = quantized(tiny_model, tiny_text, tmp_path / "out", GridSpec(bits=3, group_size=64), overrides)
    layers = open_checkpoint(path).layers
    assert layers["model.layers.0.mlp.up_proj"] == Scheme(8, 64, True)
    assert layers["model.layers.1.self_attn.o_proj"] == Scheme(3, -1, True)
    assert layers["model.layers.0.self_attn.k_proj"] == Scheme(4, 16, True)
    assert "model.layers.1.mlp.down_proj" not in layers
    torch.testing.assert_close(our_logits(path), their_logits(path), rtol=1e-4, atol=1e-4)


def test_a_whole_model_per_row_loads_in_transformers(tiny_model: Path, tiny_text: Path, tmp_path: Path) -> None:
    path = quantized(tiny_model, tiny_text, tmp_path / "out", GridSpec(bits=3, group_size=-1))
    torch.testing.assert_close(our_logits(path), their_logits(path), rtol=1e-4, atol=1e-4)


def test_shards_load_here_and_in_transformers(
    packed_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied(packed_model, tmp_path)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)
    write_weights(path, tensors)
    write_sums(path)
    shards = sorted(f.name for f in path.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert torch.equal(our_logits(path), our_logits(packed_model))
    torch.testing.assert_close(our_logits(path), their_logits(path), rtol=1e-4, atol=1e-4)


def test_everything_a_user_needs_travels_along(packed_model: Path) -> None:
    names = {f.name for f in packed_model.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert names >= {"tokenizer_config.json", "chat_template.jinja", "report.json", "report.html", "SHA256SUMS"}
    listed = {line.partition("  ")[2] for line in (packed_model / "SHA256SUMS").read_text().splitlines()}
    assert listed == names - {"SHA256SUMS"}
    assert (packed_model / "model.safetensors").stat().st_mode & 0o044 == 0o044, "readable for a server's own user"


# --- what others write, we read -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["group", "channel"])
def test_checkpoints_of_compressed_tensors_are_read(bits: int, symmetric: bool, strategy: str, tmp_path: Path) -> None:
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    n, k, group = 24, 96, 32
    arguments = QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=group if strategy == "group" else None
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    generator = torch.Generator().manual_seed(bits)
    groups = k // group if strategy == "group" else 1
    state = {
        "weight": torch.randn(n, k, generator=generator).to(torch.bfloat16),
        "weight_scale": (torch.rand(n, groups, generator=generator) * 0.2 + 0.2).to(torch.bfloat16),
        "weight_zero_point": torch.zeros(n, groups, dtype=torch.int8),
    }
    if not symmetric:
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
        state["weight_zero_point"] = torch.randint(low, high, (n, groups), generator=generator).to(torch.int8)
    stored = PackedQuantizationCompressor.compress(state, scheme)
    values = PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
    save_file({f"a.b.{name}": t.contiguous() for name, t in stored.items()}, tmp_path / "model.safetensors")
    config = QuantizationConfig(config_groups={"group_0": scheme}, format="pack-quantized", ignore=["lm_head"])
    write_json(tmp_path / "config.json", {"quantization_config": json.loads(config.model_dump_json())})

    ((name, w),) = open_checkpoint(tmp_path).packed()
    assert name == "a.b"
    assert w.group_size == (group if strategy == "group" else k)
    assert (w.zero is None) == symmetric
    torch.testing.assert_close(w.decode(dtype=torch.bfloat16), values, rtol=0, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [16, -1])
def test_packed_weights_survive_a_round_trip_through_the_disk(
    bits: int, symmetric: bool, group: int, tmp_path: Path
) -> None:
    n, k = 13, 80  # neither fills its last word
    generator = torch.Generator().manual_seed(bits)
    groups = 1 if group == -1 else k // group
    codes = torch.randint(0, 2**bits, (n, k), generator=generator).to(torch.uint8)
    zero = None if symmetric else torch.randint(0, 2**bits, (n, groups), generator=generator).to(torch.uint8)
    w = PackedWeight(pack_codes(codes, bits), torch.rand(n, groups).half() + 0.1, zero, bits, k)
    write_weights(tmp_path, {**packed_tensors("x.y", w), "x.norm": torch.ones(3)})
    schemes = {"x.y": Scheme(bits, group, symmetric)}
    write_json(tmp_path / "config.json", {"quantization_config": to_config(schemes, ["lm_head"])})
    write_sums(tmp_path)

    opened = open_checkpoint(tmp_path)
    assert opened.layers == schemes
    assert opened.dense == ("x.norm",)
    ((_, read),) = opened.packed()
    assert torch.equal(read.packed, w.packed)
    assert torch.equal(read.scale, w.scale)
    assert (read.zero is None) if zero is None else torch.equal(read.zero, zero)  # type: ignore[arg-type]
    assert torch.equal(read.decode(), w.decode())


# --- hostile input --------------------------------------------------------------------------------------------------


def copied(source: Path, parent: Path) -> Path:
    path = parent / "copy"
    shutil.copytree(source, path)
    return path


def refused(path: Path, *names: str) -> str:
    """Loading fails with one sentence that names each of ``names``, and the same for text alone; returns it."""
    with pytest.raises(CheckpointError) as caught:
        dq_runtime.load(path, "cpu")
    message = str(caught.value)
    with pytest.raises(CheckpointError) as caught:
        load_for_text(path, "cpu")
    assert str(caught.value) == message
    assert "\n" not in message.strip(), message
    assert len(message) < 500, message
    for name in names:
        assert name in message
    return message


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("sums", [True, False], ids=["hashed", "unhashed"])
def test_a_truncated_weights_file_is_refused(packed_model: Path, tmp_path: Path, share: float, sums: bool) -> None:
    path = copied(packed_model, tmp_path)
    file = path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: min(int(len(content) * share), len(content) - 1)])
    if not sums:
        (path / "SHA256SUMS").unlink()
    refused(path, "model.safetensors")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("place", [0.02, 0.3, 0.97])
def test_a_flipped_bit_is_found_by_its_hash(packed_model: Path, tmp_path: Path, file: str, place: float) -> None:
    path = copied(packed_model, tmp_path)
    flip(path / file, place)  # 0.02 of the weights is their header, the rest payload
    refused(path, file)


def flip(path: Path, place: float, bit: int = 2) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    path.write_bytes(content)


def test_any_flipped_bit_of_header_or_config_is_refused_or_harmless_without_hashes(
    packed_model: Path, tmp_path: Path
) -> None:
    """Without hashes some flips cannot be seen (a token id, a scale); what must never happen is another exception."""
    path = copied(packed_model, tmp_path)
    (path / "SHA256SUMS").unlink()
    header = 8 + int.from_bytes((path / "model.safetensors").read_bytes()[:8], "little")
    choose = random.Random(0)
    outcomes = set()
    for name, length in (("model.safetensors", header), ("config.json", (path / "config.json").stat().st_size)):
        original = (path / name).read_bytes()
        for _ in range(60):
            content = bytearray(original)
            content[choose.randrange(length)] ^= 1 << choose.randrange(8)
            (path / name).write_bytes(content)
            try:
                dq_runtime.load(path, "cpu")
                outcomes.add("loaded")
            except DQError:
                outcomes.add("refused")
        (path / name).write_bytes(original)
    assert outcomes == {"loaded", "refused"}


Tensors = dict[str, torch.Tensor]


def replaced(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[f"{LAYER}.{name}"] = change(tensors[f"{LAYER}.{name}"].clone())

    return edit


def put(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[5] = value
        return tensor

    return change


def removed(name: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        del tensors[name]

    return edit


TAMPERINGS: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "scale of the wrong shape": (replaced("weight_scale", lambda t: t[:-1]), f"{LAYER} weight_scale"),
    "one scale too few a row": (replaced("weight_scale", lambda t: t.repeat(1, 2)), f"{LAYER} weight_scale"),
    "flat scale": (replaced("weight_scale", lambda t: t.view(-1)), f"{LAYER} weight_scale"),
    "integer scale": (replaced("weight_scale", lambda t: t.int()), f"{LAYER} weight_scale"),
    "NaN scale": (replaced("weight_scale", put(torch.nan)), f"{LAYER} weight_scale"),
    "infinite scale": (replaced("weight_scale", put(torch.inf)), f"{LAYER} weight_scale"),
    "int64 codes": (replaced("weight_packed", lambda t: t.long()), f"{LAYER} weight_packed"),
    "a row of codes too few": (replaced("weight_packed", lambda t: t[1:]), f"{LAYER} weight_packed"),
    "a word of codes too few": (replaced("weight_packed", lambda t: t[:, 1:]), f"{LAYER} weight_packed"),
    "shape transposed": (replaced("weight_shape", lambda t: t.flip(0)), LAYER),
    "shape negative": (replaced("weight_shape", lambda t: -t), f"{LAYER} weight_shape"),
    "shape of three": (replaced("weight_shape", lambda t: t.repeat(2)[:3]), f"{LAYER} weight_shape"),
    "shape as floats": (replaced("weight_shape", lambda t: t.double()), f"{LAYER} weight_shape"),
    "shape absurd": (replaced("weight_shape", lambda t: t * 2**40), f"{LAYER} weight_packed"),
    "no scale": (removed(f"{LAYER}.weight_scale"), f"{LAYER}.weight_scale"),
    "no shape": (removed(f"{LAYER}.weight_shape"), f"{LAYER}.weight_shape"),
    "no codes": (removed(f"{LAYER}.weight_packed"), f"{LAYER}.weight_packed"),
    "no norm": (removed("model.norm.weight"), "model.norm.weight"),
    "no embedding": (removed("model.embed_tokens.weight"), "model.embed_tokens.weight"),
    "an extra tensor": (lambda t: t.update({"model.extra": torch.ones(2)}), "model.extra"),
    "a dense copy of a packed layer": (
        lambda t: t.update({f"{LAYER}.weight": torch.zeros(192, 64)}),
        f"{LAYER}.weight",
    ),
    "a zero point in a symmetric layer": (
        lambda t: t.update({f"{LAYER}.weight_zero_point": torch.zeros(18, 1, dtype=torch.int32)}),
        f"{LAYER}.weight_zero_point",
    ),
    "a packed layer the model lacks": (
        lambda t: t.update({k.replace(LAYER, "model.other"): v.clone() for k, v in t.items() if LAYER in k}),
        "model.other",
    ),
    "a norm of the wrong shape": (lambda t: t.update({"model.norm.weight": torch.ones(65)}), "model.norm.weight"),
    "a NaN embedding": (lambda t: t["model.embed_tokens.weight"].view(-1)[3].fill_(torch.nan), "embed_tokens.weight"),
    "an integer norm": (
        lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)}),
        "model.norm.weight",
    ),
}


@pytest.mark.parametrize("tampering", TAMPERINGS)
def test_a_tampered_tensor_is_refused_by_name(packed_model: Path, tmp_path: Path, tampering: str) -> None:
    path = copied(packed_model, tmp_path)
    (path / "SHA256SUMS").unlink()  # whoever edits tensors can also edit hashes
    tensors = load_file(path / "model.safetensors")
    edit, named = TAMPERINGS[tampering]
    edit(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path / "model.safetensors")
    refused(path, named, str(path))


def test_padding_bits_must_be_zero(tmp_path: Path) -> None:
    w = PackedWeight(pack_codes(torch.ones(4, 77, dtype=torch.uint8), 3), torch.ones(4, 1).half(), None, 3, 77)
    tensors = packed_tensors("x", w)
    tensors["x.weight_packed"][2, -1] |= 1 << 30
    write_weights(tmp_path, tensors)
    config = to_config({"x": Scheme(3, -1, True)}, [])
    write_json(tmp_path / "config.json", {"quantization_config": config})
    with pytest.raises(CheckpointError, match=r"x weight_packed .*padding"):
        list(open_checkpoint(tmp_path).packed())


Config = dict[str, Any]


def weights_of(config: Config) -> Config:
    found: Config = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    return found


CONFIGS: dict[str, tuple[Callable[[Config], Any], str]] = {
    "no quantization": (lambda c: c.pop("quantization_config"), "quantization_config"),
    "quantization is a list": (lambda c: c.update(quantization_config=[]), "quantization_config"),
    "9 bits": (lambda c: weights_of(c).update(num_bits=9), "9-bit"),
    "1 bit": (lambda c: weights_of(c).update(num_bits=1), "1-bit"),
    "bits as text": (lambda c: weights_of(c).update(num_bits="3"), "'3'-bit"),
    "4 bits where 3 are stored": (lambda c: weights_of(c).update(num_bits=4), "weight_packed"),
    "floats": (lambda c: weights_of(c).update(type="float"), "'float'"),
    "dynamic": (lambda c: weights_of(c).update(dynamic=True), "dynamic"),
    "activation order": (lambda c: weights_of(c).update(actorder="group"), "weight_g_idx is missing"),
    "another group size": (lambda c: weights_of(c).update(group_size=32), "weight_scale"),
    "group size zero": (lambda c: weights_of(c).update(group_size=0), "group size 0"),
    "group size as text": (lambda c: weights_of(c).update(group_size="64"), "'64'"),
    "strategy tensor": (lambda c: weights_of(c).update(strategy="tensor"), "'tensor'"),
    "asymmetric without zero points": (lambda c: weights_of(c).update(symmetric=False), "weight_zero_point"),
    "unknown method": (lambda c: c["quantization_config"].update(quant_method="magic"), "'magic'"),
    "GPTQ": (
        lambda c: c.update(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128}),
        "no packed weights",
    ),
    "another format": (lambda c: c["quantization_config"].update(format="int-quantized"), "'int-quantized'"),
    "no groups": (lambda c: c["quantization_config"].update(config_groups={}), "config_groups"),
    "a group without weights": (
        lambda c: c["quantization_config"]["config_groups"]["group_0"].update(weights=None),
        "group_0",
    ),
    "quantized activations": (
        lambda c: c["quantization_config"]["config_groups"]["group_0"].update(input_activations={"num_bits": 8}),
        "activations",
    ),
    "no target matches": (
        lambda c: c["quantization_config"]["config_groups"]["group_0"].update(targets=["re:^nothing$"]),
        "is packed, but no config group targets it",
    ),
    "target is no expression": (
        lambda c: c["quantization_config"]["config_groups"]["group_0"].update(targets=["re:("]),
        "re:(",
    ),
    "targets is a number": (
        lambda c: c["quantization_config"]["config_groups"]["group_0"].update(targets=3),
        "targets",
    ),
    "unknown architecture": (lambda c: c.update(model_type="no_such_model"), "config.json"),
    "no architecture": (lambda c: c.pop("model_type"), "config.json"),
    "another hidden size": (lambda c: c.update(hidden_size=128), "model"),
    "hidden size as text": (lambda c: c.update(hidden_size="64"), "config.json"),
    "more layers than weights": (lambda c: c.update(num_hidden_layers=3), "model.layers.2"),
    "fewer layers than weights": (lambda c: c.update(num_hidden_layers=1), "model.layers.1"),
    "another vocabulary": (lambda c: c.update(vocab_size=17), "embed_tokens"),
}


@pytest.mark.parametrize("change", CONFIGS)
def test_a_foreign_or_contradicting_config_is_refused(packed_model: Path, tmp_path: Path, change: str) -> None:
    path = copied(packed_model, tmp_path)
    (path / "SHA256SUMS").unlink()
    config = json.loads((path / "config.json").read_text())
    edit, named = CONFIGS[change]
    edit(config)
    (path / "config.json").write_text(json.dumps(config))
    refused(path, named, str(path))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b"[" * 100_000], ids=lambda c: str(c[:4])
)
def test_a_config_that_is_no_json_object_is_refused(packed_model: Path, tmp_path: Path, content: bytes) -> None:
    path = copied(packed_model, tmp_path)
    (path / "SHA256SUMS").unlink()
    (path / "config.json").write_bytes(content)
    refused(path, "config.json")


def test_a_shard_index_that_disagrees_with_its_shards_is_refused(
    packed_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied(packed_model, tmp_path)
    (path / "SHA256SUMS").unlink()
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 40_000)
    write_weights(path, tensors)
    index = path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    shards = sorted(set(good["weight_map"].values()))

    def with_map(change: Callable[[dict[str, Any]], Any]) -> None:
        weight_map = dict(good["weight_map"])
        change(weight_map)
        write_json(index, {**good, "weight_map": weight_map})

    with_map(lambda m: m.pop("model.norm.weight"))
    refused(path, "model.norm.weight", "index")
    with_map(lambda m: m.update({"model.ghost": shards[0]}))
    refused(path, "model.ghost", "index")
    with_map(lambda m: m.update({"model.norm.weight": "model-00009-of-00009.safetensors"}))
    refused(path, "model-00009-of-00009.safetensors")
    with_map(lambda m: m.update({"model.norm.weight": "../../etc/passwd"}))
    refused(path, "index.json")
    with_map(lambda m: m.update({"model.norm.weight": next(s for s in shards if s != m["model.norm.weight"])}))
    refused(path, "model.norm.weight")
    write_json(index, {"weight_map": []})
    refused(path, "index.json")
    write_json(index, good)
    (path / shards[-1]).unlink()
    refused(path, shards[-1])


def test_what_is_not_a_checkpoint_is_refused(tmp_path: Path, packed_model: Path, tiny_model: Path) -> None:
    refused(tmp_path / "missing", "missing")
    refused(packed_model / "config.json", "config.json")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "config.json")
    with pytest.raises(CheckpointError, match="quantization_config"):  # an unquantized model, which loads dense
        open_checkpoint(tiny_model)
    only_config = tmp_path / "only-config"
    only_config.mkdir()
    shutil.copy(packed_model / "config.json", only_config)
    refused(only_config, "model.safetensors")


def test_a_file_that_the_hashes_list_must_exist(packed_model: Path, tmp_path: Path) -> None:
    path = copied(packed_model, tmp_path)
    (path / "tokenizer.json").unlink()
    refused(path, "tokenizer.json")


@pytest.mark.parametrize("content", ["", "garbage\n", "0" * 64 + "  ../x\n"])
def test_damaged_hashes_are_refused(packed_model: Path, tmp_path: Path, content: str) -> None:
    path = copied(packed_model, tmp_path)
    (path / "SHA256SUMS").write_text(content)
    refused(path, "SHA256SUMS")


def test_the_model_card_may_be_edited(packed_model: Path, tmp_path: Path) -> None:
    path = copied(packed_model, tmp_path)
    (path / "README.md").write_text("my notes")
    assert torch.equal(our_logits(path), our_logits(packed_model))


def test_without_hashes_a_sound_checkpoint_loads(packed_model: Path, tmp_path: Path) -> None:
    path = copied(packed_model, tmp_path)
    (path / "SHA256SUMS").unlink()
    assert torch.equal(our_logits(path), our_logits(packed_model))
