"""What answers look like, for the OpenAPI document (answers themselves are written as text, not through these)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class ErrorText(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """OpenAI's error."""

    error: ErrorText


class Usage(BaseModel):
    """Tokens of an answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class ChatMessage(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    tool_calls: list[dict[str, Any]] | None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    """OpenAI's chat completion."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(BaseModel):
    """One continuation."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """OpenAI's completion."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class ResponseObject(BaseModel):
    """OpenAI's response, the fields that are always there."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete", "in_progress"]
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None


class ModelCard(BaseModel):
    """The model and its size."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    bits: list[int]
    bits_per_weight: float | None
    size_bytes: int


class ModelList(BaseModel):
    """All models: the one."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    """Whether the server can be sent requests, and how busy it is."""

    status: Literal["ok", "stopping", "failed"]
    running: int
    waiting: int


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's ``responses`` for these statuses."""
    return {status: {"model": Error} for status in statuses}


def generating(answer: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's ``responses`` of a generating endpoint: ``answer`` whole, or a stream of events."""
    event = {"type": "object", "properties": {"event": {"type": "string"}, "data": {"type": "string"}}}
    stream = {"text/event-stream": {"schema": event}}
    return {
        200: {"model": answer, "content": stream},
        **errors(400, 401, 404, 408, 413, 429, 500, 503, 504),
    }
