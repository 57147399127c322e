"""The one-token step's kernels on the chip, and the fused step, captured in a graph, against the plain one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from decode_cases import CHECKS
from decoder_models import MODELS, VOCABULARY, build, error, transformers_config
from torch import Tensor

from dq_runtime.backends.triton_cuda import TritonCuda
from dq_runtime.packing.checkpoint import open_checkpoint
from dq_runtime.runtime.decoder import DecoderConfig, read_config, read_weights
from dq_runtime.runtime.decoder.torch_decoder import TorchDecoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or TritonCuda().available() is not None,
        reason="no GPU to test on, or triton cannot run there",
    ),
]
BF16, FP32 = torch.bfloat16, torch.float32
PROMPT, LENGTH = 250, 264  # past 256, where the graph changes


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name, (_, todo) in CHECKS.items() for case in todo], ids=str
)
def test_kernels(name: str, case: tuple[Any, ...]) -> None:
    CHECKS[name][0](*case, "cuda")


# Shapes of served models: 32 pieces, several blocks a piece, rings that have wrapped, sequences of unlike length.
@pytest.mark.parametrize(
    ("shape", "ring", "softcap"),
    [
        ((32, 8, 128, 4096), (4096, None, (4095,)), None),
        ((32, 8, 128, 4096), (8192, None, (17, 4000, 2048, 0)), None),
        ((32, 32, 96, 2558), (2558, 2047, (10000, 2000, 2557)), None),
        ((16, 8, 256, 4607), (4607, 4096, (9999,)), 50.0),
        ((9, 3, 64, 2048), (2048, None, tuple(range(0, 2048, 32))), None),
    ],
    ids=str,
)
def test_attention_of_served_shapes(
    shape: tuple[int, int, int, int], ring: tuple[int, int | None, tuple[int, ...]], softcap: float | None
) -> None:
    CHECKS["attention"][0](shape, ring, softcap, BF16, "cuda")


def test_caches_beyond_2_to_31_values() -> None:
    """Sequence 1 of 2 begins at 2^31 values of the keys: a 32-bit offset would wrap."""
    from dq_kernels.attention import decode_attention
    from dq_kernels.rope import rope_and_cache

    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of free GPU memory")
    keys, values = (torch.zeros(2, 16, 2**20, 128, dtype=BF16, device="cuda") for _ in range(2))
    lengths = torch.tensor([3, 5], device="cuda")
    qkv = torch.randn(2, (16 + 32) * 128, device="cuda").to(BF16)
    cos, sin = torch.ones(2, 128, dtype=BF16, device="cuda"), torch.zeros(2, 128, dtype=BF16, device="cuda")
    q = rope_and_cache(qkv, cos, sin, None, 1e-5, keys, values, lengths)
    parts = qkv.view(2, 48, 128)
    assert torch.equal(q, parts[:, :16])
    for row, slot in enumerate((3, 5)):
        assert torch.equal(keys[row, :, slot], parts[row, 16:32])
        assert torch.equal(values[row, :, slot], parts[row, 32:])
    out = decode_attention(q, keys, values, lengths, used=64, window=1, scale=1.0, softcap=None)
    assert torch.equal(out.view(2, 16, 128), parts[:, 32:])  # a window of one sees the token itself alone


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fused") / "model"
    build(directory, transformers_config(request.param))
    return directory


def logits(directory: Path, dtype: torch.dtype, ids: Tensor, fused: bool, capture: bool) -> Tensor:
    """[B, LENGTH - PROMPT + 1, V], the prompt's last and every step's; twice in the same memory, equal both times."""
    opened = open_checkpoint(directory)
    config = read_config(opened.config)
    assert isinstance(config, DecoderConfig), config
    decoder = TorchDecoder(config, read_weights(opened, config), "cuda", dtype)
    assert decoder.fused, "the fused step is what a GPU should choose"
    decoder.fused, decoder.capture = fused, capture
    runs = []
    for _ in range(2):
        cache = decoder.start(ids.shape[0], LENGTH)
        steps = [decoder.step(ids[:, :PROMPT], cache)]
        steps += [decoder.step(ids[:, i : i + 1], cache) for i in range(PROMPT, LENGTH)]
        runs.append(torch.stack(steps, 1))
        assert cache.lengths.tolist() == [LENGTH] * ids.shape[0]
        del cache
    assert torch.equal(*runs), "two runs differ"
    return runs[0]


@pytest.mark.parametrize("batch", [1, 3])
def test_the_fused_step_equals_the_plain_one(checkpoint: Path, batch: int) -> None:
    ids = torch.randint(0, VOCABULARY, (batch, LENGTH), generator=torch.Generator().manual_seed(batch))
    plain = logits(checkpoint, FP32, ids, fused=False, capture=False)
    # float32 in another order, or through TF32 where a library's kernel multiplies in it (2^-11)
    assert error(logits(checkpoint, FP32, ids, fused=True, capture=True), plain) < 4 * 2.0**-11
    # bfloat16 may cost what it costs the plain step, whose rounding errors are others of the same size
    bound = 2 * error(logits(checkpoint, BF16, ids, fused=False, capture=False), plain)
    fused = logits(checkpoint, BF16, ids, fused=True, capture=True)
    assert error(fused, plain) < bound
    eager = logits(checkpoint, BF16, ids, fused=True, capture=False)
    assert error(fused, eager) < 2.0**-6  # the same kernels, but sums of slots split elsewhere
