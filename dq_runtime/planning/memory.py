"""Bytes, tensor by tensor: what every part of a run holds, and what is alive at the worst moment of each phase.

W quantized weights in layers [N, K], D parameters that stay dense, T tokens a window, H hidden size, F intermediate
size, V vocabulary. A formula says what the code allocates, not what it should: where one changes, the other has to, and
``tests/unit/test_plan.py`` compares them with real tensors, ``benchmarks/plan.py`` with measured runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dq_runtime.planning.shapes import ModelShape

HOST, GPU = "host", "GPU"

# Bytes a weight between two steps: u int16, m int8, v uint8 (rounding/latent.py); x, m, v float32 (discquant_paper).
LATENT, RELAXED = 4, 12
# What saves an unfinished block method: the codes of finished layers, uint8.
CODES = 1
METHODS = ("discquant", "discquant-paper", "autoround", "gptq", "nearest")

# A CUDA process before the first tensor: context, kernels, cuBLAS workspaces. Not measured here; CUDA 12 and 13 take
# 0.5 to 1.0 GB on an H100. PyTorch's caching allocator rounds and splits: 5% on top is a usual figure.
CUDA_CONTEXT, CUDA_SLACK = 10**9, 0.05
# glibc's malloc: freed activations and temporary tensors lie between others, and are kept for the next step.
HOST_SLACK = 0.75
# Of a tokenizer in memory, bytes an entry of its vocabulary (SmolLM2: 49 MB for 49152).
TOKENIZER = 1000


@dataclass(frozen=True)
class Setting:
    """What a run is asked for, as far as memory depends on it. ``loop`` 4 or 2: bytes of the rounding loop's dtype;
    ``compact``: layers hold lo, y and free packed (GPUs); ``fused``: our own passes run a layer (native CPU);
    ``mapped``: the weights file is float32 and stays mapped; ``world``: processes that share rows; ``baseline``: of a
    process with torch, transformers and the model's class."""

    method: str
    options: dict[str, Any]
    windows: int
    length: int
    held: int
    loop: int
    device: str
    compact: bool
    fused: bool
    mapped: bool
    blockwise: bool = False
    world: int = 1
    baseline: int = 0


@dataclass(frozen=True)
class Component:
    """``size`` bytes of something, ``place`` HOST or GPU; ``how``: the arithmetic."""

    name: str
    size: int
    how: str
    place: str
    moving: bool = False  # comes and goes within the phase


@dataclass(frozen=True)
class Phase:
    """What is alive together at the worst moment of a part of the run."""

    name: str
    components: tuple[Component, ...]

    def total(self, place: str) -> int:
        return sum(c.size for c in self.components if c.place == place)


def state_size(method: str, shape: ModelShape) -> int:
    """Bytes of the state that a method saves, at its largest, with scales, whether it moves them or not."""
    if method == "nearest":
        return 0
    if method == "discquant-paper":
        return RELAXED * shape.weights
    if method == "qat":  # and the ends of every group's range, float32, with two moments as well
        ends = sum(layer.scales * (1 if layer.symmetric else 2) for layer in shape.layers)
        return RELAXED * (shape.weights + ends)
    return (LATENT if method == "discquant" else CODES) * shape.weights + scales_size(shape)


def scales_size(shape: ModelShape) -> int:
    """2 bytes a scale, 1 a zero point."""
    return sum(layer.scales * (2 if layer.symmetric else 3) for layer in shape.layers)


def packed_size(shape: ModelShape) -> int:
    """Codes as bitstreams of 32-bit words, with their scales."""
    return sum(4 * layer.n * -(-layer.k * layer.bits // 32) for layer in shape.layers) + scales_size(shape)


def original_size(shape: ModelShape, compact: bool) -> int:
    """lo, y and free of every layer: 1 + 4 + 1 bytes, compactly bits / 8 + 2 + 1 / 8, and the scales."""
    if not compact:
        return 6 * shape.weights + scales_size(shape)
    packed = sum(4 * layer.n * -(-layer.k * layer.bits // 32) for layer in shape.layers)
    return packed + 2 * shape.weights + shape.weights // 8 + scales_size(shape)


def activations(shape: ModelShape, loop: int, fused: bool, first: bool) -> int:
    """Bytes a token that the forward pass of one block keeps for the backward pass. ``first``: nothing before the
    block is trained, so its first norm keeps nothing.

    fused   the sums before both norms float32; normed inputs, q, k, v, attention, gate, up, gated product in the dtype
    plain   the same, q and k turned, keys and values repeated for every head, silu(gate), norms' intermediates float32
    """
    h, f = shape.hidden, shape.intermediate
    a, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if fused:
        return 8 * h + loop * (2 * h + 2 * a + 2 * kv + 3 * f) + 4 * shape.heads
    norms = 4 * 2 * h if first else 4 * 4 * h
    return norms + loop * (2 * h + 5 * a + 4 * f) + 4 * shape.heads


class Parts:
    """The components of one setting; ``each``: the place where weights, state and activations lie."""

    def __init__(self, shape: ModelShape, setting: Setting) -> None:
        self.shape, self.set = shape, setting
        self.each = HOST if setting.device == "cpu" else GPU
        self.tokens = setting.length * min(int(setting.options.get("batch", 1)), max(1, setting.windows))

    def part(self, name: str, size: float, how: str, place: str = "", moving: bool = False) -> Component:
        return Component(name, int(size), how, place or self.each, moving)

    def process(self) -> tuple[Component, ...]:
        """What a process holds before it has read a weight."""
        shape, found = self.shape, []
        found.append(self.part("Python, torch, transformers", self.set.baseline, "measured in this process", HOST))
        size = TOKENIZER * shape.vocab
        found.append(self.part("tokenizer", size, f"{TOKENIZER} B x {shape.vocab} entries", HOST))
        if self.each == GPU:
            found.append(self.part("CUDA context", CUDA_CONTEXT, "assumed"))
        return tuple(found)

    def dense(self) -> Component:
        """The unquantized parameters, float32."""
        if self.set.mapped:
            return self.part(
                "the weights file, mapped", 4 * self.shape.parameters, "4 B x (W + D), the system's to take back"
            )
        world = 1 if self.shape.tied else self.set.world  # fully_shard holds an embedding and a head that are two
        return self.part("embedding, norms, head", 4 * self.shape.dense / world, "4 B x D" + self.among(world))

    def original(self) -> Component:
        """The original weights as the layers hold them."""
        world, compact = self.set.world, self.set.compact
        how = "lo bits/8, y 2, free 1/8 B x W, scales" if compact else "lo 1, y 4, free 1 B x W, scales"
        size = original_size(self.shape, compact) / world
        return self.part("original weights on the grid", size, how + self.among(world))

    def packed(self, what: str) -> Component:
        """All layers in packed form; every process has all of them."""
        return self.part(what, packed_size(self.shape), "bits/8 B x W, scales")

    def latents(self) -> Component:
        world = self.set.world
        size = (LATENT * self.shape.weights + scales_size(self.shape)) / world
        how = "u 2, m 1, v 1 B x W, scales" + self.among(world)
        return self.part("state of discquant", size, how)

    def head_copy(self) -> list[Component]:
        """The bfloat16 copy of the head (modules/student.py)."""
        if self.set.loop == 4:
            return []
        return [self.part("head in bfloat16", 2 * self.shape.vocab * self.shape.hidden, "2 B x V x H")]

    def logits(self) -> Component:
        """Teacher's and student's, of which the gradient takes the teacher's place."""
        loop, t, v = self.set.loop, self.set.length, self.shape.vocab
        return self.part("logits of teacher and student", 2 * loop * t * v, f"2 x {loop} B x {t} x {v}", moving=True)

    def saved(self, blocks: int, tokens: int, fused: bool, first: bool = False) -> Component:
        per = activations(self.shape, self.set.loop, fused, first)
        how = f"{per} B x {tokens} tokens x {blocks} blocks"
        return self.part("activations kept for the backward pass", per * tokens * blocks, how, moving=True)

    def passing(self, tokens: int) -> Component:
        """Gradients of activations on their way back through a block, in float32 at the most."""
        per = 4 * (3 * self.shape.intermediate + 7 * self.shape.hidden)
        return self.part(
            "gradients of one block's activations", per * tokens, f"4 B x (3 F + 7 H) x {tokens}", moving=True
        )

    def layer(self, per: int, what: str) -> Component:
        """Of the largest layer only, for a moment."""
        size = per * self.shape.largest
        return self.part(f"largest layer: {what}", size, f"{per} B x {self.shape.largest}", moving=True)

    def context(self) -> tuple[Component, ...]:
        """What is there in every phase once the layers are on the grid."""
        nearest = [self.packed("nearest, packed")] if self.set.world == 1 else []  # several pack it in the end
        return (*self.process(), self.dense(), self.original(), *nearest)

    @staticmethod
    def among(world: int) -> str:
        """The end of the arithmetic of what ``world`` processes share."""
        return f", / {world}" if world > 1 else ""
