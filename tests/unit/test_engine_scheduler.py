"""What each pass computes: its budget, its fairness, who waits and who gives way."""

from __future__ import annotations

import random

import pytest
from engine_fakes import END, FakeDecoder, FakeModel, Listener, continued, request
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_runtime.runtime.decoder.paged import BLOCK
from dq_runtime.runtime.engine.answer import Answer
from dq_runtime.runtime.engine.blocks import BlockPool
from dq_runtime.runtime.engine.scheduler import Scheduler, shares
from dq_runtime.runtime.engine.sequence import Sequence
from dq_runtime.runtime.token_bytes import TokenBytes

MODEL = FakeModel()


class Driver:
    """A scheduler and the decoder, one pass at a time, without a thread; every pass is checked."""

    def __init__(self, blocks: int, max_running: int = 8, step_tokens: int = 64, reuse: bool = True) -> None:
        self.pool = BlockPool(blocks)
        self.scheduler = Scheduler(self.pool, max_running, step_tokens, reuse)
        self.decoder = FakeDecoder()
        self.memory = self.decoder.memory(blocks)
        self.max_running, self.step_tokens = max_running, step_tokens
        self.number = 0

    def add(self, prompt: list[int], max_tokens: int) -> Sequence:
        self.number += 1
        asked = request(prompt, max_tokens)
        answer = Answer(asked, MODEL, max_tokens, {END}, TokenBytes(None), None)
        sequence = Sequence(self.number, len(prompt), answer, Listener())
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> list[tuple[Sequence, int]]:
        """One pass; who took part with how many tokens."""
        plan = self.scheduler.plan()
        assert plan or not (self.scheduler.running or self.scheduler.waiting)
        assert sum(len(segment.tokens) for _, segment in plan) <= self.step_tokens
        assert len(self.scheduler.running) <= self.max_running
        generating = {s for s in self.scheduler.running if not s.prefilling}
        assert generating <= {s for s, _ in plan}, "a generating sequence was left out"
        if plan:
            rows = iter(self.decoder.run([segment for _, segment in plan], self.memory))
        for sequence, segment in plan:
            self.scheduler.done(sequence, segment)
            if segment.wants_logits:
                sequence.answer.advance(next(rows))
                if sequence.answer.finish:
                    sequence.ended = True
                    self.scheduler.retire(sequence)
        self.pool.check()
        numbers = [s.number for s in [*self.scheduler.running, *self.scheduler.waiting]]
        assert numbers == sorted(numbers), "order of arrival was lost"
        return [(sequence, len(segment.tokens)) for sequence, segment in plan]

    def run(self, most: int = 10_000) -> int:
        """Until nothing is left; the number of passes."""
        for passes in range(most):
            if not self.step():
                return passes
        raise AssertionError("some request never ended")


def prompt(length: int, seed: int) -> list[int]:
    choose = random.Random(seed)
    return [choose.randrange(256) for _ in range(length)]


def test_texts_are_those_of_the_model_whatever_the_neighbours() -> None:
    driver = Driver(40)
    asked = [(prompt(length, length), count) for length, count in ((1, 5), (63, 3), (64, 70), (65, 1), (300, 20))]
    sequences = [driver.add(*a) for a in asked]
    driver.run()
    for sequence, (ids, count) in zip(sequences, asked, strict=True):
        assert sequence.tokens == ids + continued(ids, count)
    assert driver.pool.used == 0


def test_a_long_prompt_does_not_stall_texts_under_way() -> None:
    driver = Driver(100, step_tokens=32)
    talking = driver.add(prompt(3, 0), 30)
    driver.step()
    driver.add(prompt(1000, 1), 1)
    for _ in range(20):
        before = talking.answer.generated
        driver.step()
        assert talking.answer.generated == before + 1


def test_a_short_prompt_does_not_wait_for_a_long_one_nor_stop_it() -> None:
    driver = Driver(100, step_tokens=32)
    long = driver.add(prompt(1000, 1), 1)
    driver.step()
    short = driver.add(prompt(16, 2), 1)
    held = long.computed
    driver.step()
    assert short.answer.finish == "length"
    assert long.computed == held + 16


@given(st.lists(st.integers(1, 300), max_size=12), st.integers(1, 256))
def test_shares(needs: list[int], budget: int) -> None:
    given_out = shares(needs, budget)
    assert all(0 <= g <= n for g, n in zip(given_out, needs, strict=True))
    assert sum(given_out) == min(budget, sum(needs))  # nothing is left lying
    if needs:
        assert given_out[0] >= min(needs[0], max(1, budget // 2))
    if budget >= 2 * len(needs):
        assert all(given_out)


def test_a_waiting_request_is_admitted_when_its_prompt_and_a_reserve_fit() -> None:
    driver = Driver(4)
    first, second = driver.add(prompt(2 * BLOCK, 1), 10), driver.add(prompt(BLOCK + 1, 2), 10)
    driver.step()
    # 2 blocks are left, which its prompt needs; but the first will want another one soon.
    assert driver.scheduler.running == [first]
    assert list(driver.scheduler.waiting) == [second]
    driver.run()
    assert driver.scheduler.preemptions == 0


def test_the_youngest_gives_way_and_says_the_same_in_the_end() -> None:
    driver = Driver(4)
    asked = [(prompt(10, i), 2 * BLOCK) for i in range(2)]
    old, young = (driver.add(*a) for a in asked)
    while not driver.scheduler.preemptions:
        driver.step()
    assert driver.scheduler.running == [old]
    driver.run()
    for sequence, (ids, count) in zip((old, young), asked, strict=True):
        assert sequence.tokens == ids + continued(ids, count)


def test_who_gave_way_is_admitted_before_those_that_came_later() -> None:
    driver = Driver(4, max_running=2)
    old, young, later = (driver.add(prompt(10, i), 2 * BLOCK) for i in range(3))
    while not driver.scheduler.preemptions:
        driver.step()
    assert (driver.scheduler.running, list(driver.scheduler.waiting)) == ([old], [young, later])
    driver.run()
    assert later.tokens == prompt(10, 2) + continued(prompt(10, 2), 2 * BLOCK)


@pytest.mark.parametrize("reuse", [True, False])
def test_a_preempted_text_is_repeated_as_it_was_made(reuse: bool) -> None:
    """Its prompt as a prompt, its generated tokens one by one as generated: otherwise bits would differ."""
    driver = Driver(4, reuse=reuse)
    old, young = driver.add(prompt(10, 0), 3 * BLOCK), driver.add(prompt(10, 1), 2 * BLOCK)
    driver.run()
    assert driver.scheduler.preemptions
    segments = [s for segments in driver.decoder.passes for s in segments]
    assert (old.cached, young.cached) == (0, 0)  # what it finds of its own is no gain
    for sequence in (old, young):
        for s in segments:
            if list(s.tokens) == sequence.tokens[s.start : s.start + len(s.tokens)]:
                assert s.generated == (s.start >= 10)
                assert len(s.tokens) == 1 or not s.generated


def test_what_a_preempted_text_finds_of_its_own_is_no_gain() -> None:
    driver = Driver(10)
    ids = prompt(BLOCK + 6, 0)
    sequence = driver.add(ids, 2 * BLOCK)
    for _ in range(BLOCK):
        driver.step()
    driver.scheduler._preempt(sequence)
    held = driver.step()
    assert held == [(sequence, 1)]  # only what was in no full block
    assert sequence.computed > BLOCK
    driver.run()
    assert sequence.cached == 0
    assert sequence.tokens == ids + continued(ids, 2 * BLOCK)


def test_an_answer_that_comes_back_in_a_prompt_is_computed_again() -> None:
    """Its keys and values were summed as generated ones."""
    driver = Driver(10)
    ids = prompt(BLOCK + 6, 0)
    first = driver.add(ids, 2 * BLOCK)
    driver.run()
    second = driver.add([*first.tokens, 1], 1)
    driver.run()
    assert second.cached == BLOCK
    assert second.tokens[-1:] == continued([*first.tokens, 1], 1)


def test_a_common_beginning_is_computed_once() -> None:
    driver = Driver(40)
    common = prompt(3 * BLOCK, 0)
    first = driver.add([*common, 1, 2], 2)
    driver.run()
    second = driver.add([*common, 3], 2)
    driver.run()
    assert (first.cached, second.cached) == (0, 3 * BLOCK)
    assert second.tokens[-2:] == continued([*common, 3], 2)


def test_requests_that_arrive_together_share_their_beginning() -> None:
    """The younger ones wait for the blocks that the oldest is computing."""
    driver = Driver(60, step_tokens=64)
    common = prompt(4 * BLOCK, 0)
    sequences = [driver.add([*common, i], 2) for i in range(5)]
    driver.run()
    computed = sum(len(s.tokens) for segments in driver.decoder.passes for s in segments)
    assert computed == 4 * BLOCK + 5 * 2  # the beginning once; the last token of each prompt and one more
    assert [sequence.cached for sequence in sequences] == [0] + 4 * [4 * BLOCK]
    for i, sequence in enumerate(sequences):
        assert sequence.tokens[-2:] == continued([*common, i], 2)


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    driver = Driver(10)
    ids = prompt(2 * BLOCK, 0)
    driver.add(ids, 1)
    driver.run()
    again = driver.add(ids, 1)
    driver.run()
    assert again.cached == BLOCK
    assert again.tokens[-1:] == continued(ids, 1)


def test_without_reuse_nothing_is_cached() -> None:
    driver = Driver(10, reuse=False)
    for _ in range(2):
        sequence = driver.add(prompt(100, 0), 1)
        driver.run()
        assert sequence.cached == 0
    assert driver.pool.cached == 0


ACTIONS = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 200), st.integers(1, 90)),
    st.tuples(st.just("cancel"), st.integers(0, 20), st.just(0)),
    st.tuples(st.just("step"), st.integers(1, 8), st.just(0)),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(ACTIONS, max_size=25), st.integers(5, 12), st.integers(1, 4), st.booleans())
def test_any_load_ends_without_a_leak(
    actions: list[tuple[str, int, int]], blocks: int, max_running: int, reuse: bool
) -> None:
    driver = Driver(blocks, max_running, 4 + max_running, reuse)
    asked: list[tuple[Sequence, list[int], int]] = []
    for action, a, b in actions:
        if action == "add":
            ids = (prompt(2 * BLOCK, 0) + prompt(200, a))[:a] if a % 2 else prompt(a, a)  # every second: one beginning
            asked.append((driver.add(ids, b), ids, b))
        elif action == "step":
            for _ in range(a):
                driver.step()
        elif asked:
            sequence = asked[a % len(asked)][0]
            if not sequence.ended:
                sequence.ended = True
                driver.scheduler.retire(sequence)
                driver.pool.check()
    driver.run()
    assert driver.pool.used == 0
    assert driver.pool.cached + len(driver.pool._free) == blocks
    for sequence, ids, count in asked:
        said = sequence.tokens[len(ids) :]
        assert sequence.ended
        assert said == continued(ids, len(said))
        assert sequence.answer.finish is None or len(said) == count
