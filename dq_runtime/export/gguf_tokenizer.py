"""A byte-level BPE tokenizer and its chat template as GGUF metadata.

llama.cpp does not read the expression that cuts text into words before BPE: it knows a list of them by name
(``tokenizer.ggml.pre``). The name is found here by the pre-tokenizer's own definition, and a tokenizer whose definition
is not in the list is refused: with another's name the model would read slightly different text, without a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dq_runtime.errors import SpecError
from dq_runtime.runtime.tokenizer import load_tokenizer

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The expression of a Split pre-tokenizer -> llama.cpp's name of it (llama-vocab.cpp).
_SPLITS = {
    _CONTRACTIONS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + r"\p{N}" + _REST: "qwen2",
}


def add_tokenizer(writer: Any, directory: Path, vocabulary: int) -> None:
    """Tokens, merges, special ids and chat template of the tokenizer in ``directory`` into a ``gguf.GGUFWriter``.
    ``vocabulary`` is the number of embedding rows; those without a token are listed as unused."""
    import gguf

    file = directory / "tokenizer.json"
    if not file.is_file():
        raise SpecError(f"{directory} has no tokenizer.json, which a GGUF file needs; add the model's tokenizer to it")
    described = json.loads(file.read_text(encoding="utf-8"))
    model = described["model"]
    pre = _pre_tokenizer(described, str(file))
    tokens = [f"[PAD{i}]" for i in range(vocabulary)]
    kinds = [gguf.TokenType.UNUSED] * vocabulary
    for text, i in model["vocab"].items():
        tokens[i], kinds[i] = text, gguf.TokenType.NORMAL
    for added in described.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    tokenizer = load_tokenizer(directory)
    for role in ("bos", "eos", "unk", "pad", "sep", "mask"):
        text = tokenizer.named.get(f"{role}_token")
        if text is not None:
            getattr(writer, f"add_{role}_token_id")(tokenizer.token_id(text))
    plain, framed = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    writer.add_add_bos_token(framed[0] != plain[0])
    writer.add_add_eos_token(framed[-1] != plain[-1])
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _pre_tokenizer(described: Mapping[str, Any], where: str) -> str:
    """llama.cpp's name of what cuts the text into words."""
    model = described["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise SpecError(f"{where} is not a byte-level BPE tokenizer, the only kind that is exported to gguf so far")
    stated = described.get("pre_tokenizer") or {}
    parts = stated.get("pretokenizers", [stated])
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and parts[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        name = _SPLITS.get((parts[0].get("pattern") or {}).get("Regex", ""))
        if name is not None:
            return name
    raise SpecError(
        f"{where} cuts text into words in a way that has no known name in llama.cpp "
        f"({' then '.join(map(str, kinds))}); this model cannot be exported to gguf"
    )
