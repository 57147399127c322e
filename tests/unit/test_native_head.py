"""The head in two planes (csrc/cpu/head.h): what is stored, which rows are refined, and that they are."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import test_native_decoder
import torch
from test_native_decoder import config, native, weights
from torch import Tensor

from dq_runtime.backends import cpu_prepared
from dq_runtime.backends.cpu_prepared import Arena, Part, plan, prepare, qmm_prepared
from dq_runtime.packing.bridge import host_of
from dq_runtime.runtime.decoder import Linear
from dq_runtime.runtime.decoder.torch_decoder import TorchDecoder

pytestmark = [
    pytest.mark.skipif(os.environ.get("DQ_NATIVE") == "0", reason="DQ_NATIVE=0: built without the extension"),
    pytest.mark.usefixtures("one_thread"),
]

# csrc/cpu/head.h: rows refined of n at most, and how far below the largest.
REACH = 12.0


@pytest.fixture(autouse=True)
def small_heads_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_prepared, "PLANES_FROM", 64)


def most_refined(n: int) -> int:
    return min(n, max(64, n // 32))


def planes(head: Tensor) -> tuple[Tensor, Tensor]:
    """The upper plane's values and both planes' together, float64 [n, k], as prepared from ``head``."""
    n, k = head.shape
    layout = plan([Part(host_of(head))], n, exact=False, head=True)
    assert layout.storage == 6
    assert layout.rest == n * k // 64 * 20
    ready = prepare(layout, Arena(layout.nbytes), 1)
    upper = torch.from_numpy(qmm_prepared(np.eye(k, dtype=np.float32), ready, True, 1)).T.double()
    _, scale, rest = ready.arrays
    lines = torch.from_numpy(rest.copy()).view(n, k // 64, 20)
    pieces = lines[:, :, None, :16]
    lower = (pieces >> torch.tensor([0, 2, 4, 6]).view(4, 1) & 3).reshape(n, k).double() - 1.5
    bits = torch.from_numpy(scale.view(np.int16).copy()).view(torch.bfloat16).double()
    steps = bits.view(-1, k // 32, 16).transpose(1, 2).reshape(-1, k // 32)[:n] / 4
    copied = lines[:, :, 16:].contiguous().view(torch.bfloat16).view(n, -1)
    assert (copied.double() == 4 * steps).all()
    return upper, upper + lower * steps.repeat_interleave(32, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "k"), [(67, 64), (16, 192), (1, 128)])
def test_planes(n: int, k: int, dtype: torch.dtype) -> None:
    """Both planes are within half a step of 1/125 of a group's largest magnitude, the upper one within two."""
    head = torch.randn(n, k, generator=torch.Generator().manual_seed(n)).to(dtype)
    head[0, :32] = 0
    upper, both = planes(head)
    step = head.double().view(n, -1, 32).abs().amax(-1).repeat_interleave(32, 1) / 125 * (1 + 2**-7)
    assert ((both - head.double()).abs() <= 0.5001 * step).all()
    assert ((upper - head.double()).abs() <= 2.0001 * step).all()
    assert ((upper - head.double()).abs() > 0.6 * step).any(), "the upper plane alone is coarser"


def test_other_columns_stay_in_one_plane(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_prepared, "PLANES_FROM", 128)
    for k, storage in ((64, 8), (96, 8), (160, 8), (128, 6), (192, 6)):
        assert plan([Part(host_of(torch.zeros(16, k).bfloat16()))], 16, False, head=True).storage == storage
    assert plan([Part(host_of(torch.zeros(16, 128).bfloat16()))], 16, True, head=True).storage == cpu_prepared.FLOAT


@pytest.mark.parametrize("spread", [0.1, 0.3])
@pytest.mark.parametrize("vocab", [211, 5000])
def test_the_largest_logits_are_refined(vocab: int, spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same model with both planes, and with the upper one alone: the first rows by size are those of both
    planes, the last those of one. The logits' own spread is 13 nats times ``spread``."""
    monkeypatch.setattr(test_native_decoder, "HIDDEN", 128)
    monkeypatch.setattr(test_native_decoder, "VOCAB", vocab)
    c, w = replace(config(), tied_head=False), weights()
    head = (torch.randn(vocab, 128, generator=torch.Generator().manual_seed(2)) * spread).bfloat16()
    upper, both = planes(head)
    tokens = torch.tensor([[3, 200, 5, 11, 7]])
    decoder = native(c, replace(w, head=Linear(head, None)))
    cache = decoder.start(1, 5)
    found = torch.stack([decoder.step(tokens[:, i : i + 1], cache)[0] for i in range(5)])[1:]
    fine, coarse = (
        TorchDecoder(c, replace(w, head=Linear(values.float(), None)), "cpu", torch.float32, True).logits(tokens)[0, 1:]
        for values in (both, upper)
    )
    most, refined, left = most_refined(vocab), 0, 0
    for logits, exact, rough in zip(found, fine, coarse, strict=True):
        order = rough.argsort(descending=True)
        near, far = (logits - exact).abs(), (logits - rough).abs()
        # A third of what lies between the two: activations of 15 bits and float32 sums move a logit far less.
        within = order[rough[order] > rough.max() - REACH + 1][: most // 3]
        assert near[within].sum() < far[within].sum() / 3 or len(within) < 8
        refined += len(within)
        beyond = order[most + 16 :]
        assert len(beyond) == 0 or far[beyond].sum() < near[beyond].sum() / 3
        left += len(beyond)
    assert refined > 20
    assert left > 400


def test_a_head_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """No logit stands out, and none is moved."""
    monkeypatch.setattr(test_native_decoder, "HIDDEN", 128)
    c, w = replace(config(), tied_head=False), weights()
    head = Linear(torch.zeros_like(w.embedding), None)
    assert (native(c, replace(w, head=head)).logits(torch.tensor([[1, 2]])) == 0).all()
