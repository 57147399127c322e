"""Calibration and held-out text: documents in, windows of token ids out."""

from dq_runtime.data.documents import read_documents
from dq_runtime.data.sources import Text, read_texts
from dq_runtime.data.windows import Tokenizer, Windows, pack_windows, split_documents

__all__ = ["Text", "Tokenizer", "Windows", "pack_windows", "read_documents", "read_texts", "split_documents"]
