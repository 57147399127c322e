"""Whether an engine will load each layer of a packed checkpoint, on which kernel, and what to change: said in advance
from the facts in ``engines.py``, without the engine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dq_runtime.errors import SpecError
from dq_runtime.export.check_tables import TABLES_OF_OURS, plugin_note, table_in_vllm
from dq_runtime.export.engines import (
    ENGINES,
    KERNELS,
    READERS,
    TRANSFORMERS,
    VLLM,
    Kernel,
    Reader,
    fused_groups,
    input_shards,
)
from dq_runtime.levels import INT
from dq_runtime.packing import PackedWeight
from dq_runtime.packing.checkpoint import Checkpoint, open_checkpoint
from dq_runtime.packing.quant_config import FLOAT_FORMATS, OWN_METHOD
from dq_runtime.spec import PER_ROW


@dataclass(frozen=True)
class Verdict:
    """On ``count`` layers alike: ``layer`` their name with * for numbers, ``grid`` in words, whether they ``load``,
    ``how`` they run, and what to ``change`` ("" if nothing)."""

    layer: str
    count: int
    grid: str
    load: bool
    how: str
    change: str


@dataclass(frozen=True)
class Checked:
    """All verdicts on one checkpoint. ``engine`` is the version whose source or behaviour they rest on; ``notes`` are
    sentences about the whole."""

    engine: str
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...]

    @property
    def loads(self) -> bool:
        """Whether every layer does."""
        return all(v.load for v in self.verdicts)


def check(path: str | Path, engine: str, ranks: int = 1) -> Checked:
    """The verdicts of ``engine`` (a member of :data:`ENGINES`) on a packed checkpoint; ``ranks`` of tensor parallelism
    concern vLLM alone."""
    if engine not in ENGINES:
        raise SpecError(f"unknown engine {engine!r}; known: {', '.join(ENGINES)}")
    if ranks < 1 or (ranks > 1 and engine != "vllm"):
        raise SpecError(f"tensor parallelism over {ranks} ranks is checked for vllm only, and needs at least 1")
    source = open_checkpoint(path)
    layers = dict(source.packed())
    if engine == "vllm":
        return _vllm(source, layers, ranks)
    verdicts = [(name, *_elsewhere(engine, w)) for name, w in layers.items()]
    if engine in READERS:
        form = READERS[engine].form
        notes = (f"write what it reads with: dq export {path} --to {form} -o DIR",)
        return Checked(READERS[engine].version, _merged(verdicts, layers), notes)
    if (source.config.get("quantization_config") or {}).get("transposed"):
        verdicts = [
            (name, False, "", "transposed linears (Conv1D) run in dq_runtime; export to dense") for name in layers
        ]
    expanded = (
        "every weight is expanded to dense at the first forward pass; dq_runtime.use_packed_linears() before "
        "from_pretrained keeps them packed"
    )
    ours = f"nobody but dq_runtime reads {_method(source)} there: from_pretrained without it refuses the directory"
    return Checked(TRANSFORMERS, _merged(verdicts, layers), (ours if _method(source) == OWN_METHOD else expanded,))


def _method(source: Checkpoint) -> Any:
    """``quant_method`` of a directory; None of a GGUF file, which has no such thing."""
    return (source.config.get("quantization_config") or {}).get("quant_method")


def _elsewhere(engine: str, w: PackedWeight) -> tuple[bool, str, str]:
    """(loads, how, change) of one layer in an engine without tensor parallelism."""
    if w.form != INT:
        return _table(engine, w.form)
    if engine == "transformers":
        if w.zero is None:
            return True, "dequantized", ""
        return True, "dequantized at load", "pass quantization_config=CompressedTensorsConfig(dequantize=True)"
    reader: Reader = READERS[engine]
    bits = next((b for b in reader.bits if b >= w.bits), None)
    groups = [g for g in reader.groups if w.group_size % g == 0]
    if bits is None or not groups:
        fit = " or ".join(str(g) for g in reader.groups if g >= 32)
        return False, "", f"quantize with --group-size {fit}"
    if engine == "llama.cpp":
        return _llama_cpp(w)
    return True, f"{bits} bits, groups of {max(groups)}", ""


def _table(engine: str, form: str) -> tuple[bool, str, str]:
    """Of a grid that is not evenly spaced."""
    if engine == "transformers":
        return True, "dequantized" if form in FLOAT_FORMATS else "packed, after `import dq_runtime.hf`", ""
    if engine == "llama.cpp" and form == "mxfp4":
        return True, "MXFP4", ""
    return False, "", f"{form} does not exist there; quantize with another --grid, or export to dense"


def _llama_cpp(w: PackedWeight) -> tuple[bool, str, str]:
    if w.zero is None:
        return True, "Q4_0" if w.bits <= 4 else "Q8_0", ""
    if w.bits == 8:
        return False, "", "quantize without --asymmetric, or with --bits 7"
    return True, "Q4_1 where scale * zero is a float16, else Q8_0" if w.bits <= 4 else "Q8_0", ""


def _vllm(source: Checkpoint, layers: Mapping[str, PackedWeight], ranks: int) -> Checked:
    config = source.config.get("text_config", source.config)
    dtype = str(source.config.get("dtype") or source.config.get("torch_dtype") or "bfloat16")
    verdicts = []
    dense = [name.removesuffix(".weight") for name in source.dense if name.endswith(".weight")]
    for members in fused_groups([*layers, *dense]):
        weights = {name: layers[name] for name in members if name in layers}
        if not weights:
            continue
        load, how, change = _vllm_group(source, weights, config, dtype, ranks)
        if len(weights) < len(members):
            odd = next(name for name in members if name not in layers).rpartition(".")[2]
            load, how, change = False, "", f"{odd}, in one matrix with it there, is dense; pack both or neither"
        verdicts += [(name, load, how, change) for name in weights]
    notes = []
    own = any(w.form in TABLES_OF_OURS for w in layers.values())
    if own:
        notes.append(plugin_note())
    elif _method(source) != "compressed-tensors":
        notes.append("only compressed-tensors checkpoints are judged: dq export OUT --to compressed-tensors -o DIR")
        verdicts = [(name, False, "", "export it with --to compressed-tensors") for name, *_ in verdicts]
    if any(w.bits in (3, 5, 6, 7) for w in layers.values()):
        notes.append("VLLM_BATCH_INVARIANT=1 would misread 3, 5, 6 and 7 bits: it unpacks with compressed-tensors 0.17")
    said = f"read from the source of {VLLM}, which was not run"
    notes.append(f"{VLLM} ran nf4 and fp4 on a CPU, on one rank and on three; on a GPU it was not run" if own else said)
    return Checked(f"{VLLM}, tensor parallel {ranks}", _merged(verdicts, layers), tuple(notes))


def _vllm_group(
    source: Checkpoint, weights: Mapping[str, PackedWeight], config: Mapping[str, Any], dtype: str, ranks: int
) -> tuple[bool, str, str]:
    """(loads, kernels by platform, change) of the layers that vLLM multiplies as one matrix."""
    again = "dq export OUT --to compressed-tensors"
    rank = f" --set tensor_parallel={ranks}" if ranks > 1 else ""
    first = next(iter(weights.values()))
    if any(".experts." in name for name in weights):
        return False, "", "packed experts have rules of their own that are not checked here"
    if first.form != INT:
        split = all(input_shards(name) for name in weights)
        return table_in_vllm(source, weights, _uneven(weights, config, split, ranks), ranks if split else 1)
    if len({(w.bits, w.group_size, w.zero is None) for w in weights.values()}) > 1:
        return False, "", f"fused layers must share bits, groups and symmetry: {again}{rank} -o DIR"
    stored = {str(w.scale.dtype).removeprefix("torch.") for w in weights.values()}
    if stored != {dtype}:
        return False, "", f"scales are {' and '.join(stored)} and would be rounded to {dtype}: {again}{rank} -o DIR"
    split = all(input_shards(name) for name in weights)
    why = _uneven(weights, config, split, ranks)
    if why:
        return False, "", why
    n = sum(w.n for w in weights.values()) // (1 if split else ranks)
    k = first.k // (ranks if split else 1)
    if k * first.bits % 32 or (first.group_size != first.k and k % first.group_size):
        return False, "", f"{k} inputs a rank are no whole groups of {first.group_size}: {again}{rank} -o DIR"
    if first.zero is not None and any(w.n // (1 if split else ranks) * w.bits % 32 for w in weights.values()):
        return False, "", "zero points of a rank end inside a word; quantize without --asymmetric"
    group = PER_ROW if first.group_size == first.k else first.group_size
    kernels = {
        platform: next((c.name for c in table if _takes(c, first, group, n, k, dtype)), "none")
        for platform, table in KERNELS.items()
    }
    return True, ", ".join(f"{platform}: {kernel}" for platform, kernel in kernels.items()), ""


def _uneven(weights: Mapping[str, PackedWeight], config: Mapping[str, Any], split: bool, ranks: int) -> str:
    """Why the ranks cannot share this matrix evenly, and what to do; "" if they can."""
    heads = config.get("num_attention_heads")
    kv_heads = config.get("num_key_value_heads", heads)
    if isinstance(heads, int) and isinstance(kv_heads, int) and heads % ranks:
        return f"{heads} heads cannot be shared by {ranks} ranks; serve with a number of ranks that divides them"
    if isinstance(kv_heads, int) and kv_heads % ranks and ranks % kv_heads:
        return f"{kv_heads} key-value heads cannot be shared or repeated by {ranks} ranks; serve with fewer"
    for name, w in weights.items():
        size = w.k if split else w.n
        if size % ranks and not name.endswith(("k_proj", "v_proj")):
            return f"{size} {'inputs' if split else 'outputs'} cannot be shared by {ranks} ranks; serve with fewer"
    return ""


def _takes(kernel: Kernel, w: PackedWeight, group: int, n: int, k: int, dtype: str) -> bool:
    return (
        (w.bits, w.zero is None) in kernel.grids
        and (kernel.groups is None or group in kernel.groups)
        and (kernel.rows or group != PER_ROW)
        and n % kernel.n == 0
        and k % kernel.k == 0
        and kernel.dtype in ("", dtype)
    )


def _merged(verdicts: list[tuple[str, bool, str, str]], layers: Mapping[str, PackedWeight]) -> tuple[Verdict, ...]:
    """One verdict for all layers that differ in numbers alone."""
    counts: dict[tuple[str, str, bool, str, str], int] = {}
    for name, load, how, change in verdicts:
        w = layers[name]
        group = "whole rows" if w.group_size == w.k else f"groups of {w.group_size}"
        kind = f"{w.bits} bits" if w.form == INT else w.form
        grid = f"{kind}, {group}, {'symmetric' if w.zero is None else 'asymmetric'}, {w.n} x {w.k}"
        key = (re.sub(r"\d+", "*", name), grid, load, how, re.sub(r"\.\d+\.", ".*.", change))
        counts[key] = counts.get(key, 0) + 1
    return tuple(Verdict(key[0], count, *key[1:]) for key, count in counts.items())
