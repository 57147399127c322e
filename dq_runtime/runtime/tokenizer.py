"""A tokenizer from tokenizer.json and its config, without transformers: the same ids, the same text, the same chats."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from dq_runtime.errors import CheckpointError

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# What transformers undoes after decoding where the config asks for it and the model is not BPE.
_SPACED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class Tokenizer:
    """Text to token ids and back. ``chat_template`` is Jinja source, or None; ``named`` the special tokens by role
    ("eos_token" and so on). The file says which special tokens :meth:`encode` adds; what it says about truncation and
    padding is of training and is ignored, as transformers does."""

    def __init__(self, backend: Any, settings: dict[str, Any], chat_template: str | None) -> None:
        from tokenizers import AddedToken

        self.backend = backend
        backend.no_truncation()
        backend.no_padding()
        self.chat_template = chat_template
        self.named = {name: text for name in _NAMED if (text := _content(settings.get(name)))}
        added = {token.content for token in backend.get_added_tokens_decoder().values()}
        missing = [text for text in dict.fromkeys(self.named.values()) if text not in added]
        backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in missing])
        is_bpe = type(backend.model).__name__ == "BPE"
        self._clean_up = bool(settings.get("clean_up_tokenization_spaces")) and not is_bpe
        self._render: tuple[str, Callable[..., str]] | None = None

    @property
    def eos_token_id(self) -> int | None:
        """The id of the token that ends a text, if the config names one."""
        return self.token_id(self.named["eos_token"]) if "eos_token" in self.named else None

    def __len__(self) -> int:
        """Number of ids, special ones included."""
        size: int = self.backend.get_vocab_size(with_added_tokens=True)
        return size

    def token_id(self, token: str) -> int | None:
        """The id of one token as the vocabulary spells it."""
        found: int | None = self.backend.token_to_id(token)
        return found

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; special tokens written in it are recognised."""
        # encode() holds the interpreter's lock all the while, 1 s for 1 MB of text; encode_batch() lets go of it.
        ids: list[int] = self.backend.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of ``ids``; bytes that are no UTF-8 come out as U+FFFD."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        for spaced in _SPACED if self._clean_up else ():
            text = text.replace(spaced, spaced.strip())
        return text

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        tokenize: Literal[False] = False,  # transformers' tokenizers return ids unless told so
        add_generation_prompt: bool = False,
    ) -> str:
        """The conversation as one text, as the model was trained to read it."""
        if self.chat_template is None:
            raise CheckpointError("the tokenizer has no chat template; generate from plain text instead")
        if self._render is None or self._render[0] != self.chat_template:
            self._render = self.chat_template, _compile(self.chat_template)
        try:
            return self._render[1](
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.named,
            )
        except Exception as e:  # a template is a program: it raises by itself, or fails on messages it did not expect
            raise CheckpointError(f"the chat template cannot render these messages: {e}") from None


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a checkpoint: ours if it has tokenizer.json, one of transformers' if only older files or if it
    is a GGUF file, None if it has none at all."""
    if directory.is_file():
        from dq_runtime.runtime.dense import gguf_tokenizer

        return gguf_tokenizer(directory)
    config = directory / "tokenizer_config.json"
    if not (directory / "tokenizer.json").exists():
        return _from_transformers(directory) if config.exists() else None
    from tokenizers import Tokenizer as Backend

    try:
        settings = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
        older = directory / "special_tokens_map.json"
        if older.exists():  # where tokenizer_config.json of transformers 4 does not repeat it
            settings = json.loads(older.read_text(encoding="utf-8")) | settings
        backend = Backend.from_file(str(directory / "tokenizer.json"))
        return Tokenizer(backend, settings, _chat_template(directory, settings))
    except Exception as e:  # the tokenizers library raises plain Exception
        raise CheckpointError(f"the tokenizer files of {directory} could not be read: {e}") from None


def _from_transformers(directory: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as e:
        raise CheckpointError(f"the tokenizer files of {directory} could not be read: {e}") from None


def _content(token: Any) -> str | None:
    """A special token is a string, or an object that describes one."""
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None


def _chat_template(directory: Path, settings: dict[str, Any]) -> str | None:
    """The default template: in a file of its own (transformers 4.51 and later), else in tokenizer_config.json, alone or
    as the one named "default"."""
    file = directory / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    value = settings.get("chat_template")
    if isinstance(value, list):
        value = {entry["name"]: entry["template"] for entry in value}.get("default")
    return value if isinstance(value, str) else None


def _compile(source: str) -> Callable[..., str]:
    """Templates come from whoever published the model: they run sandboxed. The names below are those that transformers
    promises them."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks the assistant's words for training; here its body is all there is to it."""

        tags = {"generation"}  # noqa: RUF012 (as the base class declares it)

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return body

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, **({"ensure_ascii": False, "indent": indent} | options))

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson  # Jinja's own escapes HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source).render
