"""Triton kernels of dq_runtime. Tensors in, tensors out: this package imports nothing from dq_runtime."""
