"""The plan's formulas against real tensors, real runs' files, and what it says where something does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from students import MemoryStore, student_model

from dq_runtime.cli import main
from dq_runtime.errors import DQError, SpecError
from dq_runtime.modules.blocks import ModelBlocks
from dq_runtime.modules.surgery import linears
from dq_runtime.planning.disk import disk_use
from dq_runtime.planning.memory import GPU, METHODS, Setting, activations, original_size, packed_size, state_size
from dq_runtime.planning.plan import Plan, Question, make_plan
from dq_runtime.planning.shapes import ModelShape, model_shape
from dq_runtime.preflight import plan as grids_of
from dq_runtime.rounding import ROUNDINGS, Choice, Job, Needs
from dq_runtime.rounding.base import choices_to_tensors
from dq_runtime.runtime.dense import load_dense
from dq_runtime.spec import GridSpec, QuantSpec, RoundingSpec

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
SPEC = QuantSpec(GridSpec(bits=3, group_size=16))


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@pytest.fixture(scope="module")
def shape(tiny_model: Path) -> ModelShape:
    return model_shape(str(tiny_model), SPEC)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("llama") / "config.json"
    file.write_text(json.dumps(LLAMA))
    return str(file)


def test_shapes_from_the_config_are_those_of_the_loaded_model(tiny_model: Path, shape: ModelShape) -> None:
    model = load_dense(str(tiny_model)).model
    modules = linears(model)
    grids = grids_of(modules, SPEC)
    assert {layer.name: (layer.n, layer.k) for layer in shape.layers} == {
        n: tuple(modules[n].weight.shape) for n in grids
    }
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert (shape.blocks, shape.hidden, shape.intermediate, shape.tied) == (2, 64, 192, True)
    assert shape.largest_block == 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 192


def test_a_layer_holds_what_the_plan_says(tiny_model: Path, shape: ModelShape) -> None:
    student = student_model(tiny_model, torch.zeros(1, 8, dtype=torch.int64), bits=3, group_size=16)
    layers = student.layers.values()
    held = _bytes(t for layer in layers for t in (layer._lo, layer._y, layer._free, layer.scale, layer.zero))
    assert not any(layer.compact for layer in layers)
    assert original_size(shape, False) == held
    packed = [layer.pack(Choice(layer.grid.nearest(layer.weight(), layer.scales))) for layer in layers]
    assert packed_size(shape) == _bytes(t for w in packed for t in (w.packed, w.scale, w.zero))


@pytest.mark.parametrize("method", [m for m in METHODS if m != "nearest"] + ["qat"])
def test_a_state_is_as_large_as_the_plan_says(tiny_model: Path, shape: ModelShape, method: str) -> None:
    """Saved at the end, when all layers are in it; beside what is counted a state has a few numbers a layer."""
    tokens = torch.randint(3, 200, (2, 16), generator=torch.Generator().manual_seed(0))
    student = student_model(tiny_model, tokens, bits=3, group_size=16)
    options = {"discquant": {"iters": 1, "epochs": 1}, "autoround": {"iters": 1}}.get(method, {})
    rounding = ROUNDINGS.get(method)(options)
    student.begin(relaxed=Needs.RELAXED in rounding.needs)
    store, sizes = MemoryStore(), list[int]()
    store.due = lambda: True  # type: ignore[method-assign]
    store.save = lambda step, tensors, extra: sizes.append(_bytes(tensors.values()))  # type: ignore[method-assign]
    result = rounding.round(Job(student.layers, student, 0, store, lambda *a, **k: None, ModelBlocks(student)))
    sizes.append(_bytes(choices_to_tensors(result.choices).values()))  # of the choices, saved last
    expected = state_size(method, shape)
    assert max(sizes) <= expected + 64 * len(shape.layers)
    assert max(sizes) >= 0.88 * expected  # gptq moves no scales, which are 2 bytes for 16 weights here


@pytest.mark.parametrize("fused", [False, True])
def test_activations_that_wait_for_the_backward_pass_are_counted(tmp_path: Path, fused: bool) -> None:
    """Of both blocks in the second stage, as autograd keeps them: within a third, where what is no tensor of a block
    (logits, the last norm) and the copies of one architecture are left out."""
    from conftest import build_tiny_model

    from dq_runtime.backends import training

    if fused and training.layer_passes(torch.device("cpu"), torch.float32) is None:
        pytest.skip("the C++ extension is not built")
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1} if fused else {}  # of 32, or 16, columns
    directory = build_tiny_model(tmp_path / "model", **heads)
    length = 64
    student = student_model(directory, torch.randint(3, 200, (1, length)), bits=3, group_size=16)
    weights = {name: layer.weight().requires_grad_() for name, layer in student.layers.items()}
    seen: dict[int, int] = {}
    own = {t.data_ptr() for t in (*student.model.parameters(), *student.model.buffers(), *weights.values())}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        student.kl_of(0, {name: (lambda w=w: w) for name, w in weights.items()})
    shape = model_shape(str(directory), SPEC)
    logits = 4 * length * shape.vocab
    kept = sum(seen.values()) - logits
    assert activations(shape, 4, fused, False) * length * shape.blocks == pytest.approx(kept, rel=1 / 3)


def _plan(model: str, method: str = "discquant", **changes: Any) -> Plan:
    options = changes.pop("options", {})
    spec = replace(SPEC, grid=GridSpec(bits=3), rounding=RoundingSpec(method, options))
    return make_plan(Question(model, spec, flops=1e11, host_memory=2 * 10**12, **changes))


def test_llama_70b_blockwise_fits_one_gpu_of_80_gb(llama: str) -> None:
    plan = _plan(llama, "autoround", device="cuda", gpu_memory=80 * 10**9, blockwise=True)
    assert plan.shape.weights == 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    assert GPU not in plan.short()
    # One block of 856 M weights: at least what AutoRound trains of it, far less than a byte of every weight.
    assert 16 * plan.shape.largest_block < plan.needed(GPU) < plan.shape.weights


def test_llama_70b_whole_needs_more_than_one_gpu_and_is_told_what_to_lower(llama: str) -> None:
    one = _plan(llama, device="cuda", gpu_memory=80 * 10**9)
    assert GPU in one.short()
    assert "it needs" in one.advice[0]
    eight = _plan(llama, device="cuda", gpu_memory=80 * 10**9, gpus=8)
    assert eight.needed(GPU) < one.needed(GPU) / 3
    state = next(c for p in eight.phases for c in p.components if c.name == "state of discquant")
    assert state.size == pytest.approx(4.03 * plan_weights(eight) / 8, rel=0.01)


def plan_weights(plan: Plan) -> int:
    return plan.shape.weights


def test_what_is_advised_fits(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for windows of 128, but not for 256: 19 MB, by which this process itself may shrink or grow meanwhile."""
    monkeypatch.setattr("dq_runtime.planning.plan._resident", lambda: 500_000_000)

    def plan(length: int, **memory: int) -> Plan:
        spec = replace(SPEC, rounding=RoundingSpec("discquant"))
        return make_plan(Question(str(tiny_model), spec, window_length=length, flops=1e11, **memory))

    between = (plan(256).needed("host") + plan(128).needed("host")) // 2
    tight = plan(256, host_memory=between)
    assert tight.short() == ["host"]
    assert tight.advice[0].startswith("it needs")
    assert "it fits with --window-length 128" in tight.advice


def test_disk_is_what_the_method_saves(shape: ModelShape) -> None:
    total = {m: sum(c.size for c in disk_use(shape, m)) for m in (*METHODS, "qat")}
    assert total["nearest"] < total["gptq"] < total["discquant"] < total["discquant-paper"]
    assert total["discquant-paper"] == 2 * state_size("discquant-paper", shape)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "yaqa"}, "dq plan knows discquant"),
        ({"blockwise": True}, "--blockwise rounds with autoround"),
        ({"gpus": 2}, "several GPUs"),
        ({"window_length": 10**6}, "exceeds the model's context"),
    ],
    ids=str,
)
def test_what_cannot_be_planned_is_one_sentence(tiny_model: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        _plan(str(tiny_model), **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"model_type": "no-such-model"}'])
def test_a_bad_config_is_one_sentence(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(DQError, match=r"config\.json") as caught:
        model_shape(str(file), SPEC)
    assert "\n" not in str(caught.value)


def test_the_command_takes_every_option_of_quantize(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [str(tiny_model), "-o", "out", "--bits", "3", "--group-size", "32", "--override", "*.o_proj=4"]
    common += ["--calibration", "text.txt", "--windows", "4", "--window-length", "32", "--set", "iters=2", "--resume"]
    assert main(["plan", *common, "--tflops", "0.1", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["setting"]["options"]["iters"] == 2
    assert plan["fits"]
    assert plan["phases"][0]["name"] == "loading"
    assert not Path("out").exists()
    assert main(["plan", *common, "--tflops", "0.1"]) == 0
    shown = capsys.readouterr().out
    assert "peak" in shown
    assert "It fits." in shown


def test_measured_phases_are_those_predicted(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same phases, all measured; how well they agree on real models is benchmarks/plan.py's to say."""
    command = ["plan", str(tiny_model), "--bits", "3", "--group-size", "32", "--windows", "4", "--window-length", "32"]
    assert main([*command, "--compute-dtype", "float32", "--tflops", "0.1", "--measure", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["measured"]["phases"]
    assert [row["name"] for row in measured] == [
        "loading", "grids and nearest", "blocks (first stage)", "whole model (second stage)",
    ]  # fmt: skip
    assert all(row["bytes"] > 0 for row in measured)
    assert all(row["seconds"] > 0 for row in measured[2:])


def test_a_setting_is_json(tiny_model: Path) -> None:
    plan = _plan(str(tiny_model), window_length=64)
    assert json.loads(json.dumps(plan.to_json()))["setting"]["world"] == 1
    assert isinstance(plan.setting, Setting)
