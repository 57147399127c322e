"""The phases of a run in their order, each with what is alive at its worst moment: the model held whole."""

from __future__ import annotations

from dq_runtime.planning.memory import (
    CODES,
    CUDA_SLACK,
    GPU,
    HOST,
    HOST_SLACK,
    RELAXED,
    Component,
    Parts,
    Phase,
    Setting,
    packed_size,
    scales_size,
)
from dq_runtime.planning.shapes import ModelShape

BLOCK_METHODS = ("discquant", "autoround")


def whole_model(shape: ModelShape, setting: Setting) -> list[Phase]:
    """Of ``dq quantize`` without ``--blockwise``."""
    parts = Parts(shape, setting)
    phases = [_loading(parts), _grids(parts)]
    if setting.method in BLOCK_METHODS:
        phases.append(_blocks(parts))
    if setting.method == "gptq":
        phases.append(_grams(parts))
    if setting.method == "discquant":
        phases.append(_latent_step(parts))
    if setting.method == "discquant-paper":
        phases.append(_relaxed_step(parts))
    phases += [_writing(parts), _evaluating(parts)]
    return [with_slack(parts, phase) for phase in phases]


def _loading(parts: Parts) -> Phase:
    """transformers builds the model in float32 on the host; what is stored narrower is mapped beside it."""
    shape, setting = parts.shape, parts.set
    found = [*parts.process()]
    if setting.mapped:
        found.append(parts.part("the weights file, mapped", 4 * shape.parameters, "4 B x (W + D)", HOST))
    else:
        found.append(parts.part("weights in float32", 4 * shape.parameters, "4 B x (W + D)", HOST))
        size = shape.stored_size
        if setting.world == 1:  # the processes share its pages
            found.append(parts.part("as stored", size * shape.parameters, f"{size} B x (W + D)", HOST))
    if parts.each == GPU and setting.world == 1:
        found.append(parts.part("weights in float32, on the GPU", 4 * shape.parameters, "4 B x (W + D)"))
    return Phase("loading", tuple(found))


def _grids(parts: Parts) -> Phase:
    """Layer by layer from float32 to the grid, then nearest, whose codes are all there before they are packed."""
    size = CODES * parts.shape.weights if parts.set.world == 1 else 0
    codes = parts.part("codes of nearest", size, "1 B x W")
    return Phase("grids and nearest", (*parts.context(), codes, parts.layer(20, "fit, neighbours, position")))


def _streams(parts: Parts) -> list[Component]:
    """Both streams, which change in place: hidden states of all windows, float32."""
    setting = parts.set
    size = 2 * 4 * setting.windows * setting.length * parts.shape.hidden
    return [parts.part("hidden states of two streams", size, f"2 x 4 B x {setting.windows} x {setting.length} x H")]


def block_work(parts: Parts) -> list[Component]:
    """AutoRound on one block (rounding/autoround.py, straight_through.py), a weight of the largest block: the original
    in the loop's dtype, w 4, v 4 and its gradient 4, what snap keeps 5, w_hat in the loop's dtype, best codes 1."""
    loop, largest = parts.set.loop, parts.shape.largest_block
    per = loop + 4 + 4 + 4 + 5 + 1 + (4 if loop == 4 else 2)
    work = parts.part("AutoRound's block", per * largest, f"{per} B x {largest} weights of the block")
    return [
        work,
        parts.saved(1, parts.tokens, fused=False, first=True),
        parts.passing(parts.tokens),
        parts.layer(20, "w_hat, its gradient, products of snap"),
    ]


def _blocks(parts: Parts) -> Phase:
    world = parts.set.world
    size = (CODES * parts.shape.weights + scales_size(parts.shape)) / world
    codes = parts.part("codes and scales so far", size, "1 B x W, scales" + parts.among(world))
    return Phase("blocks (first stage)" if parts.set.method == "discquant" else "blocks", (
        *parts.context(), codes, *_streams(parts), *block_work(parts)
    ))  # fmt: skip


def gram_work(parts: Parts) -> list[Component]:
    """GPTQ on one layer: the second moments of its inputs, their factor, and the walk; the block's weights twice, as
    they were and as they are, in the loop's dtype."""
    shape, loop, length = parts.shape, parts.set.loop, parts.set.length
    k = max(layer.k for layer in shape.layers)
    block = shape.largest_block
    return [
        parts.part("the block's weights, twice", 2 * loop * block, f"2 x {loop} B x {block}"),
        parts.part("H, damped, its factor and inverse", 5 * 4 * k * k, f"5 x 4 B x {k}^2"),
        parts.layer(24, "ordered, errors, values, codes"),
        parts.part("activations of a window", 4 * 8 * shape.intermediate * length, f"8 x 4 B x F x {length}"),
    ]


def _grams(parts: Parts) -> Phase:
    codes = parts.part("codes so far", CODES * parts.shape.weights, "1 B x W")
    return Phase("layers", (*parts.context(), codes, *_streams(parts), *gram_work(parts)))


def _latent_step(parts: Parts) -> Phase:
    shape, setting = parts.shape, parts.set
    found = [*parts.context(), parts.latents(), *parts.head_copy(), parts.logits()]
    found.append(parts.saved(max(1, shape.blocks), setting.length, setting.fused))
    found.append(parts.passing(setting.length))
    if parts.each == HOST:  # in C++, without products on the way
        found.append(parts.layer(3 * setting.loop, "w_hat twice, its gradient"))
    else:
        found.append(parts.layer(24, "w_hat twice, its gradient, products of decoding"))
    size = 4 * setting.windows * setting.length * shape.hidden
    found.append(parts.part("what the original hands to its head", size, "4 B x windows x T x H", HOST))
    extra = int(setting.options.get("model_batch", 1)) > setting.world
    if extra:
        found.append(parts.part("gradients of a step, added up", 4 * shape.weights / setting.world, "4 B x W"))
    if setting.world > 1:
        found.append(parts.layer(8, "gathered from all processes"))
    if parts.each == GPU:
        found.append(parts.part("state on its way to the disk", 4 * shape.weights / setting.world, "4 B x W", HOST))
    return Phase("whole model (second stage)", tuple(found))


def _relaxed_step(parts: Parts) -> Phase:
    shape, setting = parts.shape, parts.set
    found = [*parts.context(), *parts.head_copy(), parts.logits()]
    found.append(parts.part("x, m, v", RELAXED * shape.weights, f"{RELAXED} B x W"))
    found.append(parts.part("gradients of x", 4 * shape.weights, "4 B x W, all until the step"))
    found.append(parts.saved(max(1, shape.blocks), setting.length, setting.fused))
    found.append(parts.passing(setting.length))
    found.append(parts.layer(8, "w_hat, its gradient"))
    if parts.each == GPU:
        found.append(parts.part("state on its way to the disk", RELAXED * shape.weights, f"{RELAXED} B x W", HOST))
    return Phase("whole model", tuple(found))


def _writing(parts: Parts) -> Phase:
    """Codes of every layer beside their packed form, and the dense tensors in the serving dtype."""
    shape, world = parts.shape, parts.set.world
    found = [*parts.context(), *_chosen(parts)]
    if world > 1:
        found.append(parts.packed("nearest, packed"))
    found.append(parts.part("dense tensors as served", 2 * shape.dense, "2 B x D", HOST))
    return Phase("checkpoint", tuple(found))


def _evaluating(parts: Parts) -> Phase:
    """The original in float32, and what was written, read back; the logits of one window of each."""
    shape, setting = parts.shape, parts.set
    found = [*parts.context()]
    if setting.method != "nearest":
        found += _chosen(parts)
    if setting.world > 1:
        found.append(parts.packed("nearest, packed"))
    copies = 2 if parts.each == HOST else 1  # mapped, and repacked for the CPU's kernels
    served = copies * (packed_size(shape) + 2 * shape.dense)
    found.append(parts.part("the checkpoint, read back", served, f"{copies} x (bits/8 B x W, scales, 2 B x D)"))
    size = 6 * 4 * setting.length * shape.vocab
    found.append(parts.part("logits and what is compared", size, f"6 x 4 B x {setting.length} x {shape.vocab}"))
    return Phase("evaluation", tuple(found))


def _chosen(parts: Parts) -> list[Component]:
    """What the method decided, as codes and packed."""
    world = parts.set.world
    codes = parts.part("codes", CODES * parts.shape.weights / world, "1 B x W" + parts.among(world))
    return [codes, parts.packed("rounded, packed")]


def with_slack(parts: Parts, phase: Phase) -> Phase:
    """What allocators lose: PyTorch's on a GPU rounds and splits; glibc keeps what is freed between the tensors that
    stay, of that which comes and goes in every step."""
    if parts.each == GPU:
        lost = parts.part("lost by the allocator", CUDA_SLACK * phase.total(GPU), f"assumed {CUDA_SLACK:.0%}", GPU)
    else:
        moving = sum(c.size for c in phase.components if c.moving)
        lost = parts.part("kept by malloc", HOST_SLACK * moving, f"measured: about {HOST_SLACK} of what moves", HOST)
    return Phase(phase.name, (*phase.components, lost))
