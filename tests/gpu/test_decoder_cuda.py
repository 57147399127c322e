"""The decoder on the chip: captured steps against eager ones, and both against transformers, on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_models import MODELS, VOCABULARY, build, error, in_bfloat16, transformers_config
from torch import Tensor

import dq_runtime
from dq_runtime.packing.checkpoint import open_checkpoint
from dq_runtime.runtime.decoder import DecoderConfig, read_config, read_weights, torch_decoder
from dq_runtime.runtime.decoder.captured import CapturedStep
from dq_runtime.runtime.decoder.torch_decoder import TorchDecoder
from dq_runtime.runtime.sampling import Sampling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU to test on: torch sees no CUDA device"),
]
LENGTH = 300  # past 256, where the steps that are captured change
BF16, FP32 = torch.bfloat16, torch.float32


def tokens(batch: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, LENGTH), generator=torch.Generator().manual_seed(batch))


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A packed checkpoint, and transformers' model with its decoded weights on the GPU."""
    directory = tmp_path_factory.mktemp("decoder") / "model"
    return directory, build(directory, transformers_config(request.param)).to("cuda")


def decoder_of(directory: Path, dtype: torch.dtype) -> TorchDecoder:
    checkpoint = open_checkpoint(directory)
    config = read_config(checkpoint.config)
    assert isinstance(config, DecoderConfig), config
    return TorchDecoder(config, read_weights(checkpoint, config), "cuda", dtype)


def stepped(decoder: TorchDecoder, ids: Tensor, prompt: int = 200) -> Tensor:
    """Logits [B, LENGTH - prompt + 1, V]: of the prompt's last token and of every one after it, through the cache."""
    cache = decoder.start(ids.shape[0], LENGTH)
    parts = [decoder.step(ids[:, :prompt], cache)]
    parts += [decoder.step(ids[:, i : i + 1], cache) for i in range(prompt, LENGTH)]
    return torch.stack(parts, 1)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
def test_logits_equal_transformers(model: tuple[Path, Any], dtype: torch.dtype, batch: int) -> None:
    directory, reference = model
    ids = tokens(batch)
    expected = reference(input_ids=ids.cuda(), use_cache=False).logits
    # float32 sums of 96 products in another order, or through TF32 where a kernel multiplies in it (2^-11); bfloat16 is
    # held to what it costs transformers itself.
    bound = 4 * 2.0**-11
    if dtype is BF16:
        theirs = in_bfloat16(reference)(input_ids=ids.cuda(), use_cache=False).logits.float()
        bound = 2 * error(theirs, expected)
    decoder = decoder_of(directory, dtype)
    assert error(decoder.logits(ids), expected) < bound
    assert error(stepped(decoder, ids), expected[:, 199:]) < bound


@torch.no_grad()
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
def test_captured_steps_equal_eager_ones(
    model: tuple[Path, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three sequences in the graph of four, across the length at which another graph takes over; and once more in the
    same memory, which must not be captured again."""
    decoder = decoder_of(model[0], dtype)
    ids = tokens(3)
    monkeypatch.setattr(decoder, "capture", False)
    eager = stepped(decoder, ids)
    made: list[CapturedStep] = []

    class Counted(CapturedStep):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(torch_decoder, "CapturedStep", Counted)
    monkeypatch.setattr(decoder, "capture", True)
    bound = 2.0**-16 if dtype is FP32 else 2.0**-6  # the same kernels, but reductions over other lengths
    for _ in range(2):
        captured = stepped(decoder, ids)
        assert error(captured, eager) < bound
        assert len(made) == 2


def test_generated_text_is_that_of_the_cpu(packed_model: Path) -> None:
    """Greedy in float32: the loop that runs ahead of the host chooses the same tokens and stops at the same ones."""
    prompts = ["Anna found a red lamp", "Later", "The mayor sold 12 apples. Then"]
    on_cpu, on_gpu = (dq_runtime.load(packed_model, device, FP32) for device in ("cpu", "cuda"))
    for prompt in prompts:
        expected = dq_runtime.generate(on_cpu, prompt, max_tokens=24)
        answer = dq_runtime.generate(on_gpu, prompt, max_tokens=24)
        assert (answer.tokens, answer.finish) == (expected.tokens, expected.finish)


def test_a_seed_repeats_a_sampled_text(packed_model: Path) -> None:
    model = dq_runtime.load(packed_model, "cuda")
    settings = [Sampling(1.0, top_k=50, top_p=0.95, repetition_penalty=1.1, seed=s) for s in (1, 1, 2)]
    texts = [dq_runtime.generate(model, "Anna", max_tokens=20, sampling=s).tokens for s in settings]
    assert texts[0] == texts[1] != texts[2]
