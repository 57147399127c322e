"""Mixtures of experts on their way out: packed expert by expert, each linear exported as any other, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_moe import _configs, _write
from torch import Tensor

from dq_runtime.errors import SpecError
from dq_runtime.export.run import export
from dq_runtime.packing.checkpoint import open_checkpoint, write_weights
from dq_runtime.packing.quant_config import Scheme
from dq_runtime.runtime.load import load

TOKENS = torch.arange(4, 24).view(1, -1)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A random Qwen3-MoE packed to 4 bits, and the logits of the same weights in transformers."""
    path = tmp_path_factory.mktemp("moe") / "qwen3-moe"
    model, tensors = _write(path, _configs()["qwen3-moe"](), False, Scheme(4, 32, True))
    half = {n: t.bfloat16() if t.dtype is torch.float32 else t for n, t in tensors.items()}  # as models are published
    write_weights(path, half)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in half:
                parameter.copy_(half[name])
        return path, model(input_ids=TOKENS).logits[0]


def same(path: Path, logits: Tensor) -> None:
    ours = load(path, "cpu", torch.float32, exact=True).logits(TOKENS)[0]
    torch.testing.assert_close(torch.as_tensor(ours).float(), logits, rtol=0, atol=2e-4 * float(logits.abs().max()))


def test_dense_is_read_by_transformers(moe: tuple[Path, Tensor], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    export(moe[0], "dense", tmp_path / "dense")
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)(input_ids=TOKENS)
    torch.testing.assert_close(theirs.logits[0], moe[1], rtol=0, atol=1e-4 * float(moe[1].abs().max()))


@pytest.mark.parametrize(("form", "options"), [("gptq", {}), ("compressed-tensors", {"dtype": "bfloat16"})])
def test_every_expert_keeps_its_values(
    form: str, options: dict[str, str], moe: tuple[Path, Tensor], tmp_path: Path
) -> None:
    export(moe[0], form, tmp_path / "out", options)
    before, after = (dict(open_checkpoint(p).packed()) for p in (moe[0], tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(w.decode(), after[name].decode()) for name, w in before.items())
    same(moe[0], moe[1])


def test_gguf_says_that_it_holds_no_experts(moe: tuple[Path, Tensor], tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    with pytest.raises(SpecError, match="qwen3_moe"):
        export(moe[0], "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
