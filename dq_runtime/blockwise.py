"""Rounding block by block from disk: no more than one transformer block's weights are in memory at a time.

    for every block:  read it -> W -> grid.fit -> rounding.round -> pack -> a file of its own -> forget it
    then:             these files and those of what stays dense are the checkpoint; it and the original are walked once
                      more, block by block, over the held-out windows

Any method that asks for WEIGHTS and BLOCKS alone can be run so, one job a block, and gives the codes it gives of a
model held whole. Beside the block, the hidden states of the calibration windows in both streams are held (4 bytes x
windows x length x hidden each, beyond 1 GiB in a file: modules/hidden_states.py). The finished blocks lie in
``OUT.partial/`` with the state, from which a stopped run continues bit for bit: what is finished is read and run again,
not rounded again.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dq_runtime.errors import SpecError
from dq_runtime.evaluate.figures import Measured
from dq_runtime.evaluate.metrics import Rows, compare
from dq_runtime.grids import GRIDS, Scales
from dq_runtime.interrupt import interruptible
from dq_runtime.modules.block_trace import Call
from dq_runtime.modules.blocks import TransformerBlock
from dq_runtime.modules.hidden_states import HiddenStates
from dq_runtime.modules.streamed_model import Part, StreamedStudent
from dq_runtime.modules.student_linear import Mode, StudentLinear
from dq_runtime.modules.surgery import bias_of, is_conv1d, linears, replace_module, weight_of
from dq_runtime.packing import PackedWeight
from dq_runtime.packing.atomic import replace_file
from dq_runtime.packing.bridge import packed_of
from dq_runtime.packing.checkpoint import (
    Checkpoint,
    open_checkpoint,
    packed_tensors,
    shard_names,
    write_index,
    write_shard,
)
from dq_runtime.packing.float4 import shared_shift
from dq_runtime.packing.quant_config import scheme_of
from dq_runtime.packing.readers.compressed_tensors import packed_layer
from dq_runtime.packing.run_state import RunState
from dq_runtime.packing.tensor_file import TensorFile
from dq_runtime.rounding import Blocks, Choice, Job, LayerProblem, Monitor, Needs, Rounding
from dq_runtime.rounding.sequential import nearest_choice
from dq_runtime.runtime.save import dense_names, served, write_settings
from dq_runtime.runtime.skeleton import skeleton
from dq_runtime.runtime.streamed import PackedTensors, StoredModel
from dq_runtime.spec import GridSpec, QuantSpec

History = list[dict[str, float]]


def check_blockwise(spec: QuantSpec, rounding: Rounding, select: str, lacks_text: bool) -> None:
    """:class:`SpecError` for what needs the whole model at once."""
    name = spec.rounding.name
    if rounding.needs & ~(Needs.WEIGHTS | Needs.BLOCKS):
        raise SpecError(
            f"rounding {name!r} runs the whole model at every step, and --blockwise never holds it; use --rounding "
            "autoround"
        )
    for given, what in (
        (spec.transform != "identity", f"transform {spec.transform!r} turns the whole model"),
        (spec.target is not None, "--target-bpw measures the whole model"),
        (select != "random", f"--calibration-select {select} runs the whole model"),
    ):
        if given:
            raise SpecError(
                f"{what} before any layer is rounded, and --blockwise never holds it; leave out one of them"
            )
    if lacks_text:
        raise SpecError("--blockwise does not let the model write its own text, token by token; add --calibration TEXT")


class BlockwiseRun:
    """One run, on a model whose layers are to be rounded on ``grids``: :meth:`round`, then :meth:`write`, then
    :meth:`measure`. ``windows`` int64 [count, T], ``dtype`` and ``device`` are those of the rounding loop."""

    def __init__(
        self,
        lm: StoredModel,
        grids: Mapping[str, GridSpec],
        spec: QuantSpec,
        windows: Tensor,
        dtype: torch.dtype,
        device: str,
        state: RunState,
    ) -> None:
        self._lm, self._grids, self._spec, self._state = lm, grids, spec, state
        modules = linears(lm.model)
        self._transposed = any(is_conv1d(modules[name]) for name in grids)
        layers = _empty_layers(lm.model, modules, grids)
        self._student = StreamedStudent(lm.model, layers, windows, dtype, lm, torch.device(device))
        self._order = {name: i for i, name in enumerate(layers)}
        self._serving: torch.dtype = getattr(torch, spec.grid.scale_dtype)
        self._files = state.directory / "blocks"
        self._files.mkdir(parents=True, exist_ok=True)

    def round(self, rounding: Rounding, monitor: Monitor) -> History:
        """Round and store every block that is not stored yet; the history of all of them."""
        began = time.monotonic()
        try:
            with interruptible() as asked:
                self._state.asked_to_stop = asked
                return self._round(rounding, monitor)
        finally:
            self._state.add_seconds(time.monotonic() - began)

    def _round(self, rounding: Rounding, monitor: Monitor) -> History:
        saved = self._state.load()
        finished, history = (0, []) if saved is None else (saved[2]["finished"], saved[2]["history"])
        done = sum(len(block.layers) for block in self._student.blocks[:finished])
        walk = self._streams if Needs.BLOCKS in rounding.needs else self._weights
        for i, layers, blocks in walk(finished):
            part = _OneBlock(self._state, monitor, i, done, len(self._order), history)
            job = Job(layers, None, self._spec.seed, part, part, blocks=blocks, order=self._order)
            result = rounding.round(job)
            self._store(i, {name: self._student.layers[name].pack(c) for name, c in result.choices.items()})
            done, history = done + len(layers), part.whole(result.history)
            self._state.save(done, {}, {"finished": i + 1, "history": history})
            if done < len(self._order) and self._state.stop_requested():
                self._state.stop(done, len(self._order))
        return list(history)

    def _weights(self, first: int) -> Iterator[tuple[int, Mapping[str, LayerProblem], None]]:
        """The blocks from the ``first`` on, one in memory at a time."""
        for i, part in enumerate(self._student.blocks[first:], first):
            with self._student.held(part):
                yield i, part.layers, None

    @torch.no_grad()
    def _streams(self, first: int) -> Iterator[tuple[int, Mapping[str, LayerProblem], Blocks]]:
        """The same, with both streams carried through the blocks before, as they were rounded."""
        student, blocks = self._student, self._student.blocks
        if first == len(blocks):
            return
        trace = student.trace()
        rounded = HiddenStates.of(student.front(student.tokens), student.windows, self._state.directory)
        originals = rounded.copy(self._state.directory)
        for i, (part, call, stages) in enumerate(zip(blocks, trace.calls, trace.stages, strict=True)):
            with student.held(part):
                for layer in part.layers.values():
                    layer.candidate = layer.weight
                    layer.mode, layer.compute_dtype = Mode.CANDIDATE, student.compute_dtype
                block = TransformerBlock(student, part.module, call, stages, originals, rounded)
                if i < first:
                    for name, w in self._stored(i).items():
                        block.install(name, Choice(w.codes(), Scales(w.scale, w.zero)))
                else:
                    yield i, block.layers, [block]
                if i + 1 < len(blocks):
                    block.carry()

    def _file(self, block: int) -> Path:
        return self._files / f"block-{block:05}.safetensors"

    def _store(self, block: int, packed: Mapping[str, PackedWeight]) -> None:
        """Everything of a block as the checkpoint will have it, in a file of its own."""
        tensors: dict[str, Tensor] = {}
        shift = shared_shift(packed.values())
        for name, w in packed.items():
            tensors |= packed_tensors(name, w, shift)
        self._write(self._file(block), tensors, self._dense_of(self._student.blocks[block]))

    def _stored(self, block: int) -> dict[str, PackedWeight]:
        """The packed weights of a finished block, mapped from its file."""
        file = TensorFile(self._file(block))
        names = self._student.blocks[block].layers
        return {name: packed_of(packed_layer(name, scheme_of(self._grids[name]), file)) for name in names}

    def _dense_of(self, part: Part) -> set[str]:
        """The dense tensors that are stored with a block."""
        biases = {f"{name}.bias" for name, layer in part.layers.items() if layer.bias is not None}
        return biases | {slot.name for slot in part.slots}

    def _write(self, file: Path, tensors: Mapping[str, Tensor], dense: Iterable[str]) -> None:
        """``tensors`` and the ``dense`` ones of the original model as they are served."""
        stored = {name: served(name, self._lm.tensor(name), self._serving) for name in sorted(dense)}
        replace_file(file, lambda path: write_shard(path, {**tensors, **stored}))
        self._lm.release()

    def write(self, directory: Path) -> None:
        """The checkpoint, whose weights are the files of the blocks and of what is in none."""
        write_settings(directory, self._lm, self._grids, self._transposed, self._serving)
        files = [self._file(block) for block in range(len(self._student.blocks))]
        with_blocks = {name for part in self._student.blocks for name in self._dense_of(part)}
        for i, name in enumerate(n for n in dense_names(self._lm.model, self._grids) if n not in with_blocks):
            files.append(self._files / f"rest-{i:05}.safetensors")
            self._write(files[-1], {}, [name])
        shards, total = {}, 0
        for name, file in zip(shard_names(len(files)), files, strict=True):
            stored = TensorFile(file)
            shards[name] = list(stored.names())
            total += sum(stored.tensor(tensor).values.nbytes for tensor in shards[name])
            _link(file, directory / name)
        write_index(directory, shards, total)

    @torch.no_grad()
    def measure(self, directory: Path, held: Tensor, monitor: Callable[[int, int], object]) -> Measured:
        """What was written in ``directory``, and nearest, against the original, in float32 on the ``held`` windows."""
        student, method = self._student, self._spec.rounding.name
        student.compute_dtype = torch.float32
        calls, keep = student.trace().calls, self._state.directory
        checkpoint = open_checkpoint(directory)
        written = self._written(checkpoint, held)
        original = HiddenStates.of(student.front(held), len(held), keep)
        nearest = original.copy(keep)
        saved = HiddenStates.of(written.front(held), len(held), keep)
        measured, total = Measured(), len(calls) + len(held)
        for i, (call, mine, theirs) in enumerate(zip(calls, student.blocks, written.blocks, strict=True), 1):
            with student.held(mine), written.held(theirs):
                near = {name: layer.pack(nearest_choice(layer)) for name, layer in mine.layers.items()}
                packed = {name: layer.packed for name, layer in theirs.layers.items() if layer.packed is not None}
                measured.add(mine.layers, packed, near)
                for name, layer in mine.layers.items():
                    layer.mode, layer.compute_dtype, layer.packed = Mode.TEACHER, torch.float32, near[name]
                _run(call, mine, original)
                for layer in mine.layers.values():
                    layer.mode = Mode.PACKED
                _run(call, mine, nearest)
                _run(call, theirs, saved)
            monitor(i, total)
        with student.tail() as own_head, written.tail() as written_head:
            # Of nearest itself the second entry replaces the first: what is on disk is what counts.
            candidates = {"nearest": _logits(own_head, nearest), method: _logits(written_head, saved)}
            measured.results = compare(
                held, _logits(own_head, original), candidates, lambda step, _: monitor(len(calls) + step, total)
            )
        return measured

    def _written(self, checkpoint: Checkpoint, held: Tensor) -> StreamedStudent:
        """The model of a checkpoint, to be walked as the original is."""
        model = skeleton(checkpoint, torch.float32).eval()
        layers = _empty_layers(model, linears(model), self._grids)
        return StreamedStudent(model, layers, held, torch.float32, PackedTensors(checkpoint), self._student.device)


class _OneBlock:
    """The store and the monitor of one block's job, in terms of the whole run: ``done`` layers of ``total`` and their
    ``history`` came before."""

    def __init__(self, state: RunState, monitor: Monitor, block: int, done: int, total: int, history: History) -> None:
        self._state, self._monitor = state, monitor
        self._block, self._done, self._total, self._history = block, done, total, history

    def __call__(self, step: int, total: int, **figures: float) -> None:
        self._monitor(self._done + step, self._total, **figures)

    def whole(self, history: History) -> History:
        """With what came before it."""
        return self._history + [{**row, "step": row["step"] + len(self._history)} for row in history]

    def due(self) -> bool:
        return self._state.due()

    def save(self, step: int, tensors: Mapping[str, Tensor], extra: Mapping[str, Any]) -> None:
        before = {"finished": self._block, "history": self._history}
        self._state.save(self._done + step, tensors, {**before, "step": step, "within": dict(extra)})

    def load(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        saved = self._state.load()
        if saved is None or saved[2]["finished"] != self._block or "within" not in saved[2]:
            return None
        return saved[2]["step"], saved[1], saved[2]["within"]

    def stop_requested(self) -> bool:
        return self._state.stop_requested()

    def stop(self, step: int, total: int) -> None:
        self._state.stop(self._done + step, self._total)


class _Rows:
    """Logits of one window, computed for the rows that are asked for."""

    def __init__(self, logits: Callable[[Tensor], Tensor], hidden: Tensor) -> None:
        self._logits, self._hidden = logits, hidden

    def __getitem__(self, rows: slice) -> Tensor:
        return self._logits(self._hidden[:, rows])


def _logits(head: Callable[[Tensor], Tensor], states: HiddenStates) -> Callable[[Tensor], Rows]:
    """The next window's whenever it is called."""
    windows = iter(states)
    return lambda tokens: _Rows(head, next(windows))


def _run(call: Call, part: Part, states: HiddenStates) -> None:
    """Bring every window through a block."""
    for window, hidden in enumerate(states):
        states[window] = call.run(part.module, hidden)


def _empty_layers(
    model: nn.Module, modules: Mapping[str, nn.Module], grids: Mapping[str, GridSpec]
) -> dict[str, StudentLinear]:
    """Put a StudentLinear that holds nothing in the place of each linear of ``grids``."""
    layers = {}
    for name, grid in grids.items():
        layers[name] = StudentLinear(weight_of(modules[name]), bias_of(modules[name]), GRIDS.get(grid.name)(grid))
        replace_module(model, name, layers[name])
    return layers


def _link(file: Path, name: Path) -> None:
    """``file`` under a second name; a copy where the file system has none."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copy(file, name)
