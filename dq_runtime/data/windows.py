"""Documents -> windows of exactly ``length`` token ids. Held-out documents never enter calibration."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dq_runtime.errors import DataError


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


@dataclass(frozen=True)
class Windows:
    """``tokens`` int64 [count, length]; ``source`` says in words where they came from."""

    tokens: Tensor
    source: str

    def fingerprint(self) -> str:
        """sha256 of shape and ids: two runs on the same windows agree on it."""
        shape = str(list(self.tokens.shape)).encode()
        return hashlib.sha256(shape + self.tokens.contiguous().numpy().tobytes()).hexdigest()


def split_documents(documents: Sequence[str], seed: int, share: float = 0.1) -> tuple[list[str], list[str]]:
    """(calibration, held-out): a seeded choice of contiguous runs of documents is held out, about ``share`` of the
    characters. Runs, because neighbouring documents of one file are often pieces of one article. A document that occurs
    on both sides is dropped from calibration."""
    run = max(1, len(documents) // 50)
    runs = [list(documents[i : i + run]) for i in range(0, len(documents), run)]
    if len(runs) < 2:
        raise DataError("one document cannot be split into calibration and held-out text; give a held-out file too")
    random.Random(seed).shuffle(runs)
    wanted = share * sum(len(d) for d in documents)
    held: list[str] = []
    while len(runs) > 1 and sum(len(d) for d in held) < wanted:
        held += runs.pop()
    kept = set(held)
    train = [d for r in runs for d in r if d not in kept]
    if not train:
        raise DataError("the documents repeat each other and cannot be split for calibration; give a held-out file too")
    return train, held


def pack_windows(
    documents: Sequence[str], tokenizer: Tokenizer, count: int, length: int, seed: int, source: str
) -> Windows:
    """Shuffle documents by ``seed``, join them with the end-of-text token, cut into windows, keep ``count``."""
    order = list(documents)
    random.Random(seed).shuffle(order)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for document in order:
        if len(ids) >= count * length:
            break
        ids += tokenizer.encode(document, add_special_tokens=False) + end
    if len(ids) < count * length:
        possible = len(ids) // length
        instead = f"at most {possible} windows" if possible else "shorter windows"
        raise DataError(
            f"{source} gives {len(ids)} tokens, fewer than {count} windows of {length}; "
            f"give more text or ask for {instead}"
        )
    return Windows(torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length), source)
