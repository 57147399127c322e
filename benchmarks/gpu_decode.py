"""A whole decode step of an 8B model on this GPU, random weights: packed against bf16, in the same lean decoder.

    python benchmarks/gpu_decode.py --out FILE [--seconds 90] [--layers 32]

The shape is Llama 3's 8B. Steps are those that `dq generate` takes, one CUDA graph each, on a cache filled to the 512
positions it has slots for; sampling is not included. A step reads every linear once, the head, and the cache: those
bytes a second, over the bandwidth of a copy in the same run, is the fraction that a row reports.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import gpu_part
import torch
from torch import Tensor

from dq_kernels import timing
from dq_kernels.precompile import Launch, compile_all
from dq_kernels.table import capability_of, choose
from dq_runtime.packing import PackedWeight, words_per_row
from dq_runtime.runtime.decoder import DecoderConfig, DecoderWeights, LayerWeights, Linear, read_config
from dq_runtime.runtime.decoder.torch_decoder import TorchDecoder

SHAPE = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
}
CONTEXT = 512
WARM_UP, STEPS = 4, 40  # the last position is CONTEXT, so that all steps replay the graph of CONTEXT slots
CHECKED = 300  # tokens over which a decoder is checked before it is timed
BATCHES = (1, 16, 64)
GROUP = 64
# Bits of the layers' linears and of the head. A head of 16 bits is what `dq quantize` leaves unless asked.
VARIANTS = ((16, 16), (4, 16), (3, 16), (4, 4), (3, 3))
SPREAD = 0.02  # standard deviation of the weights, as most models are initialised: logits stay finite
# Relative error of a step's logits against those of one pass over all tokens, which runs other kernels. In each, about
# 12 values a layer are rounded to bf16, by 2^-9 or so and independently: two norms, q/k/v, rotated q and k, attention's
# weights and its output, o, gate, up, their product, down, two sums. Measured: 0.046 dense on an H100.
LOGIT_ERROR = math.sqrt(2 * 12 * 32) * 2.0**-9  # 0.054


def random_linear(n: int, k: int, bits: int) -> Linear:
    """Random weights [N, K] of spread SPREAD on the default device, packed to ``bits`` (symmetric) or bf16 for 16."""
    if bits == 16:
        return Linear(torch.empty(n, k, dtype=torch.bfloat16).normal_(0.0, SPREAD), None)
    words = torch.randint(0, 256, (n, 4 * words_per_row(k, bits)), dtype=torch.uint8).view(torch.int32)
    step = SPREAD * math.sqrt(12) / 2**bits  # codes are uniform: their spread is 2^bits / sqrt(12) steps
    scale = (torch.rand(n, k // GROUP) + 0.5) * step
    return Linear(PackedWeight(words, scale.bfloat16(), None, bits, k), None)


def random_decoder(config: DecoderConfig, bits: int, head_bits: int, device: str) -> tuple[TorchDecoder, int]:
    """A decoder with those widths on ``device``, and the bytes of weights that one of its steps reads."""
    hidden, width = config.hidden, config.heads * config.head_dim
    read = 0

    def linear(n: int, k: int, bits: int) -> Linear:
        nonlocal read
        made = random_linear(n, k, bits)
        read += made.weight.nbytes
        return made

    def norm() -> Tensor:
        return torch.ones(hidden, dtype=torch.bfloat16)

    def layer() -> LayerWeights:
        # Projections of one input as one linear, as the decoder would join them.
        return LayerWeights(
            attention_norm=norm(),
            qkv=(linear(width + 2 * config.kv_heads * config.head_dim, hidden, bits),),
            q_norm=None,
            k_norm=None,
            o=linear(hidden, width, bits),
            after_attention_norm=None,
            mlp_norm=norm(),
            gate_up=(linear(2 * config.intermediate, hidden, bits),),
            down=linear(hidden, config.intermediate, bits),
            after_mlp_norm=None,
        )

    with torch.device(device):
        embedding = torch.empty(config.vocab, hidden, dtype=torch.bfloat16).normal_()
        layers = tuple(layer() for _ in config.layers)
        weights = DecoderWeights(embedding, layers, norm(), linear(config.vocab, hidden, head_bits))
    return TorchDecoder(config, weights, device, torch.bfloat16), read


def check(decoder: TorchDecoder, tokens: Tensor) -> str | None:
    """None if a captured step after a prompt gives the logits of one pass over all of ``tokens`` [1, T], finite, and
    the same bits again; else what is wrong."""
    whole = decoder.logits(tokens)[:, -1]
    found = []
    for _ in range(2):
        cache = decoder.start(1, CONTEXT)
        decoder.step(tokens[:, :-1], cache)
        found.append(decoder.step(tokens[:, -1:], cache))
        del cache  # its memory, and the graph made on it, serve the next one
    error = float((found[0] - whole).norm() / whole.norm())
    if not error <= LOGIT_ERROR:  # NaN is not
        return f"a step's logits are off by {error:.3g}, relative to a pass over all tokens"
    return None if torch.equal(*found) else "two equal steps gave different bits"


def time_steps(decoder: TorchDecoder, batch: int) -> list[float]:
    """Microseconds of each of STEPS steps of ``batch`` sequences, the last at position CONTEXT."""
    vocabulary = decoder.config.vocab
    prompt = CONTEXT - WARM_UP - STEPS
    cache = decoder.start(batch, CONTEXT)
    decoder.step(torch.randint(0, vocabulary, (batch, prompt), device="cuda"), cache)
    tokens = torch.randint(0, vocabulary, (batch, 1), device="cuda")
    for _ in range(WARM_UP):
        decoder.step(tokens, cache)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(STEPS + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:  # not waited for: the host runs ahead, as the decode loop does
        decoder.step(tokens, cache)
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) * 1e3 for a, b in pairwise(events)]


def compile_ours(config: DecoderConfig) -> None:
    """The kernels of every packed linear at every batch, into Triton's cache; M = 2^20: those that decode."""
    device = torch.device("cuda", torch.cuda.current_device())
    width = config.heads * config.head_dim
    shapes = {
        (width + 2 * config.kv_heads * config.head_dim, config.hidden),
        (config.hidden, width),
        (2 * config.intermediate, config.hidden),
        (config.hidden, config.intermediate),
        (config.vocab, config.hidden),
    }
    widths = {bits for variant in VARIANTS for bits in variant} - {16}
    compile_all(
        [
            Launch(k, bits, GROUP, choose(m, n, k, bits, device))
            for n, k in shapes
            for bits in widths
            for m in (*BATCHES, 2**20)
        ],
        capability_of(device),
    )


def main() -> int:
    """Measure, print, write; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="result file")
    parser.add_argument("--seconds", type=float, default=90.0, help="no further variant is begun after that many")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    args = parser.parse_args()
    reason = gpu_part.unusable()
    if reason is not None:
        print(f"gpu_decode: nothing was timed: {reason}", file=sys.stderr)
        return 2
    started = time.perf_counter()
    shape = {**SHAPE, "num_hidden_layers": args.layers}
    config = read_config(shape)
    if isinstance(config, str):
        raise SystemExit(f"gpu_decode: the decoder refuses the model: {config}")
    torch.manual_seed(0)
    compile_ours(config)
    result: dict[str, Any] = {
        **gpu_part.environment(),
        "copy_gb_s": timing.copy_gb_s(),
        "model": shape,
        "context": CONTEXT,
        "decode": [],
        "wrong": [],
    }
    dense_us: dict[int, float] = {}
    for bits, head_bits in VARIANTS:
        if time.perf_counter() - started > args.seconds:
            result["cut_short"] = f"no further variant was begun after {args.seconds:.0f} s"
            print(f"gpu_decode: {result['cut_short']}", flush=True)
            break
        decoder, weight_bytes = random_decoder(config, bits, head_bits, "cuda")
        fault = check(decoder, torch.randint(0, config.vocab, (1, CHECKED), device="cuda"))
        if fault is not None:
            result["wrong"].append(f"{bits} bits, head of {head_bits}: {fault}")
            print(f"WRONG, not timed: {result['wrong'][-1]}", flush=True)
            continue
        for batch in BATCHES:
            torch.cuda.reset_peak_memory_stats()
            times = time_steps(decoder, batch)
            us = statistics.median(times)
            if (bits, head_bits) == (16, 16):
                dense_us[batch] = us
            cache_bytes = 2 * len(config.layers) * batch * config.kv_heads * CONTEXT * config.head_dim * 2
            gb_s = (weight_bytes + cache_bytes) / us / 1e3
            row = {
                **{"bits": bits, "head_bits": head_bits, "batch": batch},
                **{"median_us": us, "min_us": min(times), "max_us": max(times), "steps": len(times)},
                "tokens_per_second": batch / us * 1e6,
                "weight_bytes": weight_bytes,
                "cache_bytes": cache_bytes,
                "gb_s": gb_s,
                "fraction_of_copy": gb_s / result["copy_gb_s"],
                "speedup_over_bf16": dense_us[batch] / us if batch in dense_us else None,
                "peak_memory_bytes": torch.cuda.max_memory_allocated(),
            }
            result["decode"].append(row)
            more = f"{row['fraction_of_copy']:.0%} of a copy"
            more += "" if batch not in dense_us else f", {dense_us[batch] / us:.2f}x bf16"
            print(
                f"{bits:2} bits (head {head_bits:2}) batch {batch:2}: {us:8.1f} us a step, "
                f"{row['tokens_per_second']:8.1f} tokens/s, {gb_s:6.0f} GB/s ({more})",
                flush=True,
            )
            gpu_part.write(args.out, result)
        del decoder
        torch.cuda.empty_cache()
    gpu_part.write(args.out, result)
    print(f"wrote {args.out}, {time.perf_counter() - started:.0f} s")
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
