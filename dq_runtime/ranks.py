"""The processes of one ``torchrun``, and what they do together: share out rows, add up, agree.

A rounding that runs on several processes is one program that all of them run: the same layers in the same order, each
on windows of its own. A tensor of a layer [N, ...] is held as ``torch.chunk`` cuts it, rows of every process, as a
DTensor with ``Shard(0)``; :func:`whole` gathers it where a layer runs, and what comes of that is dropped after use.

Why the layers that are rounded do not go through ``fully_shard`` (FSDP2): it holds integers and frozen parameters as
well, but gathers all that a module holds whenever the module runs. A layer holds the original (2.5 to 6 bytes a
weight), of which the teacher's pass alone needs any, and the latent (4 bytes), of which the student's passes need only
the code: one byte a weight goes over the wire there instead of all ten. And a gradient must meet the rows of a latent,
which is no parameter: an int16 has no gradient, so FSDP2's own reduction would not see it.

Without torchrun every method is what it says for one process, and no collective is ever called. DTensor takes a second
to import, which only they wait for.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dq_runtime.errors import DQError, SpecError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# How long a process waits for the others: the first one alone writes the checkpoint. A process that dies is torchrun's
# to notice, at once.
PATIENCE = timedelta(hours=2)

Item = TypeVar("Item")
Result = TypeVar("Result")


class Ranks:
    """``rank`` of ``world`` processes; ``mesh`` None: this process alone, without torchrun."""

    def __init__(self, rank: int = 0, world: int = 1, mesh: DeviceMesh | None = None) -> None:
        self.rank, self.world, self.mesh = rank, world, mesh

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    # Rows

    def share(self, tensor: Tensor) -> Tensor:
        """The rows of this process of a tensor [N, ...] that all have; what is shared already stays as it is."""
        if self.mesh is None or is_shared(tensor):
            return tensor
        rows = -(-len(tensor) // self.world)  # as torch.chunk: the last processes may have fewer, or none
        mine = tensor[self.rank * rows : (self.rank + 1) * rows]
        return self.rows_of(mine.clone(), tensor.shape)

    def rows_of(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """The tensor of ``shape`` of which this process has ``rows`` (not copied)."""
        if self.mesh is None:
            return rows
        from torch.distributed.tensor import DTensor, Shard

        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(rows, self.mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Unwritten, shared out; a scalar is one in every process."""
        assert self.mesh is not None
        if not shape:
            return torch.empty(shape, dtype=dtype, device=self.mesh.device_type)
        rows = -(-shape[0] // self.world)
        mine = max(0, min(rows, shape[0] - self.rank * rows))
        return self.rows_of(torch.empty(mine, *shape[1:], dtype=dtype, device=self.mesh.device_type), shape)

    def begin(self, n: int) -> int:
        """The first row of this process, of ``n``."""
        return min(n, self.rank * -(-n // self.world))

    # Sums over the processes

    def sum_rows(self, tensor: Tensor) -> Tensor:
        """The rows of this process of the sum of one tensor [N, K] of every process (a reduce-scatter)."""
        if self.mesh is None:
            return tensor
        from torch.distributed.tensor import DTensor, Partial, Shard

        apart = DTensor.from_local(tensor.contiguous(), self.mesh, [Partial()], run_check=False)
        return local(apart.redistribute(placements=[Shard(0)]))

    def largest(self, value: Tensor) -> Tensor:
        """The elementwise maximum over all processes; in place."""
        if self.mesh is not None:
            dist.all_reduce(value, dist.ReduceOp.MAX)
        return value

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Give every parameter the sum of its gradients, of which a process may have none."""
        if self.mesh is None:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def total(self, value: float) -> float:
        """The sum of a number of every process, in float64."""
        if self.mesh is None:
            return value
        number = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(number)
        return number.item()

    def any(self, flag: bool) -> bool:
        """Whether it holds in any process."""
        return self.total(float(flag)) > 0 if self.mesh is not None else flag

    def lowest_of_top(self, values: Tensor, count: int) -> Tensor:
        """The ``count``-th largest of the values [n] of all processes together, a scalar."""
        top = torch.topk(values, min(count, len(values)), sorted=False).values
        if self.mesh is not None:
            mine = top.new_full((count,), -torch.inf)
            mine[: len(top)] = top
            tops = [torch.empty_like(mine) for _ in range(self.world)]
            dist.all_gather(tops, mine)
            top = torch.topk(torch.cat(tops), count, sorted=False).values
        return top.min()

    # Work

    def mine(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every ``world``-th item, from the ``rank``-th on."""
        return items[self.rank :: self.world]

    def spread(self, work: Callable[[Item], float], items: Sequence[Item]) -> list[float]:
        """``work`` of each item, each by one process; all have the results, in the items' order."""
        results = torch.zeros(len(items), dtype=torch.float64)
        for i in range(self.rank, len(items), self.world):
            results[i] = work(items[i])
        if self.mesh is not None:
            dist.all_reduce(results)  # the others added zeros
        numbers: list[float] = results.tolist()
        return numbers

    def told(self, value: Item) -> Item:
        """The first process's value; small, any picklable one."""
        if self.mesh is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        """Until all are here."""
        self.total(0.0)

    def once(self, work: Callable[..., object], *arguments: Any) -> None:
        """``work(*arguments)`` in the first process, while the others wait for it; its :class:`DQError` is raised in
        all."""
        if self.mesh is None:
            work(*arguments)
            return
        error: DQError | None = None
        if self.first:
            try:
                work(*arguments)
            except DQError as e:
                error = e
        error = self.told(error)
        if error is not None:
            raise error


ALONE = Ranks()


def is_shared(tensor: Tensor) -> bool:
    """Whether this process holds some rows of it only."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """The rows that this process holds."""
    rows: Tensor = tensor.to_local() if is_shared(tensor) else tensor  # type: ignore[attr-defined]
    return rows


def whole(tensor: Tensor) -> Tensor:
    """All rows, gathered where they are shared out; every process must ask at the same time. Of any dtype but int16,
    which gloo does not know."""
    rows: Tensor = tensor.full_tensor() if is_shared(tensor) else tensor  # type: ignore[attr-defined]
    return rows


def is_first_process() -> bool:
    """Whether this process speaks to the user; true without torchrun."""
    return not dist.is_torchelastic_launched() or os.environ["RANK"] == "0"


def join(device: str) -> tuple[Ranks, str]:
    """The processes of this torchrun and the device of this one: ``cuda`` is the GPU of its LOCAL_RANK. ``gloo`` on
    CPUs, ``nccl`` on GPUs. Without torchrun: this process, ``device``. :class:`SpecError` where one GPU is named for
    all of them or there are fewer than processes."""
    if not dist.is_torchelastic_launched():
        return ALONE, device
    kind, _, index = device.partition(":")
    if kind == "cuda":
        number = int(os.environ["LOCAL_RANK"])
        if index:
            raise SpecError(f"under torchrun each process takes a GPU of its own; use --device cuda, not {device}")
        if number >= torch.cuda.device_count():
            raise SpecError(
                f"torchrun started more processes than there are GPUs: torch sees {torch.cuda.device_count()}; lower "
                "--nproc-per-node"
            )
        device = f"cuda:{number}"
        torch.cuda.set_device(number)
    if not dist.is_initialized():
        # Flags and figures are CPU tensors on either device.
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=PATIENCE)
        atexit.register(dist.destroy_process_group)
    from torch.distributed.device_mesh import init_device_mesh

    world = dist.get_world_size()
    return Ranks(dist.get_rank(), world, init_device_mesh(kind, (world,))), device
