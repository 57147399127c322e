"""Codes to bytes and back: the canonical bitstream (layout) and the checkpoint on disk."""

from dq_runtime.packing.layout import PackedWeight, pack_codes, unpack_codes, words_per_row

__all__ = ["PackedWeight", "pack_codes", "unpack_codes", "words_per_row"]
