"""Files and directories that appear whole or not at all: temporary name, fsync, rename."""

from __future__ import annotations

import glob
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dq_runtime.errors import DQError

if TYPE_CHECKING:  # most of this file needs no torch, whose import takes 2 s
    from torch import Tensor


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """``write(temporary path)``, then move it over ``path``; on any failure ``path`` is as it was."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        write(temporary)
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)
    except OSError as e:
        raise DQError(f"could not write {path}: {e.strerror or e}; nothing was changed") from e
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """``tensors`` (any device) as a safetensors file; a full disk is an OSError, as for any other file."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    try:
        save_file(plain, path, metadata=dict(metadata))
    except SafetensorError as e:
        raise OSError(None, str(e)) from e


# The process that writes the output of several (shared_state.py): they may read it before it is finished.
TOGETHER: set[int] = set()


def unfinished_by(path: Path) -> int | None:
    """The number of the process that is (or was, if it was killed) writing this directory of :func:`new_directory`."""
    found = re.fullmatch(r"\..+\.tmp-(\d+)", path.resolve().name)
    return None if found is None else int(found.group(1))


def remove_unfinished(path: Path) -> None:
    """Remove what killed processes left of ``path``."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.tmp-*"):
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def new_directory(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling directory; on success it becomes ``path``, on failure nothing is left behind.

    An existing ``path`` is refused unless ``overwrite``, and then removed only after the new one is complete.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            _fsync(file)
        _fsync(temporary)
        if path.exists():
            if not overwrite:
                raise DQError(f"{path} appeared while this run was writing; nothing was replaced")
            old = path.with_name(f".{path.name}.old-{os.getpid()}")
            path.rename(old)
            try:
                temporary.rename(path)
            except BaseException:
                old.rename(path)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.rename(path)
        _fsync(path.parent)
    except OSError as e:
        raise DQError(f"could not write {path}: {e.strerror or e}; nothing was written") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
