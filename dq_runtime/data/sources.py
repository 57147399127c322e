"""Which documents calibrate and which measure: the two never share one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from dq_runtime.data.documents import read_documents
from dq_runtime.data.windows import split_documents
from dq_runtime.errors import DataError


@dataclass(frozen=True)
class Text:
    """Documents and, in words, where they are from."""

    documents: list[str]
    source: str

    def fingerprint(self) -> str:
        """sha256 of the documents in their order."""
        digest = hashlib.sha256()
        for document in self.documents:
            encoded = document.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return digest.hexdigest()


def read_texts(calibration: str | None, held_out: str | None, seed: int) -> tuple[Text | None, Text | None]:
    """(calibration, held-out) documents; None where the teacher has to write them itself.

    Without ``held_out``, some documents of ``calibration`` are kept out of it. A document in both sources is only
    measured on.
    """
    if calibration is None:
        return None, None if held_out is None else Text(read_documents(held_out), held_out)
    documents = read_documents(calibration)
    if held_out is None:
        documents, kept = split_documents(documents, seed)
        return Text(documents, calibration), Text(kept, f"held-out documents of {calibration}")
    kept = read_documents(held_out)
    shared = set(documents) & set(kept)
    documents = [d for d in documents if d not in shared]
    if not documents:
        raise DataError(f"every document of {calibration} is also in {held_out}; nothing is left to calibrate on")
    return Text(documents, calibration), Text(kept, held_out)
