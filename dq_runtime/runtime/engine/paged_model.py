"""The paged decoder of a model, whatever runs it."""

from __future__ import annotations

from dq_runtime.runtime.decoder.native_decoder import NativeDecoder
from dq_runtime.runtime.decoder.paged import PagedDecoder
from dq_runtime.runtime.engine.one_cache_each import OneCacheEach
from dq_runtime.runtime.language_model import LanguageModel, LeanModel


def paged_decoder(model: LanguageModel) -> PagedDecoder:
    """What runs segments of ``model``: the native decoder itself, the torch decoder's weights on paged memory, or, for
    a model that runs through transformers, a cache of its own for every sequence."""
    if not isinstance(model, LeanModel):
        return OneCacheEach(model)
    native = getattr(model.decoder, "native", model.decoder)  # NativeOnTorch is a NativeDecoder in torch's clothes
    if isinstance(native, NativeDecoder):
        return native
    from dq_runtime.runtime.decoder.paged_torch import PagedTorch
    from dq_runtime.runtime.decoder.torch_decoder import TorchDecoder

    assert isinstance(model.decoder, TorchDecoder)
    return PagedTorch(model.decoder)
