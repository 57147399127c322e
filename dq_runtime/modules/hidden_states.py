"""The hidden states of all windows between two blocks, in memory or, where there are many, in a file without a name."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dq_runtime.errors import DQError

# Bytes of one stream that are held in memory: 96 windows of 512 tokens at hidden 5120.
IN_MEMORY = 2**30


class HiddenStates:
    """A :class:`~dq_runtime.modules.blocks.Stream`: [1, T, H] for each of ``count`` windows, all of ``like``'s shape
    and dtype, given out on its device. Beyond :data:`IN_MEMORY` bytes they lie in a file in ``directory`` that is gone
    with the process, and pages of it count as this process's only while a window is copied."""

    def __init__(self, count: int, like: Tensor, directory: Path) -> None:
        self._device, self._map = like.device, None
        size = count * like.nbytes
        if size <= IN_MEMORY:
            self._all = torch.empty(count, *like.shape, dtype=like.dtype)
        else:
            self._map = _unnamed(directory, size)
            self._all = torch.frombuffer(self._map, dtype=like.dtype).view(count, *like.shape)

    @classmethod
    def of(cls, windows: Iterator[Tensor], count: int, directory: Path) -> HiddenStates:
        """``count`` windows, one after the other."""
        states = None
        for i, hidden in enumerate(windows):
            states = states or cls(count, hidden, directory)
            states[i] = hidden
        assert states is not None, "there is a window"
        return states

    def copy(self, directory: Path) -> HiddenStates:
        """The same states, to be changed apart from these."""
        return HiddenStates.of(iter(self), len(self._all), directory)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[window] for window in range(len(self._all)))

    def __getitem__(self, window: int) -> Tensor:
        if self._map is None:
            return self._all[window].to(self._device)
        found = self._all[window].to(self._device, copy=True)
        self._drop()
        return found

    def __setitem__(self, window: int, hidden: Tensor) -> None:
        self._all[window] = hidden
        self._drop()

    def _drop(self) -> None:
        """What was written stays in the file."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def _unnamed(directory: Path, size: int) -> mmap.mmap:
    """So many bytes of a file. They are taken at once: a disk that is full later would end the process by a signal."""
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return mmap.mmap(file.fileno(), size)
    except OSError as e:
        raise DQError(
            f"{directory} could not take {size / 1e9:.1f} GB of activations: {e.strerror or e}; free some space, or "
            "use fewer or shorter windows"
        ) from e
