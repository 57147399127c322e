"""A causal LM of which only the part that runs is in memory; the rest stays where its tensors are stored.

A *part* is a transformer block with everything in it, or one module outside of the blocks with its own parameters (the
embedding, the last norm, the head). Loaded, its dense parameters are float32 and its quantized layers filled. What
enters the first block and what follows the last one are asked for separately (:meth:`StreamedStudent.front`,
:meth:`StreamedStudent.tail`), because whoever walks a model block by block runs every window through one block before
the next is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dq_runtime.environment import give_back_memory
from dq_runtime.errors import CheckpointError, SpecError
from dq_runtime.modules.block_trace import Trace, block_list, run_until
from dq_runtime.modules.student import StudentModel
from dq_runtime.modules.student_linear import StudentLinear
from dq_runtime.modules.surgery import tied_to


class StoredTensors(Protocol):
    """The tensors of a model by their names in it; bad ones raise :class:`DQError`."""

    def tensor(self, name: str) -> Tensor:
        """A dense tensor as it is stored, of any dtype, over mapped memory that must not be written to."""
        ...

    def fill(self, name: str, layer: StudentLinear, device: torch.device) -> None:
        """Give a quantized layer its weight and its bias."""
        ...

    def release(self) -> None:
        """Give back the memory of what was read so far."""
        ...


class _Slot(NamedTuple):
    """A parameter of ``module``: ``meta`` stands for it while it is not loaded; its tensor is stored as ``name``."""

    module: nn.Module
    leaf: str
    name: str
    meta: nn.Parameter


class Part:
    """A block, or a module outside of them, with the quantized layers in it."""

    def __init__(self, module: nn.Module, slots: list[_Slot], layers: dict[str, StudentLinear]) -> None:
        self.module, self.slots, self.layers = module, slots, layers


class StreamedStudent(StudentModel):
    """A student whose ``model`` is on the meta device but for its buffers, and whose ``layers`` hold nothing yet;
    ``blocks`` and ``others`` are its parts. Raises :class:`SpecError` for a model that cannot be walked."""

    def __init__(
        self,
        model: Any,
        layers: Mapping[str, StudentLinear],
        windows: Tensor,
        compute_dtype: torch.dtype,
        stored: StoredTensors,
        device: torch.device,
    ) -> None:
        super().__init__(model, layers, windows, compute_dtype)
        self._stored, self._device = stored, device
        self._loaded: dict[str, nn.Parameter] = {}
        self._trace: Trace | None = None
        modules = block_list(self)
        inside = {id(module) for block in modules for module in block.modules()}
        outside = [module for module in model.modules() if id(module) not in inside]
        names = _Names(model, layers)
        self.blocks = [names.part(block, block.modules()) for block in modules]
        self.others = [part for module in outside if (part := names.part(module, [module])).slots]
        in_blocks = {name for block in self.blocks for name in block.layers}
        lone = [name for name in layers if name not in in_blocks]
        if lone or not self.blocks:
            raise SpecError(
                f"--blockwise rounds layers of transformer blocks only, and {lone[0] if lone else 'this model'} is in "
                f"none; leave it dense (--ignore), or leave --blockwise out"
            )
        for name in names.stored_buffers():
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = stored.tensor(name).clone()
        for module in model.modules():
            if not isinstance(module, StudentLinear):
                module._buffers.update({leaf: b.to(device) for leaf, b in module._buffers.items() if b is not None})

    @property
    def device(self) -> torch.device:
        """Where token ids and hidden states go."""
        return self._device

    @contextmanager
    def held(self, *parts: Part) -> Iterator[None]:
        """Inside, these parts are in memory. A tensor of two of them is loaded once."""
        before = dict(self._loaded)
        try:
            for part in parts:
                self._load(part)
            yield
        finally:
            for part in parts:
                self._unload(part)
            self._loaded = before
            give_back_memory()  # glibc kept several blocks' worth

    def trace(self) -> Trace:
        """How the blocks are called; found by reading the model once, the first time. :class:`SpecError` for a model
        whose blocks do not simply pass on what the one before returned."""
        if self._trace is None:
            with ExitStack() as stack:
                for part in self.blocks:
                    stack.enter_context(self._run_through(part))
                stack.enter_context(self.held(*self._without(self.model.get_output_embeddings())))
                stack.enter_context(_instead(self.model.get_output_embeddings(), lambda hidden: hidden[..., :1]))
                self._trace = Trace(self, [part.module for part in self.blocks])
            if not self._trace.blocks or not self._trace.bare:
                raise SpecError(
                    f"the blocks of {type(self.model).__name__} do not simply pass on what the one before returned, so "
                    "they cannot be streamed; leave --blockwise out"
                )
        return self._trace

    @torch.no_grad()
    def front(self, windows: Tensor) -> Iterator[Tensor]:
        """What enters the first block, [1, T, H], for each of ``windows`` int64 [count, T]."""
        with self.held(*self._without(self.model.get_output_embeddings())):
            for tokens in windows:
                yield run_until(self, self.blocks[0].module, tokens)

    @contextmanager
    def tail(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """A function from what leaves the last block, [1, T, H], to logits [T, V]."""

        def logits(hidden: Tensor) -> Tensor:
            with ExitStack() as stack, torch.no_grad():
                for part in self.blocks:
                    stack.enter_context(_instead(part.module, lambda *args, **kwargs: hidden))
                # The embeddings are not looked at: what the first block is handed is not used.
                out: Tensor = self.model(inputs_embeds=hidden, use_cache=False).logits
            return out.squeeze(0)

        with self.held(*self._without(self.model.get_input_embeddings())):
            yield logits

    def _without(self, module: nn.Module) -> list[Part]:
        return [part for part in self.others if part.module is not module]

    @contextmanager
    def _run_through(self, part: Part) -> Iterator[None]:
        """Inside, the part is loaded whenever it is entered and given back when it is left."""
        own = part.module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with self.held(part):
                return own(*args, **kwargs)

        with _instead(part.module, forward):
            yield

    def _load(self, part: Part) -> None:
        for slot in part.slots:
            if slot.name not in self._loaded:
                tensor = self._stored.tensor(slot.name)
                if tensor.shape != slot.meta.shape:
                    shapes = f"{list(tensor.shape)}, but the model of its config wants {list(slot.meta.shape)}"
                    raise CheckpointError(f"{slot.name} is {shapes}")
                copied = tensor.to(self._device, torch.float32, copy=True)
                self._loaded[slot.name] = nn.Parameter(copied, requires_grad=False)
            slot.module._parameters[slot.leaf] = self._loaded[slot.name]
        for name, layer in part.layers.items():
            self._stored.fill(name, layer, self._device)
        self._stored.release()

    @staticmethod
    def _unload(part: Part) -> None:
        for slot in part.slots:
            slot.module._parameters[slot.leaf] = slot.meta
        for layer in part.layers.values():
            layer.release()


class _Names:
    """The names of a model's tensors."""

    def __init__(self, model: Any, layers: Mapping[str, StudentLinear]) -> None:
        self._model, self._tied = model, tied_to(model)
        self._modules = {id(module): name for name, module in model.named_modules()}
        self._layers = {id(layer): name for name, layer in layers.items()}

    def part(self, module: nn.Module, members: Iterable[nn.Module]) -> Part:
        """``members``: the modules whose own parameters belong to it."""
        slots, layers = [], {}
        for member in members:
            if isinstance(member, StudentLinear):
                layers[self._layers[id(member)]] = member
                continue
            for leaf, parameter in member._parameters.items():
                if parameter is not None:
                    name = f"{self._modules[id(member)]}.{leaf}".removeprefix(".")
                    slots.append(_Slot(member, leaf, self._tied.get(name, name), parameter))
        return Part(module, slots, layers)

    def stored_buffers(self) -> list[str]:
        """Buffers that are no table computed from the config."""
        buffers = {name for name, _ in self._model.named_buffers()}
        own = {f"{name}." for name in self._layers.values()}
        return [n for n in self._model.state_dict() if n in buffers and n[: n.rfind(".") + 1] not in own]


@contextmanager
def _instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, calling ``module`` calls ``forward``; its hooks stay."""
    kept = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if kept is not None:
            module.forward = kept
