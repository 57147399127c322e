"""The lean decoder: every architecture against transformers' own model on the same weights, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_models import (
    COMMON,
    LENGTH,
    LLAMA3,
    LONGROPE,
    MODELS,
    VOCABULARY,
    WINDOW,
    build,
    error,
    in_bfloat16,
    tokens,
    transformers_config,
)
from torch import Tensor

import dq_runtime
from dq_runtime.errors import BackendError, CheckpointError, SpecError
from dq_runtime.modules.quant_linear import QuantLinear
from dq_runtime.packing.checkpoint import open_checkpoint, packed_tensors, write_json, write_weights
from dq_runtime.runtime.decoder import (
    DECODERS,
    Decoder,
    DecoderConfig,
    build_decoder,
    kv_cache,
    read_config,
    read_weights,
    torch_decoder,
)
from dq_runtime.runtime.decoder.torch_decoder import TorchDecoder
from dq_runtime.runtime.language_model import LeanModel

ROOT = Path(__file__).parents[2]


def decoder_of_choice(directory: Path) -> Decoder:
    """The decoder that DQ_DECODER asks for, or the preferred one."""
    loaded = dq_runtime.load(directory, "cpu", exact=True)
    assert isinstance(loaded, LeanModel)
    return loaded.decoder


def decoder_of(directory: Path, dtype: torch.dtype = torch.float32) -> TorchDecoder:
    """The PyTorch decoder, whatever would be preferred here."""
    checkpoint = open_checkpoint(directory)
    config = read_config(checkpoint.config)
    assert isinstance(config, DecoderConfig), config
    return TorchDecoder(config, read_weights(checkpoint, config), "cpu", dtype)


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A packed checkpoint, and transformers' model with the same weights."""
    directory = tmp_path_factory.mktemp("decoder") / "model"
    return directory, build(directory, transformers_config(request.param))


@pytest.fixture(scope="module")
def pair(model: tuple[Path, Any]) -> tuple[TorchDecoder, Any]:
    """The PyTorch decoder and transformers' model on the same weights."""
    return decoder_of(model[0]), model[1]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of 7 tokens: rings of WINDOW + 6 slots wrap around several times, and prompts take several passes."""
    monkeypatch.setattr(kv_cache, "CHUNK", 7)
    monkeypatch.setattr(torch_decoder, "CHUNK", 7)


def close(actual: Tensor, expected: Tensor) -> None:
    """float32 through two layers: sums of at most 96 products and softmaxes, in another order."""
    assert expected.std() > 0.1
    assert actual.dtype is torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("implementation", DECODERS)
@pytest.mark.parametrize("batch", [1, 3])
def test_logits_equal_transformers(
    model: tuple[Path, Any], batch: int, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every implementation that runs here: the whole sequence at once; a prompt; then token by token through the cache,
    past the sliding window."""
    directory, reference = model
    monkeypatch.setenv("DQ_DECODER", implementation)
    decoder = decoder_of_choice(directory)
    ids = tokens(batch)
    expected = reference(input_ids=ids, use_cache=False).logits
    close(decoder.logits(ids), expected)
    cache = decoder.start(batch, LENGTH)
    close(decoder.step(ids[:, :6], cache), expected[:, 5])
    for i in range(6, LENGTH):
        close(decoder.step(ids[:, i : i + 1], cache), expected[:, i])
    assert cache.lengths.tolist() == [LENGTH] * batch


@torch.no_grad()
def test_bfloat16_costs_what_it_costs_transformers(model: tuple[Path, Any]) -> None:
    directory, reference = model
    decoder = decoder_of(directory, torch.bfloat16)
    ids = tokens(2)
    expected = reference(input_ids=ids, use_cache=False).logits
    theirs = in_bfloat16(reference)(input_ids=ids, use_cache=False).logits.float()
    cache = decoder.start(2, LENGTH)
    ours = torch.stack([decoder.step(ids[:, i : i + 1], cache) for i in range(LENGTH)], 1)
    # Rounding errors of two orders of summation: of the same size, not the same.
    assert error(ours, expected) < 2 * error(theirs, expected)


@torch.no_grad()
@pytest.mark.usefixtures("small_chunks")
def test_prompts_in_passes_and_rings_that_wrap(pair: tuple[TorchDecoder, Any]) -> None:
    decoder, reference = pair
    ids = tokens(2)
    expected = reference(input_ids=ids, use_cache=False).logits
    close(decoder.logits(ids), expected)
    cache = decoder.start(2, LENGTH)
    for start, stop in ((0, 17), (17, 18), (18, 20), (20, 39), (39, 40)):
        close(decoder.step(ids[:, start:stop], cache), expected[:, stop - 1])
    slots = {
        layer.window: memory.shape[2] for layer, memory in zip(decoder.config.layers, cache.storage.keys, strict=True)
    }
    assert slots == {w: LENGTH if w is None else w + 6 for w in slots}


@torch.no_grad()
@pytest.mark.usefixtures("small_chunks")
def test_sequences_of_one_batch_may_differ_in_length(pair: tuple[TorchDecoder, Any]) -> None:
    """Rows filled one by one and put together: lengths, rings and rotations are per sequence."""
    decoder, reference = pair
    ids = tokens(2)
    expected = reference(input_ids=ids, use_cache=False).logits
    lengths = (5, 26)
    both = decoder.start(2, LENGTH)
    with torch.inference_mode():
        for row, length in enumerate(lengths):
            one = decoder.start(1, LENGTH)
            decoder.step(ids[row : row + 1, :length], one)
            for whole, part in zip(
                (*both.storage.keys, *both.storage.values), (*one.storage.keys, *one.storage.values), strict=True
            ):
                whole[row] = part[0]
            both.lengths[row] = length
    both.longest = max(lengths)
    for i in range(8):
        following = torch.stack([ids[row, length + i : length + i + 1] for row, length in enumerate(lengths)])
        wanted = torch.stack([expected[row, length + i] for row, length in enumerate(lengths)])
        close(decoder.step(following, both), wanted)


class Uncaptured:
    """Takes the place of a captured graph where there is no GPU: the same fixed buffer of tokens, run eagerly."""

    made = 0

    def __init__(self, run: Callable[[Tensor], Tensor], batch: int, state: Tensor) -> None:
        type(self).made += 1
        self.run, self.tokens = run, torch.zeros(batch, 1, dtype=torch.int64)

    def __call__(self, ids: Tensor) -> Tensor:
        self.tokens[: ids.shape[0]].copy_(ids)
        return self.run(self.tokens)


@torch.no_grad()
def test_what_is_captured_on_a_gpu_gives_the_same_logits(
    pair: tuple[TorchDecoder, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch and capacity rounded up to powers of two, memory used a second time: all but the capture itself."""
    decoder, reference = pair
    monkeypatch.setattr(torch_decoder, "CapturedStep", Uncaptured)
    monkeypatch.setattr(decoder, "capture", True)
    monkeypatch.setattr(Uncaptured, "made", 0)
    memory = set()
    for capacity in (LENGTH, 30, LENGTH):  # longrope: above, below and above the length that separates its two sets
        ids = tokens(3, capacity)
        expected = reference(input_ids=ids, use_cache=False).logits
        cache = decoder.start(3, capacity)
        memory.add(cache.storage.keys[0].data_ptr())
        assert cache.storage.keys[0].shape[0] == 4
        close(decoder.step(ids[:, :20], cache), expected[:, 19])
        for i in range(20, capacity):
            close(decoder.step(ids[:, i : i + 1], cache), expected[:, i])
        with pytest.raises(SpecError, match="cannot take 1 more"):
            decoder.step(ids[:, :1], cache)
        del cache
    assert len(memory) == 1
    assert Uncaptured.made == 1
    held = [decoder.start(3, 30) for _ in range(2)]
    assert held[0].storage is not held[1].storage, "memory in use is nobody else's"


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gemma") / "model"
    build(directory, transformers_config("gemma3"))
    return directory


def test_memory_is_bounded_and_never_grows(gemma: Path) -> None:
    decoder = decoder_of(gemma)
    cache = decoder.start(2, 5000)
    ring = WINDOW + kv_cache.CHUNK - 1
    assert cache.nbytes == 2 * 4 * 2 * 2 * 32 * (ring + 5000)  # keys and values, float32, batch, heads, head_dim
    before = [t.data_ptr() for t in cache.storage.keys]
    for _ in range(3):
        decoder.step(tokens(2, 600), cache)
    assert [t.data_ptr() for t in cache.storage.keys] == before
    with pytest.raises(
        SpecError, match="holds 1800 of 5000 positions and cannot take 3201 more; start one of a larger"
    ):
        decoder.step(tokens(2, 3201), cache)
    assert cache.lengths.tolist() == [1800, 1800], "a refused step changes nothing"
    for ids in (tokens(3, 1), tokens(2)[0], tokens(2)[:, :0]):
        with pytest.raises(SpecError, match=r"expected token ids \[2, 1 or more\]"):
            decoder.step(ids, cache)
    for batch, capacity in ((0, 5), (1, 0)):
        with pytest.raises(SpecError, match="a batch and a capacity of at least 1"):
            decoder.start(batch, capacity)


@torch.no_grad()
def test_projections_of_different_kinds_are_run_side_by_side(tmp_path: Path) -> None:
    reference = build(tmp_path / "m", transformers_config("llama"), lambda name: 8 if "v_proj" in name else 4)
    decoder = decoder_of(tmp_path / "m")
    packed = [m for m in decoder.modules() if isinstance(m, QuantLinear)]
    assert len(packed) == 2 * (3 + 1 + 1 + 1)  # q, k, v apart; gate and up in one
    ids = tokens(2)
    close(decoder.logits(ids), reference(input_ids=ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_half_of_a_multimodal_gemma(prefix: str, gemma: Path, tmp_path: Path) -> None:
    expected = decoder_of(gemma).logits(tokens(1))
    checkpoint = open_checkpoint(gemma)
    tensors = {name.replace("model.", prefix, 1): t for name, t in checkpoint.read(list(checkpoint.dense))}
    for name, w in checkpoint.packed():
        tensors |= packed_tensors(name.replace("model.", prefix, 1), w)
    tower = "vision_tower." if prefix.startswith("language") else "model.vision_tower."
    tensors[f"{tower}patch.weight"] = torch.ones(3)
    text = {k: v for k, v in checkpoint.config.items() if k not in ("quantization_config", "architectures")}
    config = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    config |= {"quantization_config": checkpoint.config["quantization_config"], "eos_token_id": [1, 5]}
    write_json(tmp_path / "config.json", config)
    write_weights(tmp_path, tensors)
    loaded = dq_runtime.load(tmp_path, "cpu", exact=True)
    assert isinstance(loaded, LeanModel)
    assert loaded.end_tokens() == {1, 5}
    torch.testing.assert_close(loaded.logits(tokens(1)), expected)


# --- config.json ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_both_generations_of_keys_mean_the_same(name: str) -> None:
    new = transformers_config(name).to_dict() | {"architectures": ["XForCausalLM"]}
    old = json.loads(json.dumps(new))
    ropes = old.pop("rope_parameters")
    if name == "gemma3":
        old |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"type": "linear", "factor": 8.0}}
        # transformers 4.50 wrote no layer_types either: every second layer attends to everything.
        old |= {"sliding_window_pattern": 2}
        old.pop("layer_types")
    else:
        old |= {"rope_theta": ropes.pop("rope_theta"), "rope_scaling": None}
        partial = ropes.pop("partial_rotary_factor", 1.0)
        old |= {"partial_rotary_factor": partial} if partial != 1.0 else {}
        kind = ropes.pop("rope_type")
        if kind != "default":
            old["rope_scaling"] = ropes | {"type": "su" if kind == "longrope" else kind}
    read = read_config(old)
    assert isinstance(read, DecoderConfig), read
    assert read == read_config(new)


# As published: only what the decoder looks at, and what it must be able to do without.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192, "factor": 32.0, "rope_theta": None},
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "vocab_size": 128256,
    },
    "gemma-3-4b": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
    },
}


def test_published_configs() -> None:
    llama = read_config(PUBLISHED["Llama-3.2-1B"])
    assert isinstance(llama, DecoderConfig)
    assert llama.layers[0].rope.theta == 5e5
    assert (llama.tied_head, llama.kv_heads, llama.eps, llama.attention_scale) == (True, 8, 1e-5, 64**-0.5)
    gemma = read_config(PUBLISHED["gemma-3-4b"])
    assert isinstance(gemma, DecoderConfig)
    assert (gemma.heads, gemma.kv_heads, gemma.head_dim, gemma.vocab, gemma.nested) == (8, 4, 256, 262208, True)
    assert [layer.window for layer in gemma.layers[:7]] == [1024] * 5 + [None, 1024]
    assert {(layer.rope.theta, layer.rope.scaling) for layer in gemma.layers} == {(1e6, 8.0), (1e4, 1.0)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "mixtral"}, "its architecture 'mixtral' is not one of"),
        ({"model_type": None}, "its architecture None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "is not a causal LM"),
        ({"hidden_act": "relu"}, "its activation 'relu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "its rope type 'yarn' is not known"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "its rope type 'dynamic' is not known"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1]}}, "its rope parameter 'mrope_section'"),
        ({"rope_scaling": {"type": "linear"}}, "factor: None where a positive number"),
        ({"rope_scaling": [1]}, "are not an object"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rotates only a part"),
        ({"layer_types": ["chunked_attention", "full_attention"]}, "layer_types of its own"),
        ({"model_type": "qwen3", "layer_types": ["linear_attention", "full_attention"]}, "type 'linear_attention'"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "does not list 2 layers"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 2}, "sliding layers, but no sliding_window"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 30.0}, "implementations disagree"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "attends in both directions"),
        ({"model_type": "gemma3"}, "gemma3 has no text_config"),
        ({"num_hidden_layers": None}, "num_hidden_layers: None where a positive integer"),
        ({"hidden_size": "64"}, "hidden_size: '64' where a positive integer"),
        ({"num_key_value_heads": 3}, "4 heads are not a multiple of 3"),
        ({"rms_norm_eps": -1}, "rms_norm_eps: -1"),
        ({"model_type": "phi3", "rope_scaling": LONGROPE | {"long_factor": [1.0]}}, "longrope needs 8 short and long"),
    ],
    ids=lambda v: json.dumps(v)[:60] if isinstance(v, dict) else "",
)
def test_what_is_not_known_is_refused(change: dict[str, Any], reason: str) -> None:
    config = {"model_type": "llama", "hidden_act": "silu", **COMMON}
    assert isinstance(read_config(config), DecoderConfig)
    answer = read_config(config | change)
    assert isinstance(answer, str)
    assert reason in answer
    assert "\n" not in answer


# --- weights --------------------------------------------------------------------------------------------------------


def _edited(source: Path, target: Path, edit: Callable[[dict[str, Tensor]], Any]) -> Path:
    from safetensors.torch import load_file

    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    write_weights(target, tensors)
    return target


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda t: t.pop("model.layers.1.self_attn.q_norm.weight"), "layers.1.self_attn.q_norm.weight is missing"),
        (lambda t: t.update({"model.extra": torch.ones(1)}), "model.extra is not part of the model"),
        (lambda t: t.update({"vision_tower.x": torch.ones(1)}), "vision_tower.x is not part of the model"),
        (lambda t: t.update({"model.norm.weight": torch.ones(7)}), r"norm.weight is \[7\], but the model wants \[64\]"),
        (lambda t: t["model.norm.weight"].__setitem__(3, torch.nan), "model.norm.weight holds NaN or infinity"),
        (lambda t: t["model.embed_tokens.weight"].__setitem__((9, 3), -torch.inf), "holds NaN or infinity"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int64)}), "wants a floating-point tensor"),
        (
            lambda t: t.update({k.replace("q_proj", "x_proj"): t.pop(k) for k in list(t) if "0.self_attn.q_proj" in k}),
            "x_proj is packed, but the model has no linear of that name",
        ),
        (
            lambda t: t.update({k.replace("gate", "down"): t[k].clone() for k in list(t) if "0.mlp.gate_proj" in k}),
            r"down_proj is \[96, 64\], but the model wants \[64, 96\]",
        ),
    ],
)
def test_weights_that_do_not_fit_the_config(
    edit: Callable[[dict[str, Tensor]], Any], message: str, gemma: Path, tmp_path: Path
) -> None:
    path = _edited(gemma, tmp_path / "edited", edit)
    with pytest.raises(CheckpointError, match=message) as caught:
        dq_runtime.load(path, "cpu")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tied_head_may_be_stored_but_does_not_count(gemma: Path, tmp_path: Path) -> None:
    path = _edited(gemma, tmp_path / "head", lambda t: t.update({"lm_head.weight": torch.zeros(VOCABULARY, 64)}))
    torch.testing.assert_close(decoder_of(path).logits(tokens(1)), decoder_of(gemma).logits(tokens(1)))


# --- choice and imports ---------------------------------------------------------------------------------------------


def test_a_requested_decoder_never_falls_back(gemma: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(gemma)
    config = read_config(checkpoint.config)
    assert isinstance(config, DecoderConfig)
    weights = read_weights(checkpoint, config)
    monkeypatch.setenv("DQ_DECODER", "torch")
    assert isinstance(build_decoder(config, weights, "cpu", torch.float32), TorchDecoder)
    monkeypatch.setenv("DQ_DECODER", "abacus")
    with pytest.raises(BackendError, match=r"DQ_DECODER='abacus' is not a decoder; known: .*torch"):
        build_decoder(config, weights, "cpu", torch.float32)
    monkeypatch.setenv("DQ_DECODER", "torch")
    monkeypatch.setattr(TorchDecoder, "refusal", staticmethod(lambda *_: "it is Sunday"))
    with pytest.raises(BackendError, match="no decoder can run this gemma3_text model on cpu: torch: it is Sunday"):
        build_decoder(config, weights, "cpu", torch.float32)


def test_generating_does_not_import_transformers(packed_model: Path) -> None:
    """Importing transformers takes longer than the whole answer of a small model."""
    code = f"""
import sys
from dq_runtime.cli import main
assert main(["generate", {str(packed_model)!r}, "Anna", "--max-tokens", "3", "--device", "cpu", "--chat"]) == 0
print(sorted({{"transformers", "matplotlib", "huggingface_hub", "datasets"}} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        check=False,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
