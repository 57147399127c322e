"""Packed linears inside transformers: from_pretrained, generate, save_pretrained, pipelines, LoRA."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_checkpoints import pack_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, pipeline
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import dq_runtime
from dq_runtime.errors import CheckpointError
from dq_runtime.hf.linear import PackedLinear
from dq_runtime.levels import LEVELS
from dq_runtime.packing.checkpoint import open_checkpoint
from dq_runtime.runtime.load import load
from dq_runtime.spec import GridSpec, Override, QuantSpec

ROOT = Path(__file__).parents[2]
TOKENS = torch.arange(5, 45).view(1, -1)


@pytest.fixture(autouse=True)
def _opted_in() -> Iterator[None]:
    """use_packed_linears() holds for a process; other tests want transformers as it is."""
    tables = AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING
    before = [table["compressed-tensors"] for table in tables]
    dq_runtime.use_packed_linears()
    dq_runtime.use_packed_linears()
    yield
    for table, entry in zip(tables, before, strict=True):
        table["compressed-tensors"] = entry


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=TOKENS).logits
    return logits


@pytest.mark.parametrize(
    ("bits", "symmetric"), [(2, True), (3, True), (4, True), (8, True), (3, False), (4, False), (5, False)]
)
def test_from_pretrained_stays_packed_and_saves_what_it_loaded(
    bits: int, symmetric: bool, tiny_model: Path, tmp_path: Path
) -> None:
    grid = GridSpec(bits=bits, group_size=64, symmetric=symmetric)
    spec = QuantSpec(grid, overrides=(Override.parse("*.o_proj=dense"), Override.parse("*.0.mlp.*=6:32")))
    path = pack_model(tiny_model, tmp_path / "packed", spec)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert set(packed) == set(open_checkpoint(path).layers)
    assert isinstance(model.model.layers[0].self_attn.o_proj, torch.nn.Linear)
    theirs, ours = logits_of(model), load(path, "cpu", torch.float32, exact=True).logits(TOKENS)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    stored = dict(open_checkpoint(tmp_path / "again").packed())
    for name, w in open_checkpoint(path).packed():
        assert torch.equal(stored[name].packed, w.packed)
        assert torch.equal(stored[name].scale, w.scale)
        assert w.zero is None or torch.equal(stored[name].zero, w.zero)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits_of(again), theirs)


def test_generate_and_pipelines_give_our_text(packed_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(packed_model)
    ours = dq_runtime.generate(load(packed_model, "cpu", exact=True), "Anna found", max_tokens=12)
    ids = tokenizer("Anna found", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert out.tolist()[: len(ours.tokens)] == ours.tokens
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = pipe("Anna found", max_new_tokens=12, do_sample=False)[0]["generated_text"]
    assert text.startswith("Anna found" + ours.text[:4])


def test_a_bias_is_loaded(tmp_path: Path, tiny_model: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2))
    torch.nn.init.normal_(model.model.layers[0].self_attn.q_proj.bias)
    model.save_pretrained(tmp_path / "dense")
    path = pack_model(tmp_path / "dense", tmp_path / "packed", QuantSpec(GridSpec(bits=4, group_size=32)))
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    bias = loaded.model.layers[0].self_attn.q_proj.bias
    assert torch.equal(bias, model.model.layers[0].self_attn.q_proj.bias.detach().bfloat16().float())
    torch.testing.assert_close(logits_of(loaded), load(path, "cpu", torch.float32, exact=True).logits(TOKENS))


def test_what_does_not_fit_is_refused(packed_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad"
    shutil.copytree(packed_model, path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 4
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"weight_packed is int32 \[\d+, 18\], expected int32 \[\d+, 24\]"):
        AutoModelForCausalLM.from_pretrained(path)


# --- tables ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model on every table grid, the output projections left dense."""
    folder, dense = tmp_path_factory.mktemp("tables"), (Override.parse("*.o_proj=dense"),)
    group = {"nf4": 64, "fp4": 32}
    return {
        name: pack_model(
            tiny_model, folder / name, QuantSpec(GridSpec.named(name, group_size=group.get(name)), overrides=dense)
        )
        for name in LEVELS
    }


@pytest.mark.parametrize("name", LEVELS)
def test_tables_stay_packed_speak_and_are_saved_as_they_were(
    name: str, tables: dict[str, Path], tmp_path: Path
) -> None:
    path = tables[name]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    packed = {layer: module for layer, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert set(packed) == set(open_checkpoint(path).layers)
    assert {module.form for module in packed.values()} == {name}
    ours = load(path, "cpu", torch.float32, exact=True)
    logits = logits_of(model)
    torch.testing.assert_close(logits, ours.logits(TOKENS), rtol=1e-4, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = dq_runtime.generate(ours, "Anna found", max_tokens=8)
    ids = tokenizer("Anna found", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert out.tolist()[: len(text.tokens)] == text.tokens
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(folder / "model.safetensors") for folder in (path, tmp_path / "again"))
    for layer in packed:
        stored = {tensor: value for tensor, value in before.items() if tensor.startswith(f"{layer}.")}
        assert stored.keys() == {tensor for tensor in after if tensor.startswith(f"{layer}.")}
        for tensor, value in stored.items():
            assert after[tensor].dtype == value.dtype
            assert torch.equal(after[tensor].view(torch.uint8), value.view(torch.uint8)), tensor
    stated = [json.loads((folder / "config.json").read_text())["model_type"] for folder in (path, tmp_path / "again")]
    assert stated == ["dq_llama" if name in ("nf4", "fp4") else "llama"] * 2, "nobody else may mistake it"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits_of(again), logits)


def test_a_config_of_ours_is_copied_pickled_and_known_by_its_true_type(tables: dict[str, Path]) -> None:
    config = AutoConfig.from_pretrained(tables["nf4"])
    for same in (config, copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert isinstance(same, LlamaConfig)
        assert same.model_type == "llama"
        assert same.hidden_size == 64
        assert json.loads(same.to_json_string())["model_type"] == "dq_llama"


def test_importing_our_package_is_enough_for_our_own_tables(tables: dict[str, Path]) -> None:
    """Without use_packed_linears(); and without us the directory is refused, not run on random weights."""
    code = """
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except ValueError as error:
    assert "dq_llama" in str(error)
else:
    raise SystemExit("it was loaded without us")
import dq_runtime.hf
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model).__name__, type(model.model.layers[0].self_attn.q_proj).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tables["fp4"])], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.stdout.split() == ["LlamaForCausalLM", "PackedLinear"], done.stderr


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_lora_trains_through_a_table(tables: dict[str, Path]) -> None:
    peft = pytest.importorskip("peft")
    from dq_runtime.hf.lora import lora_config

    base = AutoModelForCausalLM.from_pretrained(tables["nf4"], dtype=torch.float32)
    model = peft.get_peft_model(base, lora_config(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    losses = train(model, TOKENS, 6, 2e-2)
    assert losses[-1] < losses[0]


def test_what_cannot_stay_packed_in_transformers_names_the_reason(
    tables: dict[str, Path], packed_model: Path, tmp_path: Path
) -> None:
    layer = "model.layers.0.mlp.up_proj"

    def changed(source: Path, name: str, change: Any) -> Path:
        path = tmp_path / f"{source.name}-{name}"
        shutil.copytree(source, path)
        tensors = load_file(path / "model.safetensors")
        value = change(tensors.pop(f"{layer}.{name}"))
        save_file(tensors | ({} if value is None else {f"{layer}.{name}": value}), path / "model.safetensors")
        return path

    cases = [
        (changed(tables["nvfp4"], "weight_global_scale", lambda t: t * 1.37), "no power of two.*dq_runtime.load"),
        (changed(packed_model, "weight_scale", lambda t: t.float()), "stored as float32.*dq_runtime.load"),
        (changed(packed_model, "weight_shape", lambda t: None), "weight_shape is missing"),
        (changed(tables["nf4"], "weight_scale", lambda t: t * float("nan")), "NaN or infinity"),
    ]
    for path, message in cases:
        with pytest.raises(CheckpointError, match=message):
            AutoModelForCausalLM.from_pretrained(path)


# --- LoRA -----------------------------------------------------------------------------------------------------------


def train(model: Any, tokens: Tensor, steps: int, rate: float) -> list[float]:
    """Losses of ``steps`` AdamW steps on the adapters of ``model``."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # peft 0.21 says so of every custom module
def test_lora_trains_through_packed_linears_and_is_saved(packed_model: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from dq_runtime.hf.lora import lora_config

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(packed_model, dtype=torch.float32)
    before = logits_of(base)
    config = lora_config(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    assert torch.equal(logits_of(model), before), "B starts at 0"
    losses = train(model, TOKENS, 8, 2e-2)
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(packed_model, dtype=torch.float32)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter", config=config)
    assert torch.equal(logits_of(again.eval()), logits_of(model.eval()))
    with pytest.raises(dq_runtime.DQError, match="cannot be merged"):
        model.merge_and_unload()


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_all_linear_means_packed_linears_too(packed_model: Path) -> None:
    peft = pytest.importorskip("peft")
    from dq_runtime.hf.lora import PackedLora, lora_config

    with pytest.raises(dq_runtime.DQError, match="needs the model"):
        lora_config(r=2, target_modules="all-linear")
    base = AutoModelForCausalLM.from_pretrained(packed_model, dtype=torch.float32)
    before = logits_of(base)
    model = peft.get_peft_model(base, lora_config(base, r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted = [name for name, module in model.named_modules() if isinstance(module, PackedLora)]
    assert len(adapted) == 14, "7 linears of 2 layers, and not the head"
    assert torch.equal(logits_of(model), before)
    losses = train(model, TOKENS, 6, 2e-2)
    assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_the_gradient_of_an_adapter_is_that_of_the_dense_model(packed_model: Path) -> None:
    peft = pytest.importorskip("peft")
    from dq_runtime.hf.lora import lora_config

    settings = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    gradients = []
    for dense in (False, True):
        model = AutoModelForCausalLM.from_pretrained(packed_model, dtype=torch.float32)
        if dense:
            for name, w in open_checkpoint(packed_model).packed():
                linear = torch.nn.Linear(w.k, w.n, bias=False)
                linear.weight = torch.nn.Parameter(w.decode())
                model.set_submodule(name, linear)
        torch.manual_seed(1)
        model = peft.get_peft_model(model, lora_config(**settings))
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if "lora_B" in n})
    assert len(gradients[0]) == 2
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.real_model
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_lora_lowers_the_loss_of_the_real_model(smollm2_gguf: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from dq_runtime.hf.lora import lora_config

    path = pack_model(smollm2_gguf, tmp_path / "packed", QuantSpec(GridSpec(bits=4, group_size=64)))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    text = "The harbour master of Ystad wrote down every ship in a green book, and the book was never wrong. " * 3
    tokens = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt")["input_ids"][:, :48]
    torch.manual_seed(0)
    model = peft.get_peft_model(model, lora_config(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    losses = train(model, tokens, 4, 5e-3)
    assert losses[-1] < losses[0] - 0.3
