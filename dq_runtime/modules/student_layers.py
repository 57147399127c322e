"""Put StudentLinears in place of a model's linears, one at a time, so that W is never held twice.

Of several processes each keeps its rows of them (dq_runtime/ranks.py), and FSDP2 (``fully_shard``) shares out the two
large weights that stay dense, embedding and head, unless they are one. Norms and biases are small, and whole in every
process: blocks are run by themselves in the first stage, where a root of FSDP2 would not gather them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from dq_runtime.errors import SpecError
from dq_runtime.grids import GRIDS
from dq_runtime.modules.block_trace import Watch
from dq_runtime.modules.student import StudentModel
from dq_runtime.modules.student_linear import StudentLinear
from dq_runtime.modules.surgery import bias_of, replace_module, weight_of
from dq_runtime.ranks import Ranks
from dq_runtime.spec import GridSpec


def student_layers(
    model: nn.Module,
    modules: Mapping[str, Any],
    grids: Mapping[str, GridSpec],
    device: str,
    ranks: Ranks,
    show: Callable[[int, int], object],
) -> dict[str, StudentLinear]:
    """The layers of ``grids`` by name, in ``model`` and on ``device``, as is the rest of it afterwards; of ``modules``
    the weights are dropped. Several processes share a layer out as soon as its grid is fitted."""
    layers = {}
    for i, (name, grid) in enumerate(grids.items(), 1):
        module = modules[name]
        bias = bias_of(module)
        built = GRIDS.get(grid.name)(grid)
        layers[name] = StudentLinear(weight_of(module).to(device), None if bias is None else bias.to(device), built)
        layers[name].share(ranks)
        replace_module(model, name, layers[name])
        module.weight = None
        show(i, len(grids))
    model.to(device)
    share_dense(model, ranks)
    return layers


def share_dense(model: Any, ranks: Ranks) -> None:
    """Embedding and head by FSDP2: gathered for their own pass, in which they are called as modules."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if ranks.mesh is None or not isinstance(head, nn.Linear) or head.weight is embedding.weight:
        return
    from torch.distributed.fsdp import fully_shard

    for module in (embedding, head):
        fully_shard(module, mesh=ranks.mesh, reshard_after_forward=True)


def check_every_token_everywhere(student: StudentModel) -> None:
    """:class:`SpecError` for a model with a layer that sees some tokens only, such as an expert: processes with other
    windows would not meet in it, and all would wait for ever. Looked for in the first window."""
    tokens, seen = student.tokens[0], dict.fromkeys(student.layers, 0)

    def see(name: str, h: Any) -> None:
        seen[name] += h.numel() // h.shape[-1]

    with Watch(student.layers, see):
        student.logits(tokens)
    for name, count in seen.items():
        if count == 0 or count % len(tokens):
            raise SpecError(
                f"{name} runs on some tokens only, as experts do, and several processes cannot round such a model "
                "together; run it without torchrun"
            )
