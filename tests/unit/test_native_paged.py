"""Many sequences in one pass over blocks of shared memory (decoder/paged.py): a token's logits are the same, bit for
bit, as those of its sequence alone, and close to those of the torch decoder."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import test_native_decoder as small
import torch
from decoder_models import MODELS, VOCABULARY, build, transformers_config
from test_native_prepared import runnable
from torch import Tensor

from dq_runtime.errors import SpecError
from dq_runtime.packing.checkpoint import open_checkpoint
from dq_runtime.runtime.decoder import DecoderConfig, read_config, read_weights
from dq_runtime.runtime.decoder.native_decoder import NativeMemory
from dq_runtime.runtime.decoder.native_on_torch import NativeOnTorch
from dq_runtime.runtime.decoder.paged import BLOCK, MAX_TOKENS, PagedDecoder, Segment
from dq_runtime.runtime.decoder.rope import LongRopeScaling, Rope
from dq_runtime.runtime.decoder.torch_decoder import TorchDecoder

pytestmark = [
    pytest.mark.skipif(os.environ.get("DQ_NATIVE") == "0", reason="DQ_NATIVE=0: built without the extension"),
    pytest.mark.usefixtures("one_thread"),
]


@dataclass
class Sequence:
    """``ids`` of which the first ``prompt`` are a prompt, the logits expected of each, and how far it is."""

    ids: list[int]
    prompt: int
    expected: Tensor
    blocks: list[int] = field(default_factory=list)
    done: int = 0


def alone(decoder: NativeOnTorch, lengths: list[tuple[int, int]], vocabulary: int) -> list[Sequence]:
    """Sequences of random ids, (prompt, generated) many, and the logits that the rectangular path gives them: the whole
    prompt in passes of 512 tokens, then one token at a time."""
    dice = random.Random(5)
    found = []
    longest = max(prompt + generated for prompt, generated in lengths)
    for prompt, generated in lengths:
        ids = [dice.randrange(vocabulary) for _ in range(prompt + generated)]
        cache = decoder.start(1, longest)
        last = decoder.step([ids[:prompt]], cache)
        steps = [decoder.step([[token]], cache) for token in ids[prompt:]]
        padded = ids[:prompt] + [0] * (longest - prompt)  # of one capacity, which decides between longrope's angles
        every = decoder.logits([padded])[0, :prompt]
        assert torch.equal(every[-1:], last), "a prompt's last token, whether or not the others' logits are asked for"
        found.append(Sequence(ids, prompt, torch.cat([every, *steps])))
    return found


def check_mixed_passes(decoder: NativeOnTorch, sequences: list[Sequence], seed: int, threads: int = 1) -> None:
    """Feed all of them in passes of random company, prompts cut anywhere, blocks anywhere, and compare every logit that
    a pass gives, bit for bit."""
    dice = random.Random(seed)
    longest = max(len(s.ids) for s in sequences)
    blocks = sum(-(-len(s.ids) // BLOCK) for s in sequences) + 3
    memory = decoder.memory(blocks, longest)
    # Whatever a block held before must not matter: the largest finite floats here.
    memory.memory.view(np.float16 if not decoder.native.exact else np.float32)[:] = 6e4
    free = dice.sample(range(blocks), blocks)
    for s in sequences:
        s.done, s.blocks = 0, []
    torch.set_num_threads(threads)
    while running := [s for s in sequences if s.done < len(s.ids)]:
        chosen = dice.sample(running, dice.randint(1, len(running)))
        segments, wanted, room = [], [], MAX_TOKENS - len(chosen)
        for s in chosen:
            left = s.prompt - s.done
            count = 1 if left <= 0 else min(left, dice.choice((1, 2, 3, 5, 17, 64, 200, left)), 1 + room)
            room -= count - 1
            while len(s.blocks) * BLOCK < s.done + count:
                s.blocks.append(free.pop())
            wants = dice.random() < 0.8
            segments.append(Segment(s.ids[s.done : s.done + count], s.done, s.blocks, wants, s.done >= s.prompt))
            s.done += count
            if wants:
                wanted.append(s.expected[s.done - 1])
        logits = decoder.run(segments, memory)
        assert logits.shape == (len(wanted), decoder.config.vocab)
        for row, expected in zip(logits, wanted, strict=True):
            assert torch.equal(row, expected)


LENGTHS = [(1, 70), (40, 40), (63, 3), (64, 2), (130, 9), (2, 30), (90, 1), (7, 0)]


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_in_mixed_company(name: str, tmp_path: Path) -> None:
    build(tmp_path / "m", transformers_config(name, max_position_embeddings=256))
    checkpoint = open_checkpoint(tmp_path / "m")
    config = read_config(checkpoint.config)
    assert isinstance(config, DecoderConfig), config
    weights = read_weights(checkpoint, config)
    decoder = NativeOnTorch(config, weights, "cpu", torch.float32, True)
    sequences = alone(decoder, LENGTHS, VOCABULARY)
    reference = TorchDecoder(config, weights, "cpu", torch.float32, True)
    longest = max(len(s.ids) for s in sequences)
    for s in sequences[3:5]:
        padded = s.ids + [0] * (longest - len(s.ids))
        torch.testing.assert_close(s.expected, reference.logits([padded])[0, : len(s.ids)], rtol=1e-4, atol=1e-4)
    check_mixed_passes(decoder, sequences, 1)


LONG = [(700, 20), (255, 4), (256, 3), (513, 8), (1, 300), (5, 5), (90, 3), (33, 33), (1, 1), (2, 2)]


SHORTER = [(150, 3), (256, 2), (1, 20), (5, 5), (33, 2), (70, 1)]  # for the scalar kernels, 30 times as slow


def mixed_long(exact: bool, lengths: list[tuple[int, int]]) -> None:
    """Contexts that are split over positions, windows shorter than them, prompts longer than a pass."""
    c = replace(small.config(window=100), attention_softcap=5.0, logit_softcap=4.0)
    decoder = small.native(c, small.weights(), exact)
    # Without exact, at most four texts: a fifth in a pass makes all of them less precise.
    sequences = alone(decoder, lengths if exact else lengths[:4], small.VOCAB)
    for threads in (1, 2):
        check_mixed_passes(decoder, sequences, threads, threads)


@pytest.mark.parametrize("exact", [True, False])
def test_long_contexts_in_mixed_company(exact: bool) -> None:
    mixed_long(exact, LONG)


def test_on_other_instruction_sets() -> None:
    """Bit for bit within each. The one in use has been tested above."""
    from dq_runtime import _native

    here = Path(__file__).parent
    paths = [str(Path(_native.__file__).parents[1]), str(here.parents[1] / "kernels"), str(here), str(here.parent)]
    code = f"""
import sys
sys.path[:0] = {paths!r}
from test_native_paged import SHORTER, mixed_long
for exact in (True, False):
    mixed_long(exact, SHORTER)
"""
    for isa in set(runnable()) - {_native.isa()}:
        environment = {**os.environ, "DQ_ISA": isa, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300, check=False
        )
        assert done.returncode == 0, f"{isa}: {done.stderr}"


@pytest.mark.parametrize("exact", [True, False])
def test_batches_of_every_size(exact: bool) -> None:
    """1 to 20 generated tokens in a pass: every way in which a matmul takes few tokens, and the first of many. Without
    exact, those of up to four are more precise than those of more, and each kind is the same in every such pass."""
    decoder = small.native(small.config(), small.weights(), exact)
    ids = small.ids(20, 6)
    memory = decoder.memory(20)
    for i in range(20):
        decoder.run([Segment(ids[i, :5].tolist(), 0, [i], False)], memory)

    def together(rows: list[int]) -> torch.Tensor:
        return decoder.run([Segment([int(ids[i, 5])], 5, [i], generated=True) for i in rows], memory)

    few = torch.cat([together(list(range(first, first + 4))) for first in range(0, 20, 4)])
    many = together(list(range(20)))
    assert torch.equal(few, many) == exact
    torch.testing.assert_close(few, many, rtol=0, atol=0.02 * float(few.std()))
    for count in range(1, 21):
        assert torch.equal(together(list(range(count))), (few if count <= 4 else many)[:count]), count
    whole = decoder.start(20, 64)
    decoder.step(ids[:, :5], whole)
    assert torch.equal(decoder.step(ids[:, 5:], whole), many)


def test_a_prompt_token_by_itself_is_still_a_prompt() -> None:
    """Both orders of summation are used, and differ: else the tests above would prove less than they seem to."""
    decoder = small.native(small.config(), small.weights(), exact=True)
    ids = small.ids(1, 600)[0].tolist()
    memory, blocks = decoder.memory(10), list(range(10))
    decoder.run([Segment(ids[:500], 0, blocks, False)], memory)
    decoder.run([Segment(ids[500:599], 500, blocks, False)], memory)
    prompt = decoder.run([Segment(ids[599:], 599, blocks)], memory)
    generated = decoder.run([Segment(ids[599:], 599, blocks, generated=True)], memory)
    assert not torch.equal(prompt, generated)
    torch.testing.assert_close(prompt, generated, rtol=1e-4, atol=1e-4)
    assert torch.equal(prompt, decoder.logits([ids])[:, -1])


def test_beginnings_can_be_shared() -> None:
    """Two sequences read the same two full blocks, and each goes on in blocks of its own."""
    decoder = small.native(small.config(), small.weights(), exact=True)
    ids = small.ids(3, 150)
    common = ids[0, : 2 * BLOCK].tolist()
    memory = decoder.memory(6)
    decoder.run([Segment(common, 0, [4, 1], False)], memory)
    tails = [ids[row, 2 * BLOCK :].tolist() for row in (1, 2)]
    logits = decoder.run([Segment(tails[0], 2 * BLOCK, [4, 1, 0]), Segment(tails[1], 2 * BLOCK, [4, 1, 5])], memory)
    for row, tail in zip(logits, tails, strict=True):
        assert torch.equal(row, decoder.logits([common + tail])[0, -1])


def test_longrope_has_the_angles_of_the_longest_sequence() -> None:
    ones = (1.0,) * (small.DIM // 2)
    rope = Rope(small.DIM, 10000.0, LongRopeScaling(ones, tuple(3.0 * f for f in ones), 100, 1.2))
    c = replace(small.config(), layers=tuple(replace(layer, rope=rope) for layer in small.config().layers))
    c = replace(c, context_length=1000)
    decoder, ids = small.native(c, small.weights(), exact=True), small.ids(1, 30)
    found = {}
    for blocks, positions, capacity in ((1, None, 64), (5, None, 101), (50, None, 1000), (50, 100, 100)):
        memory = decoder.memory(blocks, positions)
        found[blocks, positions] = decoder.run([Segment(ids[0].tolist(), 0, [0])], memory)
        cache = decoder.start(1, capacity)
        assert torch.equal(found[blocks, positions], decoder.step(ids, cache))
    assert torch.equal(found[1, None], found[50, 100])
    assert not torch.equal(found[1, None], found[50, None])


def test_sizes() -> None:
    for exact, width in ((True, 4), (False, 2)):
        decoder = small.native(small.config(24), small.weights(), exact)
        each = small.LAYERS * small.KV_HEADS * BLOCK * 2 * small.DIM * width
        assert decoder.block_bytes == each, "a window keeps all positions here"
        assert decoder.memory(7).nbytes == 7 * each
    paged: PagedDecoder = decoder
    assert paged.memory(2).positions == 2 * BLOCK
    assert decoder.memory(1000).positions == decoder.config.context_length == 8192


def bad_calls() -> list[tuple[list[Segment], str]]:
    a = [1, 2, 3]
    table = list(range(10))
    return [
        ([], "the number of segments must be positive"),
        ([Segment([], 0, [0])], "segment 0 has 0 tokens; allowed are 1 to 512"),
        ([Segment([0] * (MAX_TOKENS + 1), 0, table)], "segment 0 has 513 tokens"),
        ([Segment([0] * 300, 0, table[:5]), Segment([0] * 300, 0, table[5:])], "at most 512 tokens a pass, got 600"),
        ([Segment([1, 2], 0, [0], generated=True)], "has 2 tokens; .* and 1 where it is generated"),
        ([Segment(a, 0, [0]), Segment([211], 0, [1])], "token id 211 is outside the vocabulary"),
        ([Segment([-1], 0, [0])], "token id -1 is outside the vocabulary"),
        ([Segment([2**70], 0, [0])], "64-bit"),
        ([Segment(a, 0, [])], "segment 0 needs 1 blocks for 3 positions, its table has 0"),
        ([Segment(a, 62, [3])], "segment 0 needs 2 blocks for 65 positions, its table has 1"),
        ([Segment(a, 0, [10])], "segment 0 names block 10 of a memory of 10"),
        ([Segment(a, 0, [0, -1])], "segment 0 names block -1 of a memory of 10"),
        ([Segment(a, 0, [2**70])], "64-bit"),
        ([Segment(a, -1, [0])], "would have tokens -1 to 1 of a sequence of at most 600"),
        ([Segment(a, 598, table)], "would have tokens 598 to 600 of a sequence of at most 600"),
        ([Segment(a, 2**62, table)], "of a sequence of at most 600"),
        ([Segment(a, 0, [3]), Segment(a, 5, [3])], "segment 1 uses block 3, which segment 0 writes"),
        ([Segment(a, 64, [3, 4]), Segment(a, 5, [3])], "segment 0 uses block 3, which segment 1 writes"),
        ([Segment([0] * 65, 0, [3, 3])], "segment 0 uses block 3, which segment 0 writes"),
    ]


def test_bad_calls_write_nothing() -> None:
    decoder = small.native(small.config(), small.weights())
    memory = decoder.memory(10, 600)
    for segments, message in bad_calls():
        with pytest.raises(SpecError, match=message):
            decoder.run(segments, memory)
    assert not memory.memory.any()
    for blocks, positions, message in (
        (0, None, "at least 1 block"),
        (1, 0, "at least 1 position"),
        (2**60, 9, "bytes"),
    ):
        with pytest.raises(SpecError, match=message):
            decoder.memory(blocks, positions)


def test_numpy_alone() -> None:
    decoder = small.native(small.config(), small.weights())
    segment = Segment(small.ids(1, 9)[0].tolist(), 0, [1])
    logits = decoder.native.run([segment], decoder.native.memory(2))
    assert isinstance(logits, np.ndarray)
    assert torch.equal(torch.from_numpy(logits), decoder.run([segment], decoder.memory(2)))


def test_no_logits_wanted() -> None:
    decoder = small.native(small.config(), small.weights())
    memory = decoder.memory(1)
    assert decoder.run([Segment([1, 2], 0, [0], False)], memory).shape == (0, small.VOCAB)
    assert isinstance(memory, NativeMemory)
    assert memory.memory.any()
