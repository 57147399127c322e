"""Makes the golden checkpoints beside it, each with the values that its format's own tools read from it.

    python tests/golden/make.py --auto-round DIR --gptqmodel DIR --autoawq DIR --compressed-tensors-017 DIR

The directories are unpacked source or wheel archives, of which single files are loaded: auto_round 0.16.1 packs GPTQ
and AWQ, GPTQModel 7.7.0 and AutoAWQ 0.2.9 unpack them; compressed-tensors 0.20 and 0.17.1 pack and unpack theirs; the
gguf package 0.19 writes and dequantizes GGUF. None of them is needed to run the test. Every directory gets
``expected.json``: for every linear the SHA-256 of its float32 values [N, K] (zeros positive), their sum and the first
four.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
HIDDEN, INTERMEDIATE, VOCAB, HEADS, KV_HEADS = 64, 96, 40, 2, 1
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float16",
}
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
SHAPES = {
    f"{ATTENTION}.q_proj": (HIDDEN, HIDDEN),
    f"{ATTENTION}.k_proj": (HIDDEN // 2, HIDDEN),
    f"{ATTENTION}.v_proj": (HIDDEN // 2, HIDDEN),
    f"{ATTENTION}.o_proj": (HIDDEN, HIDDEN),
    f"{MLP}.gate_proj": (INTERMEDIATE, HIDDEN),
    f"{MLP}.up_proj": (INTERMEDIATE, HIDDEN),
    f"{MLP}.down_proj": (HIDDEN, INTERMEDIATE),
}
Tensors = dict[str, torch.Tensor]


def others(generator: torch.Generator) -> Tensors:
    """Everything that is not a linear."""
    norms = ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm")
    tensors = {f"{name}.weight": torch.rand(HIDDEN, generator=generator).half() + 0.5 for name in norms}
    return tensors | {"model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN, generator=generator).half()}


def rounded(shape: tuple[int, int], bits: int, group: int, symmetric: bool, signed: bool, g: torch.Generator) -> Any:
    """A weight on a random grid: ``weight`` [N, K] float32, ``scale`` float16 and ``zero`` int32 [N, G]."""
    n, k = shape
    groups = k // group
    scale = ((torch.rand(n, groups, generator=g) * 0.02 + 0.01) * 2.0 ** (4 - bits)).half()
    if signed:
        scale *= torch.where(torch.rand(n, groups, generator=g) < 0.5, -1.0, 1.0).half()
    # From 1 on: the first version of GPTQ has no place for a zero point of 0.
    zero = torch.randint(1, 2**bits, (n, groups), generator=g)
    zero = torch.full_like(zero, 2 ** (bits - 1)) if symmetric else zero
    codes = torch.randint(0, 2**bits, (n, k), generator=g)
    wide = scale.float().repeat_interleave(group, 1), zero.repeat_interleave(group, 1)
    return SimpleNamespace(weight=(codes - wide[1]) * wide[0], scale=scale, zero=zero.int(), codes=codes)


def write(name: str, tensors: Tensors, quantization: dict[str, Any] | None, expected: Tensors) -> None:
    directory = HERE / name
    directory.mkdir(exist_ok=True)
    save_file({key: t.contiguous() for key, t in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    config = CONFIG | ({} if quantization is None else {"quantization_config": quantization})
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    write_expected(directory, {key: t.numpy() for key, t in expected.items()})


def write_expected(directory: Path, expected: dict[str, np.ndarray]) -> None:
    found = {}
    for name, values in sorted(expected.items()):
        plain = np.ascontiguousarray(values, np.float32) + np.float32(0)
        first = [float(v) for v in plain.reshape(-1)[:4]]
        digest = hashlib.sha256(plain.tobytes()).hexdigest()
        found[name] = {"sha256": digest, "sum": float(plain.sum(dtype=np.float64)), "first": first}
    (directory / "expected.json").write_text(json.dumps(found, indent=1) + "\n")


def load_file(name: str, file: Path, package: str = "") -> ModuleType:
    """One file of a package, without the package."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.__package__ = package
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def stub(name: str, **members: Any) -> None:
    module = ModuleType(name)
    module.__path__ = []
    for key, value in members.items():
        setattr(module, key, value)
    sys.modules[name] = module


def auto_round(root: Path) -> tuple[Any, Any, Any]:
    """Its packers: GPTQ with zero points one too small, GPTQ with zero points as they are, AWQ."""
    stub("auto_round")
    stub("auto_round.utils", get_packing_device=lambda device=None: torch.device("cpu"))
    load_file("auto_round.utils.bit_packing", root / "auto_round/utils/bit_packing.py")
    stub("auto_round_extension")
    stub("auto_round_extension.torch")
    plain = load_file("auto_round_extension.torch.qlinear_torch", root / "auto_round_extension/torch/qlinear_torch.py")
    first = load_file(
        "auto_round_extension.torch.qlinear_torch_zp", root / "auto_round_extension/torch/qlinear_torch_zp.py"
    )
    awq = load_file("auto_round_awq", root / "auto_round/export/export_to_awq/utils.py")
    return first.QuantLinear, plain.QuantLinear, awq.WQLinear_GEMM


def gptqmodel(root: Path) -> Any:
    """Its file of functions that dequantize checkpoints."""
    base = root / "gptqmodel"
    stub("gptqmodel")
    stub("gptqmodel.utils")
    stub("gptqmodel.quantization")
    import logging

    stub("gptqmodel.utils.logger", setup_logger=lambda: logging.getLogger("gptqmodel"))
    stub("gptqmodel.utils.torch", HAS_NPU=False)
    load_file("gptqmodel.quantization.dtype", base / "quantization/dtype.py", "gptqmodel.quantization")
    load_file("gptqmodel.utils.planar_packing", base / "utils/planar_packing.py", "gptqmodel.utils")
    return load_file("gptqmodel.utils.model_dequant", base / "utils/model_dequant.py", "gptqmodel.utils")


def make_gptq(args: argparse.Namespace) -> None:
    first, plain, _ = auto_round(args.auto_round)
    reader = gptqmodel(args.gptqmodel)
    cases = [  # name, bits, group, symmetric, signed scales, act-order, packer, checkpoint_format
        ("gptq-v1-4bit", 4, 32, True, False, False, first, "gptq"),
        ("gptq-v1-3bit-asymmetric", 3, 32, False, False, False, first, "gptq"),
        ("gptq-v2-2bit-asymmetric", 2, 32, False, False, False, plain, "gptq_v2"),
        ("gptq-v2-8bit-per-row", 8, -1, True, True, False, plain, "gptq_v2"),
        ("gptq-v1-4bit-act-order", 4, 32, False, False, True, first, "gptq"),
    ]
    for seed, (name, bits, group, symmetric, signed, ordered, packer, version) in enumerate(cases):
        generator = torch.Generator().manual_seed(seed)
        tensors = others(generator)
        for layer, (n, k) in SHAPES.items():
            size = k if group == -1 else group
            w = rounded((n, k), bits, size, symmetric, signed, generator)
            linear = torch.nn.Linear(k, n, bias=False)
            linear.weight = torch.nn.Parameter(w.weight)
            module = packer(bits, size, k, n, False)
            module.device = torch.device("cpu")
            module.pack(linear, w.scale.float(), w.zero.float(), None, device="cpu")
            groups = torch.arange(k) // size
            if ordered:  # quantized in another order: rows of qweight stay, what group they are of is permuted
                groups = groups[torch.randperm(k, generator=generator)]
            stored = {"qweight": module.qweight, "qzeros": module.qzeros, "scales": module.scales}
            stored["g_idx"] = groups.int()
            tensors |= {f"{layer}.{suffix}": t for suffix, t in stored.items()}
        quantization = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric}
        quantization |= {"desc_act": ordered, "checkpoint_format": version}
        write(name, tensors, quantization, {})
        values = reader.convert_gptq_file(HERE / name / "model.safetensors", torch.float32, quantization, "cpu")
        write(name, tensors, quantization, {layer: values[f"{layer}.weight"] for layer in SHAPES})


def make_awq(args: argparse.Namespace) -> None:
    packer = auto_round(args.auto_round)[2]
    reader = load_file("autoawq_packing", args.autoawq / "awq/utils/packing_utils.py")
    generator = torch.Generator().manual_seed(10)
    tensors, expected = others(generator), {}
    for layer, (n, k) in SHAPES.items():
        w = rounded((n, k), 4, 32, False, False, generator)
        linear = torch.nn.Linear(k, n, bias=False)
        linear.weight = torch.nn.Parameter(w.weight)
        module = packer.from_linear(linear, 4, 32, scales=w.scale.float().t(), zeros=w.zero.t(), device="cpu")
        stored = {"qweight": module.qweight, "qzeros": module.qzeros, "scales": module.scales}
        tensors |= {f"{layer}.{suffix}": t for suffix, t in stored.items()}
        values = reader.dequantize_gemm(module.qweight, module.qzeros, module.scales.float(), 4, 32)
        expected[layer] = values.t().float()
    quantization = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    write("awq-4bit", tensors, quantization, expected)


def make_compressed_tensors(name: str, schemes: list[dict[str, Any]]) -> None:
    """Several config groups: the last is for every Linear, the others for the layers that an expression names."""
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

    generator = torch.Generator().manual_seed(len(name))
    tensors, expected, groups = others(generator), {}, {}
    for number, scheme in enumerate(schemes):
        groups[f"group_{number}"] = QuantizationScheme(**scheme)
    for layer, shape in SHAPES.items():
        number = len(schemes) - 1
        for i, scheme in enumerate(schemes[:-1]):
            if scheme["targets"][0].endswith(layer.rpartition(".")[2]):
                number = i
        arguments = groups[f"group_{number}"].weights
        size = shape[1] if arguments.strategy == "channel" else arguments.group_size
        w = rounded(shape, arguments.num_bits, size, arguments.symmetric, False, generator)
        middle = 2 ** (arguments.num_bits - 1)
        state = {"weight": w.weight, "weight_scale": w.scale, "weight_zero_point": (w.zero - middle).to(torch.int8)}
        stored = PackedQuantizationCompressor.compress(state, groups[f"group_{number}"])
        tensors |= {f"{layer}.{suffix}": t for suffix, t in stored.items()}
        exact = stored | {"weight_scale": w.scale.float()}
        expected[layer] = PackedQuantizationCompressor.decompress(exact, groups[f"group_{number}"])["weight"]
    config = QuantizationConfig(config_groups=groups, format="pack-quantized", ignore=["lm_head"])
    write(name, tensors, json.loads(config.model_dump_json()), expected)


def make_float4(name: str, form: str) -> None:
    """mxfp4 or nvfp4; in nvfp4 down_proj has the global scale that llm-compressor gives it, and the others a power of
    two, as those that dq_runtime writes."""
    from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor, unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from compressed_tensors.quantization.quant_scheme import MXFP4A16, NVFP4A16

    preset, packer = {"mxfp4": (MXFP4A16, MXFP4PackedCompressor), "nvfp4": (NVFP4A16, NVFP4PackedCompressor)}[form]
    scheme = QuantizationScheme(targets=["Linear"], **preset)
    generator = torch.Generator().manual_seed(40 + len(name))
    tensors, expected = others(generator), {}
    for layer, (n, k) in SHAPES.items():
        weight = torch.randn(n, k, generator=generator) * 0.05
        largest = weight.view(n, -1, scheme.weights.group_size).abs().amax(-1)
        state = {"weight": weight, "weight_scale": 2.0 ** (largest.log2().floor() - 2)}
        if form == "nvfp4":
            whole = 448 * 6 / weight.abs().max()
            whole = whole if layer.endswith("down_proj") else 2.0 ** whole.log2().floor()
            state |= {"weight_scale": largest / 6 * whole, "weight_global_scale": whole.reshape(1)}
            state["weight_scale"] = state["weight_scale"].to(torch.float8_e4m3fn).float()
        stored = packer.compress(state, scheme)
        tensors |= {f"{layer}.{suffix}": t for suffix, t in stored.items()}
        values = unpack_fp4_from_uint8(stored["weight_packed"], n, k, torch.float32)
        scale = packer._decompress_scale(stored["weight_scale"], torch.float32)
        whole = stored.get("weight_global_scale")
        expected[layer] = dequantize(values, scale, args=scheme.weights, global_scale=whole, dtype=torch.float32)
    config = QuantizationConfig(config_groups={"group_0": scheme}, format=f"{form}-pack-quantized", ignore=["lm_head"])
    write(name, tensors, json.loads(config.model_dump_json()), expected)


def make_gguf() -> None:
    import gguf
    from gguf import GGMLQuantizationType as Kind

    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "model.layers.0.input_layernorm": "blk.0.attn_norm",
        "model.layers.0.post_attention_layernorm": "blk.0.ffn_norm",
        **{f"{ATTENTION}.{x}_proj": f"blk.0.attn_{x}" for x in "qkv"},
        f"{ATTENTION}.o_proj": "blk.0.attn_output",
        **{f"{MLP}.{x}_proj": f"blk.0.ffn_{x}" for x in ("gate", "up", "down")},
    }
    for seed, (kind, down) in enumerate([(Kind.Q4_0, Kind.Q4_1), (Kind.Q8_0, Kind.Q5_0), (Kind.MXFP4, Kind.Q5_1)]):
        directory = HERE / f"gguf-{kind.name.lower()}"
        directory.mkdir(exist_ok=True)
        generator = torch.Generator().manual_seed(20 + seed)
        writer = gguf.GGUFWriter(directory / "model.gguf", "llama")
        writer.add_context_length(64)
        writer.add_embedding_length(HIDDEN)
        writer.add_block_count(1)
        writer.add_feed_forward_length(INTERMEDIATE)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(10000.0)
        writer.add_rope_dimension_count(HIDDEN // HEADS)
        writer.add_vocab_size(VOCAB)
        writer.add_eos_token_id(2)
        expected = {}
        for name, tensor in others(generator).items():
            values = tensor.float().numpy()
            name = name.removesuffix(".weight")
            if values.ndim == 2:
                packed = gguf.quants.quantize(values, Kind.Q8_0)
                writer.add_tensor(f"{names[name]}.weight", packed, raw_dtype=Kind.Q8_0)
            else:
                writer.add_tensor(f"{names[name]}.weight", values)
        for layer, shape in SHAPES.items():
            stored = down if layer.endswith("down_proj") else kind
            packed = gguf.quants.quantize(torch.randn(shape, generator=generator).numpy(), stored)
            writer.add_tensor(f"{names[layer]}.weight", packed, raw_dtype=stored)
            values = gguf.quants.dequantize(packed, stored)
            if layer.endswith(("q_proj", "k_proj")):  # what llama.cpp's converter did to the rows, undone
                size = HIDDEN // HEADS
                values = values.reshape(-1, size // 2, 2, shape[1]).swapaxes(1, 2).reshape(shape)
            expected[layer] = values
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write_expected(directory, expected)


def make_our_own() -> None:
    """What dq_runtime of today writes, with the values that compressed-tensors reads from it."""
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    from dq_runtime.packing import PackedWeight, pack_codes
    from dq_runtime.packing.checkpoint import packed_tensors, write_json, write_sums, write_weights
    from dq_runtime.packing.quant_config import Scheme, to_config

    directory = HERE / "dq-1"
    directory.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(30)
    tensors, expected, schemes = others(generator), {}, {}
    for layer, shape in SHAPES.items():
        symmetric, bits, group = ".mlp." in layer, 3 if ".mlp." in layer else 4, 32
        w = rounded(shape, bits, group, symmetric, False, generator)
        zero = None if symmetric else w.zero.to(torch.uint8)
        weight = PackedWeight(pack_codes(w.codes.to(torch.uint8), bits), w.scale, zero, bits, shape[1])
        stored = packed_tensors(layer, weight)
        tensors |= stored
        schemes[layer] = Scheme(bits, group, symmetric)
        arguments = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=group)
        plain = {key.rpartition(".")[2]: t for key, t in stored.items()} | {"weight_scale": w.scale.float()}
        scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
        expected[layer] = PackedQuantizationCompressor.decompress(plain, scheme)["weight"]
    write_weights(directory, tensors)
    write_json(directory / "config.json", CONFIG | {"quantization_config": to_config(schemes, [])})
    (directory / "expected.json").unlink(missing_ok=True)  # is not part of the checkpoint
    write_sums(directory)
    write_expected(directory, {key: t.numpy() for key, t in expected.items()})


def make_our_tables() -> None:
    """What dq_runtime of today writes of nf4 and fp4, with the values by definition: no other format has them."""
    from dq_runtime.levels import LEVELS
    from dq_runtime.packing import PackedWeight, pack_codes
    from dq_runtime.packing.checkpoint import packed_tensors, write_json, write_sums, write_weights
    from dq_runtime.packing.quant_config import FOREIGN_PREFIX, Scheme, to_config

    for seed, form in enumerate(("nf4", "fp4")):
        directory = HERE / f"dq-1-{form}"
        directory.mkdir(exist_ok=True)
        generator = torch.Generator().manual_seed(50 + seed)
        tensors, expected, schemes = others(generator), {}, {}
        for layer, (n, k) in SHAPES.items():
            codes = torch.randint(0, 16, (n, k), generator=generator)
            scale = (torch.rand(n, k // 32, generator=generator) * 0.1 + 0.01).bfloat16()
            tensors |= packed_tensors(layer, PackedWeight(pack_codes(codes.byte(), 4), scale, None, 4, k, form))
            schemes[layer] = Scheme(4, 32, True, form)
            expected[layer] = torch.tensor(LEVELS[form])[codes] * scale.float().repeat_interleave(32, 1)
        write_weights(directory, tensors)
        config = CONFIG | {"model_type": f"{FOREIGN_PREFIX}llama", "quantization_config": to_config(schemes, [])}
        write_json(directory / "config.json", config)
        (directory / "expected.json").unlink(missing_ok=True)  # is not part of the checkpoint
        write_sums(directory)
        write_expected(directory, {key: t.numpy() for key, t in expected.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("auto-round", "gptqmodel", "autoawq", "compressed-tensors-017"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    make_gptq(args)
    make_awq(args)
    make_gguf()
    make_our_own()
    make_our_tables()
    for form in ("mxfp4", "nvfp4"):
        make_float4(f"compressed-tensors-{form}", form)
    group = {"type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    every = {"targets": ["Linear"], "weights": group | {"num_bits": 3, "actorder": "static"}}
    make_compressed_tensors("compressed-tensors-3bit", [every])
    rows = {"targets": ["re:.*o_proj"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}
    odd = {"targets": ["re:.*down_proj"], "weights": group | {"num_bits": 4, "symmetric": False}}
    wide = {"targets": ["Linear"], "weights": group | {"num_bits": 2, "symmetric": False}}
    make_compressed_tensors("compressed-tensors-mixed", [rows, odd, wide])
    for name in [name for name in sys.modules if name.partition(".")[0] == "compressed_tensors"]:
        del sys.modules[name]
    sys.path.insert(0, str(args.compressed_tensors_017))
    odd = {"targets": ["re:.*down_proj"], "weights": group | {"num_bits": 5, "symmetric": False}}
    make_compressed_tensors("compressed-tensors-0.17", [odd, every])


if __name__ == "__main__":
    main()
