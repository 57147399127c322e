"""The model while it is rounded: one set of weights that can act as teacher, relaxed student or packed student."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from dq_runtime.backends import training
from dq_runtime.environment import give_back_memory
from dq_runtime.errors import SpecError
from dq_runtime.modules.fused_layers import FusedLayers
from dq_runtime.modules.kl import mean_kl
from dq_runtime.modules.step_graph import StepGraph
from dq_runtime.modules.student_linear import Mode, StudentLinear
from dq_runtime.modules.teacher_outputs import TeacherOutputs
from dq_runtime.packing import PackedWeight
from dq_runtime.ranks import is_shared
from dq_runtime.rounding.base import Weights

# Steps before a CUDA graph is recorded: the first compiles kernels, the second finds every library warm.
EAGER_STEPS = 2


class StudentModel:
    """Wraps a causal LM whose linears are :class:`StudentLinear`; implements the ``Student`` contract of rounding.

    ``windows`` int64 [count, T] are the calibration windows. ``compute_dtype`` bfloat16 runs the whole forward under
    autocast (logits and activations in bfloat16 as in the paper's code, losses in float32).
    """

    def __init__(
        self, model: Any, layers: Mapping[str, StudentLinear], windows: Tensor, compute_dtype: torch.dtype
    ) -> None:
        self.model = model
        self.layers = layers
        self.tokens = windows
        self.windows = windows.shape[0]
        self.compute_dtype = compute_dtype
        # Layers held compactly run on kernels that never wait for the device; logits() says why a cache is needed.
        takes_cache = "past_key_values" in signature(model.forward).parameters
        self.graphed = takes_cache and all(layer.compact and layer.scale.is_cuda for layer in layers.values())
        self._graph: StepGraph | None = None
        self._eager_steps = 0
        self._fused_layers: FusedLayers | None = None
        self._teacher: TeacherOutputs | None = None
        self._wide_head: Tensor | None = None  # float32, while a bfloat16 copy stands in for it
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    def set_mode(self, mode: Mode, packed: Mapping[str, PackedWeight] | None = None) -> None:
        """Switch every layer at once; PACKED takes the weights it is to use."""
        for name, layer in self.layers.items():
            layer.mode = mode
            layer.compute_dtype = torch.float32 if mode is Mode.PACKED else self.compute_dtype
            layer.packed = None if packed is None else packed[name]

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        device = self.model.get_input_embeddings().weight.device
        assert isinstance(device, torch.device)
        return device

    def logits(self, tokens: Tensor) -> Tensor:
        """Next-token logits [T, V] of one window [T]."""
        device = self.device
        # Without a cache transformers looks into the position ids for packed sequences, which waits for the device (and
        # builds a dense mask while a graph is recorded); an empty cache says that there is one sequence.
        cache = {"past_key_values": _empty_cache()} if self.graphed else {}
        with self.autocast():
            out = self.model(input_ids=tokens.to(device).unsqueeze(0), use_cache=False, **cache).logits
        assert isinstance(out, Tensor)
        return out.squeeze(0)  # a view: backward of out[0] would fill and copy another [T, V]

    def autocast(self) -> torch.autocast:
        """The context in which the model, or a part of it, runs in ``compute_dtype``."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.compute_dtype is torch.bfloat16)

    def kl(self, tokens: Tensor) -> Tensor:
        """Mean KL(teacher || student) in nats per token of one window [T]; differentiable in every x."""
        self.set_mode(Mode.TEACHER)
        with torch.no_grad(), self._fused():
            teacher = self.logits(tokens)
        self.set_mode(Mode.RELAXED)
        with self._fused():
            student = self.logits(tokens)
        return mean_kl(student, teacher, reuse_teacher=True)

    def kl_of(self, window: int, weights: Weights) -> Tensor:
        """The same of one of the calibration windows and of a student on ``weights``; differentiable in what those
        depend on. The teacher runs on a window once; in every step where several processes share the layers out, which
        then gather them together, whatever window each is at."""
        tokens = self.tokens[window]
        if self._teacher is None:
            self._teacher = TeacherOutputs(self.model, any(is_shared(layer.scale) for layer in self.layers.values()))
        self.set_mode(Mode.TEACHER)
        with torch.no_grad(), self._fused(), self.autocast():
            teacher = self._teacher.logits(window, lambda: self.logits(tokens))
        self.set_mode(Mode.REBUILT)
        for name, weight in weights.items():
            self.layers[name].candidate = weight
        with self._fused():
            student = self.logits(tokens)
        return mean_kl(student, teacher, reuse_teacher=True)

    def _fused(self) -> AbstractContextManager[None]:
        """Within, the layers that allow it run on our own passes between their products."""
        ops = training.layer_passes(self.device, self.compute_dtype)
        if ops is None:
            return nullcontext()
        if self._fused_layers is None:
            self._fused_layers = FusedLayers(self.model, ops)
        return self._fused_layers.installed()

    def kl_backward(self, window: int, weights: Weights | None = None) -> Tensor:
        """See :class:`dq_runtime.rounding.base.Student`; on a GPU the relaxed choices run by a recorded graph from the
        third step on."""
        if weights is not None:
            loss = self.kl_of(window, weights)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()
        tokens = self.tokens[window]
        parameters = [layer.x for layer in self.layers.values()]
        warm = self.graphed and self._eager_steps >= EAGER_STEPS
        if warm and self._graph is None and all(x.grad is None for x in parameters):
            self._record(tokens, parameters)
        if self._graph is not None:
            return self._graph.replay(tokens)
        self._eager_steps += 1
        return self._backward(tokens)

    def _record(self, tokens: Tensor, parameters: list[nn.Parameter]) -> None:
        """A model that waits for the device in its forward pass cannot be recorded: it goes on launch by launch."""
        try:
            self._graph = StepGraph(self._backward, tokens, parameters, self.device)
        except RuntimeError as error:
            self.graphed = False
            for x in parameters:
                x.grad = None
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"the step was not recorded as a CUDA graph, which is slower: {reason}", stacklevel=2)

    def _backward(self, tokens: Tensor) -> Tensor:
        loss = self.kl(tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def begin(self, relaxed: bool = True) -> None:
        """Make ready for steps; ``relaxed``: allocate x, which is then all that is trainable in the model."""
        if relaxed:
            for layer in self.layers.values():
                layer.begin_relaxation()
        self._narrow_head()
        assert all(p.requires_grad == (relaxed and n.endswith(".x")) for n, p in self.model.named_parameters())

    def end(self) -> None:
        """Free what that took."""
        self._graph = self._teacher = None
        if self._wide_head is not None:
            self.model.get_output_embeddings().weight = self._wide_head
            self._wide_head = None
        for layer in self.layers.values():
            layer.end_relaxation()
            layer.candidate = None
        gc.collect()  # a trained layer and the hook on its gradient hold each other, 4 bytes a weight
        give_back_memory()

    def _narrow_head(self) -> None:
        """Cast the weight of an unquantized lm_head once, which autocast would do twice a step (40 of 3000 ms in
        SmolLM2, whose head is 49152 x 576); the embedding that it may be tied to stays as it is."""
        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or is_shared(head.weight):  # FSDP2 gathers it anew for every pass
            return
        if self.compute_dtype is torch.bfloat16 and head.weight.dtype is torch.float32:
            self._wide_head = head.weight
            head.weight = nn.Parameter(head.weight.bfloat16(), requires_grad=False)


def _empty_cache() -> Any:
    from transformers import DynamicCache  # takes seconds to import; whoever has a model has paid for it

    return DynamicCache()


def loop_dtype_of(requested: str, device: torch.device) -> torch.dtype:
    """Resolve ``auto|float32|bfloat16``. auto is bfloat16 where the chip multiplies it natively: 3.3x faster GEMMs than
    float32 on a 2-core Zen 4, but slower where it is emulated."""
    if requested != "auto":
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(requested)
        if dtype is None:
            raise SpecError(f"compute dtype must be auto, float32 or bfloat16, got {requested!r}")
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_bf16_supported")
    native = any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return torch.bfloat16 if native else torch.float32
