"""Which sequences the next pass advances, by how many tokens, in which blocks.

Every generating sequence gets one token in every pass; what is left of the pass's tokens goes to prompts. Sequences are
admitted in the order of arrival, and where blocks run out the youngest gives up its own: the oldest always has what it
needs, so every request ends. Belongs to one thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from dq_runtime.runtime.decoder.paged import BLOCK, Segment
from dq_runtime.runtime.engine.blocks import BlockPool, Content
from dq_runtime.runtime.engine.sequence import Sequence


class Scheduler:
    """``forget`` is told the blocks of a sequence before it gives them back. At most ``step_tokens`` tokens a pass and
    ``max_running`` <= ``step_tokens`` sequences with blocks; ``waiting`` and ``running`` are both oldest first. Each
    sequence must fit into the pool alone."""

    def __init__(
        self,
        pool: BlockPool,
        max_running: int,
        step_tokens: int,
        prefix_reuse: bool,
        forget: Callable[[list[int]], None] = lambda blocks: None,
    ) -> None:
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._max_running, self._step_tokens = max_running, step_tokens
        self._prefix_reuse, self._forget = prefix_reuse, forget

    def add(self, sequence: Sequence) -> None:
        """A new one, younger than all others."""
        self.waiting.append(sequence)

    def retire(self, sequence: Sequence) -> None:
        """It has ended: its blocks are free."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._release(sequence)

    def plan(self) -> list[tuple[Sequence, Segment]]:
        """The next pass: empty only if there is no sequence at all."""
        self._grow()
        self._admit()
        if self._prefix_reuse:
            for sequence in self.running:
                if sequence.prefilling:
                    sequence.reuse(self.pool)
        generating = [s for s in self.running if not s.prefilling]
        prompts = self._leaders([s for s in self.running if s.prefilling])
        chunks = shares([s.prompt - s.computed for s in prompts], self._step_tokens - len(generating))
        parts = [(s, s.segment(1)) for s in generating]
        return parts + [(s, s.segment(chunk)) for s, chunk in zip(prompts, chunks, strict=True) if chunk]

    def done(self, sequence: Sequence, segment: Segment) -> None:
        """The decoder has written ``segment``."""
        sequence.advance(len(segment.tokens))
        if self._prefix_reuse:
            sequence.learn(self.pool)

    def _grow(self) -> None:
        """A block for the next token of every generating sequence; those of prompts were taken when it was admitted."""
        for sequence in list(self.running):
            while sequence in self.running and len(sequence.blocks) * BLOCK <= sequence.computed:
                taken = self.pool.take(1)
                if taken is None:
                    self._preempt(self.running[-1])
                else:
                    sequence.blocks += taken

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)  # it is older than all that have not run yet
        self.preemptions += 1

    def _admit(self) -> None:
        """Move the oldest waiting ones in as long as all their tokens fit, and a block more for every running one, so
        that the next of these to grow does not throw out whom we just let in."""
        while self.waiting and len(self.running) < self._max_running:
            sequence = self.waiting[0]
            cached = sequence.cached
            if self._prefix_reuse:
                sequence.reuse(self.pool)
            missing = sequence.wanted_blocks - len(sequence.blocks)
            taken = None
            if missing + len(self.running) <= self.pool.available:
                taken = self.pool.take(missing)
            if taken is None:
                sequence.drop(self.pool)
                sequence.cached = cached  # it will be looked up, and counted, again
                return
            sequence.blocks += taken
            sequence.admitted = True
            self.running.append(self.waiting.popleft())

    def _leaders(self, prompts: list[Sequence]) -> list[Sequence]:
        """Those that do not begin a block which an older one is computing at this moment: they wait to share it."""
        if not self._prefix_reuse:
            return prompts
        leaders, computing = [], set[Content]()
        for sequence in prompts:
            content = sequence.content()
            if sequence.may_reuse and content in computing:
                continue
            if content is not None:
                computing.add(content)
            leaders.append(sequence)
        return leaders

    def _release(self, sequence: Sequence) -> None:
        self._forget(sequence.blocks)
        sequence.drop(self.pool)


def shares(needs: list[int], budget: int) -> list[int]:
    """How many of ``needs`` tokens each prompt, oldest first, gets of ``budget`` tokens.

    The oldest gets up to half, so that it is done soon; the others as evenly as their needs allow (the smallest first),
    so that a short prompt behind long ones does not wait for them; what nobody of these needs goes to the oldest again.
    None starves: each gets at least 1 where ``budget >= 2 * len(needs)``, and the oldest always does."""
    given = [0] * len(needs)
    if not needs:
        return given
    given[0] = min(needs[0], max(1, budget // 2) if len(needs) > 1 else budget)
    left = budget - given[0]
    others = sorted(range(1, len(needs)), key=lambda i: needs[i])
    for served, i in enumerate(others):
        given[i] = min(needs[i], left // (len(others) - served))
        left -= given[i]
    given[0] += min(needs[0] - given[0], left)
    return given
