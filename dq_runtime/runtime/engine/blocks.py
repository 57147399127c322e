"""Who owns which block of the memory of keys and values, and which free ones still hold a beginning worth keeping.

A block is used (sequences hold it: it is counted by how many), cached (nobody holds it, but what it holds is known and
may be asked for again), or free. Cached blocks are memory that nobody pays for: they are taken, the longest unused
first, when no free one is left (automatic prefix caching as in vLLM). Belongs to one thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

ROOT = 0  # the beginning of every text, what its first block follows


class Content(NamedTuple):
    """What a full block holds; equal contents have equal keys and values.

    ``before``: the serial number of the content of the block before it, or ROOT, so that a block stands for the whole
    text up to its end. ``tokens``: its ids. ``generated``: how many of them, at the end, were produced by the decode
    loop: their keys and values were summed in another order than a prompt's. Contents are compared, not only hashed, so
    that no collision can mix two texts."""

    before: int
    tokens: tuple[int, ...]
    generated: int


class BlockPool:
    """``total`` blocks, numbered from 0."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))  # taken from the end: what was written last is mapped and warm
        self._holders = [0] * total
        self._cached: OrderedDict[int, None] = OrderedDict()  # the longest unused first
        self._blocks: dict[Content, int] = {}
        self._contents: dict[int, tuple[Content, int]] = {}  # of a block: what it holds, and the serial number of that
        self._serial = ROOT

    @property
    def available(self) -> int:
        """Blocks that can be taken: free and cached."""
        return len(self._free) + len(self._cached)

    @property
    def cached(self) -> int:
        """Blocks that nobody holds and whose content is known."""
        return len(self._cached)

    @property
    def used(self) -> int:
        """Blocks that somebody holds."""
        return self.total - self.available

    def take(self, count: int) -> list[int] | None:
        """``count`` blocks of unknown content, each held once; None, and nothing taken, if so many are not there."""
        if count > self.available:
            return None
        while len(self._free) < count:
            block, _ = self._cached.popitem(last=False)
            content, _ = self._contents.pop(block)
            del self._blocks[content]
            self._free.append(block)
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
        return taken

    def hold(self, block: int) -> None:
        """Hold a block whose content is known once more, so that it is not taken."""
        self._cached.pop(block, None)
        self._holders[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Give back one hold of each of a sequence's blocks, in order. The end of a text is forgotten before its
        beginning, without which it could not be found."""
        for block in reversed(list(blocks)):
            self._holders[block] -= 1
            if self._holders[block] > 0:
                continue
            if block in self._contents:
                self._cached[block] = None
            else:
                self._free.append(block)

    def find(self, content: Content) -> int | None:
        """The block that holds ``content``, if one does; hold it before anything is taken."""
        return self._blocks.get(content)

    def serial(self, block: int) -> int:
        """The number of a known block's content: what the content of the next one follows. Never used again."""
        return self._contents[block][1]

    def learn(self, block: int, content: Content) -> int:
        """Say what a held block holds from now on; the block that holds it: another one, held in its place, where the
        content was there already."""
        known = self._blocks.get(content)
        if known is not None:
            self.hold(known)
            self.release([block])
            return known
        self._serial += 1
        self._blocks[content] = block
        self._contents[block] = content, self._serial
        return block

    def check(self) -> None:
        """Raise :class:`AssertionError` unless every block is used, cached or free, and only one of them."""
        free, cached = set(self._free), set(self._cached)
        used = {block for block, holders in enumerate(self._holders) if holders > 0}
        assert len(free) == len(self._free), "a block is free twice"
        assert len(free) + len(cached) + len(used) == len(free | cached | used), "a block is in two states"
        assert free | cached | used == set(range(self.total)), "a block is lost"
        assert all(holders >= 0 for holders in self._holders), "a block was released too often"
        assert set(self._contents) == set(self._blocks.values()), "contents and blocks disagree"
        assert cached <= set(self._contents), "a block of unknown content is cached"
        assert not free & set(self._contents), "a free block has a content"
