"""Read documents from a text file, a JSONL file or a Hugging Face dataset.

text    split at ``<|endoftext|>`` where the file has it, else at blank lines, else one document a line
jsonl   one JSON object a line with a ``text`` field (``.jsonl``)
hub     ``hf:NAME[:CONFIG[:SPLIT]]``, the ``text`` column; needs the ``datasets`` package
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from dq_runtime.errors import DataError

SEPARATOR = "<|endoftext|>"


def read_documents(source: str) -> list[str]:
    """The non-empty documents of ``source``; raises :class:`DataError` naming the source when there is none."""
    if source.startswith("hf:"):
        documents = _from_hub(source)
    else:
        path = Path(source)
        if not path.is_file():
            raise DataError(f"calibration source {source!r} is not a file; for a hub dataset write hf:NAME")
        try:
            text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
        except UnicodeDecodeError as e:
            raise DataError(f"{source}: byte {e.start} is not UTF-8 text; convert the file first") from None
        documents = _from_jsonl(text, source) if path.suffix == ".jsonl" else _from_text(text)
    documents = [d.strip() for d in documents if d.strip()]
    if not documents:
        raise DataError(f"{source} holds no text; give a file with at least one document")
    return documents


def _from_text(text: str) -> list[str]:
    if SEPARATOR in text:
        return text.split(SEPARATOR)
    if re.search(r"\n\s*\n", text):
        return re.split(r"\n\s*\n", text)
    return text.split("\n")  # str.splitlines would also split at form feeds and Unicode separators


def _from_jsonl(text: str, source: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.split("\n"), 1):  # U+2028 is a legal character inside a JSON string
        if not line.strip():
            continue
        try:
            value = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError):
            value = None
        if not isinstance(value, str):
            raise DataError(f'{source}, line {number}: expected a JSON object with a string field "text"')
        # Half of a surrogate pair (a "\\ud83d" cut off by a crawler) is legal JSON, but no tokenizer can encode it.
        documents.append(value.encode("utf-8", "replace").decode("utf-8"))
    return documents


def _from_hub(source: str) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(f"{source}: reading hub datasets needs the datasets package: pip install datasets") from None
    name, *rest = source.removeprefix("hf:").split(":")
    config = rest[0] if rest else None
    split = rest[1] if len(rest) > 1 else "train"
    try:
        rows = load_dataset(name, config, split=split)
        return [row["text"] for row in rows]
    except Exception as e:  # the library raises a dozen unrelated types
        raise DataError(f"{source}: the dataset could not be read ({type(e).__name__}: {e})") from None
