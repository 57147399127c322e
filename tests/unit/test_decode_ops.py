"""The kernels of the one-token step, and the fused step itself, on triton's interpreter; when it is chosen.

TRITON_INTERPRET counts when @triton.jit decorates, so the checks run in one subprocess that has it set
(tests/gpu/decode_cases.py as a script), which prints one verdict a check and case.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from decoder_models import COMMON

from dq_runtime.backends.triton_cuda import TritonCuda
from dq_runtime.runtime.decoder import DecoderConfig, read_config
from dq_runtime.runtime.decoder.fused_step import MAX_HEAD_DIM, MAX_HIDDEN, refusal

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@needs_triton
def test_everything_the_interpreter_ran_is_right() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    environment["DQ_BACKEND"] = "reference"  # for the matmuls of both steps: interpreted, they would take minutes
    script = ROOT / "tests" / "gpu" / "decode_cases.py"
    done = subprocess.run(
        [sys.executable, script], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    verdicts = json.loads(done.stdout.splitlines()[-1])
    assert len(verdicts) > 35
    assert {name: verdict for name, verdict in verdicts.items() if verdict != "ok"} == {}


def test_what_the_kernels_cannot_hold_takes_the_plain_step(monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_config(
        COMMON | {"model_type": "llama", "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 1e4}
    )
    assert isinstance(config, DecoderConfig), config
    monkeypatch.setattr(TritonCuda, "available", lambda self: "no CUDA device")
    assert refusal(config) == "no CUDA device"
    monkeypatch.setattr(TritonCuda, "available", lambda self: None)
    assert refusal(config) is None
    assert "heads of 512" in (refusal(replace(config, head_dim=512)) or "")
    assert "rows of 32768" in (refusal(replace(config, hidden=32768)) or "")


@needs_triton
def test_the_limits_are_those_of_the_kernels() -> None:
    from dq_kernels import attention, norm

    assert (MAX_HEAD_DIM, MAX_HIDDEN) == (attention.MAX_HEAD_DIM, norm.MAX_WIDTH)


@needs_triton
def test_kernels_refuse_what_would_be_read_past_its_end() -> None:
    from dq_kernels.attention import decode_attention
    from dq_kernels.gated import gated
    from dq_kernels.norm import add_rmsnorm
    from dq_kernels.rope import rope_and_cache

    x, lengths = torch.zeros(2, 64), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"delta must be contiguous torch.float32 \[2, 64\], got .* \[1, 64\]"):
        add_rmsnorm(x, x[:1], x[0], 1e-5)
    with pytest.raises(ValueError, match="not contiguous"):
        add_rmsnorm(torch.zeros(64, 2).t(), None, x[0], 1e-5)
    with pytest.raises(ValueError, match="at most 16384"):
        add_rmsnorm(torch.zeros(1, 20000), None, torch.zeros(20000), 1e-5)
    with pytest.raises(ValueError, match="silu, gelu_tanh"):
        gated(x, "relu")
    cache = torch.zeros(2, 1, 8, 16)
    with pytest.raises(ValueError, match=r"values must be .* \[2, 1, 8, 16\]"):
        rope_and_cache(x, x[:, :16].contiguous(), x[:, :16].contiguous(), None, 1e-5, cache, cache[:1], lengths)
    with pytest.raises(ValueError, match="rotate 17 values"):
        rope_and_cache(x, x[:, :17], x[:, :17], None, 1e-5, cache, cache, lengths)
    q = torch.zeros(2, 2, 16)
    with pytest.raises(ValueError, match="9 of 8 slots"):
        decode_attention(q, cache, cache, lengths, used=9, window=None, scale=1.0, softcap=None)
    with pytest.raises(ValueError, match=r"lengths must be contiguous torch.int64 \[2\]"):
        decode_attention(q, cache, cache, lengths.int(), used=8, window=None, scale=1.0, softcap=None)


@needs_triton
def test_slots_are_split_where_programs_are_few() -> None:
    from dq_kernels.attention import splits_of

    assert [splits_of(tiles, 64) for tiles in (1, 8, 9, 32, 200, 10000)] == [32, 32, 16, 8, 1, 1]
    assert [splits_of(8, blocks) for blocks in (1, 3, 4, 7)] == [1, 2, 4, 4]
