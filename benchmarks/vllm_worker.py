"""The logits that vLLM's own model class computes from a table checkpoint through our plugin, on CPUs.

    PYTHON benchmarks/vllm_worker.py CHECKPOINT IDS RANKS OUTPUT.npz

benchmarks/interop.py runs it; PYTHON has vLLM (0.33), IDS are token ids with commas between them. Everything from
config.json to the logits is vLLM's: the quantization registry, the model, its loaders, the all-reduce between RANKS
processes (gloo). The published wheel has no kernels for CPUs, so norms, rotations and activations are vLLM's own
definitions in PyTorch, and attention is torch's, over one prompt without a cache.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]


def attention(self: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Causal attention [T, heads * head size] over all T tokens, for ``Attention.forward``."""
    q = query.view(-1, self.num_heads, self.head_size).transpose(0, 1)
    k, v = (t.view(-1, self.num_kv_heads, self.head_size).transpose(0, 1) for t in (key, value))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.impl.scale, enable_gqa=True)
    return out.transpose(0, 1).reshape(query.shape[0], -1)


def run(rank: int, ranks: int, port: int, path: str, ids: list[int], output: str) -> None:
    """One of ``ranks`` processes; the first writes the logits float32 [T, V]."""
    import vllm
    from vllm.config import DeviceConfig, LoadConfig, ModelConfig, ParallelConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.custom_op import CustomOp
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.model_loader import get_model

    import dq_runtime.vllm_plugin

    dq_runtime.vllm_plugin.register()  # what vLLM does by our entry point where we are installed
    torch.set_num_threads(1)
    torch.accelerator.empty_cache = lambda: None  # raises where there is none
    Attention.forward = attention
    CustomOp.dispatch_forward = lambda self, *args, **kwargs: self.forward_native
    model_config = ModelConfig(model=path, dtype="float32", enforce_eager=True, max_model_len=512)
    config = VllmConfig(
        model_config=model_config,
        load_config=LoadConfig(load_format="safetensors", use_tqdm_on_load=False),
        device_config=DeviceConfig(device="cpu"),
        parallel_config=ParallelConfig(tensor_parallel_size=ranks, distributed_executor_backend="external_launcher"),
    )
    with set_current_vllm_config(config), torch.inference_mode():
        init_distributed_environment(ranks, rank, f"tcp://127.0.0.1:{port}", rank, "gloo")
        initialize_model_parallel(ranks, 1)
        model = get_model(vllm_config=config)
        tokens = torch.tensor(ids)
        hidden = model(tokens, torch.arange(len(ids)), None)
        logits = model.compute_logits(hidden)
    if rank == 0:
        packed = sum(hasattr(module, "dq_linear") for module in model.modules())
        np.savez(output, logits=logits.float().numpy(), version=vllm.__version__, matrices=packed)


if __name__ == "__main__":
    checkpoint, stated, count, out = sys.argv[1:]
    os.environ |= {"VLLM_TARGET_DEVICE": "cpu", "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        free = sock.getsockname()[1]
    arguments = (int(count), free, checkpoint, [int(i) for i in stated.split(",")], out)
    torch.multiprocessing.spawn(run, arguments, nprocs=int(count))
