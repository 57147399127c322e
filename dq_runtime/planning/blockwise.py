"""The phases of ``dq quantize --blockwise``: one block in memory, everything else on disk."""

from __future__ import annotations

from dq_runtime.modules.hidden_states import IN_MEMORY
from dq_runtime.planning.memory import (
    CODES,
    HOST,
    Component,
    Parts,
    Phase,
    Setting,
    original_size,
    packed_size,
    scales_size,
)
from dq_runtime.planning.phases import block_work, gram_work, with_slack
from dq_runtime.planning.shapes import ModelShape

ABLE = ("autoround", "gptq", "nearest")


def stream_size(shape: ModelShape, setting: Setting) -> int:
    """The hidden states of all calibration windows, float32, once."""
    return 4 * setting.windows * setting.length * shape.hidden


def blockwise(shape: ModelShape, setting: Setting) -> list[Phase]:
    """Of a method that needs weights and blocks alone (:data:`ABLE`)."""
    parts = Parts(shape, setting)
    share = shape.largest_block / shape.weights  # scales are spread as weights are
    held = parts.part(
        "the block's original weights",
        share * original_size(shape, setting.compact),
        f"as the layers hold them, {shape.largest_block} weights",
    )
    packed = parts.part("the block, packed", share * packed_size(shape), "bits/8 B a weight, scales")
    largest = parts.part("embedding or head, float32", 4 * shape.vocab * shape.hidden, "4 B x V x H")
    codes = parts.part(
        "the block's codes and scales", CODES * shape.largest_block + share * scales_size(shape), "1 B a weight"
    )
    work: list[Component] = []
    if setting.method == "autoround":
        work = block_work(parts)
    elif setting.method == "gptq":
        work = gram_work(parts)
    streams = [] if setting.method == "nearest" else _streams(parts)
    entering = parts.part("a block while it runs", 4 * shape.largest_block, "w_hat, 4 B a weight, layer by layer")
    phases = [
        Phase("embedding, first block's inputs", (*parts.process(), *streams, largest)),
        Phase("blocks", (*parts.process(), *streams, held, codes, packed, *work, parts.layer(20, "fit, neighbours"))),
        Phase("evaluation, block by block", (*parts.process(), *_held(parts), held, packed, packed, entering)),
        Phase("evaluation, heads", (*parts.process(), *_held(parts), largest, largest, _logits(parts))),
    ]
    return [with_slack(parts, phase) for phase in phases]


def _streams(parts: Parts) -> list[Component]:
    """Two streams, in place; in a file beyond a size."""
    size = stream_size(parts.shape, parts.set)
    if size > IN_MEMORY:
        return [parts.part("hidden states", 0, f"2 x {size / 1e9:.1f} GB in a file", HOST)]
    how = f"2 x 4 B x {parts.set.windows} x {parts.set.length} x H"
    return [parts.part("hidden states, original and rounded", 2 * size, how, HOST)]


def _held(parts: Parts) -> list[Component]:
    """Three streams of the held-out windows: original, nearest, what was written."""
    setting = parts.set
    size = 4 * setting.held * setting.length * parts.shape.hidden
    kept = 0 if size > IN_MEMORY else 3 * size
    return [parts.part("hidden states, held-out", kept, f"3 x 4 B x {setting.held} x {setting.length} x H", HOST)]


def _logits(parts: Parts) -> Component:
    size = 6 * 4 * min(64, parts.set.length) * parts.shape.vocab
    return parts.part("logits", size, f"6 x 4 B x 64 rows x {parts.shape.vocab}")
