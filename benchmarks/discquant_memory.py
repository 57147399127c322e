"""Memory and time of a step: discquant-paper, discquant's second stage, that stage with 32-bit state, and a whole run
of autoround that streams its blocks from disk.

    python benchmarks/discquant_memory.py [--output FILE] [--only blockwise]

A random Llama (67 million weights, 3 bits, groups of 64, float32, one thread) is rounded for a few steps by each, in a
process of its own. Run from the root with the package installed. Bytes are per quantized weight:

    state      what the method holds between two steps, counted tensor by tensor
    original   what the layers hold of the original weights beside it (the teacher), likewise
    peak       how far the process's memory rises above what it was before the method began: state, gradients, temporary
               tensors and activations (64 tokens, an embedding of 512: small on purpose)

The rows of ``blockwise`` are of ``dq quantize --blockwise --rounding autoround`` from beginning to end, measurement
included, on a model of as many layers as the row says (4.2 million weights each, 3 bits, two steps a block): how far
the process's memory rises above what it was before, a small model having been quantized already. They are compared with
what discquant, by its row above, holds of a whole model at its worst moment: original and peak.

The held-out KL beside them is that of stories260K in benchmarks/results/compare_stories260k.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from discquant_ablation import Row, WideLatent
from discquant_step import NoState
from theory_common import ROOT, rows_of, with_figure, write_result
from torch import Tensor

from dq_runtime.environment import flushed_denormals, give_back_memory
from dq_runtime.grids import GRIDS
from dq_runtime.modules.student import StudentModel
from dq_runtime.modules.student_linear import StudentLinear
from dq_runtime.modules.surgery import linears, replace_module, weight_of
from dq_runtime.packing.atomic import replace_file
from dq_runtime.pipeline import quantize
from dq_runtime.rounding import Choice, Job
from dq_runtime.rounding.discquant import Recipe, distil, usual_rate
from dq_runtime.rounding.discquant_paper import DiscQuantPaper
from dq_runtime.rounding.latent import Latent
from dq_runtime.spec import GridSpec, QuantSpec, RoundingSpec

BITS, STEPS, WINDOW = 3, 8, 64
SHAPE = {
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 512,
}
METHODS = ("discquant-paper", "discquant", "discquant, 32-bit state")
DEPTHS = (8, 24)


def build() -> StudentModel:
    """The model, its layers on the grid."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, max_position_embeddings=WINDOW, tie_word_embeddings=True)).eval()
    spec, layers = GridSpec(bits=BITS, group_size=64), {}
    for name, module in linears(model).items():
        layers[name] = StudentLinear(4 * weight_of(module), None, GRIDS.get(spec.name)(spec))
        replace_module(model, name, layers[name])
        module.weight = None
    windows = torch.randint(0, SHAPE["vocab_size"], (STEPS, WINDOW), generator=torch.Generator().manual_seed(1))
    return StudentModel(model, layers, windows, torch.float32)


def measure_blockwise(depth: int) -> dict[str, Any]:
    """One row: a model of ``depth`` layers on disk, rounded and measured there; in a fresh process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as place:
        folder = Path(place)
        text = folder / "text.txt"
        words = random.Random(0)
        text.write_text("\n\n".join(" ".join(f"w{words.randrange(90)}" for _ in range(60)) for _ in range(99)) + "\n")
        small, large = (_saved(folder / name, layers) for name, layers in (("small", 1), ("large", depth)))
        _blockwise(small, folder / "small_out", text)  # what is loaded or cached at first use is there from here on
        gc.collect()
        give_back_memory()
        Path("/proc/self/clear_refs").write_text("5")
        before, began = kilobytes("VmRSS"), time.perf_counter()
        report = _blockwise(large, folder / "out", text)
        seconds, peak = time.perf_counter() - began, 1024 * (kilobytes("VmHWM") - before)
    weights = report["quantized_weights"]
    return {
        "layers": depth,
        "weights": weights,
        "peak_bytes": peak,
        "peak_bytes_per_weight": peak / weights,
        "peak_bytes_per_weight_of_a_block": depth * peak / weights,
        "seconds": seconds,
    }


def _saved(folder: Path, layers: int) -> Path:
    """A random model of blocks an eighth the size, with a tokenizer of a word a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    shape = SHAPE | {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8}
    torch.manual_seed(0)
    config = LlamaConfig(**shape | {"num_hidden_layers": layers}, max_position_embeddings=WINDOW)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"[E]": 0} | {f"w{i}": i + 1 for i in range(90)}, unk_token="[E]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[E]").save_pretrained(folder)
    gc.collect()
    return folder


def _blockwise(model: Path, output: Path, text: Path) -> dict[str, Any]:
    spec = QuantSpec(GridSpec(bits=BITS, group_size=64), rounding=RoundingSpec("autoround", {"iters": 2, "batch": 4}))
    sizes = {"windows": STEPS, "window_length": WINDOW, "held_out_windows": 2}
    return quantize(
        str(model), output, spec, calibration=str(text), compute_dtype="float32", blockwise=True, **sizes
    )  # fmt: skip


def kilobytes(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field + ":"))


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure(method: str) -> dict[str, Any]:
    """One row; in a fresh process."""
    torch.set_num_threads(1)
    student = build()
    weights = sum(layer.in_features * layer.out_features for layer in student.layers.values())
    original = size(t for layer in student.layers.values() for t in (layer._lo, layer._y, layer._free))
    for window in (0, 1):  # everything that is loaded or cached at first use is there before the count begins
        student.set_mode(student.layers[next(iter(student.layers))].mode)
        with torch.no_grad():
            student.logits(student.tokens[window])
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before, times, states = kilobytes("VmRSS"), [], []
    begin = time.perf_counter()

    def monitor(step: int, total: int, **figures: float) -> None:
        nonlocal begin
        times.append(time.perf_counter() - begin)
        begin = time.perf_counter()

    class Store(NoState):
        def due(self) -> bool:
            return not states

        def save(self, step: int, tensors: Any, extra: Any) -> None:
            states.append(size(tensors.values()))

    student.begin(relaxed=method == "discquant-paper")
    job = Job(student.layers, student, 0, Store(), monitor)
    with flushed_denormals():
        if method == "discquant-paper":
            DiscQuantPaper({}).round(job)
        else:
            distil(job, None, _latents(student, method == "discquant"), Recipe(epochs=1), [])
    peak = 1024 * (kilobytes("VmHWM") - before)
    return {
        "method": method,
        "state_bytes_per_weight": states[0] / weights,
        "original_bytes_per_weight": original / weights,
        "peak_bytes_per_weight": peak / weights,
        "seconds_per_step": statistics.median(times[1:]),
        "weights": weights,
    }


def _latents(student: StudentModel, own: bool) -> dict[str, Any]:
    row = Row("", "", lr=usual_rate(BITS))
    latents: dict[str, Any] = {}
    for name, layer in student.layers.items():
        choice = Choice(layer.grid.nearest(layer.weight(), layer.scales))
        latents[name] = Latent.start(layer, choice, row.room, 0) if own else WideLatent(layer, choice, row)
    return latents


def table(result: dict[str, Any]) -> list[str]:
    """In markdown."""
    head = ["bytes a weight", "state", "original", "peak above both", "seconds a step", "held-out KL"]
    lines = []
    for row in result["rows"]:
        kl = row["kl_stories260k"]
        sizes = [f"{row[f'{name}_bytes_per_weight']:.2f}" for name in ("state", "original")]
        above = row["peak_bytes_per_weight"] - row["state_bytes_per_weight"]
        lines.append(
            [row["method"], *sizes, f"{above:.2f}", f"{row['seconds_per_step']:.2f}", f"{kl:.3f}" if kl else "-"]
        )
    return rows_of(head, lines)


def blockwise_table(result: dict[str, Any]) -> list[str]:
    """In markdown: what streaming takes, and what discquant holding the same model takes by the rows above."""
    whole = next(row for row in result["rows"] if row["method"] == "discquant")
    each = whole["original_bytes_per_weight"] + whole["peak_bytes_per_weight"]
    head = [
        "layers",
        "weights",
        "peak",
        "bytes a weight",
        "bytes a weight of one block",
        "of discquant's",
        "held-out KL",
    ]
    return rows_of(
        head,
        [
            [
                str(row["layers"]),
                f"{row['weights'] / 1e6:.0f} M",
                f"{row['peak_bytes'] / 1e6:.0f} MB",
                f"{row['peak_bytes_per_weight']:.2f}",
                f"{row['peak_bytes_per_weight_of_a_block']:.0f}",
                f"{row['peak_bytes_per_weight'] / each:.0%}",
                f"{row['kl_stories260k']:.3f}",
            ]
            for row in result["blockwise"]
        ],
    )


def _apart(measured: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What it gives in a process of its own."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_answer, args=(theirs, measured, *arguments))
    process.start()
    row: dict[str, Any] = ours.recv()
    process.join()
    print(json.dumps(row), flush=True)
    return row


def _kl_of(method: str) -> float | None:
    """Held out, of stories260K, from the table of methods; None for what is no method of it."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "compare_stories260k.json").read_text())["rows"]
    at = {"method": method, "bits": BITS, "group_size": 64, "transform": "identity"}
    found = [row["kl"] for row in rows if all(row.get(key) == value for key, value in at.items())]
    return found[0] if found else None


def _answer(pipe: Any, measured: Callable[..., dict[str, Any]], *arguments: Any) -> None:
    pipe.send(measured(*arguments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "discquant_memory.json")
    parser.add_argument("--only", choices=["blockwise"], help="keep the other rows that FILE has")
    chosen = parser.parse_args()
    (ROOT / "build").mkdir(exist_ok=True)
    if chosen.only:
        rows = json.loads(chosen.output.read_text())["rows"]
    else:
        rows = [_apart(measure, method) | {"kl_stories260k": _kl_of(method)} for method in METHODS]
    result = {
        "question": "bytes a quantized weight, seconds a step and held-out KL of stories260K",
        "model": SHAPE,
        "bits": BITS,
        "window": WINDOW,
        "steps": STEPS,
        "rows": rows,
        "blockwise": [_apart(measure_blockwise, depth) | {"kl_stories260k": _kl_of("autoround")} for depth in DEPTHS],
    }
    written = write_result(chosen.output, "discquant_memory", result)
    page = ROOT / "docs" / "discquant.md"
    text = with_figure(page.read_text(encoding="utf-8"), "memory", table(written))
    text = with_figure(text, "blockwise", blockwise_table(written))
    replace_file(page, lambda path: path.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
