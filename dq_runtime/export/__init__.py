"""Write a packed checkpoint in the formats of other engines: one file a format, one line here.

:func:`dq_runtime.export.run.export` is the straight line. An export is lossless or refused: codes, scales and zero
points are carried over by value, and where a format cannot hold a value nothing is written. The one exception is a
rounding that the user asks for by name (``dense`` with a 16-bit dtype).
"""

from dq_runtime.registry import Registry

EXPORTERS = Registry(
    "export format",
    {
        "compressed-tensors": "dq_runtime.export.compressed_tensors:ToCompressedTensors",
        "gptq": "dq_runtime.export.gptq:ToGPTQ",
        "gguf": "dq_runtime.export.gguf:ToGGUF",
        "mlx": "dq_runtime.export.mlx:ToMLX",
        "onnx": "dq_runtime.export.onnx:ToONNX",
        "dense": "dq_runtime.export.dense:ToDense",
    },
)

__all__ = ["EXPORTERS"]
