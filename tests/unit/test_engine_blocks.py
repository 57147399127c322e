"""The block pool: nothing is lost, nothing owned twice, and only equal texts share."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_runtime.runtime.decoder.paged import BLOCK
from dq_runtime.runtime.engine.blocks import ROOT, BlockPool, Content


def full(before: int, token: int, generated: int = 0) -> Content:
    return Content(before, (token,) * BLOCK, generated)


def test_blocks_are_used_free_or_cached() -> None:
    pool = BlockPool(4)
    first = pool.take(3)
    assert first is not None
    assert (pool.used, pool.available, pool.cached) == (3, 1, 0)
    pool.learn(first[0], full(ROOT, 1))
    pool.release(first)
    assert (pool.used, pool.available, pool.cached) == (0, 4, 1)
    pool.check()


def test_more_than_there_is_takes_nothing() -> None:
    pool = BlockPool(2)
    assert pool.take(3) is None
    assert pool.available == 2
    assert pool.take(0) == []


def test_a_known_block_is_found_until_its_memory_is_wanted() -> None:
    pool = BlockPool(2)
    (block,) = pool.take(1) or []
    content = full(ROOT, 1)
    pool.learn(block, content)
    pool.release([block])
    assert pool.find(content) == block
    assert pool.take(1) == [1 - block]  # a free one first
    assert pool.find(content) == block
    assert pool.take(1) == [block]
    assert pool.find(content) is None
    pool.check()


def test_the_end_of_a_text_is_forgotten_before_its_beginning() -> None:
    pool = BlockPool(3)
    blocks = pool.take(3) or []
    before = ROOT
    contents = []
    for token, block in enumerate(blocks):
        contents.append(full(before, token))
        pool.learn(block, contents[-1])
        before = pool.serial(block)
    pool.release(blocks)
    for left in (2, 1, 0):
        pool.take(1)
        assert [pool.find(c) is not None for c in contents] == [True] * left + [False] * (3 - left)


def test_what_two_computed_is_kept_once() -> None:
    pool = BlockPool(2)
    one, two = pool.take(2) or []
    assert pool.learn(one, full(ROOT, 1)) == one
    assert pool.learn(two, full(ROOT, 1)) == one
    assert pool.used == 1
    pool.release([one])
    assert pool.used == 1
    pool.release([one])
    assert (pool.used, pool.cached) == (0, 1)
    pool.check()


def test_generated_tokens_are_another_content_than_a_prompts() -> None:
    """Their keys and values are summed in another order: sharing them would change bits."""
    pool = BlockPool(1)
    (block,) = pool.take(1) or []
    pool.learn(block, full(ROOT, 1, generated=3))
    assert pool.find(full(ROOT, 1)) is None
    assert pool.find(full(ROOT, 1, generated=3)) == block


def test_texts_whose_hashes_collide_are_not_mixed() -> None:
    """hash(-1) == hash(-2) in CPython, so these two contents collide."""
    pool = BlockPool(1)
    (block,) = pool.take(1) or []
    one, two = Content(-1, (1,) * BLOCK, 0), Content(-2, (1,) * BLOCK, 0)
    assert hash(one) == hash(two)
    pool.learn(block, one)
    assert pool.find(two) is None


def test_a_serial_number_is_never_used_again() -> None:
    pool = BlockPool(1)
    seen = set()
    for token in range(3):
        (block,) = pool.take(1) or []
        pool.learn(block, full(ROOT, token))
        seen.add(pool.serial(block))
        pool.release([block])
    assert len(seen) == 3
    assert ROOT not in seen


def test_the_check_notices() -> None:
    pool = BlockPool(2)
    taken = pool.take(1) or []
    pool._free.append(taken[0])
    with pytest.raises(AssertionError, match="two states"):
        pool.check()
    lost = BlockPool(2)
    lost._free.pop()
    with pytest.raises(AssertionError, match="lost"):
        lost.check()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["take", "release", "learn", "share"]), st.integers(0, 6)), max_size=60))
def test_any_order_of_calls_keeps_every_block(calls: list[tuple[str, int]]) -> None:
    """Against a model: lists of blocks held, each learned in order along its own text."""
    pool = BlockPool(7)
    held: list[tuple[list[int], int, int]] = []  # blocks, how many are known, serial number of the last known
    for call, n in calls:
        if call == "take":
            taken = pool.take(n)
            assert (taken is None) == (n > 7 - len({b for blocks, _, _ in held for b in blocks}))
            if taken:
                held.append((taken, 0, ROOT))
        elif held and call == "release":
            pool.release(held.pop(n % len(held))[0])
        elif held and call == "learn":
            blocks, known, before = held[n % len(held)]
            if known < len(blocks):
                blocks[known] = pool.learn(blocks[known], full(before, n % 2))
                held[n % len(held)] = blocks, known + 1, pool.serial(blocks[known])
        elif call == "share":
            block = pool.find(full(ROOT, n % 2))
            if block is not None:
                pool.hold(block)
                held.append(([block], 1, pool.serial(block)))
        pool.check()
        assert pool.used == len({b for blocks, _, _ in held for b in blocks})
    for blocks, _, _ in held:
        pool.release(blocks)
    pool.check()
    assert pool.used == 0
