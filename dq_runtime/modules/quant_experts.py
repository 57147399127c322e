"""A mixture of experts that serves packed: what stands in for the 3-D expert parameters of transformers 5.

transformers 5 keeps all experts of a layer in one module with ``gate_up_proj`` [E, 2I, H] and ``down_proj`` [E, H, I]
(Mixtral, Qwen3-MoE, OLMoE and their kin). Packed checkpoints store each expert as three linears under the names that
transformers 4 gave them, ``experts.3.gate_proj`` or ``experts.3.w1``; :func:`place_experts` brings the two together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dq_runtime.backends import dispatch
from dq_runtime.backends.base import PreparedWeight
from dq_runtime.errors import CheckpointError, DQError
from dq_runtime.modules.moe_ops import PackedExperts, qmm_grouped, qmm_grouped_prepared
from dq_runtime.modules.surgery import replace_module
from dq_runtime.packing import PackedWeight

# Mixtral's w1, w2, w3 are everybody else's gate, down and up projection.
ROLES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
EXPERT_LINEAR = re.compile(rf"(.+\.experts)\.(\d+)\.({'|'.join(ROLES)})")
# What the decorator of transformers' expert modules says of the only kind that is read here.
STANDARD = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}


class ExpertLinear(nn.Module):
    """y[p] = x[p // top_k] @ decode(weight of expert p).T for every (token, expert) pair p.

    ``weight_packed`` int32 [E, N, ceil(K*bits/32)], ``weight_scale`` fp16/bf16 [E, N, G], ``weight_zero`` uint8
    [E, N, G] or None; not part of a state dict, whose names are those of single experts. :meth:`prepare` exchanges them
    for the order the device's kernels are fastest on; do it last, for inference only.
    """

    weight_packed: Tensor | None
    weight_scale: Tensor | None
    weight_zero: Tensor | None

    def __init__(self, w: PackedExperts) -> None:
        super().__init__()
        self.experts, self.out_features, self.in_features = w.packed.shape[0], w.packed.shape[1], w.k
        self.bits, self.group_size = w.bits, w.k // w.scale.shape[2]
        self._decoded_by = (w.bits, w.k, w.form)
        self.register_buffer("weight_packed", w.packed, persistent=False)
        self.register_buffer("weight_scale", w.scale, persistent=False)
        self.register_buffer("weight_zero", w.zero, persistent=False)
        self.prepared: PreparedWeight | None = None

    @property
    def packed(self) -> PackedExperts:
        """The weights as on disk; gone after :meth:`prepare`."""
        if self.weight_packed is None or self.weight_scale is None:
            raise DQError("these experts were prepared for their device, which drops the canonical weights; load again")
        return PackedExperts(self.weight_packed, self.weight_scale, self.weight_zero, *self._decoded_by)

    def prepare(self, dtype: torch.dtype) -> None:
        """Repack for activations of ``dtype`` on the device the weights are on; nothing changes where that cannot help.

        Afterwards the module cannot move: the packed buffers are freed.
        """
        self.prepared = dispatch.prepare_experts(self.packed.experts(), dtype)
        if self.prepared is not None:
            self.weight_packed = self.weight_scale = self.weight_zero = None

    def forward(self, x: Tensor, expert_of: Tensor) -> Tensor:
        if self.prepared is None:
            return qmm_grouped(x, self.packed, expert_of)
        return qmm_grouped_prepared(x, self.prepared, self.experts, expert_of)

    def extra_repr(self) -> str:
        return (
            f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bits={self.bits}, group_size={self.group_size}"
        )


class QuantExperts(nn.Module):
    """The experts of one layer, packed: a stand-in for transformers 5's module of 3-D parameters.

    ``gate_up``: one weight [2I, H] an expert, the rows of the gate first; ``down``: one weight [H, I] an expert.
    ``apply_gate`` makes [P, I] of [P, 2I], usually ``act(gate) * up``. Raises ValueError where experts are not packed
    alike or do not fit together.
    """

    def __init__(
        self, gate_up: Sequence[PackedWeight], down: Sequence[PackedWeight], apply_gate: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.gate_up_proj = ExpertLinear(PackedExperts.stack(gate_up))
        self.down_proj = ExpertLinear(PackedExperts.stack(down))
        self.apply_gate = apply_gate
        first, second = self.gate_up_proj, self.down_proj
        if first.experts != second.experts or first.out_features != 2 * second.in_features:
            raise ValueError(f"experts that do not fit together: {first} before {second}")

    def prepare(self, dtype: torch.dtype) -> None:
        """As :meth:`ExpertLinear.prepare`, of both products."""
        self.gate_up_proj.prepare(dtype)
        self.down_proj.prepare(dtype)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index integer [T, top_k], top_k_weights [T, top_k] -> [T, H] in x's dtype: the
        sum of a token's experts by weight, added in the order of top_k, so the same input gives the same bits."""
        expert_of = top_k_index.reshape(-1)
        h = self.down_proj(self.apply_gate(self.gate_up_proj(hidden_states, expert_of)), expert_of)
        weighted: Tensor = h.view(*top_k_index.shape, -1) * top_k_weights.unsqueeze(-1)
        return weighted.sum(1).to(hidden_states.dtype)


def model_name(stored: str, modules: Collection[str]) -> str:
    """The name in a model of ``modules`` of what a checkpoint calls ``stored``: Mixtral's ``block_sparse_moe`` became
    ``mlp`` in transformers 5, but not in its checkpoints."""
    head, found, tail = stored.partition(".block_sparse_moe")
    return f"{head}.mlp{tail}" if found and f"{head}.block_sparse_moe" not in modules else stored


def place_experts(model: nn.Module, packed: dict[str, PackedWeight], where: str) -> None:
    """Take the linears of single experts out of ``packed`` and put :class:`QuantExperts` of them into ``model``.

    Names that are linears of the model itself stay. ``where`` begins every error: :class:`CheckpointError` for experts
    that the model does not have, that are incomplete, of another shape, or packed in more than one way.
    """
    modules = dict(model.named_modules())
    found: dict[str, dict[tuple[int, str], PackedWeight]] = {}
    for name in list(packed):
        match = EXPERT_LINEAR.fullmatch(name)
        if match is not None and name not in modules:
            layer = found.setdefault(model_name(match[1], modules), {})
            layer[int(match[2]), ROLES[match[3]]] = packed.pop(name)
    for name, weights in found.items():
        replace_module(model, name, _build(name, modules.get(name), weights, where))


def _build(name: str, old: Any, weights: dict[tuple[int, str], PackedWeight], where: str) -> QuantExperts:
    gate_up, down = getattr(old, "gate_up_proj", None), getattr(old, "down_proj", None)
    if not isinstance(gate_up, Tensor) or not isinstance(down, Tensor) or not hasattr(old, "_apply_gate"):
        raise CheckpointError(f"{where}: {name} is packed expert by expert, but the model has no such experts there")
    odd = [f"{key}={getattr(old, key)}" for key, usual in STANDARD.items() if getattr(old, key, usual) != usual]
    if odd:
        raise CheckpointError(f"{where}: {name} holds experts of a kind that is not served packed ({', '.join(odd)})")
    experts, hidden, inner = down.shape
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    for e in range(experts):
        for role, shape in shapes.items():
            w = weights.get((e, role))
            if w is None:
                raise CheckpointError(f"{where}: {name} has {experts} experts, but the {role} weight of {e} is missing")
            if (w.n, w.k) != shape:
                raise CheckpointError(
                    f"{where}: the {role} weight of expert {e} of {name} is {[w.n, w.k]}, but the model wants "
                    f"{list(shape)}"
                )
    if len(weights) > 3 * experts:
        raise CheckpointError(f"{where}: {name} has {experts} experts, but expert {max(weights)[0]} is packed")
    try:
        joined = [_rows_joined(weights[e, "gate"], weights[e, "up"]) for e in range(experts)]
        return QuantExperts(joined, [weights[e, "down"] for e in range(experts)], old._apply_gate)
    except ValueError as error:
        raise CheckpointError(f"{where}: {name}: {error}") from None


def _rows_joined(gate: PackedWeight, up: PackedWeight) -> PackedWeight:
    """The rows of ``gate``, then those of ``up``: a row of the bitstream ends at a word, so nothing is repacked."""
    both = PackedExperts.stack((gate, up))
    zero = None if both.zero is None else both.zero.flatten(0, 1)
    return PackedWeight(both.packed.flatten(0, 1), both.scale.flatten(0, 1), zero, both.bits, both.k, both.form)
