"""Conversations as clients send them, and as chat templates expect them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from dq_runtime.server.errors import APIError
from dq_runtime.server.fields import Strict

TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


class ContentPart(Strict):
    """A piece of a message. Only text is taken; other types are refused by name."""

    type: str
    text: str | None = None


class FunctionCall(Strict):
    """What an assistant called, ``arguments`` as JSON text."""

    name: str
    arguments: str


class ToolCall(Strict):
    """A call in an assistant's message."""

    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCall


class Message(Strict):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class FunctionDefinition(Strict):
    """A function that the model may call; ``parameters`` is a JSON schema."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Strict):
    """OpenAI's wrapping of a function."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Strict):
    """The name in a :class:`NamedTool`."""

    name: str


class NamedTool(Strict):
    """A ``tool_choice`` that names the one function to be called."""

    type: Literal["function"]
    function: NamedFunction


def for_template(messages: list[Message]) -> list[dict[str, Any]]:
    """Plain dicts with the roles and shapes that templates know: "developer" is the newer name of "system", "function"
    the older one of "tool", contents are strings, and arguments of calls objects."""
    return [_turn(number, message) for number, message in enumerate(messages)]


def _turn(number: int, message: Message) -> dict[str, Any]:
    role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    found: dict[str, Any] = {"role": role, "content": text_of(message.content, f"messages.{number}.content")}
    if message.name is not None:
        found["name"] = message.name
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        found["tool_calls"] = [_call(call, f"messages.{number}.tool_calls") for call in message.tool_calls]
    return found


def text_of(content: str | list[ContentPart] | None, where: str) -> str:
    """A content's text; 400 for parts that are not text."""
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.type not in TEXT_PARTS:
            raise APIError(400, f"{where}: this model reads text only, not {part.type[:50]!r}", where)
    return "".join(part.text or "" for part in content)


def _call(call: ToolCall, where: str) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        raise APIError(400, f"{where}: the arguments of {call.function.name[:64]!r} are not JSON", where) from None
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
