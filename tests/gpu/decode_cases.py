"""What the decode step's kernels must do, as checks that run on the chip and, on triton's interpreter, on the CPU.

Run as a script with TRITON_INTERPRET=1 it prints one verdict a check and case: the variable counts when @triton.jit
decorates, so tests/unit/test_decode_ops.py runs it in a subprocess. Each kernel is compared with its definition in
float64, on inputs and outputs inside guards of NaN.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROUNDOFF = 2.0**-24  # of float32
NAN = float("nan")


def random(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """Normal values inside a guard of NaN rows: what a kernel reads outside shows."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    outer = torch.full((shape[0] + 2, *shape[1:]), NAN, dtype=dtype, device=device)
    outer[1:-1] = torch.randn(shape, generator=generator).to(device, dtype)
    return outer[1:-1]


class Poisoned:
    """An output: rows 1 .. -1 of a tensor of NaN, of which the first and last must stay so."""

    def __init__(self, *shape: int, dtype: torch.dtype, device: str) -> None:
        self.outer = torch.full((shape[0] + 2, *shape[1:]), NAN, dtype=dtype, device=device)
        self.inner = self.outer[1:-1]

    def check(self, expected: Tensor, slack: Tensor | float) -> None:
        """Equal to float64 ``expected`` but for one rounding to the output's dtype and ``slack``."""
        assert torch.isnan(self.outer[[0, -1]]).all(), "wrote outside its output"
        info = torch.finfo(self.inner.dtype)
        bound = info.eps / 2 * expected.abs() * (1 + 2 * info.eps) + info.tiny + slack
        excess = (self.inner.double() - expected).abs() / bound
        assert torch.isfinite(excess).all(), "not finite"
        assert excess.max() <= 1, f"error is {excess.max():.3g} times the bound"


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """float64 RMSNorm over the last dimension."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


def check_norm(batch: int, width: int, dtype: torch.dtype, device: str) -> None:
    """With and without a delta, with and without a norm of the delta, weights in dtype and in float32."""
    from dq_kernels.norm import add_rmsnorm

    eps, ulp = 1e-5, torch.finfo(dtype).eps
    # Sums of ``width`` squares in any order, halved by the root; a reciprocal root of the chip's 2 ulp; 3 products.
    relative = (width / 2 + 8) * ROUNDOFF
    x, delta = (random(batch, width, dtype=dtype, device=device, seed=s) for s in (0, 1))
    weight, after = random(width, dtype=dtype, device=device), random(width, dtype=FP32, device=device, seed=2)
    outs = [Poisoned(batch, width, dtype=dtype, device=device) for _ in range(5)]
    same, _ = add_rmsnorm(x, None, weight, eps, out=(x, outs[0].inner))
    assert same is x
    expected = rms_norm(x.double(), weight, eps)
    outs[0].check(expected, relative * expected.abs())
    for total, normed, norm in ((outs[1], outs[2], None), (outs[3], outs[4], after)):
        add_rmsnorm(x, delta, weight, eps, norm, (total.inner, normed.inner))
        added = delta.double()
        if norm is not None:
            added = rms_norm(added, norm, eps)
        # float32 sum of two; a normed delta has been rounded to dtype, which the float64 definition has not
        slack = 2 * ROUNDOFF * (x.double().abs() + added.abs())
        slack += 0.0 if norm is None else (relative + 0.51 * ulp) * added.abs() * (1 + ulp)
        total.check(x.double() + added, slack)
        expected = rms_norm(total.inner.double(), weight, eps)  # of the rounded sum, to the bit
        normed.check(expected, relative * expected.abs())


def check_gated(batch: int, width: int, dtype: torch.dtype, device: str) -> None:
    from dq_kernels.gated import gated

    x = random(batch, 2 * width, dtype=dtype, device=device)
    x[0, :4] = torch.tensor([-100.0, 100.0, -20.0, 0.0])  # saturated: exp overflows, and must not become NaN
    gate, up = x.double().chunk(2, -1)
    for activation, f in (("silu", F.silu(gate)), ("gelu_tanh", F.gelu(gate, approximate="tanh"))):
        out = Poisoned(batch, width, dtype=dtype, device=device)
        gated(x, activation, out.inner)
        # f is rounded to dtype before the product; exp errs by its argument's rounding, |2u| < 2 |g| + |g|^3.
        grown = 1 + 2 * gate.abs() + gate.abs() ** 3
        error = torch.finfo(dtype).eps * 0.51 * f.abs() + 16 * ROUNDOFF * grown * f.abs() + torch.finfo(dtype).tiny
        out.check(f * up, error * up.abs() * (1 + torch.finfo(dtype).eps))


def check_rope(shape: tuple[int, int, int, int], turned: int, normed: bool, dtype: torch.dtype, device: str) -> None:
    """``shape``: B, heads, kv heads, D. Rings have wrapped for some sequences; no other slot may change."""
    from dq_kernels.rope import rope_and_cache

    batch, heads, kv, dim = shape
    slots, eps, ulp = 7, 1e-6, torch.finfo(dtype).eps
    qkv = random(batch, (heads + 2 * kv) * dim, dtype=dtype, device=device)
    angles = torch.rand(batch, turned // 2, generator=torch.Generator().manual_seed(1)).mul(6.28).to(device)
    cos, sin = (torch.cat(p, -1).to(dtype) for p in ((angles.cos(),) * 2, (-angles.sin(), angles.sin())))
    norms = tuple(random(dim, dtype=FP32, device=device, seed=s) for s in (1, 2)) if normed else None
    lengths = torch.arange(batch, device=device) * 5 + 4
    keys, values = (Poisoned(batch, kv, slots, dim, dtype=dtype, device=device) for _ in range(2))
    q = Poisoned(batch, heads, dim, dtype=dtype, device=device)
    rope_and_cache(qkv, cos, sin, norms, eps, keys.inner, values.inner, lengths, q.inner)
    x = qkv.double().view(batch, -1, dim)
    turning, kept = x[:, : heads + kv], x[:, heads + kv :]
    if norms is not None:
        turning = torch.cat(
            (rms_norm(turning[:, :heads], norms[0], eps), rms_norm(turning[:, heads:], norms[1], eps)), 1
        )
    part = turning[..., :turned]
    swapped = part.roll(turned // 2, -1)
    c, s = cos.double()[:, None], sin.double()[:, None]
    expected = torch.cat((part * c + swapped * s, turning[..., turned:]), -1)
    size = torch.cat(((part * c).abs() + (swapped * s).abs(), turning[..., turned:].abs()), -1)
    slack = ((0.51 * ulp * (1 + ulp) + (dim / 2 + 8) * ROUNDOFF if normed else 0.0) + 4 * ROUNDOFF) * size
    q.check(expected[:, :heads], slack[:, :heads])
    rows = torch.arange(batch, device=device)
    written = lengths % slots
    for cache, want, much in ((keys, expected[:, heads:], slack[:, heads:]), (values, kept, torch.zeros_like(kept))):
        got = Poisoned(batch, kv, dim, dtype=dtype, device=device)
        got.inner.copy_(cache.inner[rows, :, written])
        got.check(want, much)
        cache.inner[rows, :, written] = NAN
        assert torch.isnan(cache.outer).all(), "wrote another slot"


def check_attention(
    shape: tuple[int, int, int, int],
    ring: tuple[int, int | None, tuple[int, ...]],
    softcap: float | None,
    dtype: torch.dtype,
    device: str,
) -> None:
    """``shape``: heads, kv heads, D, used slots; ``ring``: slots, window, the query's position in each sequence."""
    from dq_kernels.attention import decode_attention

    heads, kv, dim, used = shape
    slots, window, at = ring
    batch, scale = len(at), dim**-0.5
    q = random(batch, heads, dim, dtype=dtype, device=device)
    keys, values = (random(batch * kv, slots, dim, dtype=dtype, device=device, seed=s) for s in (1, 2))
    keys, values = keys.view(batch, kv, slots, dim), values.view(batch, kv, slots, dim)
    lengths = torch.tensor(at, device=device)
    held = lengths[:, None] - torch.remainder(lengths[:, None] - torch.arange(slots, device=device), slots)
    seen = (held >= 0) & (lengths[:, None] - held < (window or slots))
    keys.masked_fill_(~seen[:, None, :, None], NAN)
    values.masked_fill_(~seen[:, None, :, None], NAN)
    outs = [Poisoned(batch, heads * dim, dtype=dtype, device=device) for _ in range(2 if device == "cpu" else 8)]
    for out in outs:
        decode_attention(
            q, keys, values, lengths, used=used, window=window, scale=scale, softcap=softcap, out=out.inner
        )
    k, v = (t.double().nan_to_num(0.0).repeat_interleave(heads // kv, 1) for t in (keys, values))
    scores = scale * torch.einsum("bhd,bhsd->bhs", q.double(), k)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    shares = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    expected = torch.einsum("bhs,bhsd->bhd", shares, v).flatten(1)
    size = torch.einsum("bhs,bhsd->bhd", shares, v.abs()).flatten(1)
    # A score errs by D products and by exp2's argument, the sums by the slots, and shares are rounded to dtype.
    error_of_score = (dim + 8) * ROUNDOFF * scale * torch.einsum("bhd,bhsd->bhs", q.double().abs(), k.abs()).max()
    relative = 2 * error_of_score + (2 * used + 64) * ROUNDOFF + torch.finfo(dtype).eps / 2
    relative += 16 * ROUNDOFF * (softcap or 0.0)
    outs[0].check(expected, relative * size)
    assert all(torch.equal(out.inner, outs[0].inner) for out in outs), "two runs differ"


def turns(*values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Each case with a dtype, which take turns."""
    dtype = cycle((BF16, FP16, FP32))
    return [(*value, next(dtype)) for value in values]


FULL, WRAPPED = (170, None, (149, 0, 70)), (70, 50, (69, 175, 10))
CHECKS: dict[str, tuple[Callable[..., None], list[tuple[Any, ...]]]] = {
    "norm": (check_norm, [(b, h, t) for b, h in ((1, 576), (3, 64), (2, 4096)) for t in (BF16, FP16, FP32)]),
    "gated": (check_gated, turns((1, 1536), (3, 96), (2, 513), (1, 513), (17, 64), (3, 1536))),
    "rope": (
        check_rope,
        turns(
            ((1, 4, 2, 64), 64, False), ((3, 3, 1, 80), 32, False), ((2, 2, 2, 96), 96, True),
            ((3, 4, 1, 128), 128, True), ((1, 2, 1, 256), 256, False), ((2, 3, 3, 64), 16, True),
        ),
    ),
    "attention": (
        check_attention,
        turns(
            ((4, 2, 64, 150), FULL, None), ((9, 3, 64, 70), WRAPPED, None), ((2, 2, 80, 70), WRAPPED, 5.0),
            ((4, 1, 96, 170), FULL, None), ((8, 2, 128, 70), WRAPPED, None), ((2, 1, 256, 150), FULL, 20.0),
            ((18, 1, 64, 64), (64, None, (63,)), None), ((4, 2, 128, 1), (9, 3, (0,)), None),
            ((2, 1, 256, 70), WRAPPED, None),
        ),
    ),
}  # fmt: skip
STEPS = [
    *((name, batch) for name in ("llama", "qwen2", "qwen3", "gemma3") for batch in (1, 3)),
    ("gemma2", 1),
    ("phi3-partial", 1),
]


def check_step(name: str, batch: int, folder: Path) -> None:
    """The fused step against the plain one, float32, token by token, through windows and around rings."""
    from decoder_models import WINDOW, build, tokens, transformers_config

    from dq_runtime.packing.checkpoint import open_checkpoint
    from dq_runtime.runtime.decoder import DecoderConfig, kv_cache, read_config, read_weights
    from dq_runtime.runtime.decoder.torch_decoder import TorchDecoder

    directory = folder / name
    if not directory.exists():
        build(directory, transformers_config(name))
    checkpoint = open_checkpoint(directory)
    config = read_config(checkpoint.config)
    assert isinstance(config, DecoderConfig), config
    decoder = TorchDecoder(config, read_weights(checkpoint, config), "cpu", FP32)
    assert not decoder.fused, "only a GPU should choose it"
    prompt, length = WINDOW - 1, WINDOW + 2
    ids = tokens(batch, length)
    kv_cache.CHUNK = 2  # rings of WINDOW + 1 slots, which the prompt does not fill and the steps wrap around
    logits = {}
    for fused in (False, True):
        decoder.fused = fused
        cache = decoder.start(batch, length)
        steps = [decoder.step(ids[:, :prompt], cache)]
        steps += [decoder.step(ids[:, i : i + 1], cache) for i in range(prompt, length)]
        logits[fused] = torch.stack(steps, 1)
        assert cache.lengths.tolist() == [length] * batch
    assert logits[False].std() > 0.1
    # Two layers of sums of at most 96 float32 products, in another order; the bound of tests/unit/test_decoder.py / 10.
    torch.testing.assert_close(logits[True], logits[False], rtol=1e-5, atol=1e-5)


def verdict(check: Callable[..., None], *arguments: Any) -> str:
    try:
        check(*arguments)
    except Exception as error:  # whatever goes wrong is this case's verdict
        return f"{type(error).__name__}: {error}"
    return "ok"


def interpret_everything() -> dict[str, str]:
    """Every check on every case on the CPU: "ok" or the failure, by "check case"."""
    torch.set_num_threads(1)
    verdicts = {f"{n} {c}": verdict(check, *c, "cpu") for n, (check, todo) in CHECKS.items() for c in todo}
    with tempfile.TemporaryDirectory() as folder:
        for name, batch in STEPS:
            verdicts[f"step {name} batch {batch}"] = verdict(check_step, name, batch, Path(folder))
    return verdicts


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # decoder_models
    print(json.dumps(interpret_everything()))
