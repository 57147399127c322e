"""Round a model in memory by any method, for the experiments: what `dq quantize` does, without writing a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from theory_common import original
from torch import Tensor

from dq_runtime.environment import flushed_denormals
from dq_runtime.evaluate.metrics import Quality, compare
from dq_runtime.grids import GRIDS
from dq_runtime.modules.blocks import ModelBlocks
from dq_runtime.modules.student import StudentModel, loop_dtype_of
from dq_runtime.modules.student_linear import Mode, StudentLinear
from dq_runtime.modules.surgery import bias_of, linears, replace_module, weight_of
from dq_runtime.packing import PackedWeight
from dq_runtime.preflight import plan
from dq_runtime.rounding import ROUNDINGS, Choice, Job, Needs, Rounded
from dq_runtime.spec import PER_ROW, GridSpec, Override, QuantSpec

GROUP = 64
# From a random start x has not reached the corners after 16 steps (SmolLM2 at 3 bits: a KL of 6, nearest 2); fewer
# windows than this are gone through more than once.
LEAST_STEPS = 64
ROUNDING_DTYPE = loop_dtype_of("auto", torch.device("cpu"))  # as `dq quantize` would


class _NoStore:
    """Nothing is kept: an experiment's run is shorter than the time between two saves."""

    def due(self) -> bool:
        return False

    def save(self, step: int, tensors: Mapping[str, Tensor], extra: Mapping[str, Any]) -> None:
        raise AssertionError("never due")

    def load(self) -> None:
        return None

    def stop_requested(self) -> bool:
        return False

    def stop(self, step: int, total: int) -> None:
        raise AssertionError("never asked to")


class Lab:
    """A model whose linears wait to be rounded to ``bits``, with calibration windows. Symmetric grid, groups of
    ``group``; a scale a row where that does not divide the inputs (the 172 of stories260K's down_proj)."""

    def __init__(
        self,
        path: str,
        bits: int,
        windows: Tensor,
        student: type[StudentModel] = StudentModel,
        group: int = GROUP,
        dtype: torch.dtype = ROUNDING_DTYPE,
    ) -> None:
        model = deepcopy(original(path).model)
        modules = linears(model)
        self.layers = {}
        rows = (name for name, module in modules.items() if weight_of(module).shape[1] % group)
        overrides = tuple(Override(name, bits, PER_ROW) for name in rows)
        spec = QuantSpec(grid=GridSpec(bits=bits, group_size=group), overrides=overrides)
        for name, grid in plan(modules, spec).items():
            module = modules[name]
            self.layers[name] = StudentLinear(weight_of(module), bias_of(module), GRIDS.get(grid.name)(grid))
            replace_module(model, name, self.layers[name])
        self.student = student(model, self.layers, windows, torch.float32)
        self._dtype = dtype

    def round(self, method: str, seed: int, **options: Any) -> dict[str, PackedWeight]:
        """Packed weights by layer; the lab can then round again."""
        if method == "discquant-paper":
            options.setdefault("steps", max(LEAST_STEPS, self.student.windows))
        rounding = ROUNDINGS.get(method)(options)
        return self.pack(self.choices(rounding.round, rounding.needs, seed))

    def choices(self, rounding: Callable[[Job], Rounded], needs: Needs, seed: int) -> Mapping[str, Choice]:
        """What any ``rounding`` of a job makes; the lab can then round again."""
        student = self.student
        if Needs.STUDENT in needs:
            student.begin(relaxed=Needs.RELAXED in needs)
        job = Job(self.layers, student, seed, _NoStore(), lambda *args, **figures: None, ModelBlocks(student))
        student.compute_dtype = self._dtype
        with flushed_denormals():
            choices = rounding(job).choices
        student.compute_dtype = torch.float32  # all that is measured
        if Needs.STUDENT in needs:
            student.end()
        return choices

    def pack(self, choices: Mapping[str, Choice]) -> dict[str, PackedWeight]:
        """As a checkpoint would hold them."""
        return {name: self.layers[name].pack(choice) for name, choice in choices.items()}

    def quality(self, held_out: Tensor, rounded: Mapping[str, Mapping[str, PackedWeight]]) -> dict[str, Quality]:
        """Of each named rounding against the original model, on windows [count, T]."""
        student = self.student

        def teacher(tokens: Tensor) -> Tensor:
            student.set_mode(Mode.TEACHER)
            return student.logits(tokens)

        def using(packed: Mapping[str, PackedWeight]) -> Any:
            def logits(tokens: Tensor) -> Tensor:
                student.set_mode(Mode.PACKED, packed)
                return student.logits(tokens)

            return logits

        return compare(held_out, teacher, {name: using(packed) for name, packed in rounded.items()})
