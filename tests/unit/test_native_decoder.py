"""The native decoder where it differs from the others: rounded activations, its cache, threads. What it must compute in
exact mode is asserted for every architecture in test_decoder.py."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dq_runtime.errors import SpecError
from dq_runtime.packing import PackedWeight, pack_codes
from dq_runtime.runtime.decoder import DecoderConfig, DecoderWeights, LayerWeights, Linear
from dq_runtime.runtime.decoder.architecture import LayerConfig
from dq_runtime.runtime.decoder.native_on_torch import NativeOnTorch
from dq_runtime.runtime.decoder.rope import Rope
from dq_runtime.runtime.decoder.torch_decoder import TorchDecoder

pytestmark = [
    pytest.mark.skipif(os.environ.get("DQ_NATIVE") == "0", reason="DQ_NATIVE=0: built without the extension"),
    pytest.mark.usefixtures("one_thread"),
]

HIDDEN, HEADS, KV_HEADS, DIM, INTERMEDIATE, VOCAB, LAYERS = 96, 6, 2, 16, 168, 211, 3


def config(window: int | None = None) -> DecoderConfig:
    layers = tuple(LayerConfig(window if i % 2 else None, Rope(DIM, 10000.0)) for i in range(LAYERS))
    return DecoderConfig(
        model_type="llama",
        hidden=HIDDEN,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=DIM,
        intermediate=INTERMEDIATE,
        vocab=VOCAB,
        layers=layers,
        eps=1e-5,
        activation="silu",
        norm_plus_one=False,
        sandwich_norms=False,
        qk_norm=False,
        qkv_bias=True,
        o_bias=False,
        mlp_bias=True,
        fused=False,
        tied_head=True,
        attention_scale=DIM**-0.5,
        attention_softcap=None,
        logit_softcap=None,
        embedding_scale=1.0,
        context_length=8192,
        nested=False,
    )


def weights(gate_bits: int = 4) -> DecoderWeights:
    """Random, with a q projection of other bits than k and v, and an intermediate size that fills no block."""
    g = torch.Generator().manual_seed(0)

    def packed(n: int, k: int, bits: int, group: int, bias: bool = False) -> Linear:
        codes = torch.randint(0, 2**bits, (n, k), generator=g, dtype=torch.uint8)
        scale = ((torch.rand(n, k // group, generator=g) + 0.5) * 2.0 / 2**bits * k**-0.5).bfloat16()
        values = torch.randn(n, generator=g) * 0.1 if bias else None
        return Linear(PackedWeight(pack_codes(codes, bits), scale, None, bits, k), values)

    def norm() -> Tensor:
        return 1 + 0.1 * torch.randn(HIDDEN, generator=g)

    layers = [
        LayerWeights(
            attention_norm=norm(),
            qkv=tuple(packed(h * DIM, HIDDEN, b, 32, True) for h, b in ((HEADS, 3), (KV_HEADS, 4), (KV_HEADS, 4))),
            q_norm=None,
            k_norm=None,
            o=packed(HIDDEN, HEADS * DIM, 4, 32),
            after_attention_norm=None,
            mlp_norm=norm(),
            gate_up=tuple(packed(INTERMEDIATE, HIDDEN, b, 32, True) for b in (gate_bits, 4)),
            down=packed(HIDDEN, INTERMEDIATE, 4, 56),
            after_mlp_norm=None,
        )
        for _ in range(LAYERS)
    ]
    embedding = torch.randn(VOCAB, HIDDEN, generator=g).bfloat16()
    return DecoderWeights(embedding, tuple(layers), norm(), Linear(embedding, None))


def native(c: DecoderConfig, w: DecoderWeights, exact: bool = False) -> NativeOnTorch:
    assert NativeOnTorch.refusal(c, w, "cpu", torch.float32, exact) is None
    return NativeOnTorch(c, w, "cpu", torch.float32, exact)


def divergence(expected: Tensor, actual: Tensor) -> float:
    """Mean KL per position, nats."""
    p, q = expected.double().log_softmax(-1), actual.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def ids(*shape: int) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("gate_bits", [2, 4])
def test_parts_of_different_bits_are_joined_exactly(gate_bits: int) -> None:
    c, w = config(), weights(gate_bits)
    expected = TorchDecoder(c, w, "cpu", torch.float32, True).logits(ids(2, 30))
    # 3 layers of float32 sums of up to 168 terms; logits are about 10.
    torch.testing.assert_close(native(c, w, exact=True).logits(ids(2, 30)), expected, rtol=1e-4, atol=1e-4)


def test_rounded_activations_stay_close() -> None:
    c, w = config(), weights()
    expected = TorchDecoder(c, w, "cpu", torch.float32, True).logits(ids(1, 200))
    assert divergence(expected, native(c, w).logits(ids(1, 200))) < 1e-3


def test_one_token_steps_round_hardly_at_all() -> None:
    """Generated tokens have 15-bit activations; what is left is the first token, the 8-bit head, the float16 cache."""
    c, w = config(), weights()
    tokens = ids(3, 40)
    expected = TorchDecoder(c, w, "cpu", torch.float32, True).logits(tokens)
    decoder = native(c, w)
    cache = decoder.start(3, 40)
    steps = [decoder.step(tokens[:, i : i + 1], cache) for i in range(40)]
    assert divergence(expected, torch.stack(steps, 1)) < 1e-4


@pytest.mark.parametrize("exact", [True, False])
def test_result_does_not_depend_on_threads(exact: bool) -> None:
    c, w = config(20), weights()
    decoder = native(c, w, exact)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        cache = decoder.start(2, 700)
        first = decoder.step(ids(2, 600), cache)
        found.append(torch.stack([first, *(decoder.step(ids(2, 1), cache) for _ in range(3))]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_sequences_of_different_lengths() -> None:
    c, w = config(), weights()
    decoder = native(c, w, exact=True)
    tokens = ids(2, 21)
    together = decoder.start(2, 64)
    decoder.step(tokens[:, :20], together)
    together.lengths[1] = 7  # as if the second sequence were shorter: what lies beyond is not seen
    logits = decoder.step(tokens[:, 20:], together)
    alone = decoder.start(1, 64)
    expected = decoder.step(torch.cat([tokens[1:, :7], tokens[1:, 20:]], 1), alone)
    torch.testing.assert_close(logits[1:], expected, rtol=1e-4, atol=1e-4)
    assert together.lengths.tolist() == [21, 8]


def test_rings_of_windowed_layers() -> None:
    """A capacity far beyond the window: the ring of windowed layers is overwritten many times, and is smaller."""
    c, w = config(window=24), weights()
    decoder = native(c, w, exact=True)
    tokens = ids(1, 1500)
    assert decoder.start(1, 8192).nbytes < native(config(), w, exact=True).start(1, 8192).nbytes * 0.8
    expected = TorchDecoder(c, w, "cpu", torch.float32, True).logits(tokens)
    cache = decoder.start(1, 1500)
    first = decoder.step(tokens[:, :1490], cache)
    torch.testing.assert_close(first, expected[:, 1489], rtol=1e-4, atol=1e-4)
    for i in range(1490, 1500):
        logits = decoder.step(tokens[:, i : i + 1], cache)
        torch.testing.assert_close(logits, expected[:, i], rtol=1e-4, atol=1e-4)


def test_bad_calls_change_nothing() -> None:
    c, w = config(), weights()
    decoder = native(c, w)
    cache = decoder.start(1, 8)
    decoder.step(ids(1, 5), cache)
    with pytest.raises(SpecError, match="holds 5 of 8 positions and cannot take 4 more"):
        decoder.step(ids(1, 4), cache)
    with pytest.raises(SpecError, match=r"expected token ids \[1, 1 or more\]"):
        decoder.step(ids(2, 1), cache)
    with pytest.raises(ValueError, match="token id 211 is outside the vocabulary"):
        decoder.step(torch.tensor([[VOCAB]]), cache)
    with pytest.raises(SpecError, match="batch and a capacity of at least 1"):
        decoder.start(0, 8)
    assert cache.lengths.tolist() == [5]


def test_refusals() -> None:
    c, w = config(), weights()
    for device, dtype, changed, reason in (
        ("cuda", torch.float32, c, "on the CPU only"),
        ("cpu", torch.bfloat16, c, "computes in float32"),
        ("cpu", torch.float32, replace(c, head_dim=24), "multiple of 16"),
    ):
        assert reason in str(NativeOnTorch.refusal(changed, w, device, dtype, False))
    dense = replace(w, head=Linear(torch.randn(VOCAB, HIDDEN), None))
    assert NativeOnTorch.refusal(c, dense, "cpu", torch.float32, False) is None
    assert "bfloat16 or float16" in str(NativeOnTorch.refusal(c, dense, "cpu", torch.float32, True))
