"""Who runs a call: the ordered list of backends and the dispatcher that asks each of them."""

from dq_runtime.registry import Registry

# Order is preference: the first backend whose can_run() has no objection takes the call.
BACKENDS = Registry(
    "backend",
    {
        "triton": "dq_runtime.backends.triton_cuda:TritonCuda",
        "cuda": "dq_runtime.backends.cuda_pack:CudaPack",
        "native": "dq_runtime.backends.cpu_native:CpuNative",
        "reference": "dq_runtime.backends.reference:Reference",
    },
)
