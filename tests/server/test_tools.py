"""Tool calls: out of the model's text, into OpenAI's fields, however the text is cut into pieces."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_runtime.server.tools import Call, CallReader, constraint, read_call

CALL = '<tool_call>\n{"name": "look_up", "arguments": {"word": "lamp \\u2603", "n": 2}}\n</tool_call>'
SECOND = '<tool_call>{"name": "stop", "arguments": {}}</tool_call>'
TEMPLATE = (
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% for c in m['tool_calls'] or [] %}"
    "{{ c['function']['arguments']['word'] }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Look a word up.",
            "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
        },
    },
    {"type": "function", "function": {"name": "stop"}},
]


def read(pieces: list[str], whole: bool = False) -> tuple[str, list[tuple[str, Any]]]:
    reader = CallReader(whole)
    content, calls = "", []
    for piece in pieces:
        text, found = reader.push(piece)
        content += text
        calls += found
    text, found = reader.finish()
    assert reader.called == bool(calls + found)
    return content + text, [(call.name, json.loads(call.arguments)) for call in calls + found]


EXPECTED = [("look_up", {"word": "lamp ☃", "n": 2}), ("stop", {})]


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("no call at all\n", "no call at all\n", []),
        (CALL, "", EXPECTED[:1]),
        (f"Let me see.\n\n{CALL}\n{SECOND}", "Let me see.", EXPECTED),
        (f"{CALL} and {SECOND}", " and ", EXPECTED),
        (CALL.removesuffix("</tool_call>"), "", EXPECTED[:1]),  # max_tokens ended it just before the tag
        ("<tool_call>{broken</tool_call>", "<tool_call>{broken</tool_call>", []),
        ('<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>', []),
        ("<tool_call>{cut", "<tool_call>{cut", []),
        ("a < b <tool", "a < b <tool", []),
        ("", "", []),
    ],
)
def test_calls_are_found_wherever_the_text_is_cut(text: str, content: str, calls: list[Any]) -> None:
    assert read([text]) == (content, calls)
    assert read(list(text)) == (content, calls)

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.integers(0, len(text)), max_size=6))
    def cut(places: list[int]) -> None:
        ends = sorted({0, *places, len(text)})
        pieces = [text[a:b] for a, b in pairwise(ends)]
        assert read(pieces) == (content, calls)

    cut()


def test_arguments_may_be_text_already_or_have_the_other_name() -> None:
    assert read_call('{"name": "f", "arguments": "{\\"a\\": 1}"}') == Call("f", '{"a": 1}', id=read_call_id())
    found = read_call('{"name": "f", "parameters": {"a": 1}}')
    assert found is not None
    assert json.loads(found.arguments) == {"a": 1}
    assert read_call("[1]") is None
    assert read_call("[" * 100_000) is None


class read_call_id:  # noqa: N801 (an id that equals every other)
    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and other.startswith("call_")

    __hash__ = None  # type: ignore[assignment]


def test_an_enforced_call_is_read_without_tags() -> None:
    text = '{"name": "stop", "arguments": {}}'
    assert read(list(text), whole=True) == ("", [("stop", {})])
    assert read(["{cut"], whole=True) == ("{cut", [])
    schema = json.loads(constraint([tool["function"] for tool in TOOLS]).value)
    assert [one["properties"]["name"]["const"] for one in schema["anyOf"]] == ["look_up", "stop"]


def client_of(live: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


def say(text: str) -> Callable[..., Any]:
    return lambda request: iter([text[i : i + 7] for i in range(0, len(text), 7)])


def test_calls_arrive_at_the_client_whole_and_streamed(fake: Callable[..., Any]) -> None:
    asked: Any = {"model": "fake", "messages": [{"role": "user", "content": "lamp?"}], "tools": TOOLS}
    with fake(say(f"Let me see.\n{CALL}\n{SECOND}"), template=TEMPLATE) as live:
        client = client_of(live)
        choice = client.chat.completions.create(**asked).choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "Let me see."
        calls: Any = choice.message.tool_calls
        assert [(c.function.name, json.loads(c.function.arguments)) for c in calls] == EXPECTED
        assert len({c.id for c in calls}) == 2
        deltas = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
        streamed: Any = [call for choice in deltas for call in choice.delta.tool_calls or []]
        assert [(c.index, c.function.name, json.loads(c.function.arguments)) for c in streamed] == [
            (i, *call) for i, call in enumerate(EXPECTED)
        ]
        assert "".join(choice.delta.content or "" for choice in deltas) == "Let me see."
        assert deltas[-1].finish_reason == "tool_calls"
        untouched = client.chat.completions.create(**asked, tool_choice="none").choices[0]
        assert untouched.message.content == f"Let me see.\n{CALL}\n{SECOND}"
        assert untouched.message.tool_calls is None


def test_tools_and_their_results_reach_the_template(fake: Callable[..., Any]) -> None:
    with fake(say("fine"), template=TEMPLATE) as live:
        call: Any = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "lantern"}'}}
        messages: Any = [
            {"role": "user", "content": "lamp?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "a light"},
        ]
        client = client_of(live)
        client.chat.completions.create(model="fake", messages=messages, tools=TOOLS)
        prompt = live.application.api.state.service.served.model.decode(live.engine.requests[0].tokens)
        for part in ("<tools>", "Look a word up.", "lantern", "a light"):
            assert part in prompt
        call["function"]["arguments"] = "{broken"
        with pytest.raises(openai.BadRequestError, match="not JSON"):
            client.chat.completions.create(model="fake", messages=messages, tools=TOOLS)


def test_a_call_that_is_demanded_is_enforced(fake: Callable[..., Any]) -> None:
    asked: Any = {"model": "fake", "messages": [{"role": "user", "content": "lamp?"}], "tools": TOOLS}
    with fake(say('{"name": "stop", "arguments": {}}'), template=TEMPLATE) as live:
        client = client_of(live)
        chosen: Any = {"type": "function", "function": {"name": "stop"}}
        for choice, names in (("required", ["look_up", "stop"]), (chosen, ["stop"])):
            found = client.chat.completions.create(**asked, tool_choice=choice).choices[0]
            calls: Any = found.message.tool_calls
            assert found.message.content is None
            assert calls[0].function.name == "stop"
            wanted = json.loads(live.engine.requests[-1].constraint.value)["anyOf"]
            assert [one["properties"]["name"]["const"] for one in wanted] == names
        with pytest.raises(openai.BadRequestError, match="names no function"):
            client.chat.completions.create(**asked, tool_choice={"type": "function", "function": {"name": "other"}})
