"""The vLLM plugin on a fake of vLLM's interface: rows and columns of every rank, refusals, its cost without vLLM."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_fakes
from torch import Tensor
from vllm_fakes import LinearBase, ParallelLMHead, UnquantizedLinearMethod

from dq_runtime.errors import CheckpointError
from dq_runtime.packing import PackedWeight, pack_codes
from dq_runtime.packing.checkpoint import packed_tensors
from dq_runtime.packing.quant_config import Scheme, to_config

ROOT = Path(__file__).parents[2]
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
ATTENTION = "model.layers.0.self_attn"


@pytest.fixture
def table_config(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """TableConfig as it is registered with the fake, which is gone afterwards."""
    for name, module in vllm_fakes.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    import dq_runtime.vllm_plugin

    dq_runtime.vllm_plugin.register()
    dq_runtime.vllm_plugin.register()
    yield vllm_fakes.REGISTERED.pop("dq")
    for name in ("config", "linear"):
        del sys.modules[f"dq_runtime.vllm_plugin.{name}"]


def weight(form: str, n: int, k: int, group: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> PackedWeight:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), generator=draw, dtype=torch.uint8)
    scale = (torch.rand(n, 1 if group == -1 else k // group, generator=draw) + 0.1).to(dtype)
    return PackedWeight(pack_codes(codes, 4), scale, None, 4, k, form)


def stored(w: PackedWeight) -> dict[str, Tensor]:
    """The tensors of a layer on disk, by their last name."""
    return {name.rpartition(".")[2]: tensor for name, tensor in packed_tensors("x", w).items()}


def config_of(table_config: Any, schemes: dict[str, Scheme], dense: tuple[str, ...] = ()) -> Any:
    config = table_config.from_config(to_config(schemes, dense))
    config.packed_modules_mapping = FUSED
    return config


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("form", "group", "dtype"),
    [("nf4", 32, torch.bfloat16), ("fp4", 16, torch.float16), ("nf4", -1, torch.float16)],
)
def test_every_rank_multiplies_its_rows_and_columns(
    form: str, group: int, dtype: torch.dtype, ranks: int, table_config: Any
) -> None:
    k, sizes = 96 if group == -1 else 128, [24, 8, 8]
    config = config_of(table_config, {f"{ATTENTION}.{name}_proj": Scheme(4, group, True, form) for name in "qkvo"})
    members = [weight(form, n, k, group, seed, dtype) for seed, n in enumerate(sizes)]
    x = torch.randn(5, k, generator=torch.Generator().manual_seed(9))
    bias = torch.arange(sum(sizes), dtype=torch.float32)
    parts = []
    for rank in range(ranks):
        layer = LinearBase(config, f"{ATTENTION}.qkv_proj", k, sizes, rank, ranks)
        layer.load_all([stored(w) for w in members])
        assert not list(layer.parameters()), "what was loaded is held once"
        parts.append(layer(x).split([n // ranks for n in sizes], dim=-1))
    got = torch.cat([torch.cat([part[i] for part in parts], -1) for i in range(3)], -1)
    dense = torch.cat([w.decode() for w in members])
    torch.testing.assert_close(got, x @ dense.T, rtol=1e-5, atol=1e-4)
    if ranks == 1:
        torch.testing.assert_close(layer(x, bias), x @ dense.T + bias, rtol=1e-5, atol=1e-4)
    w = weight(form, 20, k, group, 7, dtype)
    total = torch.zeros(5, 20)
    for rank, columns in enumerate(x.chunk(ranks, -1)):
        layer = LinearBase(config, f"{ATTENTION}.o_proj", k, [20], rank, ranks, row=True)
        layer.load_all([stored(w)])
        total += layer(columns)
    torch.testing.assert_close(total, x @ w.decode().T, rtol=1e-5, atol=1e-4)


def test_activations_of_sixteen_bits_and_graphs(table_config: Any) -> None:
    config = config_of(table_config, {"a": Scheme(4, 32, True, "nf4")})
    layer, w = LinearBase(config, "a", 64, [24]), weight("nf4", 24, 64, 32, 0)
    layer.load_all([stored(w)])
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), x.bfloat16().float() @ w.decode().T, rtol=1e-2, atol=5e-2)
    with torch.no_grad():
        whole = torch.compile(layer, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(whole, x @ w.decode().T, rtol=1e-5, atol=1e-4)


def test_what_is_dense_stays_so_and_what_is_no_linear_is_not_ours(table_config: Any) -> None:
    config = config_of(table_config, {f"{ATTENTION}.q_proj": Scheme(4, 32, True, "nf4")}, ("lm_head", "a.o_proj"))
    assert isinstance(config.get_quant_method(LinearBase.__new__(LinearBase), "a.o_proj"), UnquantizedLinearMethod)
    assert config.get_quant_method(ParallelLMHead(), "lm_head") is None
    assert config.get_quant_method(torch.nn.Embedding(2, 2), "model.embed_tokens") is None
    with pytest.raises(CheckpointError, match=r"lm_head is packed.*--override 'lm_head=dense'"):
        config_of(table_config, {"a": Scheme(4, 32, True, "nf4")}).get_quant_method(ParallelLMHead(), "lm_head")

    class Mapper:
        def apply_list(self, names: list[str]) -> list[str]:
            return [f"language_model.{name}" for name in names]

    config.apply_vllm_mapper(Mapper())
    assert config.scheme_of("language_model.a.o_proj") is None


def test_what_vllm_would_compute_wrongly_is_refused_in_a_sentence(table_config: Any) -> None:
    nf4, finer = Scheme(4, 64, True, "nf4"), Scheme(4, 32, True, "nf4")
    mixed = config_of(
        table_config, {f"{ATTENTION}.q_proj": nf4, f"{ATTENTION}.k_proj": nf4, f"{ATTENTION}.v_proj": finer}
    )
    with pytest.raises(
        CheckpointError, match=r"its members differ \(q_proj: nf4 groups of 64.*v_proj: nf4 groups of 32"
    ):
        LinearBase(mixed, f"{ATTENTION}.qkv_proj", 64, [8, 8, 8])
    half = config_of(table_config, {"mlp.gate_proj": nf4}, ("mlp.up_proj",))
    with pytest.raises(CheckpointError, match="gate_proj: nf4 groups of 64, up_proj: dense"):
        LinearBase(half, "mlp.gate_up_proj", 64, [8, 8])
    plain = config_of(table_config, {"a": nf4})
    with pytest.raises(CheckpointError, match=r"a: 32 of 64 inputs a rank are no whole groups of 64; serve with fewer"):
        LinearBase(plain, "a", 64, [8], 0, 2, row=True)
    rows = config_of(table_config, {"a": Scheme(4, -1, True, "nf4")})
    with pytest.raises(CheckpointError, match="20 of 40 inputs a rank are no whole words of 8 codes"):
        LinearBase(rows, "a", 40, [8], 0, 2, row=True)
    layer = LinearBase(mixed.__class__.from_config(to_config({"a": nf4}, [])), "a", 64, [8, 8])
    with pytest.raises(CheckpointError, match="a member of the matrix is missing"):
        layer.load_all([stored(weight("nf4", 8, 64, 64, 0))])
    long = stored(weight("nf4", 8, 64, 64, 0)) | {"weight_scale": torch.full((8, 1), 1 / 3)}
    with pytest.raises(CheckpointError, match="scales need more than 16 bits"):
        LinearBase(plain, "a", 64, [8]).load_all([long])
    with pytest.raises(CheckpointError, match="transposed"):
        table_config.from_config(to_config({"a": Scheme(4, 64, True)}, [], transposed=True))


def test_vllm_finds_us_and_nothing_is_paid_without_it(table_config: Any) -> None:
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    module, _, name = stated["dq"].partition(":")
    assert callable(getattr(import_module(module), name))
    config = config_of(table_config, {"a": Scheme(4, 64, True, "nf4")})
    assert config.get_name() == "dq"
    assert torch.bfloat16 in config.get_supported_act_dtypes()
    assert (config.get_min_capability(), config.get_config_filenames()) == (80, [])
    code = "import sys, dq_runtime.vllm_plugin; print(sorted({'vllm', 'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
