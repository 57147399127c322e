"""How fast is y[M, N] = x[M, K] @ decode(w)[N, K].T on this GPU, against torch's bf16 matmul?

    PYTHONPATH=.:kernels python benchmarks/qmm_gpu.py [--out FILE] [--quick]

Every (shape, M) times ``bf16`` (torch.mm on a dense weight) and, for each bit width, ``fused`` (one kernel) and
``dense`` (decode to a scratch, then torch.mm). triton.testing.do_bench empties the L2 before each call: packed layers
would fit in it. A candidate is timed only after it was right and bit-equal twice. Launches are eager, so small shapes
also show the launch cost of Python; CUDA graphs are not measured here. GB/s counts codes, scales, x and y once.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dq_runtime.backends.triton_cuda import TritonCuda
from dq_runtime.packing import PackedWeight, words_per_row

# (N, K): SmolLM2-135M's attention, up and down projections; a 7B model's attention; an 8B model's up projection.
SHAPES = ((576, 576), (1536, 576), (576, 1536), (4096, 4096), (14336, 4096))
TOKENS = (1, 16, 64, 256, 1024)
BITS = (2, 3, 4, 8)
GROUP = 64
FUSED_MAX_TOKENS = 256  # beyond it the fused kernel only re-decodes the weight for every 64 tokens
Run = Callable[..., Tensor]


def driver_version() -> str:
    """The NVIDIA driver's version, or "unknown" where nvidia-smi is missing."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.check_output(command, text=True).splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def random_weight(n: int, k: int, bits: int) -> PackedWeight:
    """Symmetric, bf16 scales. Random words are random codes: K * bits is a multiple of 32 in every shape here."""
    words = torch.randint(-(2**31), 2**31, (n, words_per_row(k, bits)), dtype=torch.int64, device="cuda")
    scale = torch.rand(n, k // GROUP, device="cuda") * 0.05 + 0.01
    return PackedWeight(words.to(torch.int32), scale.bfloat16(), None, bits, k)


def check(run: Callable[[], Tensor], exact: Tensor, magnitude: Tensor) -> None:
    """Raises unless two runs give the same bits and each element lies within bf16's bounds."""
    first, second = run(), run()
    if not torch.equal(first, second):
        raise SystemExit("two runs of one kernel differ: nothing is timed")
    # Output and (in the dense path) weights are rounded to bf16: 2^-8 of the result and of the sum of magnitudes.
    bound = 2.0**-7 * exact.abs() + 2.0**-8 * magnitude
    if not bool(((first.float() - exact).abs() <= bound).all()):
        raise SystemExit("a kernel is wrong: nothing is timed")


def timed(run: Callable[[], Tensor]) -> dict[str, float]:
    """Median, min and max of one call, in microseconds."""
    from triton.testing import do_bench

    median, low, high = do_bench(run, warmup=25, rep=100, quantiles=[0.5, 0.0, 1.0])
    return {"median_us": median * 1e3, "min_us": low * 1e3, "max_us": high * 1e3}


def measure(n: int, k: int, tokens: tuple[int, ...], bits: tuple[int, ...]) -> list[dict[str, Any]]:
    """All rows of one shape."""
    from dq_kernels.qmm import qmm_dense, qmm_fused

    rows: list[dict[str, Any]] = []
    activations = {m: torch.randn(m, k, device="cuda", dtype=torch.bfloat16) for m in tokens}
    dense = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    bf16_us: dict[int, float] = {}

    def add(m: int, method: str, width: int, weight_bytes: int, run: Callable[[], Tensor]) -> None:
        times = timed(run)
        bf16_us.setdefault(m, times["median_us"])  # bf16 itself comes first
        gb_s = (weight_bytes + 2 * m * (n + k)) / times["median_us"] / 1e3
        ratio = bf16_us[m] / times["median_us"]
        shape = {"n": n, "k": k, "m": m, "method": method, "bits": width, "group_size": None if width == 16 else GROUP}
        rows.append({**shape, **times, "gb_s": gb_s, "speedup_over_bf16": ratio})
        median, low, high = times["median_us"], times["min_us"], times["max_us"]
        print(
            f"N={n:5} K={k:4} M={m:4} {method:5} {width:2}-bit  {median:8.1f} us ({low:.1f} .. {high:.1f})  "
            f"{gb_s:7.1f} GB/s  {ratio:5.2f}x bf16",
            flush=True,
        )

    for m, x in activations.items():
        add(m, "bf16", 16, dense.nbytes, lambda x=x: torch.mm(x, dense.t()))
    for width in bits:
        w = random_weight(n, k, width)
        decoded = w.decode()
        for m, x in activations.items():
            exact = x.float() @ decoded.t()
            magnitude = x.float().abs() @ decoded.abs().t()
            methods: dict[str, Run] = {"fused": qmm_fused, "dense": qmm_dense}
            for method, kernel in methods.items():
                if method == "fused" and m > FUSED_MAX_TOKENS:
                    continue

                def run(kernel: Run = kernel, x: Tensor = x, w: PackedWeight = w) -> Tensor:
                    return kernel(x, w.packed, w.scale, w.zero, bits=w.bits)

                check(run, exact, magnitude)
                add(m, method, width, w.nbytes, run)
    return rows


def main() -> int:
    """Measure, print, write the JSON; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/gpu_<device>.json)")
    parser.add_argument("--quick", action="store_true", help="one shape, M = 1 and 64, 3 bits")
    args = parser.parse_args()
    reason = TritonCuda().available()
    if reason is not None or not torch.cuda.is_available():
        print(f"qmm_gpu: nothing was timed, no usable GPU: {reason or 'TRITON_INTERPRET is set'}", file=sys.stderr)
        return 2

    import triton

    torch.manual_seed(0)
    device = torch.cuda.get_device_name()
    shapes, tokens, bits = (SHAPES[-1:], (1, 64), (3,)) if args.quick else (SHAPES, TOKENS, BITS)
    results = [row for n, k in shapes for row in measure(n, k, tokens, bits)]
    name = "".join(c if c.isalnum() else "_" for c in device.lower())
    out = args.out or Path(__file__).resolve().parent / "results" / f"gpu_{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "question": "qmm against torch bf16 matmul; symmetric codes, bf16 x and scales, L2 flushed, eager launches",
        "device": device,
        "capability": list(torch.cuda.get_device_capability()),
        "driver": driver_version(),
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "rows": results,
    }
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
