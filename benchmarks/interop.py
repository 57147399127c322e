"""Do the engines read what we write? One row a path: the real model, an independent implementation, its answer.

    python benchmarks/interop.py MODEL --llama-python PYTHON --vllm-python PYTHON --others DIR

MODEL is a dense directory or .gguf file. Each row exports (or takes as it is) a checkpoint rounded to nearest and asks
the other implementation for its logits on 64 tokens, or for its weights. PYTHON is an interpreter with
llama-cpp-python (which takes minutes to build, so it is seldom in the same environment), or one with vLLM (on a CPU
vLLM needs only those of its dependencies that its imports ask for). An implementation that is not installed is left out
with a word; rows of an earlier run that this one does not repeat are kept. ``--only`` takes a part of a row's name.

A row gives ``max_logit_difference`` beside ``max_logit`` and the mean KL in nats per token, or ``bit_equal`` weights.
An engine that rounds activations to 8 bits says so in ``note``: its logits differ by that. Beside llama.cpp's stands
what the same rounding alone does to our logits, and the same file with float32 weights, where nothing is rounded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "unit")]

from gptq_cases import integers  # noqa: E402
from packed_checkpoints import pack_model  # noqa: E402

from dq_runtime.environment import device_name, versions  # noqa: E402
from dq_runtime.export.run import export  # noqa: E402
from dq_runtime.modules.quant_linear import QuantLinear  # noqa: E402
from dq_runtime.packing.checkpoint import open_checkpoint  # noqa: E402
from dq_runtime.runtime.load import load  # noqa: E402
from dq_runtime.runtime.skeleton import load_through_transformers  # noqa: E402
from dq_runtime.spec import GridSpec, QuantSpec  # noqa: E402

TEXT = (
    "The harbour master of Ystad kept a green book in which he wrote, in 1897 as in 1912, the name of every ship, its "
    "cargo, the weather, and whatever the captain's dog had eaten; def f(x): return x**2 + 3*x - 7  # naïve ☃"
)
LLAMA = """
import sys, numpy, llama_cpp
model = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_batch=512, n_threads=2, logits_all=True, verbose=False)
ids = [int(i) for i in sys.argv[2].split(",")]
model.eval(ids)
text = open(sys.argv[4], encoding="utf-8").read()
tokens = model.tokenize(text.encode(), add_bos=False, special=True)
numpy.savez(sys.argv[3], logits=model.scores[: len(ids)], tokens=numpy.array(tokens), version=llama_cpp.__version__)
"""
Row = dict[str, Any]
Grid = tuple[int, int, bool]


class Absent(Exception):  # noqa: N818 (an answer, not an error)
    """The other implementation is not here; the message names it."""


class Bench:
    """The model on every grid that a row asks for, packed once, and our own logits of it."""

    def __init__(self, model: Path, folder: Path, options: argparse.Namespace) -> None:
        self.model, self.folder = model, folder
        self.llama_python: str | None = options.llama_python
        self.vllm_python: str | None = options.vllm_python
        self.others: Path | None = options.others
        self._logits: dict[Grid, Tensor] = {}

    def packed(self, grid: Grid) -> Path:
        """The checkpoint on ``grid`` = (bits, group size, symmetric)."""
        bits, group, symmetric = grid
        path = self.folder / f"packed-{bits}-{group}-{symmetric}"
        if not path.exists():
            pack_model(self.model, path, QuantSpec(GridSpec(bits=bits, group_size=group, symmetric=symmetric)))
        return path

    def table(self, name: str) -> Path:
        """The checkpoint on a table grid, or on one that is aimed at an engine."""
        path = self.folder / f"packed-{name.replace(':', '-')}"
        if not path.exists():
            pack_model(self.model, path, QuantSpec(GridSpec.named(name)))
        return path

    def made(self, tool: str, scheme: str) -> tuple[str, Path]:
        """(tool and version, directory) of a checkpoint that another tool made: see benchmarks/others.py."""
        path = self.others / f"{tool}-{scheme}" if self.others else Path()
        if not (path / "made_by.txt").is_file():
            raise Absent(f"give --others, with what `python benchmarks/others.py` makes of {tool} {scheme}")
        return (path / "made_by.txt").read_text().strip(), path

    def exported(self, grid: Grid, form: str, **options: Any) -> Path:
        """The same in another format."""
        path = self.folder / f"{form}-{grid[0]}-{grid[1]}-{grid[2]}"
        export(self.packed(grid), form, path, options, overwrite=True)
        return path

    def tokens(self, grid: Grid) -> Tensor:
        """int64 [1, 64] of TEXT."""
        ids = load(self.packed(grid), "cpu", torch.float32, exact=True).encode(TEXT)
        return torch.tensor([ids[:64]])

    def logits(self, grid: Grid) -> Tensor:
        """Ours, float32 [64, V]."""
        if grid not in self._logits:
            model = load(self.packed(grid), "cpu", torch.float32, exact=True)
            self._logits[grid] = torch.as_tensor(model.logits(self.tokens(grid))[0]).float()
        return self._logits[grid]


def difference(ours: Tensor, theirs: Tensor) -> Row:
    """How far logits [T, V] are apart."""
    ours, theirs = ours.double(), theirs.double()
    log_p, log_q = ours.log_softmax(-1), theirs.log_softmax(-1)
    return {
        "max_logit_difference": (theirs - ours).abs().max().item(),
        "max_logit": ours.abs().max().item(),
        "mean_kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
        "top1_agreement": (theirs.argmax(-1) == ours.argmax(-1)).double().mean().item(),
    }


def installed(package: str) -> str:
    """``package version``; raises :class:`Absent` without it."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        raise Absent(f"{package} is not installed") from None


# --- rows: what we write ----------------------------------------------------------------------------------------------


def transformers_native(bench: Bench, grid: Grid) -> Row:
    """The native directory in transformers with compressed-tensors, without us."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(bench.packed(grid), dtype=torch.float32)
        theirs = model(input_ids=bench.tokens(grid)).logits[0]
    reader = f"{installed('transformers')}, {installed('compressed-tensors')}"
    return {"implementation": reader, **difference(bench.logits(grid), theirs)}


def transformers_dense(bench: Bench, grid: Grid) -> Row:
    """The dense float32 export in transformers."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(bench.exported(grid, "dense"), dtype=torch.float32)
        theirs = model(input_ids=bench.tokens(grid)).logits[0]
    return {"implementation": installed("transformers"), **difference(bench.logits(grid), theirs)}


def llama_cpp(bench: Bench, grid: Grid, weights: str) -> Row:
    """The GGUF file in llama.cpp: its logits, and its tokens of TEXT against ours."""
    if bench.llama_python is None:
        raise Absent("give --llama-python, an interpreter with llama-cpp-python")
    (file,) = bench.exported(grid, "gguf", weights=weights).glob("*.gguf")
    ids = ",".join(str(i) for i in bench.tokens(grid)[0].tolist())
    answer, text = bench.folder / "llama.npz", bench.folder / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    subprocess.run([bench.llama_python, "-c", LLAMA, str(file), ids, str(answer), str(text)], check=True)
    read = np.load(answer)
    ours = load(bench.packed(grid), "cpu", torch.float32, exact=True).encode(TEXT)
    row = {
        "implementation": f"llama.cpp (llama-cpp-python {read['version']})",
        **difference(bench.logits(grid), torch.from_numpy(read["logits"])),
        "same_tokens": read["tokens"].tolist() == ours,
    }
    if weights == "packed":
        row |= {
            "rounded_activations_alone": difference(bench.logits(grid), rounded_logits(bench, grid)),
            "note": "llama.cpp rounds activations to 8 bits; rounded_activations_alone is what that does to our logits",
        }
    return row


def rounded_logits(bench: Bench, grid: Grid) -> Tensor:
    """Our logits where what enters a packed linear is rounded as ggml does (block_q8_0): blocks of 32, their largest
    magnitude 127 steps, the step a float16."""

    def round_input(module: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
        blocks = inputs[0].unflatten(-1, (-1, 32))
        step = blocks.abs().amax(-1, keepdim=True) / 127
        codes = torch.where(step > 0, blocks / step, 0).round()
        return ((codes * step.half().float()).flatten(-2),)

    model = load_through_transformers(open_checkpoint(bench.packed(grid)), "cpu", torch.float32).model
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.register_forward_pre_hook(round_input)
    with torch.no_grad():
        logits: Tensor = model(input_ids=bench.tokens(grid)).logits[0]
    return logits


def gguf_library(bench: Bench, grid: Grid) -> Row:
    """Every tensor of the GGUF file as the gguf library dequantizes it; rows of q and k in llama.cpp's order."""
    reader_version = installed("gguf")
    import gguf

    (file,) = bench.exported(grid, "gguf").glob("*.gguf")
    stored = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(file).tensors}
    source = open_checkpoint(bench.packed(grid))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 64)
    heads = {"q_proj": source.config["num_attention_heads"], "k_proj": source.config["num_key_value_heads"]}
    equal = True
    for name, w in source.packed():
        wanted = w.decode()
        if (count := heads.get(name.rpartition(".")[2])) is not None:
            wanted = wanted.view(count, 2, -1, w.k).transpose(1, 2).reshape(w.n, w.k)
        equal &= np.array_equal(stored[names.get_name(name) + ".weight"], wanted.numpy())
    return {"implementation": reader_version, "bit_equal": equal}


def autoround(bench: Bench, grid: Grid, gptq_version: int) -> Row:
    """Every layer of the GPTQ export as AutoRound's torch linear unpacks it: codes minus zero points."""
    reader = installed("auto-round")
    from safetensors.torch import load_file

    if gptq_version == 2:
        from auto_round_extension.torch.qlinear_torch import QuantLinear
    else:
        from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
    tensors = load_file(bench.exported(grid, "gptq", version=gptq_version) / "model.safetensors")
    equal = True
    for name, w in open_checkpoint(bench.packed(grid)).packed():
        linear = QuantLinear(w.bits, w.group_size, w.k, w.n, bias=False)
        linear.qweight, linear.qzeros = tensors[f"{name}.qweight"], tensors[f"{name}.qzeros"]
        linear.scales = torch.ones_like(tensors[f"{name}.scales"])
        read = linear.forward(torch.eye(w.k)).T
        equal &= torch.equal(read, integers(w).float()) and torch.equal(
            tensors[f"{name}.scales"].T.float(), w.scale.float()
        )
    return {"implementation": reader, "bit_equal": equal}


def mlx(bench: Bench, grid: Grid) -> Row:
    """The MLX export: every weight as MLX dequantizes it, and the logits of mlx-lm where that is installed."""
    reader = installed("mlx")
    import mlx.core as mx

    path = bench.exported(grid, "mlx")
    stored = mx.load(str(path / "model.safetensors"))
    quantization = json.loads((path / "config.json").read_text())["quantization"]
    settings = {"group_size": quantization["group_size"], "bits": quantization["bits"]}
    equal = True
    for name, w in open_checkpoint(bench.packed(grid)).packed():
        parts = [stored[f"{name}.{p}"] for p in ("weight", "scales", "biases")]
        values = mx.dequantize(parts[0], parts[1].astype(mx.float32), parts[2].astype(mx.float32), **settings)
        equal &= np.array_equal(np.array(values), w.decode().numpy())
    row: Row = {"implementation": reader, "bit_equal": equal}
    try:
        lm = installed("mlx-lm")
    except Absent:
        return row
    from mlx_lm.utils import load_model

    model, _ = load_model(path)
    model.set_dtype(mx.float32)
    theirs = torch.from_numpy(np.array(model(mx.array(bench.tokens(grid).numpy())).astype(mx.float32)))[0]
    return row | {"implementation": f"{reader}, {lm}", **difference(bench.logits(grid), theirs)}


def onnxruntime(bench: Bench, grid: Grid, accuracy_level: int) -> Row:
    """The ONNX export in ONNX Runtime."""
    reader = f"{installed('onnxruntime')}, graph by {installed('onnxruntime-genai')}"
    import onnxruntime as ort

    path = bench.exported(grid, "onnx", accuracy_level=accuracy_level)
    session = ort.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])
    config = open_checkpoint(bench.packed(grid)).config
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    tokens = bench.tokens(grid).numpy()
    feeds: dict[str, Any] = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    for wanted in session.get_inputs():
        if wanted.name.startswith("past"):
            feeds[wanted.name] = np.zeros((1, config["num_key_value_heads"], 0, head), np.float32)
    theirs = torch.from_numpy(session.run(["logits"], feeds)[0])[0]
    note = {} if accuracy_level == 1 else {"note": "accuracy_level 4 rounds activations to 8 bits"}
    return {"implementation": reader, **difference(bench.logits(grid), theirs), **note}


def float4(bench: Bench, grid: Grid, name: str) -> Row:
    """mxfp4 or nvfp4: every weight as compressed-tensors unpacks it, and transformers' logits of the directory, its
    weights multiplied out to bfloat16, which holds them exactly."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import CompressedTensorsConfig

    path = bench.table(name)
    dense = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=dense).float()
    modules = dict(model.named_modules())
    equal = all(torch.equal(modules[n].weight, w.decode()) for n, w in open_checkpoint(path).packed())
    ours = load(path, "cpu", torch.float32, exact=True)
    tokens = torch.tensor([ours.encode(TEXT)[:64]])
    with torch.no_grad():
        theirs = model(input_ids=tokens).logits[0]
    reader = f"{installed('transformers')}, {installed('compressed-tensors')}"
    logits = torch.as_tensor(ours.logits(tokens)[0]).float()
    return {"implementation": reader, "bit_equal": equal, **difference(logits, theirs)}


def gguf_mxfp4(bench: Bench, grid: Grid) -> Row:
    """The GGUF file of an mxfp4 checkpoint: the down projections as the gguf library dequantizes MXFP4."""
    reader = installed("gguf")
    import gguf

    out = bench.folder / "gguf-mxfp4"
    export(bench.table("mxfp4"), "gguf", out, overwrite=True)
    (file,) = out.glob("*.gguf")
    stored = {t.name: t for t in gguf.GGUFReader(file).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 64)
    equal, count = True, 0
    for name, w in open_checkpoint(bench.table("mxfp4")).packed():
        if name.endswith(("q_proj", "k_proj")):  # in llama.cpp's order of rows
            continue
        found = stored[names.get_name(name) + ".weight"]
        values = torch.from_numpy(gguf.dequantize(found.data, found.tensor_type).copy())
        equal &= torch.equal(values, w.decode())
        count += 1
    return {"implementation": reader, "bit_equal": equal, "layers": count}


def vllm_plugin(bench: Bench, grid: Grid, name: str) -> Row:
    """A table in vLLM through our plugin, on one rank and on three (SmolLM2 has 9 heads and 3 key-value heads). The
    products are ours; that each of them has its rows and columns of the checkpoint is vLLM's doing."""
    if bench.vllm_python is None:
        raise Absent("give --vllm-python, an interpreter with vLLM")
    path, answer = bench.table(name), bench.folder / "vllm.npz"
    ours = load(path, "cpu", torch.float32, exact=True)
    ids = ours.encode(TEXT)[:64]
    logits = torch.as_tensor(ours.logits(torch.tensor([ids]))[0]).float()
    differences = {}
    for ranks in (1, 3):
        worker = [str(ROOT / "benchmarks" / "vllm_worker.py"), str(path), ",".join(str(i) for i in ids), str(ranks)]
        subprocess.run([bench.vllm_python, *worker, str(answer)], check=True)
        read = np.load(answer)
        differences[ranks] = difference(logits, torch.from_numpy(read["logits"]))
    return {
        "implementation": f"vllm {read['version']} (model, loaders, tensor parallelism), on a CPU",
        **differences[1],
        "three_ranks": differences[3],
        "matrices": int(read["matrices"]),
        "note": "our plugin and kernels; norms, rotations in vLLM's PyTorch, attention in torch: no CPU kernels there",
    }


WRITES: list[tuple[str, Grid, Callable[[Bench, Grid], Row]]] = [
    *(("compressed-tensors", (bits, 64, True), transformers_native) for bits in (2, 3, 4, 8)),
    ("dense", (3, 64, True), transformers_dense),
    *(("gguf", grid, gguf_library) for grid in ((3, 64, True), (4, 32, True), (4, 64, False), (8, 64, True))),
    *(("gguf", grid, partial(llama_cpp, weights="packed")) for grid in ((3, 64, True), (4, 32, True), (8, 64, True))),
    *(("gguf float32", grid, partial(llama_cpp, weights="float32")) for grid in ((4, 32, True), (4, 64, False))),
    *(("gptq", (bits, 64, True), partial(autoround, gptq_version=2)) for bits in (2, 3, 4, 8)),
    ("gptq", (4, 64, False), partial(autoround, gptq_version=2)),
    ("gptq v1", (4, 64, True), partial(autoround, gptq_version=1)),
    *(("mlx", grid, mlx) for grid in ((2, 64, True), (3, 64, True), (4, 64, True), (4, 64, False), (8, 64, True))),
    *((name, (4, size, True), partial(float4, name=name)) for name, size in (("mxfp4", 32), ("nvfp4", 16))),
    ("gguf mxfp4", (4, 32, True), gguf_mxfp4),
    *((f"table {name}", (4, 64, True), partial(vllm_plugin, name=name)) for name in ("nf4", "fp4")),
    *(("onnx", grid, partial(onnxruntime, accuracy_level=1)) for grid in ((4, 64, True), (8, 64, True), (3, 64, True))),
    ("onnx", (4, 32, True), partial(onnxruntime, accuracy_level=4)),
]


# --- rows: what others write and we read ------------------------------------------------------------------------------


def llm_compressor(bench: Bench, grid: Grid, scheme: str) -> Row:
    """A checkpoint that llm-compressor made of the model, end to end (benchmarks/others.py), as compressed-tensors
    itself decompresses it in float32."""
    maker, path = bench.made("llm-compressor", scheme)
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.compressors.nvfp4 import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from safetensors.torch import load_file

    stated = json.loads((path / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(stated)
    (group,) = config.config_groups.values()
    packer, stored = BaseCompressor.get_value_from_registry(config.format), load_file(path / "model.safetensors")

    def read(layer: str) -> Tensor:
        tensors = {n.rpartition(".")[2]: t for n, t in stored.items() if n.rpartition(".")[0] == layer}
        if config.format == "pack-quantized":
            exact = tensors | {"weight_scale": tensors["weight_scale"].float()}
            return packer.decompress(exact, group)["weight"]
        n, half = tensors["weight_packed"].shape
        values = unpack_fp4_from_uint8(tensors["weight_packed"], n, 2 * half, torch.float32)
        scale = packer._decompress_scale(tensors["weight_scale"], torch.float32)
        whole = tensors.get("weight_global_scale")
        return dequantize(values, scale, args=group.weights, global_scale=whole, dtype=torch.float32)

    return {"implementation": f"{maker}, {installed('compressed-tensors')}", **same_weights(path, read)}


def auto_round(bench: Bench, grid: Grid, scheme: str) -> Row:
    """A checkpoint that AutoRound made of the model, end to end, as AutoRound itself unpacks it. With zero points it
    chooses the layout of AWQ."""
    maker, path = bench.made("auto-round", scheme)
    from auto_round.export.export_to_awq.utils import dequantize_gemm
    from safetensors.torch import load_file

    stored, (bits, group, _) = load_file(path / "model.safetensors"), grid

    def read(layer: str) -> Tensor:
        codes, zeros, scales = (stored[f"{layer}.{part}"] for part in ("qweight", "qzeros", "scales"))
        values: Tensor = dequantize_gemm(codes, zeros, scales.float(), bits, group)
        return values.T.float()

    return {"implementation": maker, **same_weights(path, read)}


def same_weights(path: Path, read: Callable[[str], Tensor]) -> Row:
    """Whether every linear here has the values that ``read`` gives for its name, and how many stay packed."""
    source = open_checkpoint(path)
    equal, count = True, 0
    for name, w in source.packed():
        equal &= torch.equal(read(name), w.decode())
        count += 1
    dense = [name.removesuffix(".weight") for name in source.dense if name.endswith("_proj.weight")]
    for name in dense:
        equal &= torch.equal(read(name), torch.from_numpy(source.array(f"{name}.weight").float32()))
    model = load(path, "cpu", torch.float32, exact=True)
    finite = bool(torch.isfinite(torch.as_tensor(model.logits(torch.tensor([[1, 2, 3]])))).all())
    return {"bit_equal": equal and finite, "layers_packed": count, "layers_dequantized": len(dense)}


READS: list[tuple[str, Grid, Callable[[Bench, Grid], Row]]] = [
    ("compressed-tensors", (4, 64, False), partial(llm_compressor, scheme="gptq-w4a16")),
    ("mxfp4", (4, 32, True), partial(llm_compressor, scheme="mxfp4a16")),
    ("nvfp4", (4, 16, True), partial(llm_compressor, scheme="nvfp4a16")),
    ("auto-round", (4, 64, False), partial(auto_round, scheme="w4a16")),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama-python")
    parser.add_argument("--vllm-python")
    parser.add_argument("--others", type=Path, help="what benchmarks/others.py made with other tools")
    parser.add_argument("--only", default="", help="a part of the name of the rows to run, e.g. gguf-4")
    parser.add_argument("--folder", type=Path, help="keeps the rounded checkpoints for the next run")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "interop.json")
    options = parser.parse_args()
    rows: dict[str, Row] = {}
    if options.output.exists():
        rows = {row["name"]: row for row in json.loads(options.output.read_text())["rows"]}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        bench = Bench(options.model, folder, options)
        todo = [("write", *row) for row in WRITES] + [("read", *row) for row in READS]
        for direction, form, grid, function in todo:
            label = getattr(function, "func", function).__name__
            bits, group, symmetric = grid
            name = f"{direction} {form}-{bits}-{group}{'' if symmetric else '-asymmetric'} {label}"
            if options.only not in name:
                continue
            began = time.monotonic()
            what = {"direction": direction, "format": form, "bits": bits, "group": group, "symmetric": symmetric}
            try:
                rows[name] = {"name": name, **what, **function(bench, grid)}
            except Absent as absent:
                print(f"{name}: left out, {absent}")
                continue
            print(f"{name}: {time.monotonic() - began:.0f} s, {rows[name]}", flush=True)
            _write(options.output, rows, options.model)


def _write(output: Path, rows: dict[str, Row], model: Path) -> None:
    result = {
        "question": "do independent implementations compute from our files what we compute?",
        "model": model.name,
        "device": device_name("cpu"),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": "python benchmarks/interop.py MODEL --llama-python PYTHON --vllm-python PYTHON --others DIR",
        "rows": list(rows.values()),
    }
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
