"""Golden checkpoints of every format read, against the values that the formats' own tools read (make.py says which)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from dq_runtime.levels import INT, LEVELS
from dq_runtime.packing import HostTensor
from dq_runtime.packing.checkpoint import Checkpoint, open_checkpoint
from dq_runtime.packing.host import unpack_rows
from dq_runtime.packing.quant_config import Scheme
from dq_runtime.runtime.load import load

HERE = Path(__file__).parent
NAMES = sorted(path.parent.name for path in HERE.glob("*/expected.json"))
# What is kept packed: the schemes of q_proj and of down_proj; None where a layer is dequantized.
SCHEMES: dict[str, tuple[Scheme | None, Scheme | None]] = {
    "awq-4bit": (Scheme(4, 32, False), Scheme(4, 32, False)),
    "compressed-tensors-0.17": (Scheme(3, 32, True), Scheme(5, 32, False)),
    "compressed-tensors-3bit": (Scheme(3, 32, True), Scheme(3, 32, True)),
    "compressed-tensors-mixed": (Scheme(2, 32, False), Scheme(4, 32, False)),
    "compressed-tensors-mxfp4": (Scheme(4, 32, True, "mxfp4"),) * 2,
    "compressed-tensors-nvfp4": (Scheme(4, 16, True, "nvfp4"), None),
    "dq-1": (Scheme(4, 32, False), Scheme(3, 32, True)),
    "dq-1-fp4": (Scheme(4, 32, True, "fp4"),) * 2,
    "dq-1-nf4": (Scheme(4, 32, True, "nf4"),) * 2,
    "gguf-mxfp4": (Scheme(4, 32, True, "mxfp4"), None),
    "gguf-q4_0": (Scheme(4, 32, True), None),
    "gguf-q8_0": (Scheme(8, 32, True), None),
    "gptq-v1-3bit-asymmetric": (Scheme(3, 32, False), Scheme(3, 32, False)),
    "gptq-v1-4bit": (Scheme(4, 32, True), Scheme(4, 32, True)),
    "gptq-v1-4bit-act-order": (None, None),
    "gptq-v2-2bit-asymmetric": (Scheme(2, 32, False), Scheme(2, 32, False)),
    "gptq-v2-8bit-per-row": (Scheme(8, -1, True), Scheme(8, -1, True)),
}


def opened(name: str) -> Checkpoint:
    file = HERE / name / "model.gguf"
    if not file.exists():
        return open_checkpoint(HERE / name)
    pytest.importorskip("gguf")
    return open_checkpoint(file)


def values_of(checkpoint: Checkpoint, layer: str) -> np.ndarray:
    """float32 [N, K]: scale * (code - zero), scale * level of the code, or what the reader dequantized itself."""
    if layer not in checkpoint.layers:
        dense: HostTensor = checkpoint.array(f"{layer}.weight")
        assert dense.dtype == "float32"
        return dense.values
    w = checkpoint.weight(layer)
    codes = unpack_rows(w.packed, w.bits, w.k).astype(np.float32)
    if w.form != INT:
        return np.array(LEVELS[w.form], np.float32)[codes.astype(int)] * w.scale.float32().repeat(w.group_size, 1)
    zero = np.full(w.scale.shape, 2 ** (w.bits - 1), np.float32) if w.zero is None else w.zero.astype(np.float32)
    return (codes - zero.repeat(w.group_size, 1)) * w.scale.float32().repeat(w.group_size, 1)


def test_every_golden_checkpoint_is_listed() -> None:
    assert list(SCHEMES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_values_are_those_that_others_read(name: str) -> None:
    checkpoint = opened(name)
    for layer, expected in json.loads((HERE / name / "expected.json").read_text()).items():
        found = np.ascontiguousarray(values_of(checkpoint, layer)) + np.float32(0)
        assert [float(v) for v in found.reshape(-1)[:4]] == expected["first"], layer
        assert float(found.sum(dtype=np.float64)) == pytest.approx(expected["sum"], rel=1e-9), layer
        assert hashlib.sha256(found.tobytes()).hexdigest() == expected["sha256"], layer


@pytest.mark.parametrize("name", NAMES)
def test_what_our_grids_hold_stays_packed(name: str) -> None:
    checkpoint = opened(name)
    q, down = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
    assert (checkpoint.layers.get(q), checkpoint.layers.get(down)) == SCHEMES[name]
    assert bool(checkpoint.notes) == (None in SCHEMES[name])
    for layer, scheme in checkpoint.layers.items():
        weight = checkpoint.weight(layer)
        assert (weight.bits, weight.zero is None) == (scheme.bits, scheme.symmetric)
        assert weight.group_size == (weight.k if scheme.group_size == -1 else scheme.group_size)


@pytest.mark.parametrize("name", NAMES)
def test_they_run(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """As a model, packed, against the same model with the values in its place: to float rounding."""
    import torch

    checkpoint = opened(name)
    model = load(checkpoint.path, "cpu", torch.float32, exact=True)
    assert [r.message for r in caplog.records] == [f"note: {checkpoint.path}: {note}" for note in checkpoint.notes]
    ids = torch.arange(1, 25).unsqueeze(0)
    torch.testing.assert_close(model.logits(ids), dense_logits(checkpoint, ids), rtol=1e-4, atol=1e-4)


def dense_logits(checkpoint: Checkpoint, ids):  # type: ignore[no-untyped-def]
    """float32 logits of transformers' model with the expected weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32).eval()
    state = {f"{layer}.weight": torch.from_numpy(values_of(checkpoint, layer)) for layer in checkpoint.layers}
    state |= {name: tensor.float() for name, tensor in checkpoint.read(list(checkpoint.dense))}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_zero_points_of_gptq_v1_beside_a_zero_point_of_0() -> None:
    """GPTQModel subtracts 1 from whole words: what is borrowed from the neighbour is given back."""
    from dq_runtime.packing.readers.gptq import GptqLayout
    from dq_runtime.packing.readers.qweight import Sizes

    for bits in (2, 4, 8):
        zeros = np.random.default_rng(bits).integers(0, 2**bits, (3, 32), dtype=np.uint32)
        zeros[:, 0::4] = 0
        zeros[:, 32 // bits - 1 :: 32 // bits] = 1  # nothing to borrow from beyond the word
        fields = zeros.reshape(3, -1, 32 // bits)
        words = (fields << (np.arange(32 // bits, dtype=np.uint32) * bits)).sum(-1, dtype=np.uint32)
        stored = words - np.uint32((2**32 - 1) // (2**bits - 1))
        found = GptqLayout(True).zeros(stored.view(np.int32), Sizes(bits, 32, 64))
        np.testing.assert_array_equal(found, zeros)
