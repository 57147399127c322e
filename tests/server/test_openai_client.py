"""OpenAI's own client against a live server with the tiny model: what it asks for is what the engine computes."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import openai
import pytest

from dq_runtime.runtime.generate import generate
from dq_runtime.runtime.language_model import LanguageModel
from dq_runtime.runtime.load import load
from dq_runtime.runtime.sampling import Sampling
from server.live_server import Live

ASKED: Any = [{"role": "user", "content": "Anna found a red lamp"}]
LONG: Any = {"extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def client(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def alone(packed_model: Path) -> LanguageModel:
    """The same model, run by the decode loop of ``dq generate``."""
    return load(packed_model, "cpu", exact=True)


def test_models_say_what_is_served(client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert card.id == "tiny"
    assert client.models.retrieve("tiny").id == "tiny"
    fields = card.model_dump()
    assert fields["bits"] == [3]
    assert 3 < fields["bits_per_weight"] < 4
    assert fields["max_model_len"] == 256
    assert fields["size_bytes"] > 10_000
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_greedy_answer_is_that_of_dq_generate(client: openai.OpenAI, alone: LanguageModel, live: Live) -> None:
    found = client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=24, temperature=0)
    expected = generate(alone, ASKED, max_tokens=24)
    assert found.choices[0].message.content == expected.text
    assert found.usage is not None
    assert found.usage.prompt_tokens == expected.prompt_tokens
    assert found.usage.completion_tokens == len(expected.tokens)
    assert found.usage.total_tokens == expected.prompt_tokens + len(expected.tokens)
    assert found.choices[0].finish_reason == {"length": "length", "end": "stop"}[expected.finish]


def test_a_seed_gives_the_text_that_it_gives_alone(client: openai.OpenAI, alone: LanguageModel) -> None:
    asked: Any = {"model": "tiny", "messages": ASKED, "max_tokens": 20, "temperature": 0.9, "top_p": 0.8, "seed": 7}
    found = client.chat.completions.create(**asked)
    expected = generate(alone, ASKED, max_tokens=20, sampling=Sampling(0.9, top_p=0.8, seed=7))
    assert found.choices[0].message.content == expected.text
    three = client.chat.completions.create(**asked, n=3)
    texts = [choice.message.content for choice in three.choices]
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert texts[0] == expected.text
    assert len(set(texts)) == 3
    assert three.usage is not None
    assert three.usage.prompt_tokens == expected.prompt_tokens


def test_a_stream_is_the_whole_in_pieces(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": ASKED, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    *middle, last = chunks
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in middle)
    assert len({chunk.id for chunk in chunks}) == 1
    assert middle[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in middle)
    assert text == whole.choices[0].message.content
    assert middle[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    plain = list(client.chat.completions.create(**asked, stream=True))
    assert "usage" not in plain[0].model_fields_set


def test_streams_of_several_choices(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": ASKED, "max_tokens": 12, "temperature": 1, "seed": 3, "n": 3}
    whole = client.chat.completions.create(**asked)
    texts, reasons = ["", "", ""], [None, None, None]
    for chunk in client.chat.completions.create(**asked, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]  # type: ignore[call-overload]
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]


def test_stop_strings_end_the_text_and_are_not_part_of_it(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "prompt": "Anna found", "max_tokens": 40, "temperature": 0, **LONG}
    whole = client.completions.create(**asked).choices[0].text
    stop = whole[5:8]
    found = client.completions.create(**asked, stop=[stop, "never said"]).choices[0]
    assert found.text == whole[: whole.index(stop)]
    assert found.finish_reason == "stop"


def test_logprobs_of_a_chat(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": ASKED, "max_tokens": 6, "temperature": 0}
    choice = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3).choices[0]
    assert choice.logprobs is not None
    tokens = choice.logprobs.content or []
    assert 0 < len(tokens) <= 6
    for token in tokens:
        assert token.logprob == token.top_logprobs[0].logprob, "greedy chooses the most likely"
        assert len(token.top_logprobs) == 3
        assert sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1 + 1e-6
        assert token.bytes is not None
    assert b"".join(bytes(t.bytes or b"") for t in tokens).decode(errors="replace") == choice.message.content
    streamed = [
        token
        for chunk in client.chat.completions.create(**asked, logprobs=True, top_logprobs=3, stream=True)
        if chunk.choices[0].logprobs is not None
        for token in chunk.choices[0].logprobs.content or []
    ]
    assert streamed == tokens
    bare = client.chat.completions.create(**asked, logprobs=True).choices[0].logprobs
    assert bare is not None
    assert [t.logprob for t in bare.content or []] == [t.logprob for t in tokens]
    assert all(t.top_logprobs == [] for t in bare.content or [])


def test_logprobs_of_a_completion(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "prompt": "Later", "max_tokens": 5, "temperature": 0, **LONG}
    found = client.completions.create(**asked, logprobs=2).choices[0].logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.token_logprobs is not None
    assert found.text_offset is not None
    assert (
        len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) == len(found.top_logprobs or []) == 5
    )
    assert found.text_offset == [sum(map(len, found.tokens[:i])) for i in range(5)]


def test_several_prompts_and_the_best_of_many(client: openai.OpenAI) -> None:
    prompts = ["Anna found", "Later", "The mayor"]
    asked: Any = {"model": "tiny", "max_tokens": 6, "temperature": 0, **LONG}
    together = client.completions.create(prompt=prompts, echo=True, **asked)
    for prompt, choice in zip(prompts, together.choices, strict=True):
        assert choice.text == prompt + client.completions.create(prompt=prompt, **asked).choices[0].text
    sampled: Any = asked | {"temperature": 1.0, "seed": 5}
    all_five = client.completions.create(prompt="Later", n=5, logprobs=0, **sampled)
    best = client.completions.create(prompt="Later", n=2, best_of=5, **sampled)

    def mean(choice: Any) -> float:
        return float(sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs))

    expected = sorted(all_five.choices, key=mean, reverse=True)[:2]
    assert [choice.text for choice in best.choices] == [choice.text for choice in expected]


def test_token_ids_are_a_prompt_too(client: openai.OpenAI, alone: LanguageModel) -> None:
    asked: Any = {"model": "tiny", "max_tokens": 6, "temperature": 0, **LONG}
    ids = alone.encode("Anna found")
    text = client.completions.create(prompt="Anna found", **asked).choices[0].text
    assert client.completions.create(prompt=ids, **asked).choices[0].text == text
    both = client.completions.create(prompt=[ids, alone.encode("Later")], **asked)
    assert both.choices[0].text == text
    assert len(both.choices) == 2


def test_json_mode_gives_json(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": ASKED, "max_tokens": 60, "temperature": 1, "seed": 1}
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}, "ok": {"type": "boolean"}},
        "required": ["n", "ok"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    found = client.chat.completions.create(**asked, response_format=form).choices[0]
    assert found.finish_reason == "stop"
    value = json.loads(found.message.content or "")
    assert set(value) == {"n", "ok"}
    assert isinstance(value["ok"], bool)
    anything = client.chat.completions.create(**asked, response_format={"type": "json_object"}).choices[0]
    text = (anything.message.content or "").lstrip()
    assert text.startswith("{")
    if anything.finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_penalties_and_biases(client: openai.OpenAI, alone: LanguageModel) -> None:
    asked: Any = {"model": "tiny", "prompt": "Later", "max_tokens": 12, "temperature": 0, **LONG}
    token = alone.encode("z")[0]
    assert client.completions.create(**asked, logit_bias={str(token): 100}).choices[0].text == "z" * 12
    sampling = Sampling(presence_penalty=2.0, frequency_penalty=2.0, logit_bias=((token, 8.0),))
    expected = generate(alone, "Later", max_tokens=12, sampling=sampling)
    if expected.finish == "length":
        found = client.completions.create(
            **asked, logit_bias={str(token): 8}, presence_penalty=2.0, frequency_penalty=2.0
        )
        assert found.choices[0].text == expected.text
    with pytest.raises(openai.BadRequestError, match="outside"):
        client.completions.create(**asked, logit_bias={"999999": 1})


def test_responses(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "max_output_tokens": 10, "temperature": 0}
    whole = client.responses.create(input="Anna found", instructions="Be brief.", **asked)
    chat = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Anna found"}],
        max_tokens=10,
        temperature=0,
    )
    assert whole.output_text == chat.choices[0].message.content
    assert whole.status == {"length": "incomplete", "stop": "completed"}[chat.choices[0].finish_reason]
    turns: Any = [{"role": "user", "content": [{"type": "input_text", "text": "Anna found"}]}]
    events = list(client.responses.create(input=turns, instructions="Be brief.", stream=True, **asked))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    assert last.response.output_text == text
    with pytest.raises(openai.BadRequestError, match="not stored"):
        client.responses.create(input="a", previous_response_id="resp_1", **asked)


def test_many_clients_at_once_get_what_each_gets_alone(live: Live, client: openai.OpenAI) -> None:
    """Exact mode: a greedy text does not depend on its neighbours, sampled with a seed neither."""
    prompts = [f"Number {i} found a lamp" for i in range(10)]

    def asked(i: int) -> Any:
        return {"model": "tiny", "prompt": prompts[i], "max_tokens": 16, "temperature": i % 2, "seed": i, **LONG}

    alone = [client.completions.create(**asked(i)).choices[0].text for i in range(10)]

    async def one(many: openai.AsyncOpenAI, i: int) -> str:
        stream = await many.completions.create(**asked(i), stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as many:
            return await asyncio.gather(*(one(many, i) for i in range(10)))

    assert asyncio.run(together()) == alone
