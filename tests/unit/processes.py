"""Run a function in several processes at once, as torchrun would, without its seconds of imports for each."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from queue import Empty
from typing import Any

import torch

# One server process imports these; the processes that it forks have them.
PRELOADED = ["torch.distributed.tensor", "transformers.models.llama.modeling_llama", "dq_runtime.pipeline"]


class Lost(Exception):  # noqa: N818
    """What became of each process, by rank: its error as text, or how it ended."""


def together(world: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The results of ``work(*arguments)`` in each of ``world`` processes, with torchrun's environment; as under
    torchrun, all are killed where one fails (:class:`Lost`)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = context.Queue()
    processes = [
        context.Process(target=_enter, args=(rank, world, port, work, arguments, results), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    failed: dict[int, str] = {}
    while len(found) < world and len(failed) < world:
        try:
            rank, error, result = results.get(timeout=0.5)
        except Empty:
            ended = {r: p.exitcode for r, p in enumerate(processes) if r not in found and p.exitcode is not None}
            failed |= {r: f"exit code {code}" for r, code in ended.items() if r not in failed}
            if failed:
                break
        else:
            (failed if error else found)[rank] = error or result
    for process in processes:
        if failed:
            process.kill()
        process.join(60)
    if failed:
        raise Lost(failed)
    return [found[rank] for rank in range(world)]


def _enter(rank: int, world: int, port: int, work: Callable[..., Any], arguments: Any, results: Any) -> None:
    torch.set_num_threads(1)  # as tests/conftest.py
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(number) for name, number in numbers.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"})
    try:
        results.put((rank, None, work(*arguments)))
    except BaseException as e:
        results.put((rank, f"{type(e).__name__}: {e}", None))
    results.close()
    results.join_thread()
    time.sleep(0.2)  # python's own end takes as long; gloo takes a process that is gone for one that fell in its work
