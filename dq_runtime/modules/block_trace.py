"""How a model runs its quantized layers: their order, which share an input, where its blocks are and how it calls them.

Found by running it once and watching, so that no architecture has to be known by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dq_runtime.modules.student import StudentModel
from dq_runtime.modules.student_linear import StudentLinear


@dataclass(frozen=True)
class Call:
    """The arguments of a block beside the hidden states: positions, masks, the same for every window of a length."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states [B, T, H] after the block."""
        return first(block(hidden, *self.args, **self.kwargs))


class Watch:
    """Observes the inputs of some layers while it is entered."""

    def __init__(self, layers: Mapping[str, StudentLinear], see: Callable[[str, Tensor], object]) -> None:
        self._layers, self._see = layers, see

    def __enter__(self) -> None:
        for name, layer in self._layers.items():
            layer.observer = _bound(self._see, name)

    def __exit__(self, *error: object) -> None:
        for layer in self._layers.values():
            layer.observer = None


class Trace:
    """One pass of the first window through the model: in which order layers run, which share an input, and with which
    arguments every block is called (positions and masks are those of any window of this length). Of what runs through
    the model only one block's is kept at a time.

    ``blocks`` is empty where they are not run one after the other, each on what the one before returned. ``bare``: they
    return hidden states and nothing else.
    """

    def __init__(self, student: StudentModel, blocks: list[nn.Module]) -> None:
        self.calls: list[Call] = []
        self.stages: list[list[list[str]]] = []
        self.bare = True
        order: dict[str, None] = {}
        inputs: dict[str, Tensor] = {}
        chained, left = True, list[Tensor]()  # what the last block returned

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal chained
            hidden, call = _hidden_of(args, kwargs)
            turn = len(self.calls)
            in_turn = turn == len(self.stages) < len(blocks) and module is blocks[turn]
            chained = chained and in_turn and all(torch.equal(before, hidden) for before in left)
            self.calls.append(call)

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            left[:] = [first(output)]
            self.bare = self.bare and isinstance(output, Tensor)
            self.stages.append(_stages(student, module, inputs))
            inputs.clear()

        def see(name: str, h: Tensor) -> None:
            order.setdefault(name)
            inputs.setdefault(name, h)

        hooks = [b.register_forward_pre_hook(enter, with_kwargs=True) for b in blocks]
        hooks += [b.register_forward_hook(leave) for b in blocks]
        try:
            with Watch(student.layers, see):
                student.logits(student.tokens[0])
        finally:
            for hook in hooks:
                hook.remove()
        self.blocks = blocks if chained and len(self.stages) == len(blocks) else []
        if not self.blocks:
            self.stages = []
        self.order = [*order, *(name for name in student.layers if name not in order)]
        inside = {name for stages in self.stages for stage in stages for name in stage}
        self.first_inside = next((i for i, name in enumerate(self.order) if name in inside), len(self.order))


def _stages(student: StudentModel, block: nn.Module, inputs: Mapping[str, Tensor]) -> list[list[str]]:
    """The layers of a block in the order of ``inputs``, what each was called with, grouped where that is one tensor;
    then, each for itself, those that were not called."""
    members = {id(module) for module in block.modules()}
    names = [name for name, layer in student.layers.items() if id(layer) in members]
    stages: list[list[str]] = []
    for name in inputs:
        if name not in names:
            continue
        if stages and inputs[name] is inputs[stages[-1][0]]:
            stages[-1].append(name)
        else:
            stages.append([name])
    return stages + [[name] for name in names if name not in inputs]


class _Reached(Exception):  # noqa: N818 (not an error)
    """Raised to leave the model's forward pass where what follows is not wanted."""


def run_until(student: StudentModel, block: nn.Module, tokens: Tensor) -> Tensor:
    """What enters ``block`` for one window int64 [T], [1, T, H]."""
    found: list[Tensor] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(_hidden_of(args, kwargs)[0])
        raise _Reached

    hook = block.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        student.logits(tokens)
    except _Reached:
        pass
    finally:
        hook.remove()
    return found[0]


def inputs_of(student: StudentModel, name: str, window: int) -> Tensor:
    """What enters one layer for one window, float32 [tokens, K]; no rows if the window does not reach it."""
    layer = student.layers[name]
    found = [torch.empty(0, layer.in_features, device=layer.scale.device)]

    def see(_: str, h: Tensor) -> None:
        found.append(h.reshape(-1, h.shape[-1]).float())
        raise _Reached

    try:
        with Watch({name: layer}, see):
            student.logits(student.tokens[window])
    except _Reached:
        pass
    return found[-1]


def block_list(student: StudentModel) -> list[nn.Module]:
    """The entries of the outermost ModuleList with the most quantized layers in it."""
    quantized = {id(layer) for layer in student.layers.values()}
    best: tuple[int, list[nn.Module]] = (0, [])
    for module in student.model.modules():  # parents come before their children, so ties go to the outermost
        if isinstance(module, nn.ModuleList):
            count = sum(id(m) in quantized for m in module.modules())
            if count > best[0]:
                best = count, [m for m in module if any(id(x) in quantized for x in m.modules())]
    return best[1]


def _hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Call]:
    """The hidden states of a call of a block, and its other arguments."""
    rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
    hidden = args[0] if args else kwargs["hidden_states"]
    assert isinstance(hidden, Tensor)
    return hidden, Call(args[1:], rest)


def first(output: Any) -> Tensor:
    """The hidden states of what a block returned."""
    hidden = output[0] if isinstance(output, tuple | list) else output
    assert isinstance(hidden, Tensor)
    return hidden


def _bound(see: Callable[[str, Tensor], object], name: str) -> Callable[[Tensor], object]:
    return lambda h: see(name, h)
