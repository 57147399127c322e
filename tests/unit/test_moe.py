"""Packed mixtures of experts: the definition, the operators, the modules, checkpoints of single experts, the kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dq_runtime
from dq_runtime.backends import dispatch, reference
from dq_runtime.backends.reference import Reference
from dq_runtime.backends.triton_cuda import TritonCuda
from dq_runtime.errors import BackendError, CheckpointError, DQError
from dq_runtime.modules.moe_ops import PackedExperts, qmm_grouped, qmm_grouped_prepared
from dq_runtime.modules.quant_experts import ExpertLinear, QuantExperts
from dq_runtime.packing import PackedWeight, pack_codes
from dq_runtime.packing.checkpoint import packed_tensors, write_json, write_weights
from dq_runtime.packing.quant_config import Scheme, to_config

ROOT = Path(__file__).resolve().parents[2]
EXPERTS, TOP_K = 4, 2
ROUTED = {  # 5 tokens; every expert in use, expert 1 in none, all tokens to expert 3
    "mixed": [[0, 3], [2, 1], [3, 0], [1, 3], [2, 0]],
    "skip": [[0, 3], [2, 3], [3, 0], [0, 3], [2, 0]],
    "one": [[3, 3]] * 5,
}


@pytest.fixture(autouse=True)
def _no_requested_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DQ_BACKEND", raising=False)


def experts_of(
    n: int, k: int, bits: int = 3, group: int = 32, symmetric: bool = True, seed: int = 0, count: int = EXPERTS
) -> list[PackedWeight]:
    """``count`` different weights [n, k] with values of about 0.1."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=generator)
        scale = ((torch.rand(n, k // group, generator=generator) + 0.5) * 0.4 / 2**bits).bfloat16()
        zero = torch.randint(0, 2**bits, scale.shape, dtype=torch.uint8, generator=generator)
        made.append(PackedWeight(pack_codes(codes, bits), scale, None if symmetric else zero, bits, k))
    return made


def tokens(count: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, k, generator=torch.Generator().manual_seed(count)).to(dtype)


def test_everything_the_interpreter_ran_is_right() -> None:
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    script = ROOT / "tests" / "gpu" / "test_moe_triton.py"
    done = subprocess.run(
        [sys.executable, script], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    verdicts = json.loads(done.stdout.splitlines()[-1])
    assert len(verdicts) > 10
    assert {name: verdict for name, verdict in verdicts.items() if verdict != "ok"} == {}


@pytest.mark.parametrize("per_pair", [False, True], ids=["x of tokens", "x of pairs"])
@pytest.mark.parametrize("routed", ROUTED)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_way_to_multiply_is_the_dense_product(bits: int, routed: str, per_pair: bool) -> None:
    """Definition, canonical and prepared, against float64. K additions in float32 in any order: K * 2^-24 of the sum of
    magnitudes, twice that where a backend rounds each product too."""
    k = 96
    experts = experts_of(50, k, bits, symmetric=bits != 3)
    expert_of = torch.tensor(ROUTED[routed]).reshape(-1)
    x = tokens(len(expert_of) if per_pair else 5, k)
    by_pair = x if per_pair else x.repeat_interleave(TOP_K, 0)
    dense = torch.stack([w.decode() for w in experts])[expert_of].double()
    want = (dense @ by_pair.double().unsqueeze(-1)).squeeze(-1)
    bound = 2 * k * 2.0**-24 * (dense.abs() @ by_pair.double().abs().unsqueeze(-1)).squeeze(-1)
    stacked = PackedExperts.stack(experts)
    linear = ExpertLinear(stacked)
    unprepared = linear(x, expert_of)
    linear.prepare(torch.float32)
    defined = reference.qmm_grouped(x, expert_of, EXPERTS, 50, lambda e, rows: Reference().qmm(rows, experts[e]))
    for y in (defined, unprepared, linear(x, expert_of)):
        assert y.shape == want.shape
        assert ((y - want).abs() <= bound).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_operators_pass_opcheck(symmetric: bool) -> None:
    experts = experts_of(10, 64, symmetric=symmetric)
    w, expert_of = PackedExperts.stack(experts), torch.tensor(ROUTED["mixed"]).reshape(-1)
    x = tokens(5, 64)
    torch.library.opcheck(
        torch.ops.dq_runtime.qmm_grouped.default, (x, w.packed, w.scale, w.zero, expert_of, w.bits, w.k)
    )
    ready = dispatch.prepare_experts(experts, x.dtype)
    if ready is None:
        pytest.skip("no backend here prepares weights")
    arguments = (
        x, list(ready.tensors), expert_of, EXPERTS, ready.backend, ready.n, ready.k, ready.bits, ready.group_size,
        symmetric, ready.x_dtype,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.dq_runtime.qmm_grouped_prepared.default, arguments)
    y = qmm_grouped_prepared(x, ready, EXPERTS, expert_of)
    torch.testing.assert_close(y, qmm_grouped(x, w, expert_of), rtol=1e-5, atol=1e-5)


def test_a_traced_layer_holds_the_operator() -> None:
    w, expert_of = PackedExperts.stack(experts_of(10, 64)), torch.tensor(ROUTED["mixed"]).reshape(-1)
    graphs = []

    def keep(graph: torch.fx.GraphModule, example: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x: qmm_grouped(x, w, expert_of), backend=keep, fullgraph=True)
    x = tokens(5, 64)
    assert torch.equal(compiled(x), qmm_grouped(x, w, expert_of))
    assert "dq_runtime.qmm_grouped" in graphs[0].code


def test_what_cannot_be_routed_is_refused() -> None:
    w = PackedExperts.stack(experts_of(10, 64))
    for number in (-1, EXPERTS):
        with pytest.raises(BackendError, match=f"routed to expert {number}, but experts are numbered 0 to 3"):
            qmm_grouped(tokens(1, 64), w, torch.tensor([0, number]))
    with pytest.raises(BackendError, match="3 rows of x do not divide 10 pairs"):
        qmm_grouped(tokens(3, 64), w, torch.zeros(10, dtype=torch.int64))
    assert qmm_grouped(tokens(0, 64), w, torch.zeros(0, dtype=torch.int64)).shape == (0, 10)


def test_experts_must_be_packed_alike_and_fit() -> None:
    first, second = experts_of(10, 64)[:1], experts_of(10, 64, bits=4)[:1]
    with pytest.raises(ValueError, match="must be packed alike, got 2 ways"):
        PackedExperts.stack(first + second)
    with pytest.raises(ValueError, match="do not fit together"):
        QuantExperts(experts_of(128, 64), experts_of(64, 32), nn.Identity())


def test_only_what_the_kernels_stream_is_prepared_for_triton() -> None:
    assert TritonCuda().prepare_experts(experts_of(10, 64), torch.float32) is None
    assert TritonCuda().prepare_experts(experts_of(10, 64, group=16), torch.bfloat16) is None


def _configs() -> dict[str, Callable[[], Any]]:
    common: dict[str, Any] = {
        "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_experts_per_tok": TOP_K, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0,
        "pad_token_id": 0,
    }  # fmt: skip

    def mixtral() -> Any:
        from transformers import MixtralConfig

        return MixtralConfig(**common, intermediate_size=96, num_local_experts=EXPERTS)

    def qwen3_moe() -> Any:
        from transformers import Qwen3MoeConfig

        # Layer 0 is an ordinary MLP, as some of these models have it.
        return Qwen3MoeConfig(
            **common, intermediate_size=128, moe_intermediate_size=96, num_experts=EXPERTS, head_dim=16,
            mlp_only_layers=[0], decoder_sparse_step=1,
        )  # fmt: skip

    def olmoe() -> Any:
        from transformers import OlmoeConfig

        return OlmoeConfig(**common, intermediate_size=96, num_experts=EXPERTS)

    return {"mixtral": mixtral, "qwen3-moe": qwen3_moe, "olmoe": olmoe}


def _stored_layers(model: Any, mixtral: bool, scheme: Scheme) -> Iterator[tuple[str, PackedWeight]]:
    """The single experts of a model by their names in a checkpoint; the model gets the values they decode to."""
    for name, module in model.named_modules():
        if not name.endswith(".experts"):
            continue
        _, hidden, inner = module.down_proj.shape
        stored = name.replace(".mlp.", ".block_sparse_moe.") if mixtral else name
        kind = {"bits": scheme.bits, "group": scheme.group_size, "symmetric": scheme.symmetric}
        gate, up, down = (
            experts_of(n, k, seed=i + len(name), **kind)
            for i, (n, k) in enumerate(((inner, hidden), (inner, hidden), (hidden, inner)))
        )
        roles = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
        for e in range(EXPERTS):
            for role, w in zip(roles, (gate[e], up[e], down[e]), strict=True):
                yield f"{stored}.{e}.{role}", w
            with torch.no_grad():
                module.gate_up_proj[e] = torch.cat([gate[e].decode(), up[e].decode()])
                module.down_proj[e] = down[e].decode()


def _write(directory: Path, config: Any, mixtral: bool, scheme: Scheme) -> tuple[Any, dict[str, Tensor]]:
    """A random model whose experts are packed one by one, as llm-compressor stores them, and the tensors written."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 6  # else logits are flat, and routing hardly depends on the token
    tensors: dict[str, Tensor] = {}
    layers = dict(_stored_layers(model, mixtral, scheme))
    for name, w in layers.items():
        tensors |= packed_tensors(name, w)
    for name, tensor in model.state_dict().items():
        if "experts." not in name:
            stored = name.replace(".mlp.gate.", ".block_sparse_moe.gate.") if mixtral else name
            tensors[stored] = tensor.clone()
    settings = json.loads(model.config.to_json_string(use_diff=False))
    settings |= {"architectures": [type(model).__name__], "dtype": "float32"}
    settings["quantization_config"] = to_config(dict.fromkeys(layers, scheme), ())
    directory.mkdir()
    write_json(directory / "config.json", settings)
    write_weights(directory, tensors)
    return model, tensors


@pytest.mark.parametrize("architecture", _configs())
@pytest.mark.parametrize("scheme", [Scheme(3, 32, True), Scheme(4, 32, False)], ids=["3bit-sym", "4bit-asym"])
def test_a_checkpoint_of_single_experts_has_the_logits_of_the_decoded_model(
    tmp_path: Path, architecture: str, scheme: Scheme
) -> None:
    model, tensors = _write(tmp_path / "out", _configs()[architecture](), architecture == "mixtral", scheme)
    if architecture == "mixtral":
        assert "model.layers.0.block_sparse_moe.experts.3.w2.weight_packed" in tensors
        assert "model.layers.0.block_sparse_moe.gate.weight" in tensors
    loaded = dq_runtime.load(tmp_path / "out", "cpu", exact=True)
    served = [m for m in loaded.model.modules() if isinstance(m, QuantExperts)]  # type: ignore[attr-defined]
    assert len(served) == (1 if architecture == "qwen3-moe" else 2)
    ids = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(input_ids=ids).logits
    assert want.std() > 0.1
    torch.testing.assert_close(loaded.logits(ids), want, rtol=1e-4, atol=1e-4)
    assert len(dq_runtime.generate(loaded, [1, 2, 3], max_tokens=4).tokens) > 0


def _without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {n: t for n, t in tensors.items() if not n.startswith(name)}


def test_damaged_experts_are_refused_in_one_sentence(tmp_path: Path) -> None:
    scheme = Scheme(3, 32, True)
    _, tensors = _write(tmp_path / "out", _configs()["olmoe"](), False, scheme)
    first = "model.layers.0.mlp.experts"
    short, extra = experts_of(64, 64, count=1)[0], experts_of(96, 64, count=1)[0]
    replaced = _without(tensors, f"{first}.2.up_proj") | packed_tensors(f"{first}.2.up_proj", short)
    for changed, message in (
        (_without(tensors, f"{first}.2.up_proj"), "has 4 experts, but the up weight of 2 is missing"),
        (replaced, r"up weight of expert 2 of .* is \[64, 64\], but the model wants \[96, 64\]"),
        (tensors | packed_tensors(f"{first}.7.up_proj", extra), "has 4 experts, but expert 7 is packed"),
        (tensors | packed_tensors("model.experts.0.up_proj", extra), "model has no such experts there"),
    ):
        write_weights(tmp_path / "out", changed)
        with pytest.raises(CheckpointError, match=message) as caught:
            dq_runtime.load(tmp_path / "out", "cpu")
        assert str(tmp_path / "out") in str(caught.value)
        assert "\n" not in str(caught.value)


def test_experts_of_another_kind_are_refused() -> None:
    from dq_runtime.modules.quant_experts import place_experts

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.empty(1, 128, 64))
            self.down_proj = nn.Parameter(torch.empty(1, 64, 64))
            self.is_transposed = True
            self._apply_gate = nn.Identity()

    model = nn.ModuleDict({"experts": nn.ModuleDict({"experts": Experts()})})
    packed = {"experts.experts.0.up_proj": experts_of(64, 64)[0], "other": experts_of(64, 64)[1]}
    with pytest.raises(CheckpointError, match=r"not served packed \(is_transposed=True\)"):
        place_experts(model, packed, "here")
    assert list(packed) == ["other"]


def test_prepared_experts_say_that_the_canonical_weights_are_gone() -> None:
    experts = QuantExperts(experts_of(128, 64), experts_of(64, 64), lambda h: h[:, :64] * h[:, 64:])
    x, index = tokens(5, 64), torch.tensor(ROUTED["mixed"])
    share = torch.rand(5, TOP_K, generator=torch.Generator().manual_seed(0))
    before = experts(x, index, share)
    assert experts.state_dict() == {}
    experts.prepare(torch.float32)
    torch.testing.assert_close(experts(x, index, share), before, rtol=1e-4, atol=1e-4)
    if experts.down_proj.prepared is not None:
        with pytest.raises(DQError, match="load again"):
            _ = experts.down_proj.packed
    assert "experts=4, in_features=64, out_features=128, bits=3, group_size=32" in repr(experts)
