"""One request in the engine: which of its positions are in the memory, and what the next pass should add to them."""

from __future__ import annotations

from collections.abc import Callable

from dq_runtime.runtime.decoder.paged import BLOCK, Segment
from dq_runtime.runtime.engine.answer import Answer
from dq_runtime.runtime.engine.blocks import ROOT, BlockPool, Content
from dq_runtime.runtime.engine.events import Event


class Sequence:
    """``number`` is the order of arrival: the lower the older. ``tokens`` is the answer's list, prompt first;
    ``computed`` how many of them the ``blocks`` hold. A sequence that lost its blocks starts again at 0 and
    repeats what it did: its prompt in chunks, its generated tokens one by one, so that the same bits come out."""

    def __init__(self, number: int, prompt: int, answer: Answer, on_event: Callable[[Event], None]) -> None:
        self.number = number
        self.prompt = prompt
        self.answer = answer
        self.tokens = answer.tokens
        self.on_event = on_event
        self.ended = False
        self.computed = 0
        self.blocks: list[int] = []
        self.admitted = False
        self.cached = 0  # tokens of the prompt that were found in the memory, not computed before by this sequence
        self._furthest = 0  # positions it has ever computed
        self._known = 0  # blocks, from the beginning, whose content the pool knows
        self._before = ROOT  # serial number of the last of them

    @property
    def prefilling(self) -> bool:
        """Whether positions of the prompt are to be computed yet."""
        return self.computed < self.prompt

    @property
    def may_reuse(self) -> bool:
        """Whether a whole block comes next that need not be computed if the pool knows it: the last token always is,
        since its logits are wanted."""
        return self.computed == self._known * BLOCK and self.computed + BLOCK < len(self.tokens)

    @property
    def wanted_blocks(self) -> int:
        """Blocks for all tokens there are."""
        return -(-len(self.tokens) // BLOCK)

    def segment(self, most: int) -> Segment:
        """The next at most ``most`` tokens: of the prompt, or one generated."""
        start = self.computed
        stop = min(self.prompt, start + most) if self.prefilling else start + 1
        return Segment(
            tokens=self.tokens[start:stop],
            start=start,
            blocks=self.blocks[: -(-stop // BLOCK)],
            wants_logits=stop == len(self.tokens),
            generated=not self.prefilling,
        )

    def content(self) -> Content | None:
        """Of the first block that the pool does not know; None while its tokens are not all there."""
        start = self._known * BLOCK
        if start + BLOCK > len(self.tokens):
            return None
        generated = min(BLOCK, max(0, start + BLOCK - self.prompt))
        return Content(self._before, tuple(self.tokens[start : start + BLOCK]), generated)

    def reuse(self, pool: BlockPool) -> None:
        """Take over what the pool knows of the text from here on, in place of blocks of its own, if any."""
        while self.may_reuse:
            content = self.content()
            block = None if content is None else pool.find(content)
            if block is None:
                return
            pool.hold(block)
            if self._known < len(self.blocks):
                pool.release([self.blocks[self._known]])
                self.blocks[self._known] = block
            else:
                self.blocks.append(block)
            self._knows(pool, block)
            if self.computed >= self._furthest:
                self.cached += BLOCK
            self.computed += BLOCK

    def advance(self, count: int) -> None:
        """The memory holds ``count`` more tokens."""
        self.computed += count
        self._furthest = max(self._furthest, self.computed)

    def learn(self, pool: BlockPool) -> None:
        """Tell the pool of the blocks that are full by now."""
        while (self._known + 1) * BLOCK <= self.computed:
            content = self.content()
            assert content is not None
            block = pool.learn(self.blocks[self._known], content)
            self.blocks[self._known] = block
            self._knows(pool, block)

    def drop(self, pool: BlockPool) -> None:
        """Give all blocks back."""
        pool.release(self.blocks)
        self.blocks, self.computed, self._known, self._before = [], 0, 0, ROOT

    def _knows(self, pool: BlockPool, block: int) -> None:
        self._known += 1
        self._before = pool.serial(block)
