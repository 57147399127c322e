"""The native passes between a layer's products against autograd in float64, on every instruction set of this CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import build_tiny_model
from students import student_model
from torch import Tensor
from torch.nn import functional

from dq_runtime.backends import training
from dq_runtime.backends.layers_native import Heads
from dq_runtime.backends.training_native import NativeTraining
from dq_runtime.modules.fused_layers import FusedLayers
from dq_runtime.modules.layer_ops import add_norm, attention, gated
from dq_runtime.runtime.dense import load_dense

pytestmark = pytest.mark.skipif(os.environ.get("DQ_NATIVE") == "0", reason="DQ_NATIVE=0: built without the extension")

OPS = NativeTraining().layers
DTYPES = [torch.float32, torch.bfloat16]
U = 2.0**-24  # half an eps of float32


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def leaves(*tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Copies to differentiate: as they are and in float64."""
    return [t.clone().requires_grad_() for t in tensors], [t.double().requires_grad_() for t in tensors]


def agree(found: Tensor | None, expected: Tensor | None, terms: float, size: float = 0.0) -> None:
    """Within ``terms`` float32 roundings of the largest entry (or ``size``), and one to the dtype of what was found."""
    assert found is not None
    assert expected is not None
    largest = max(float(expected.detach().abs().max()), size)
    bound = terms * U * largest + torch.finfo(found.dtype).eps / 2 * expected.abs()
    assert bool(((found.double() - expected).abs() <= bound).all())


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and workspaces begin as NaN: whatever is not written shows."""
    assert OPS is not None
    empty, like = torch.empty, torch.empty_like

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: make(*args, **kwargs).fill_(torch.nan)

    fake = SimpleNamespace(**vars(torch))
    fake.empty, fake.empty_like = poisoned(empty), poisoned(like)
    monkeypatch.setattr("dq_runtime.backends.layers_native.torch", fake)
    OPS._local.__dict__.clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 17), (65, 576), (2, 2048)])
def test_add_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    """A sum over the row carries 64 roundings before it goes to float64; the rest is some ten operations."""
    x, delta = 3 * normal(rows, width, seed=0), normal(rows, width, seed=1, dtype=dtype)
    weight, eps = 1 + 0.1 * normal(width, seed=2), 1e-5
    grads = normal(rows, width, seed=3), normal(rows, width, seed=4, dtype=dtype)
    for with_delta in (True, False):
        ours, exact = leaves(x, delta)
        total, out = add_norm(ours[0], ours[1] if with_delta else None, weight, eps, dtype, OPS)
        expected = exact[0] + exact[1] if with_delta else exact[0] * 1
        norm = weight.double() * expected * torch.rsqrt(expected.square().mean(-1, keepdim=True) + eps)
        assert (total.dtype, out.dtype) == (torch.float32, dtype)
        agree(total, expected, 2)
        agree(out, norm, 100)
        ((total * grads[0]).sum() + (out * grads[1]).sum().float()).backward()
        ((expected * grads[0].double()).sum() + (norm * grads[1].double()).sum()).backward()
        agree(ours[0].grad, exact[0].grad, 300, size=4 / float(expected.detach().square().mean(-1).min()) ** 0.5)
        if with_delta:
            agree(ours[1].grad, exact[1].grad, 300, size=4 / float(expected.detach().square().mean(-1).min()) ** 0.5)


def test_a_norm_whose_sum_or_out_is_not_used() -> None:
    """Either gradient may be missing."""
    x, delta, weight = normal(5, 40, seed=0), normal(5, 40, seed=1), normal(40, seed=2)
    for used in range(2):
        ours, exact = leaves(x, delta)
        add_norm(ours[0], ours[1], weight, 1e-5, torch.float32, OPS)[used].sum().backward()
        total = exact[0] + exact[1]
        norm = weight.double() * total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5)
        (total, norm)[used].sum().backward()
        for a, b in zip(ours, exact, strict=True):
            agree(a.grad, b.grad, 300, size=10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (70, 1536)])
def test_gated(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate, up, grad = (4 * normal(*shape, seed=s, dtype=dtype) for s in range(3))
    ours, exact = leaves(gate, up)
    out = gated(*ours, OPS)
    expected = functional.silu(exact[0]) * exact[1]
    agree(out, expected, 30)
    out.backward(grad)
    expected.backward(grad.double())
    for a, b in zip(ours, exact, strict=True):
        agree(a.grad, b.grad, 60)


def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x [heads, M, D] as transformers turns it."""
    low, high = x.chunk(2, -1)
    return x * cosine + torch.cat((-high, low), -1) * sine


def plain_attention(q: Tensor, k: Tensor, v: Tensor, cosine: Tensor, sine: Tensor, heads: Heads) -> Tensor:
    """The definition, in the dtype of q."""
    m = q.shape[0]
    q, k, v = (t.view(m, -1, heads.dim).transpose(0, 1) for t in (q, k, v))
    group = heads.heads // heads.key_heads
    k, v = turned(k, cosine, sine).repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = turned(q, cosine, sine) @ k.transpose(1, 2) * heads.scale
    scores = scores.masked_fill(torch.ones(m, m, dtype=torch.bool).triu(1), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).reshape(m, -1)


CASES = [(1, 1, 1, 32), (5, 4, 2, 32), (64, 2, 1, 64), (65, 9, 3, 64), (200, 3, 3, 96), (130, 2, 1, 256)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "heads", "key_heads", "dim"), CASES)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.usefixtures("one_thread")
def test_attention(m: int, heads: int, key_heads: int, dim: int, threads: int, dtype: torch.dtype) -> None:
    """A score is a sum of D products (D roundings of its size, here up to 8), an output one of up to M; gradients are
    sums of those over M queries and the group. Errors of independent roundings add up as roots."""
    torch.set_num_threads(threads)
    shape = Heads(heads, key_heads, dim, 1.5 * dim**-0.5)
    q, k, v = (normal(m, h * dim, seed=s, dtype=dtype) for s, h in enumerate((heads, key_heads, key_heads)))
    grad = normal(m, heads * dim, seed=4, dtype=dtype)
    cosine, sine = normal(m, dim, seed=5), normal(m, dim, seed=6)
    ours, exact = leaves(q, k, v)
    out = attention(*ours, cosine, sine, shape, OPS)
    expected = plain_attention(*exact, cosine.double(), sine.double(), shape)
    terms = 30 * (dim**0.5 + m**0.5)
    agree(out, expected, terms)
    out.backward(grad)
    # delta is taken from the output as it was given on: in bfloat16 its rounding, 2^-9 of each, reaches the scores.
    expected.backward(grad.double())
    rounded = 0.0 if dtype is torch.float32 else 2.0**-9 * dim**0.5 / U
    # Of one token every gradient to a score is a difference of equals, of the size of the gradients to v.
    assert exact[2].grad is not None
    size = float(exact[2].grad.abs().max())
    for a, b in zip(ours, exact, strict=True):
        agree(a.grad, b.grad, 4 * terms + rounded, size)


@pytest.mark.usefixtures("one_thread")
def test_attention_is_the_same_for_any_number_of_threads() -> None:
    shape = Heads(9, 3, 64, 0.125)
    q, k, v = (normal(150, h * 64, seed=h) for h in (9, 3, 3))
    cosine, sine, grad = normal(150, 64, seed=5), normal(150, 64, seed=6), normal(150, 576, seed=7)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        ours = [t.clone().requires_grad_() for t in (q, k, v)]
        out = attention(*ours, cosine, sine, shape, OPS)
        out.backward(grad)
        results.append([out, *(t.grad for t in ours)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_nan_reaches_the_output() -> None:
    """Else the loop would go on with it."""
    shape, bad = Heads(1, 1, 32, 1.0), normal(70, 32, seed=0)
    bad[3, 5] = torch.nan
    fine, zeros = normal(70, 32, seed=1), torch.zeros(70, 32)
    for at in range(3):
        given = [fine, fine, fine]
        given[at] = bad
        out = attention(*given, zeros + 1, zeros, shape, OPS)
        assert bool(out[3].isnan().any())
    assert bool(gated(bad, fine, OPS).isnan()[3, 5])
    assert bool(add_norm(bad, None, torch.ones(32), 1e-5, torch.float32, OPS)[1][3].isnan().all())


def test_every_instruction_set() -> None:
    """The same tests in a process whose kernels are another set's."""
    if os.environ.get("DQ_ISA"):
        return
    for isa in ("scalar", "avx2"):
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
        chosen = "norm or gated or attention or nan"
        done = subprocess.run(
            [*command, "-k", chosen], capture_output=True, text=True, env={**os.environ, "DQ_ISA": isa}, check=False
        )
        if "this CPU lacks" in done.stdout or "not compiled in" in done.stdout:
            continue
        assert done.returncode == 0, done.stdout[-3000:]
        assert "passed" in done.stdout


@pytest.fixture(scope="module")
def wide_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose heads are wide enough for our attention."""
    changes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    return build_tiny_model(tmp_path_factory.mktemp("wide_heads"), **changes)


@pytest.fixture
def _fresh() -> Iterator[None]:
    """Forget which implementation was chosen, before and after."""
    training._choose.cache_clear()
    yield
    training._choose.cache_clear()


def found(model: Any) -> FusedLayers:
    assert OPS is not None
    return FusedLayers(model, OPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("_fresh")
def test_a_step_is_as_near_to_float32_as_the_plain_one(
    wide_heads: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """The gradients of every x. In float32 they differ by the order of sums; in bfloat16 ours may not be farther from
    the plain float32 step than the plain bfloat16 step is, but for the luck of the roundings (a fifth)."""
    windows = torch.randint(3, 260, (1, 70), generator=torch.Generator().manual_seed(0))

    def step(name: str, dtype: torch.dtype) -> tuple[float, Tensor]:
        monkeypatch.setenv("DQ_TRAINING", name)
        student = student_model(wide_heads, windows)
        student.compute_dtype = dtype
        student.begin()
        with torch.no_grad():
            for i, layer in enumerate(student.layers.values()):
                layer.x.copy_(torch.rand(layer.x.shape, generator=torch.Generator().manual_seed(i)) * layer.free)
        loss = student.kl_backward(0)
        used = student._fused_layers
        assert (used is not None and len(used.forwards) > 0) == (name == "native")
        grads = [layer.x.grad for layer in student.layers.values()]
        return float(loss), torch.cat([grad.flatten() for grad in grads if grad is not None])

    loss, exact = step("reference", torch.float32)
    our_loss, ours = step("native", dtype)
    plain_loss, plain = step("reference", dtype)
    if dtype is torch.float32:
        assert float((ours - exact).norm() / exact.norm()) < 1e-4
        assert our_loss == pytest.approx(loss, rel=1e-4)
    else:
        assert float((ours - exact).norm()) <= 1.2 * float((plain - exact).norm())
        assert abs(our_loss - loss) <= 2 * abs(plain_loss - loss) + 2.0**-9 * loss


def test_which_layers_are_taken(wide_heads: Path, tiny_model: Path) -> None:
    """By name and by probe: another activation or a norm of another kind looks the same and is not."""
    plain = load_dense(str(wide_heads)).model.requires_grad_(False).eval()
    layers = len(plain.model.layers)
    assert len(found(plain).forwards) == layers
    assert not found(load_dense(str(tiny_model)).model.requires_grad_(False).eval()).forwards  # its heads are narrow
    plain.model.layers[0].mlp.act_fn = torch.nn.GELU()
    assert len(found(plain).forwards) == layers - 1
    norm = plain.model.layers[1].input_layernorm
    norm.forward = lambda x: x / x.square().mean(-1, keepdim=True).sqrt() * (1 + norm.weight)
    assert len(found(plain).forwards) == layers - 2


def test_layers_are_our_own_only_within(wide_heads: Path) -> None:
    model = load_dense(str(wide_heads)).model.requires_grad_(False).eval()
    layers = found(model)
    tokens = torch.arange(3, 73)[None]
    with torch.no_grad():
        before = model(input_ids=tokens, use_cache=False).logits
        with layers.installed():
            within = model(input_ids=tokens, use_cache=False).logits
            padded = torch.ones_like(tokens)
            padded[0, :3] = 0
            masked = model(input_ids=tokens, attention_mask=padded, use_cache=False).logits
            pair = model(input_ids=tokens.repeat(2, 1), use_cache=False).logits
            cached = model(input_ids=tokens, use_cache=True).logits
        assert torch.equal(model(input_ids=tokens, use_cache=False).logits, before)
        assert torch.equal(model(input_ids=tokens, attention_mask=padded, use_cache=False).logits, masked)
    assert not any("forward" in layer.__dict__ for layer in model.modules())
    assert not torch.equal(within, before)  # another order of sums
    for other in (within, pair[1:], cached):
        torch.testing.assert_close(other, before, rtol=1e-4, atol=1e-4)
