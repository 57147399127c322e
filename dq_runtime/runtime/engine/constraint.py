"""Texts of a given form: which tokens may come next, by llguidance (the extra ``serve``)."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dq_runtime.errors import SpecError
from dq_runtime.runtime.engine.request import Constraint
from dq_runtime.runtime.language_model import LanguageModel

# Between the parts of JSON. Without a bound a greedy text of a weak model may be blank to its last token.
WHITESPACE = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,24}"}


class Guide:
    """Where one text stands in its grammar; raises :class:`SpecError` when the grammar itself gives up (a state too
    large for its limits)."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def mask(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """A copy of ``logits`` [V] with -inf for the tokens that cannot come next; an end token can where the text
        may end."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(bits, count=logits.size, bitorder="little").view(bool)
        return np.where(allowed, logits, np.float32(-np.inf))

    def accept(self, token: int) -> None:
        """Step over ``token``, which was allowed."""
        self._matcher.consume_token(token)
        self._check()

    @property
    def complete(self) -> bool:
        """Whether nothing can follow."""
        stopped: bool = self._matcher.is_stopped()
        return stopped

    def _check(self) -> None:
        if self._matcher.is_error():
            raise SpecError(f"the constraint cannot be followed any further: {_first_line(self._matcher.get_error())}")


class Grammars:
    """Compiles constraints for one model; from any thread. ``ends``: its end tokens."""

    def __init__(self, model: LanguageModel, ends: set[int]) -> None:
        self._model, self._ends = model, ends
        self._tokenizer: Any = None
        self._lock = threading.Lock()

    def compile(self, constraint: Constraint) -> Guide:
        """The beginning of a text of this form; raises :class:`SpecError` for one that is none, for an unknown kind,
        and where llguidance or a tokenizer is missing. Takes up to a second for a hard schema, and the first call
        about 0.3 s to read a vocabulary of 49 thousand tokens."""
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise SpecError("constrained text needs llguidance; install dq_runtime[serve]") from None
        if constraint.kind == "json_object":
            grammar = LLMatcher.grammar_from_json_schema('{"type": "object"}', defaults=WHITESPACE)
        elif constraint.kind == "json_schema":
            try:
                grammar = LLMatcher.grammar_from_json_schema(constraint.value, defaults=WHITESPACE)
            except ValueError as error:
                raise SpecError(f"the JSON schema is not valid: {_first_line(str(error))}") from None
        elif constraint.kind == "regex":
            grammar = LLMatcher.grammar_from_regex(constraint.value)
        else:
            raise SpecError(f"a constraint is json_object, json_schema or regex, got {constraint.kind!r}")
        matcher = LLMatcher(self._vocabulary(), grammar, log_level=0)
        if matcher.is_error():
            name = "regular expression" if constraint.kind == "regex" else "JSON schema"
            raise SpecError(f"the {name} is not valid: {_first_line(matcher.get_error())}")
        return Guide(matcher)

    def _vocabulary(self) -> Any:
        from llguidance import LLTokenizer

        with self._lock:
            if self._tokenizer is None:
                ours = self._model.tokenizer
                # Our Tokenizer keeps the library's object as ``backend``, transformers' fast ones as the longer name.
                backend: Any = getattr(ours, "backend_tokenizer", None) or getattr(ours, "backend", None)
                if not hasattr(backend, "to_str"):
                    raise SpecError("constrained text needs a model with tokenizer.json; this one has none")
                try:
                    self._tokenizer = LLTokenizer(
                        backend.to_str(), n_vocab=self._model.vocabulary, eos_token=sorted(self._ends) or None
                    )
                except Exception as error:  # llguidance raises what its Rust code finds, of no common type
                    raise SpecError(f"llguidance cannot read this tokenizer: {_first_line(str(error))}") from None
            return self._tokenizer


def _first_line(message: str) -> str:
    """Its errors quote the whole grammar after what is wrong with it."""
    return " ".join(message.strip().split("\n\n")[0].split())[:300]
