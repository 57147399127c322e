"""A packed model stays packed: neither loading nor generating ever holds a dense copy of the quantized linears."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dq_runtime.packing import PackedWeight
from dq_runtime.packing.checkpoint import packed_tensors, write_json, write_sums, write_weights
from dq_runtime.packing.quant_config import Scheme, to_config

ROOT = Path(__file__).parents[2]
HIDDEN, INTERMEDIATE, LAYERS, GROUP, BITS = 1024, 4096, 4, 64, 3

# Loading and running the tiny model first brings in every module and cache, so that growth is the large model's alone.
MEASURE = """
import json, sys, torch
import dq_runtime

def kilobytes(field):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(field + ":"))

dq_runtime.generate(sys.argv[1], list(range(20)), max_tokens=2)
before = kilobytes("VmRSS")
model = dq_runtime.load(sys.argv[2], "cpu")
loaded = kilobytes("VmHWM")
result = dq_runtime.generate(model, list(range(20)), max_tokens=2)
print(json.dumps({"load": 1024 * (loaded - before), "all": 1024 * (kilobytes("VmHWM") - before),
                  "tokens": len(result.tokens), "finish": result.finish}))
"""

# The same of text alone, without torch.
MEASURE_TEXT = MEASURE.replace("import json, sys, torch", "import json, sys").replace(
    'model = dq_runtime.load(sys.argv[2], "cpu")',
    'from dq_runtime.runtime.load import load_for_text; model = load_for_text(sys.argv[2], "cpu")',
)


@pytest.fixture(scope="module")
def large(packed_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's config scaled to 67 million quantized weights, with random codes: quantizing would take long."""
    path = tmp_path_factory.mktemp("large")
    config = json.loads((packed_model / "config.json").read_text())
    config |= {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS}
    config |= {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64}
    generator = torch.Generator().manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.randn(config["vocab_size"], HIDDEN, generator=generator) * 0.02}
    tensors["model.norm.weight"] = torch.ones(HIDDEN)
    schemes = {}
    square, up, down = (HIDDEN, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)
    shapes = {f"self_attn.{name}_proj": square for name in "qkvo"}
    shapes |= {"mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": down}
    for i in range(LAYERS):
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{name}.weight"] = torch.ones(HIDDEN)
        for name, (n, k) in shapes.items():
            words = torch.randint(-(2**31), 2**31, (n, k * BITS // 32), generator=generator).to(torch.int32)
            w = PackedWeight(words, torch.full((n, k // GROUP), 0.01).bfloat16(), None, BITS, k)
            tensors |= packed_tensors(f"model.layers.{i}.{name}", w)
            schemes[f"model.layers.{i}.{name}"] = Scheme(BITS, GROUP, True)
    tensors = {n: t.bfloat16() if t.dtype is torch.float32 else t for n, t in tensors.items()}
    config["quantization_config"] = to_config(schemes, ["lm_head"])
    write_json(path / "config.json", config)
    write_weights(path, tensors)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(packed_model / name, path / name)
    write_sums(path)
    return path


def test_a_weight_costs_at_most_3_3_bits_on_disk(large: Path) -> None:
    weights = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE)
    dense = 2 * (300 * HIDDEN + (2 * LAYERS + 1) * HIDDEN)
    size = (large / "model.safetensors").stat().st_size
    assert weights > 60e6
    assert 8 * (size - dense) / weights <= 3.3


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("backend", ["", "reference"], ids=["default", "reference"])
def test_loading_and_generating_never_hold_a_dense_copy(backend: str, large: Path, packed_model: Path) -> None:
    packed = (large / "model.safetensors").stat().st_size
    weights = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(packed_model), str(large)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=250,
        env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "DQ_BACKEND": backend, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    growth = json.loads(done.stdout.splitlines()[-1])
    assert growth["tokens"] == 2 or growth["finish"] == "end"
    # The packed file may be mapped and copied (2x), and tiles of 8 MB decoded; a dense bfloat16 copy of the linears
    # would be 134 MB on top of the packed bytes.
    assert growth["load"] < 2 * packed + 24e6
    assert growth["all"] < packed + 2 * weights
    assert growth["all"] < 2 * packed + 64e6


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.skipif(os.environ.get("DQ_NATIVE") == "0", reason="DQ_NATIVE=0: built without the extension")
def test_text_alone_holds_the_weights_once(large: Path, packed_model: Path) -> None:
    """What is mapped from the file is given back layer by layer, as it is repacked."""
    packed = (large / "model.safetensors").stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", MEASURE_TEXT, str(packed_model), str(large)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=250,
        env={"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    growth = json.loads(done.stdout.splitlines()[-1])
    # One layer's pages (7 MB), the file's buffer while it is hashed, 2 MB pages that are not filled.
    assert growth["load"] < packed + 12e6
    assert growth["all"] < packed + 24e6
