"""dq_runtime: round language models onto a low-bit grid, save what others read, serve it with our own kernels.

    dq_runtime.quantize(model, output, spec)   round and write a packed checkpoint
    dq_runtime.load(path)                      a model whose linears stay packed
    dq_runtime.generate(model_or_path, prompt) text
    dq_runtime.use_packed_linears()            transformers' from_pretrained keeps them packed too

Importing this package imports neither torch kernels nor Triton nor CUDA; names resolve on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dq_runtime._version import __version__

if TYPE_CHECKING:
    from dq_runtime.errors import DQError
    from dq_runtime.hf.quantizer import use_packed_linears
    from dq_runtime.pipeline import quantize
    from dq_runtime.runtime.generate import generate, stream
    from dq_runtime.runtime.load import load
    from dq_runtime.runtime.sampling import Sampling
    from dq_runtime.spec import GridSpec, Override, QuantSpec, RoundingSpec

_LAZY = {
    "DQError": "dq_runtime.errors",
    "GridSpec": "dq_runtime.spec",
    "Override": "dq_runtime.spec",
    "QuantSpec": "dq_runtime.spec",
    "RoundingSpec": "dq_runtime.spec",
    "Sampling": "dq_runtime.runtime.sampling",
    "generate": "dq_runtime.runtime.generate",
    "load": "dq_runtime.runtime.load",
    "quantize": "dq_runtime.pipeline",
    "stream": "dq_runtime.runtime.generate",
    "use_packed_linears": "dq_runtime.hf.quantizer",
}

__all__ = [
    "DQError",
    "GridSpec",
    "Override",
    "QuantSpec",
    "RoundingSpec",
    "Sampling",
    "__version__",
    "generate",
    "load",
    "quantize",
    "stream",
    "use_packed_linears",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'dq_runtime' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
