"""The model as a sequence of blocks with two streams of activations: the ``Blocks`` contract of rounding.

The original stream holds what the original model computes, the rounded one what it computes with the choices installed
so far. Both are held for the current block only: 4 bytes x windows x length x hidden each (151 MB for 128 windows of
512 tokens at hidden 576), what leaves a block in the place of what entered it; so the cost is three forward passes
through the model and no gradient through more than a block.

The blocks are the entries of the model's largest ModuleList with quantized layers in them. A layer outside of it
(an untied lm_head, OPT's project_in) is a block of its own, fed by running the model up to it; so is every layer of a
model whose blocks do not simply pass on what the one before them returned.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from dq_runtime.environment import give_back_memory
from dq_runtime.errors import DQError
from dq_runtime.grids import Scales
from dq_runtime.modules.block_trace import Call, Trace, Watch, block_list, inputs_of, run_until
from dq_runtime.modules.student import StudentModel
from dq_runtime.modules.student_linear import Mode, StudentLinear
from dq_runtime.rounding.base import Block, Choice, Gram, Weights, fixed, whole_choice


class Stream(Protocol):
    """The hidden states of every window, [1, T, H] each."""

    def __getitem__(self, window: int) -> Tensor: ...

    def __setitem__(self, window: int, hidden: Tensor) -> None: ...


class ModelBlocks:
    """See :class:`dq_runtime.rounding.base.Blocks`; walks ``student``'s model over its calibration windows."""

    def __init__(self, student: StudentModel) -> None:
        self._student = student

    @torch.no_grad()
    def __iter__(self) -> Iterator[Block]:
        student = self._student
        give_back_memory()  # of the grids and of nearest
        for layer in student.layers.values():
            layer.candidate = layer.weight
            layer.mode, layer.compute_dtype = Mode.CANDIDATE, student.compute_dtype
        try:
            yield from self._walk()
        finally:
            for layer in student.layers.values():
                layer.candidate, layer.observer, layer.mode = None, None, Mode.TEACHER

    def _walk(self) -> Iterator[Block]:
        trace = Trace(self._student, block_list(self._student))
        inside = {name for stages in trace.stages for stage in stages for name in stage}
        lone = [name for name in trace.order if name not in inside]
        before = [name for name in lone if trace.order.index(name) < trace.first_inside]
        for name in before:
            yield LoneLayer(self._student, name)
        if trace.blocks:
            student = self._student
            rounded = [run_until(student, trace.blocks[0], tokens) for tokens in student.tokens]
            originals = list(rounded)
            if before:
                with originally(student):
                    originals = [run_until(student, trace.blocks[0], tokens) for tokens in student.tokens]
            for module, call, stages in zip(trace.blocks, trace.calls, trace.stages, strict=True):
                block = TransformerBlock(student, module, call, stages, originals, rounded)
                yield block
                block.carry()
        for name in lone[len(before) :]:
            yield LoneLayer(self._student, name)


class _Streams(ABC):
    """What both kinds of block have in common."""

    def __init__(self, student: StudentModel, stages: Sequence[Sequence[str]]) -> None:
        self._student = student
        self.stages = stages
        self.layers = {name: student.layers[name] for stage in stages for name in stage}
        self.windows = student.windows
        self._chosen: dict[str, Choice] = {}
        for layer in self.layers.values():
            layer.candidate = fixed(layer.weight().to(student.compute_dtype))

    def install(self, name: str, choice: Choice) -> None:
        self._chosen[name] = choice
        self.layers[name].candidate = fixed(self._lazily(name)().to(self._student.compute_dtype))

    @abstractmethod
    def output(self, windows: Sequence[int], weights: Weights) -> Tensor: ...

    @torch.no_grad()
    def second_moments(self) -> dict[str, Tensor]:
        sums = {name: torch.zeros(layer.in_features, device=layer.scale.device) for name, layer in self.layers.items()}
        tokens = dict.fromkeys(self.layers, 0)

        def see(name: str, h: Tensor) -> None:
            x = h.reshape(-1, h.shape[-1]).float()
            sums[name] += x.square().sum(0)
            tokens[name] += len(x)

        with Watch(self.layers, see):
            for window in range(self.windows):
                self.output([window], {})
        return {name: total / max(1, tokens[name]) for name, total in sums.items()}

    def _lazily(self, name: str) -> Callable[[], Tensor]:
        """The layer's present weight, built whenever it is asked for instead of kept."""
        layer, choice = self.layers[name], self._chosen.get(name)
        if choice is None:
            return layer.weight
        device = layer.scale.device

        def weight() -> Tensor:
            chosen = whole_choice(choice)
            scales = chosen.scales or layer.scales
            zero = None if scales.zero is None else scales.zero.to(device)
            scales = Scales(scales.scale.to(device), zero)  # those of a resumed run come from a file
            return layer.grid.decode(chosen.codes.to(device), scales)

        return weight

    def _with(self, weights: Weights, run: Callable[[], Tensor]) -> Tensor:
        """``run()`` with these weights in place, float32."""
        kept = {name: self.layers[name].candidate for name in weights}
        for name, weight in weights.items():
            self.layers[name].candidate = weight
        try:
            return run().float()
        finally:
            for name, candidate in kept.items():
                self.layers[name].candidate = candidate


class TransformerBlock(_Streams):
    """One entry of the model's list of blocks. ``originals`` and ``rounded`` are what enters it and become what leaves
    it: the one when a target is first asked for, the other by :meth:`carry`."""

    def __init__(
        self,
        student: StudentModel,
        module: nn.Module,
        call: Call,
        stages: Sequence[Sequence[str]],
        originals: Stream,
        rounded: Stream,
    ) -> None:
        super().__init__(student, stages)
        self._module, self._call = module, call
        self._originals, self._rounded = originals, rounded
        self._weights = {name: layer.candidate for name, layer in self.layers.items()}
        self._reached = False  # whether `originals` holds the targets

    @torch.no_grad()
    def grams(self, stage: Sequence[str], cross: bool = False) -> dict[str, Gram]:
        assert not (cross and self._reached), "the targets have taken the place of the original stream"
        sums = _Sums(self.layers, stage, cross)
        for window in range(self.windows):
            if cross:
                with sums.watching_originals():
                    self._original(window)
            with sums.watching():
                self._forward(self._rounded[window])
        return sums.grams()

    @torch.no_grad()
    def target(self, windows: Sequence[int]) -> Tensor:
        self._reach()
        return torch.cat([self._originals[window] for window in windows]).float()

    def output(self, windows: Sequence[int], weights: Weights) -> Tensor:
        inputs = torch.cat([self._rounded[window] for window in windows])
        with torch.enable_grad():
            return self._with(weights, lambda: self._forward(inputs))

    def carry(self) -> None:
        """Bring both streams through this block as it is now; the layers keep their choices."""
        self._reach()
        for window in range(self.windows):
            self._rounded[window] = self._forward(self._rounded[window])
        for name, layer in self.layers.items():  # only a layer outside of all blocks will ask for these again
            layer.candidate = self._lazily(name)

    def _reach(self) -> None:
        if not self._reached:
            for window in range(self.windows):
                self._originals[window] = self._original(window)
            self._reached, self._weights = True, {}

    def _original(self, window: int) -> Tensor:
        kept = {name: layer.candidate for name, layer in self.layers.items()}
        for name, layer in self.layers.items():
            layer.candidate = self._weights[name]
        try:
            return self._forward(self._originals[window])
        finally:
            for name, layer in self.layers.items():
                layer.candidate = kept[name]

    def _forward(self, hidden: Tensor) -> Tensor:
        with self._student.autocast():
            return self._call.run(self._module, hidden)


class LoneLayer(_Streams):
    """A layer that is part of no block; its target is its own output, without the bias."""

    def __init__(self, student: StudentModel, name: str) -> None:
        super().__init__(student, ((name,),))
        self._layer = student.layers[name]
        self._weight = self._layer.weight()
        self._rounded = [inputs_of(student, name, window) for window in range(student.windows)]
        with originally(student):
            self._originals = [inputs_of(student, name, window) for window in range(student.windows)]

    @torch.no_grad()
    def grams(self, stage: Sequence[str], cross: bool = False) -> dict[str, Gram]:
        sums = _Sums(self.layers, stage, cross)
        (name,) = stage
        for x, x_rounded in zip(self._originals, self._rounded, strict=True):
            sums.add(name, x_rounded, x if cross and len(x) == len(x_rounded) else None)
        return sums.grams()

    @torch.no_grad()
    def target(self, windows: Sequence[int]) -> Tensor:
        return nn.functional.linear(_together(self._originals, windows), self._weight)

    def output(self, windows: Sequence[int], weights: Weights) -> Tensor:
        inputs = _together(self._rounded, windows)
        (name,) = self.layers
        candidate = weights.get(name, self._layer.candidate)
        assert candidate is not None
        with torch.enable_grad():
            return nn.functional.linear(inputs, candidate().float())


class originally:  # noqa: N801 (a context manager)
    """Inside, every layer of the model runs on its original weight."""

    def __init__(self, student: StudentModel) -> None:
        self._layers = student.layers.values()

    def __enter__(self) -> None:
        self._kept = [layer.candidate for layer in self._layers]
        for layer in self._layers:
            layer.candidate = layer.weight

    def __exit__(self, *error: object) -> None:
        for layer, candidate in zip(self._layers, self._kept, strict=True):
            layer.candidate = candidate


class _Sums:
    """Accumulates Grams while the model runs. Layers that are handed one and the same tensor share one sum."""

    def __init__(self, layers: Mapping[str, StudentLinear], stage: Sequence[str], cross: bool) -> None:
        self._layers = {name: layers[name] for name in stage}
        self._cross = cross
        self._sums: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._mismatch: dict[str, float] = dict.fromkeys(stage, 0.0)
        self._tokens: dict[str, int] = dict.fromkeys(stage, 0)
        self._same_as: dict[str, str] = {}
        self._original: dict[str, Tensor] = {}

    def watching(self) -> Watch:
        seen: list[tuple[str, Tensor]] = []

        def see(name: str, h: Tensor) -> None:
            owner = next((other for other, tensor in seen if tensor is h), name)
            self._same_as[name] = owner
            if owner == name:
                seen.append((name, h))
                self.add(name, h, self._original.get(name))

        return Watch(self._layers, see)

    def watching_originals(self) -> Watch:
        self._original.clear()
        return Watch(self._layers, self._original.__setitem__)

    def add(self, name: str, h: Tensor, original: Tensor | None) -> None:
        x = h.reshape(-1, h.shape[-1]).float()
        k = x.shape[1]
        if name not in self._sums:
            zeros = torch.zeros(k, k, device=x.device)
            self._sums[name] = zeros, zeros.clone() if self._cross else None
        inputs, cross = self._sums[name]
        inputs.addmm_(x.T, x)
        self._tokens[name] += len(x)
        if cross is not None:
            # A router may send other tokens here than in the original model: those count as unchanged.
            before = x
            if original is not None and original.numel() == x.numel():
                before = original.reshape(-1, k).float()
                self._mismatch[name] += float((before - x).square_().sum())
            cross.addmm_(before.T, x)

    def grams(self) -> dict[str, Gram]:
        result = {}
        for name, layer in self._layers.items():
            owner = self._same_as.get(name, name)
            tokens = self._tokens[owner]
            zeros = torch.zeros(layer.in_features, layer.in_features)
            inputs, cross = self._sums.get(owner, (zeros, zeros if self._cross else None))
            if not bool(torch.isfinite(inputs).all()):
                raise DQError(
                    f"the calibration inputs of {name} hold NaN or infinity; use --compute-dtype float32, or look for "
                    "damaged weights before it"
                )
            count = max(1, tokens)
            result[name] = Gram(
                inputs / count, None if cross is None else cross / count, tokens, self._mismatch[owner] / count
            )
        return result


def _together(parts: Sequence[Tensor], windows: Sequence[int]) -> Tensor:
    """The inputs of some windows, [1, tokens, K]; one row of zeros where no token came, so that a mean exists."""
    rows = torch.cat([parts[window] for window in windows])
    return (rows if len(rows) else torch.zeros(1, rows.shape[1], device=rows.device)).unsqueeze(0)
