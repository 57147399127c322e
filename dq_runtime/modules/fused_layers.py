"""Layers of the Llama family run on our passes between their matrix products while a model is rounded.

A decoder layer is taken where its modules have Llama's names (Llama, Mistral, Qwen2, SmolLM2, ..) *and* a probe gives
what its own code gives: names do not say whether a norm adds one to its weight or a layer goes without rotation.
Whatever else a call brings (a mask, a cache, a batch) goes to the layer's own code. The linears are called as modules,
so what stands in for them keeps working.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dq_runtime.backends.layers_native import Heads, NativeLayers
from dq_runtime.modules.layer_ops import add_norm, attention, gated

# Of a probe, and how far apart the two may be: float32 in another order of sums, relative to the largest entry.
PROBE_TOKENS, PROBE_TOLERANCE = 5, 1e-4


class FusedLayers:
    """The layers of a model that our passes reproduce, found once; :meth:`installed` puts them in place."""

    def __init__(self, model: nn.Module, ops: NativeLayers) -> None:
        self.forwards = {layer: partial(_forward, layer, layer.forward, ops) for layer in _candidates(model, ops)}
        self.forwards = {layer: own for layer, own in self.forwards.items() if _same(layer, own)}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within, these layers run on our passes. A backward pass may come later."""
        for layer, forward in self.forwards.items():
            layer.forward = forward  # of the instance, before its class's
        try:
            yield
        finally:
            for layer in self.forwards:
                del layer.forward


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _is_norm(module: nn.Module) -> bool:
    names = [name for name, _ in module.named_parameters()]
    return names == ["weight"] and not module.weight.requires_grad and isinstance(_eps(module), float)


def _eps(norm: nn.Module) -> Any:
    return getattr(norm, "variance_epsilon", None)


def _heads(attention: Any) -> Heads:
    dim = int(attention.head_dim)
    return Heads(attention.q_proj.out_features // dim, attention.k_proj.out_features // dim, dim, attention.scaling)


def _candidates(model: nn.Module, ops: NativeLayers) -> list[Any]:
    """Modules that look like a layer of Llama."""
    parts = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
    found: list[Any] = []
    for module in model.modules():
        layer: Any = module
        if (
            _children(layer) == parts
            and _children(layer.self_attn) == {"q_proj", "k_proj", "v_proj", "o_proj"}
            and _children(layer.mlp) == {"gate_proj", "up_proj", "down_proj", "act_fn"}
            and _is_norm(layer.input_layernorm)
            and _is_norm(layer.post_attention_layernorm)
            and hasattr(layer.self_attn, "head_dim")
            and hasattr(layer.self_attn, "scaling")
            and ops.refuses(_heads(layer.self_attn)) is None
        ):
            found.append(layer)
    return found


@torch.no_grad()
def _same(layer: Any, forward: Callable[..., Any]) -> bool:
    """Whether ``forward`` gives what the layer's own code gives, on noise, turned by angles that no embedding has."""
    noise = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, PROBE_TOKENS, layer.self_attn.q_proj.in_features, generator=noise)
    angles = torch.randn(2, 1, PROBE_TOKENS, layer.self_attn.head_dim, generator=noise)
    call = {"position_embeddings": (angles[0], angles[1]), "attention_mask": None}
    try:
        expected = layer(hidden, **call)
    except (TypeError, ValueError, AttributeError):  # not called as Llama's is
        return False
    if not isinstance(expected, Tensor):
        return False
    apart = (forward(hidden, **call) - expected).abs().max()
    return bool(apart <= PROBE_TOLERANCE * expected.abs().max())


def _forward(
    layer: Any,
    own: Callable[..., Any],
    ops: NativeLayers,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    past_key_values: Any = None,
    **others: Any,
) -> Any:
    """The layer on hidden states float32 [1, M, K]; ``own`` is its own code."""
    plain = hidden_states.dtype == torch.float32 and hidden_states.shape[0] == 1 and not layer.training
    if not plain or attention_mask is not None or position_embeddings is None or past_key_values is not None:
        others |= {"attention_mask": attention_mask, "past_key_values": past_key_values}
        return own(hidden_states, position_embeddings=position_embeddings, **others)
    attn, mlp = layer.self_attn, layer.mlp
    first, second = layer.input_layernorm, layer.post_attention_layernorm
    cast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if cast else torch.float32
    cosine, sine = (each[0].float().contiguous() for each in position_embeddings)

    stream, inputs = add_norm(hidden_states[0], None, first.weight, _eps(first), dtype, ops)
    q, k, v = (project(inputs).to(dtype) for project in (attn.q_proj, attn.k_proj, attn.v_proj))
    mixed = attention(q, k, v, cosine, sine, _heads(attn), ops)
    stream, inputs = add_norm(stream, attn.o_proj(mixed).to(dtype), second.weight, _eps(second), dtype, ops)
    product = gated(mlp.gate_proj(inputs).to(dtype), mlp.up_proj(inputs).to(dtype), ops)
    return (stream + mlp.down_proj(product)).unsqueeze(0)
