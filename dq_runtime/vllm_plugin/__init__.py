"""A plugin of vLLM (entry point ``vllm.general_plugins``) for what compressed-tensors cannot say: nf4 and fp4 tables.

vLLM calls :func:`register` in each of its processes. Nothing else imports this package, so it costs nothing without
vLLM; integers, mxfp4 and nvfp4 need none of it, because vLLM reads those itself.
"""


def register() -> None:
    """Make ``quant_method: dq`` known to vLLM, and the model types of such checkpoints to the transformers in it.
    Calling it again changes nothing."""
    # Their import is what registers.
    import dq_runtime.hf
    import dq_runtime.vllm_plugin.config  # noqa: F401
