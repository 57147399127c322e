"""transformers with our packed linears.

Importing this teaches transformers what nobody else reads: checkpoints of ``quant_method: dq`` (nf4 and fp4), which it
refuses otherwise. Those of compressed-tensors stay its own until :func:`dq_runtime.use_packed_linears` is called.
"""

from dq_runtime.hf import quantizer as quantizer
