"""Segments on paged memory in PyTorch, and on a cache each: any mixture of them against the whole sequence at once."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_models import MODELS, VOCABULARY, build, transformers_config
from torch import Tensor

from dq_runtime.errors import SpecError
from dq_runtime.packing.checkpoint import open_checkpoint
from dq_runtime.runtime.decoder import DecoderConfig, read_config, read_weights
from dq_runtime.runtime.decoder.paged import BLOCK, MAX_TOKENS, Segment
from dq_runtime.runtime.decoder.paged_torch import PagedTorch
from dq_runtime.runtime.decoder.torch_decoder import TorchDecoder
from dq_runtime.runtime.engine.one_cache_each import OneCacheEach
from dq_runtime.runtime.engine.paged_model import paged_decoder
from dq_runtime.runtime.language_model import LeanModel
from dq_runtime.runtime.load import load
from dq_runtime.runtime.skeleton import load_through_transformers

LENGTHS = (150, 70, 64, 9)
BLOCKS = 12


def torch_decoder_of(directory: Path) -> TorchDecoder:
    checkpoint = open_checkpoint(directory)
    config = read_config(checkpoint.config)
    assert isinstance(config, DecoderConfig), config
    return TorchDecoder(config, read_weights(checkpoint, config), "cpu", torch.float32)


@pytest.fixture(scope="module", params=MODELS)
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TorchDecoder:
    """A random model of every architecture, with room for several blocks."""
    directory = tmp_path_factory.mktemp("paged") / "model"
    build(directory, transformers_config(request.param, max_position_embeddings=256))
    return torch_decoder_of(directory)


@pytest.fixture
def llama(tmp_path: Path) -> TorchDecoder:
    build(tmp_path / "model", transformers_config("llama", max_position_embeddings=256))
    return torch_decoder_of(tmp_path / "model")


@dataclass
class Text:
    """One sequence of a random schedule: its ids, what the whole of it should give, and how far it is."""

    ids: list[int]
    expected: Tensor
    blocks: list[int]
    held: int = 0

    def segment(self, count: int, wants: bool) -> Segment:
        stop = self.held + count
        return Segment(self.ids[self.held : stop], self.held, self.blocks[: -(-stop // BLOCK)], wants)


def texts(whole: Callable[[list[list[int]]], Tensor], seed: int) -> list[Text]:
    choose = random.Random(seed)
    order = list(range(BLOCKS))
    choose.shuffle(order)
    made = []
    for length in LENGTHS:
        ids = [choose.randrange(VOCABULARY) for _ in range(length)]
        blocks = [order.pop() for _ in range(-(-length // BLOCK))]
        # Filled up to one length, so that longrope's frequencies, which follow it, are those of the full context.
        made.append(Text(ids, whole([ids + [0] * (max(LENGTHS) - length)])[0], blocks))
    return made


def run_all(decoder: Any, memory: Any, unfinished: list[Text], seed: int, released: Callable[..., None]) -> int:
    """Passes of random segments until every text is through; how many rows of logits were compared."""
    choose, compared = random.Random(seed), 0
    while unfinished:
        chosen = choose.sample(unfinished, choose.randint(1, len(unfinished)))
        parts = []
        for text in chosen:
            most = len(text.ids) - text.held
            parts.append((text, min(most, choose.choice([1, 1, 5, 63, 64, 100])), choose.random() < 0.8))
        rows = decoder.run([text.segment(count, wants) for text, count, wants in parts], memory)
        wanted = []
        for text, count, wants in parts:
            text.held += count
            if wants:
                wanted.append(text.expected[text.held - 1])
            if text.held == len(text.ids):
                unfinished.remove(text)
                released(text.blocks)
        assert rows.dtype == torch.float32 or not wanted
        assert len(rows) == len(wanted)
        if wanted:
            torch.testing.assert_close(rows, torch.stack(wanted), rtol=1e-4, atol=1e-4)
        compared += len(wanted)
    return compared


@pytest.mark.parametrize("seed", range(1, 3))
def test_any_mixture_gives_the_logits_of_the_whole(decoder: TorchDecoder, seed: int) -> None:
    """float32 through two layers, in another order: the tolerance of test_decoder.py. The memory is poisoned."""
    paged = PagedTorch(decoder)
    memory = paged.memory(BLOCKS)
    with torch.inference_mode():
        for tensor in (*memory.keys, *memory.values):
            tensor.fill_(float("nan"))
    assert run_all(paged, memory, texts(decoder.logits, seed), seed, lambda blocks: None) > 4


def test_two_sequences_share_a_beginning(llama: TorchDecoder) -> None:
    paged = PagedTorch(llama)
    memory = paged.memory(4)
    beginning = [i * 7 % VOCABULARY for i in range(BLOCK)]
    ends = [[3, 4, 5], [6, 7, 8, 9]]
    paged.run([Segment(beginning, 0, [2], False)], memory)
    rows = paged.run([Segment(end, BLOCK, [2, i]) for i, end in enumerate(ends)], memory)
    for row, end in zip(rows, ends, strict=True):
        torch.testing.assert_close(row, llama.logits([beginning + end])[0, -1], rtol=1e-4, atol=1e-4)


def test_block_bytes_are_what_is_allocated(llama: TorchDecoder) -> None:
    paged = PagedTorch(llama)
    memory = paged.memory(3)
    assert paged.block_bytes * 3 == sum(t.nbytes for t in (*memory.keys, *memory.values))
    assert memory.blocks == 3
    with pytest.raises(SpecError, match="at least 1 block and 1 position, got 0"):
        paged.memory(0)


GOOD = Segment([1, 2], 0, [0])


@pytest.mark.parametrize(
    ("segments", "reason"),
    [
        ([], "at least 1 token"),
        ([replace(GOOD, tokens=[])], "at least 1 token"),
        ([replace(GOOD, tokens=[1] * (MAX_TOKENS + 1))], f"1 to {MAX_TOKENS} in all, got {MAX_TOKENS + 1}"),
        ([GOOD, replace(GOOD, tokens=[VOCABULARY], blocks=[1])], f"token id outside 0..{VOCABULARY - 1}"),
        ([replace(GOOD, tokens=[-1])], "token id outside"),
        ([replace(GOOD, start=63)], "1 blocks cannot hold the positions 63 to 64"),
        ([replace(GOOD, start=-1)], "cannot hold the positions -1"),
        ([replace(GOOD, blocks=[4])], r"block outside 0..3"),
        ([replace(GOOD, blocks=[-1])], r"block outside 0..3"),
        ([GOOD, GOOD], "write to the same block"),
        ([replace(GOOD, tokens=[1] * 65, blocks=[2, 2])], "write to the same block"),
        ([replace(GOOD, generated=True)], "a generated segment is one token, got 2"),
    ],
)
def test_a_wrong_pass_is_refused_and_writes_nothing(llama: TorchDecoder, segments: list[Segment], reason: str) -> None:
    paged = PagedTorch(llama)
    memory = paged.memory(4)
    with pytest.raises(SpecError, match=reason):
        paged.run(segments, memory)
    assert all(not bool(t.any()) for t in (*memory.keys, *memory.values))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A packed model as it runs through transformers."""
    directory = tmp_path_factory.mktemp("foreign") / "model"
    build(directory, transformers_config("llama", max_position_embeddings=256))
    return load_through_transformers(open_checkpoint(directory), "cpu", torch.float32)


def test_a_cache_each_gives_the_logits_of_the_whole(foreign: Any) -> None:
    paged = paged_decoder(foreign)
    assert isinstance(paged, OneCacheEach)
    assert paged.block_bytes == BLOCK * 2 * 2 * 2 * 32 * 4  # k and v, layers, kv heads, head_dim, float32
    memory = paged.memory(BLOCKS)
    assert run_all(paged, memory, texts(foreign.logits, 1), 1, paged.forget(memory)) > 4
    assert not memory.held


def test_a_cache_each_survives_a_pass_that_fails(foreign: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first segment has been computed when the second one fails, and neither cache can go back."""
    paged = OneCacheEach(foreign)
    memory = paged.memory(2)
    ids = [[1, 2, 3, 4, 5], [6, 7, 8, 9]]
    paged.run([Segment(ids[0][:3], 0, [0]), Segment(ids[1][:2], 0, [1])], memory)
    step, calls = foreign.step, []

    def failing(tokens: Any, cache: Any) -> Any:
        calls.append(tokens)
        logits = step(tokens, cache)
        if len(calls) == 2:
            raise MemoryError("after the cache has grown")
        return logits

    monkeypatch.setattr(foreign, "step", failing)
    parts = [Segment(ids[0][3:], 3, [0]), Segment(ids[1][2:], 2, [1])]
    with pytest.raises(MemoryError):
        paged.run(parts, memory)
    for part, whole in zip(parts, ids, strict=True):
        rows = paged.run([part], memory)
        torch.testing.assert_close(rows[0], foreign.logits([whole])[0, -1], rtol=1e-4, atol=1e-4)


def test_a_cache_each_refuses_positions_it_does_not_hold(foreign: Any) -> None:
    paged = OneCacheEach(foreign)
    with pytest.raises(SpecError, match="block 1 does not hold 5 positions"):
        paged.run([Segment([1], 5, [1])], paged.memory(2))


def test_a_model_of_our_decoders_is_paged_without_transformers(
    packed_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DQ_DECODER", "torch")
    model = load(packed_model, "cpu")
    assert isinstance(model, LeanModel)
    assert isinstance(paged_decoder(model), PagedTorch)
