"""Files that mean harm: refused in one sentence, nothing executed, memory and time bounded."""

from __future__ import annotations

import json
import math
import pickle
import shutil
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dq_runtime.cli.inspect import describe
from dq_runtime.errors import CheckpointError, DQError
from dq_runtime.packing.checkpoint import Checkpoint, open_checkpoint
from dq_runtime.runtime.load import load, load_for_text

GOLDEN = Path(__file__).parents[1] / "golden"
DIRECTORIES = sorted(p.parent.name for p in GOLDEN.glob("*/model.safetensors"))
GGUFS = sorted(p.parent.name for p in GOLDEN.glob("*/model.gguf"))
LAYER = "model.layers.0.self_attn.v_proj"


def read(path: Path) -> Checkpoint:
    """Open, and look at every value, in at most 64 MB and 5 s."""
    tracemalloc.start()
    started = time.monotonic()
    try:
        checkpoint = open_checkpoint(path)
        for _ in checkpoint.weights():
            pass
        for _ in checkpoint.arrays(list(checkpoint.dense)):
            pass
        return checkpoint
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 64 * 2**20
        assert time.monotonic() - started < 5


def refused(path: Path, *names: str) -> str:
    """Reading fails with one sentence that names each of ``names``."""
    with pytest.raises(CheckpointError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message.strip()
    assert len(message) < 600
    for name in (str(path), *names):
        assert name in message
    return message


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    """A golden checkpoint, to be spoilt."""

    def copy(name: str) -> Path:
        target = tmp_path / name
        shutil.copytree(GOLDEN / name, target)
        (target / "SHA256SUMS").unlink(missing_ok=True)  # whoever means harm writes their own
        return target

    return copy


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(path: Path, header: dict[str, Any] | bytes, values: bytes) -> None:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + values)


def change_config(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


# --- safetensors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIRECTORIES)
@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.5, 0.99])
def test_truncated_weights(name: str, share: float, copied: Callable[[str], Path]) -> None:
    file = copied(name) / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    refused(file.parent, "model.safetensors", "truncated")


def overlap(header: dict[str, Any]) -> None:
    first, second = list(header)[1:3]
    header[second]["data_offsets"] = header[first]["data_offsets"]
    header[second] |= {"shape": header[first]["shape"], "dtype": header[first]["dtype"]}


HEADERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "overlapping offsets": overlap,
    "offsets beyond the end": lambda h: h[list(h)[1]].update(data_offsets=[2**62, 2**62 + 64], shape=[64], dtype="U8"),
    "negative offsets": lambda h: h[list(h)[1]].update(data_offsets=[-64, 0]),
    "an unknown dtype": lambda h: h[list(h)[1]].update(dtype="COMPLEX1024"),
    "a shape of a million sizes": lambda h: h[list(h)[1]].update(shape=[2**62] * 100_000),
    "a shape of strings": lambda h: h[list(h)[1]].update(shape=["64", "64"]),
    "an entry that is a list": lambda h: h.update({list(h)[1]: []}),
}


@pytest.mark.parametrize("what", HEADERS)
def test_headers_that_lie(what: str, copied: Callable[[str], Path]) -> None:
    file = copied("gptq-v1-4bit") / "model.safetensors"
    header, values = split(file)
    HEADERS[what](header)
    write(file, header, values)
    refused(file.parent, "model.safetensors")


def test_a_header_that_claims_to_be_huge(copied: Callable[[str], Path]) -> None:
    file = copied("awq-4bit") / "model.safetensors"
    content = file.read_bytes()
    for length in (2**63, 2**40, len(content)):
        file.write_bytes(length.to_bytes(8, "little") + content[8:])
        refused(file.parent, "header is cut short")
    with file.open("wb") as f:  # a sparse file as long as it says
        f.write((2 * 10**9).to_bytes(8, "little"))
        f.truncate(2 * 10**9 + 8)
    refused(file.parent, "header is too long")


def test_a_header_nested_beyond_the_stack(copied: Callable[[str], Path]) -> None:
    file = copied("awq-4bit") / "model.safetensors"
    write(file, b'{"a":' * 50_000 + b"{}" + b"}" * 50_000, b"")
    refused(file.parent, "model.safetensors")


def test_a_name_twice(copied: Callable[[str], Path]) -> None:
    directory = copied("awq-4bit")
    header, values = split(directory / "model.safetensors")
    name = next(n for n in header if n != "__metadata__")
    encoded = json.dumps(header).encode()
    write(directory / "model.safetensors", encoded[:-1] + f', "{name}": {json.dumps(header[name])}}}'.encode(), values)
    refused(directory, "names a tensor twice")


@pytest.mark.parametrize("name", DIRECTORIES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scales_that_are_no_numbers(name: str, value: float, copied: Callable[[str], Path]) -> None:
    directory = copied(name)
    header, values = split(directory / "model.safetensors")
    suffix = "weight_scale" if f"{LAYER}.weight_scale" in header else "scales"
    entry = header[f"{LAYER}.{suffix}"]
    wide = np.float32(value).tobytes()
    # The 8-bit floats of scales have no infinity, and one NaN or two.
    bits = {"F16": np.float16(value).tobytes(), "BF16": wide[2:], "F8_E4M3": b"\x7f", "U8": b"\xff"}[entry["dtype"]]
    changed = bytearray(values)
    changed[entry["data_offsets"][0] : entry["data_offsets"][0] + len(bits)] = bits
    write(directory / "model.safetensors", header, bytes(changed))
    refused(directory, LAYER, suffix, "not finite")


@pytest.mark.parametrize("name", DIRECTORIES)
def test_tensors_of_another_dtype(name: str, copied: Callable[[str], Path]) -> None:
    directory = copied(name)
    header, values = split(directory / "model.safetensors")
    for key in header:
        if key.startswith(f"{LAYER}."):
            changed = json.loads(json.dumps(header))
            other = {"I32": "F32", "F32": "I32", "F16": "I16", "BF16": "I16", "I64": "F64", "U8": "I8", "F8_E4M3": "U8"}
            changed[key]["dtype"] = other[header[key]["dtype"]]
            write(directory / "model.safetensors", changed, values)
            refused(directory, LAYER)


def test_a_shape_that_no_bytes_stand_behind(copied: Callable[[str], Path]) -> None:
    """A weight_shape of 2^40 rows must be compared with what is stored, not allocated."""
    directory = copied("compressed-tensors-3bit")
    header, values = split(directory / "model.safetensors")
    begin = header[f"{LAYER}.weight_shape"]["data_offsets"][0]
    for shape in ([2**40, 64], [32, 2**40], [-1, 64], [0, 0], [2**62, 2**62]):
        changed = bytearray(values)
        changed[begin : begin + 16] = struct.pack("<2q", *shape)
        write(directory / "model.safetensors", header, bytes(changed))
        refused(directory, LAYER)


@pytest.mark.parametrize("whole", [0.0, -1.0, math.nan, math.inf, 1e-45])
def test_global_scales_that_no_weight_can_have(whole: float, copied: Callable[[str], Path]) -> None:
    directory = copied("compressed-tensors-nvfp4")
    header, values = split(directory / "model.safetensors")
    begin = header[f"{LAYER}.weight_global_scale"]["data_offsets"][0]
    changed = bytearray(values)
    changed[begin : begin + 4] = struct.pack("<f", whole)
    write(directory / "model.safetensors", header, bytes(changed))
    refused(directory, LAYER, "weight_global_scale", "finite")


@pytest.mark.parametrize("name", ["compressed-tensors-mxfp4", "compressed-tensors-nvfp4"])
def test_float_formats_that_say_something_else(name: str, copied: Callable[[str], Path]) -> None:
    wrong = {"num_bits": 8, "type": "int", "group_size": 64, "symmetric": False, "strategy": "channel"}
    for key, stated in wrong.items():
        directory = copied(name)

        def change(config: dict[str, Any], key: str = key, stated: Any = stated) -> None:
            config["quantization_config"]["config_groups"]["group_0"]["weights"][key] = stated

        change_config(directory, change)
        refused(directory)
        shutil.rmtree(directory)


# --- index and config -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shard", ["../../etc/passwd", "/etc/passwd", "..", "a/b.safetensors", "..\\x.safetensors", "x.bin", "", 7, None]
)
def test_an_index_that_points_elsewhere(shard: Any, copied: Callable[[str], Path]) -> None:
    directory = copied("gptq-v1-4bit")
    names = [name for name in split(directory / "model.safetensors")[0] if name != "__metadata__"]
    index = {"weight_map": dict.fromkeys(names, "model.safetensors") | {names[0]: shard}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(directory, "model.safetensors.index.json", "weight_map")
    (directory / "config.json").write_text('{"model_type": "llama"}')  # dense: transformers would follow it
    with pytest.raises(CheckpointError, match="weight_map"):
        load(directory, "cpu")


def test_one_tensor_in_two_shards(copied: Callable[[str], Path]) -> None:
    directory = copied("gptq-v1-4bit")
    names = [name for name in split(directory / "model.safetensors")[0] if name != "__metadata__"]
    shutil.copy(directory / "model.safetensors", directory / "other.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors") | {names[0]: "other.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(directory, "again in other.safetensors")


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 2}',
        "[" * 100_000 + "]" * 100_000,
        '{"x": ' + "9" * 5000 + "}",
        "[]",
        '"text"',
        "",
        "\x00\xff",
        '{"model_type": "llama", "quantization_config": []}',
        '{"quantization_config": {"quant_method": "executable"}}',
        '{"quantization_config": {"quant_method": ["gptq"]}}',
        '{"quantization_config": {"quant_method": "gptq", "bits": "4", "group_size": 32}}',
        '{"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 0}}',
        '{"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"}}',
        '{"quantization_config": {"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": [1]}}',
        '{"quantization_config": {"quant_method": "auto-round", "bits": 4, "group_size": 32, "data_type": "mx_fp"}}',
        '{"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}}',
        '{"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"group_0": 7}}}',
    ],
)
def test_configs_that_are_none(text: str, copied: Callable[[str], Path]) -> None:
    directory = copied("gptq-v1-4bit")
    (directory / "config.json").write_text(text, encoding="latin-1")
    refused(directory, "config.json")


def test_a_config_beyond_reason(copied: Callable[[str], Path]) -> None:
    directory = copied("gptq-v1-4bit")
    with (directory / "config.json").open("wb") as f:
        f.truncate(2**32)
    with pytest.raises(CheckpointError, match="larger than 64 MB"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    "target", ["re:(a+)+$", "re:(.*)*x", "re:.*.*.*.*.*.*x", "re:(((", "re:a{1,99999999999}", "re:" + "(" * 5000]
)
def test_expressions_that_never_end(target: str, copied: Callable[[str], Path]) -> None:
    directory = copied("compressed-tensors-3bit")
    groups: Callable[[dict[str, Any]], Any] = lambda c: c["quantization_config"]["config_groups"]["group_0"]  # noqa: E731
    change_config(directory, lambda c: groups(c).update(targets=[target]))
    refused(directory, "config.json", "target")


def test_expressions_that_take_long_together() -> None:
    """Within the limits for one, a match may take 0.7 s; a thousand of them may not."""
    from dq_runtime.packing.quant_config import Scheme, Targets

    slow = {f"re:.*a.*a.*a.*{i}b": Scheme(4, 32, True) for i in range(1000)}
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="too long"):
        Targets(slow, "config.json").match("a" * 200)
    assert time.monotonic() - started < 5


# --- code -----------------------------------------------------------------------------------------------------------


class Creates:
    """A pickle of this creates a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Creates(tmp_path / "executed")))
    for function in (load, load_for_text):
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, a pickle"):
            function(directory, "cpu")
    (directory / "pytorch_model.bin").rename(directory / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load(directory, "cpu")
    assert not (tmp_path / "executed").exists()


def test_archives_are_not_unpacked(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with zipfile.ZipFile(directory / "model.safetensors", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", bytes(2**26))  # 64 MB of zeros in 64 KB
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load(directory, "cpu")
    file = (directory / "model.safetensors").rename(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="not a GGUF"):
        open_checkpoint(file)


def test_code_beside_a_model_is_not_run(tmp_path: Path, tiny_model: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny_model, directory)
    (directory / "evil.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'executed')!r}).touch()\n")
    change_config(
        directory,
        lambda c: c.update(
            model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        ),
    )
    with pytest.raises(DQError, match="could not be loaded"):
        load(directory, "cpu")
    assert not (tmp_path / "executed").exists()


def test_inspect_refuses_what_is_not_packed(tiny_model: Path) -> None:
    with pytest.raises(CheckpointError, match="not a packed checkpoint"):
        describe(str(tiny_model))


# --- GGUF -----------------------------------------------------------------------------------------------------------


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def value(key: bytes, kind: int, content: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + content


def tensor(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return string(name) + sizes + struct.pack("<IQ", kind, offset)


def gguf(values: list[bytes], tensors: list[bytes], data: bytes = bytes(256), **counts: int) -> bytes:
    head = struct.pack("<4sIQQ", b"GGUF", counts.get("version", 3), counts.get("claimed", len(tensors)), len(values))
    body = head + b"".join(values) + b"".join(tensors)
    return body + bytes(-len(body) % 32) + data


LLAMA = value(b"general.architecture", 8, string(b"llama"))
HOSTILE_GGUF: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "not a GGUF"),
    "magic alone": (b"GGUF", "ends in the middle"),
    "version 1": (gguf([LLAMA], [], version=1), "version 1"),
    "big-endian": (gguf([LLAMA], [], version=3 << 24), "version 50331648"),
    "2^60 tensors": (gguf([LLAMA], [], claimed=2**60), "claims 1152921504606846976 tensors"),
    "a string of 2^62 bytes": (gguf([value(b"a", 8, struct.pack("<Q", 2**62))], []), "long"),
    "a key of 2^40 bytes": (gguf([struct.pack("<Q", 2**40)], []), "a key is"),
    "2^60 strings": (gguf([value(b"a", 9, struct.pack("<IQ", 8, 2**60))], []), "claims"),
    "2^60 numbers": (gguf([value(b"a", 9, struct.pack("<IQ", 4, 2**60))], []), "claims"),
    "arrays in arrays": (gguf([value(b"a", 9, struct.pack("<IQ", 9, 1) * 1000)], []), "an array of the type 9"),
    "an unknown type": (gguf([value(b"a", 99, b"")], []), "unknown type 99"),
    "a key twice": (gguf([LLAMA, LLAMA], []), "twice"),
    "text that is none": (gguf([value(b"a", 8, string(b"\xff\xfe"))], []), "UTF-8"),
    "alignment 0": (gguf([LLAMA, value(b"general.alignment", 4, struct.pack("<I", 0))], []), "alignment"),
    "alignment 3": (gguf([LLAMA, value(b"general.alignment", 4, struct.pack("<I", 3))], []), "alignment"),
    "a tensor twice": (gguf([LLAMA], [tensor(b"a", (32,), 0, 0)] * 2), "twice"),
    "overlapping tensors": (gguf([LLAMA], [tensor(b"a", (32,), 0, 0), tensor(b"b", (32,), 0, 64)]), "overlaps"),
    "a tensor beyond the end": (gguf([LLAMA], [tensor(b"a", (32,), 0, 2**40)]), "reach to byte"),
    "a tensor of 2^124 values": (gguf([LLAMA], [tensor(b"a", (2**62, 2**62), 0, 0)]), "reach to byte"),
    "a tensor of 99 dimensions": (gguf([LLAMA], [tensor(b"a", (1,) * 99, 0, 0)]), "99 dimensions"),
    "a tensor of part of a block": (gguf([LLAMA], [tensor(b"a", (31,), 2, 0)]), "whole blocks"),
    "an unaligned tensor": (gguf([LLAMA], [tensor(b"a", (32,), 0, 1)]), "aligned"),
    "an unknown kind": (gguf([LLAMA], [tensor(b"a", (32,), 77, 0)]), "unknown type 77"),
    "an unknown architecture": (gguf([value(b"general.architecture", 8, string(b"x" * 999))], []), "architecture 'xxx"),
    "no architecture": (gguf([], []), "architecture"),
    "an architecture alone": (gguf([LLAMA], []), "no token embedding"),
}


needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="the gguf package is not installed")


@needs_gguf
@pytest.mark.parametrize("what", HOSTILE_GGUF)
def test_hostile_gguf(what: str, tmp_path: Path) -> None:
    content, named = HOSTILE_GGUF[what]
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    refused(file, named)


def cuts(length: int) -> Iterator[int]:
    yield from range(4, 4000, 131)
    yield from (length // 2, length - 1)


@needs_gguf
@pytest.mark.parametrize("name", GGUFS)
def test_truncated_gguf(name: str, tmp_path: Path) -> None:
    content = (GOLDEN / name / "model.gguf").read_bytes()
    file = tmp_path / "model.gguf"
    for length in cuts(len(content)):
        file.write_bytes(content[:length])
        refused(file)


@needs_gguf
@pytest.mark.parametrize("name", GGUFS)
def test_gguf_scales_that_are_no_numbers(name: str, tmp_path: Path) -> None:
    from gguf import GGUFReader

    reader = GGUFReader(GOLDEN / name / "model.gguf")
    offset = next(t.data_offset for t in reader.tensors if t.name == "blk.0.attn_v.weight")
    content = bytearray((GOLDEN / name / "model.gguf").read_bytes())
    content[offset : offset + 2] = b"\xff\xff" if name == "gguf-mxfp4" else np.float16(np.nan).tobytes()
    (tmp_path / "model.gguf").write_bytes(content)
    refused(tmp_path / "model.gguf", "blk.0.attn_v.weight", "not finite")
