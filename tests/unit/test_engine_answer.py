"""One request's own part: log probabilities, the bytes of tokens, constrained text."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_fakes import END, FakeModel, Listener, continued, next_token, request

from dq_runtime.errors import SpecError
from dq_runtime.runtime.engine import Constraint, Engine, EngineSettings
from dq_runtime.runtime.engine.answer import Answer
from dq_runtime.runtime.engine.constraint import Grammars
from dq_runtime.runtime.engine.logprobs import token_logprob
from dq_runtime.runtime.load import load_for_text
from dq_runtime.runtime.sampling import Sampling
from dq_runtime.runtime.token_bytes import TokenBytes


@pytest.fixture(scope="module")
def model(packed_model: Path) -> Any:
    return load_for_text(packed_model, "cpu")


@pytest.fixture(scope="module")
def spelled(model: Any) -> TokenBytes:
    return TokenBytes(model.tokenizer)


def test_logprobs_are_a_log_softmax_in_double(spelled: TokenBytes) -> None:
    logits = np.random.default_rng(0).normal(0, 4, 303).astype(np.float32)
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    for token in (0, 7, int(logits.argmax())):
        found = token_logprob(logits, token, 5, spelled)
        assert found.token == token
        assert math.isclose(found.logprob, exact[token], rel_tol=1e-12)
        assert [a.token for a in found.top] == np.argsort(-exact, kind="stable")[:5].tolist()
        assert [a.logprob for a in found.top] == pytest.approx(sorted(exact, reverse=True)[:5], rel=1e-12)
        assert found.bytes == spelled(token)
        assert found.text == spelled(token).decode(errors="replace")


def test_of_equal_logprobs_the_lower_id_comes_first(spelled: TokenBytes) -> None:
    found = token_logprob(np.zeros(300, np.float32), 9, 3, spelled)
    assert [a.token for a in found.top] == [0, 1, 2]
    assert token_logprob(np.zeros(300, np.float32), 9, 0, spelled).top == ()
    assert len(token_logprob(np.zeros(3, np.float32), 2, 10, spelled).top) == 3


def test_huge_logits_have_finite_logprobs(spelled: TokenBytes) -> None:
    found = token_logprob(np.array([3e38, -3e38, -np.inf], np.float32), 0, 2, spelled)
    assert found.logprob == 0.0
    assert found.top[1].logprob == -6e38 or math.isclose(found.top[1].logprob, -6e38, rel_tol=1e-6)


def test_logprobs_are_the_models_own_whatever_the_sampling() -> None:
    """Before temperature, penalties and bias."""
    logits = np.random.default_rng(1).normal(0, 2, 257).astype(np.float32)
    expected = token_logprob(logits, 65, 1, TokenBytes(None)).logprob
    sampling = Sampling(temperature=0.5, repetition_penalty=3.0, logit_bias=((65, 1000.0),), seed=0)
    answer = Answer(request("AAA", logprobs=0, sampling=sampling), FakeModel(), 8, {END}, TokenBytes(None), None)
    event = answer.advance(logits)
    assert list(event.tokens) == [65]
    assert event.logprobs[0].logprob == expected


@pytest.mark.parametrize("text", ["Anna found a red lamp", "naïve ☃ 😀", " \t\n\x00", "12 345"])
def test_the_bytes_of_tokens_are_those_of_the_text(model: Any, spelled: TokenBytes, text: str) -> None:
    ids = model.encode(text)
    assert b"".join(spelled(i) for i in ids) == text.encode()


def test_special_and_unknown_ids(model: Any, spelled: TokenBytes) -> None:
    assert spelled(model.tokenizer.eos_token_id) == b"<|endoftext|>"
    assert spelled(10**6) == b""


def test_the_bytes_of_a_sentencepiece_vocabulary() -> None:
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {"<unk>": 0, "▁the": 1, "<0xE2>": 2, "ab": 3}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])

    class Ours:
        pass

    ours: Any = Ours()
    ours.backend = backend
    assert [TokenBytes(ours)(i) for i in range(4)] == [b"<unk>", b" the", b"\xe2", b"ab"]


@pytest.fixture(scope="module")
def engine(model: Any) -> Iterator[Engine]:
    pytest.importorskip("llguidance", reason="the extra serve is not installed")
    running = Engine(model, EngineSettings(kv_bytes=2**22))
    yield running
    running.close()


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "n": {"enum": [1, 22]}},
    "required": ["name", "n"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_schema_is_followed_by_a_model_that_knows_nothing(engine: Engine, temperature: float) -> None:
    """Random weights: every token would be wrong without the constraint."""
    sampling = Sampling(temperature=temperature, seed=3)
    listeners = [Listener() for _ in range(3)]
    constraint = Constraint("json_schema", json.dumps(SCHEMA))
    for listener in listeners:
        engine.submit(request([5, 6, 7], 200, sampling=sampling, constraint=constraint, logprobs=1), listener)
    for listener in listeners:
        finished = listener.wait()
        assert finished.reason == "end", finished
        found = json.loads(listener.text)
        assert set(found) == {"name", "n"}
        assert found["n"] in (1, 22)
        assert len(found["name"]) <= 8
        # Of the model's own distribution, in which what was allowed may be very unlikely.
        assert all(math.isfinite(entry.logprob) for piece in listener.pieces for entry in piece.logprobs)
    assert len({listener.text for listener in listeners}) == 1


def test_a_regular_expression_is_followed(engine: Engine) -> None:
    listener = Listener()
    constraint = Constraint("regex", "(red|blue)-[0-9]{3}")
    engine.submit(request([5, 6, 7], 50, constraint=constraint), listener)
    assert listener.wait().reason == "end"
    assert re.fullmatch("(red|blue)-[0-9]{3}", listener.text)


def test_any_json_object(engine: Engine) -> None:
    listener = Listener()
    sampling = Sampling(temperature=1.0, seed=0)
    engine.submit(request([5], 30, sampling=sampling, constraint=Constraint("json_object")), listener)
    finished = listener.wait()
    assert listener.text.lstrip().startswith("{")
    if finished.reason == "end":
        assert isinstance(json.loads(listener.text), dict)


def test_an_end_token_is_allowed_where_the_text_may_end(model: Any) -> None:
    pytest.importorskip("llguidance", reason="the extra serve is not installed")
    guide = Grammars(model, model.end_tokens()).compile(Constraint("regex", "a+"))
    logits = np.zeros(model.vocabulary, np.float32)
    (end,) = model.end_tokens()
    (letter,) = model.encode("a")
    assert not np.isfinite(guide.mask(logits)[end])
    guide.accept(letter)
    assert np.isfinite(guide.mask(logits)[end])
    assert not guide.complete
    assert not np.isfinite(guide.mask(logits)[model.encode("b")[0]])
    with pytest.raises(SpecError, match="cannot be followed"):
        guide.accept(model.encode("b")[0])


@pytest.mark.parametrize(
    ("constraint", "reason"),
    [
        (Constraint("json_schema", '{"type": "frog"}'), "the JSON schema is not valid: Invalid type: frog"),
        (Constraint("json_schema", "{nonsense"), "the JSON schema is not valid"),
        (Constraint("json_schema", "[" * 100_000), "the JSON schema is not valid"),
        (Constraint("regex", "[a"), "the regular expression is not valid: .*unclosed character class"),
        (Constraint("xml", "x"), "json_object, json_schema or regex, got 'xml'"),  # type: ignore[arg-type]
    ],
    ids=lambda value: value.kind if isinstance(value, Constraint) else "",
)
def test_a_bad_constraint_is_one_sentence(model: Any, constraint: Constraint, reason: str) -> None:
    pytest.importorskip("llguidance", reason="the extra serve is not installed")
    with pytest.raises(SpecError, match=reason) as refused:
        Grammars(model, model.end_tokens()).compile(constraint)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


def test_a_constraint_without_a_tokenizer_is_refused() -> None:
    pytest.importorskip("llguidance", reason="the extra serve is not installed")
    with pytest.raises(SpecError, match=r"needs a model with tokenizer\.json"):
        Grammars(FakeModel(), {END}).compile(Constraint("json_object"))


def test_a_constraint_without_llguidance_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(SpecError, match=r"install dq_runtime\[serve\]"):
        Grammars(FakeModel(), {END}).compile(Constraint("json_object"))


def test_a_seed_says_the_same_whatever_came_before() -> None:
    """The random stream is the request's own."""

    def text(noise: int) -> list[int]:
        sampling = Sampling(temperature=1.0, seed=5)
        answer = Answer(request("x", sampling=sampling), FakeModel(), 8, {END}, TokenBytes(None), None)
        other = Answer(request("x", sampling=sampling), FakeModel(), 8, {END}, TokenBytes(None), None)
        flat = np.zeros(257, np.float32)
        for _ in range(noise):
            other.advance(flat)
        for _ in range(8):
            answer.advance(flat)
        return answer.tokens

    assert text(0) == text(5)
    assert continued(b"x", 1) == [next_token(b"x")]
