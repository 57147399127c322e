"""``POST /v1/responses``: OpenAI's newest endpoint, text in and text out. Nothing is stored between requests."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from pydantic import Field

from dq_runtime.runtime.engine import Constraint, Request
from dq_runtime.server.answer import Answer, event
from dq_runtime.server.documents import ResponseObject, generating
from dq_runtime.server.errors import APIError
from dq_runtime.server.fields import Count, SamplingFields, Strict
from dq_runtime.server.job import Job, Piece
from dq_runtime.server.messages import ContentPart, text_of
from dq_runtime.server.service import UNLIMITED, new_id, service_of

router = APIRouter()


class InputMessage(Strict):
    """A turn of the conversation."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]


class TextFormat(Strict):
    """As ``response_format`` of chats, one level flatter."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class TextSettings(Strict):
    """What the text must look like."""

    format: TextFormat | None = None


class ResponseRequest(SamplingFields):
    """OpenAI's response request."""

    input: str | Annotated[list[InputMessage], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    text: TextSettings | None = None
    store: bool | None = None
    tools: list[dict[str, Any]] | None = None
    previous_response_id: str | None = None

    def check(self) -> None:
        """What needs a memory, or a tool, that this server has not."""
        if self.previous_response_id is not None:
            message = "responses are not stored here; send the whole conversation as input"
            raise APIError(400, message, "previous_response_id")
        if self.tools:
            raise APIError(400, "tools are taken by /v1/chat/completions only", "tools")

    def messages(self) -> list[dict[str, Any]]:
        """The conversation for the chat template."""
        first = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        if isinstance(self.input, str):
            return [*first, {"role": "user", "content": self.input}]
        roles = {"developer": "system"}
        turns = [
            {"role": roles.get(turn.role, turn.role), "content": text_of(turn.content, f"input.{i}.content")}
            for i, turn in enumerate(self.input)
        ]
        return [*first, *turns]

    def constraint(self) -> Constraint | None:
        """What ``text.format`` asks for."""
        form = None if self.text is None else self.text.format
        if form is None or form.type == "text":
            return None
        if form.type == "json_object":
            return Constraint("json_object")
        if form.schema_ is None:
            raise APIError(400, "text.format json_schema needs the field schema", "text.format.schema")
        return Constraint("json_schema", json.dumps(form.schema_))


class ResponseForm:
    """One output message of one text part, and the events that OpenAI's clients follow it by."""

    def __init__(self, model: str, body: ResponseRequest) -> None:
        self._id, self._item, self._model, self._created = new_id("resp_"), new_id("msg_"), model, int(time.time())
        self._body = body
        self._number = 0
        self._text: list[str] = []

    def begin(self) -> bytes:
        item = {"id": self._item, "type": "message", "status": "in_progress", "role": "assistant", "content": []}
        place = {"item_id": self._item, "output_index": 0, "content_index": 0}
        return (
            self._event("response.created", {"response": self._object("in_progress", [], None)})
            + self._event("response.in_progress", {"response": self._object("in_progress", [], None)})
            + self._event("response.output_item.added", {"output_index": 0, "item": item})
            + self._event("response.content_part.added", place | {"part": _part("")})
        )

    def pieces(self, pieces: Sequence[Piece]) -> bytes:
        found = b""
        for piece in pieces:
            if piece.text:
                self._text.append(piece.text)
                fields = {"item_id": self._item, "output_index": 0, "content_index": 0, "delta": piece.text}
                found += self._event("response.output_text.delta", fields | {"logprobs": []})
        return found

    def end(self, job: Job) -> bytes:
        text = "".join(self._text)
        place = {"item_id": self._item, "output_index": 0, "content_index": 0}
        whole = self.whole(job)
        last = "response.completed" if whole["status"] == "completed" else "response.incomplete"
        return (
            self._event("response.output_text.done", place | {"text": text, "logprobs": []})
            + self._event("response.content_part.done", place | {"part": _part(text)})
            + self._event("response.output_item.done", {"output_index": 0, "item": whole["output"][0]})
            + self._event(last, {"response": whole})
        )

    def whole(self, job: Job) -> dict[str, Any]:
        choice = job.choices[0]
        status = "incomplete" if choice.reason == "length" else "completed"
        message = {"id": self._item, "type": "message", "status": status, "role": "assistant"}
        usage = {
            "input_tokens": choice.prompt_tokens,
            "input_tokens_details": {"cached_tokens": choice.cached_tokens},
            "output_tokens": choice.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": choice.prompt_tokens + choice.completion_tokens,
        }
        return self._object(status, [message | {"content": [_part("".join(choice.text))]}], usage)

    def _object(self, status: str, output: list[Any], usage: dict[str, Any] | None) -> dict[str, Any]:
        body = self._body
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self._model,
            "output": output,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": {"format": {"type": "text"}} if body.text is None else body.text.model_dump(by_alias=True),
            "tool_choice": "none",
            "tools": [],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": usage,
            "metadata": {},
        }

    def _event(self, name: str, fields: dict[str, Any]) -> bytes:
        self._number += 1
        return event({"type": name, "sequence_number": self._number - 1} | fields, name)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


@router.post("/v1/responses", responses=generating(ResponseObject))
async def responses(body: ResponseRequest, http: HTTPRequest) -> Answer:
    """Answer a text or a conversation."""
    service = service_of(http)
    service.served.check_name(body.model)
    body.check()

    def requests() -> list[Request]:
        tokens = service.served.encode_chat(body.messages(), None)
        sampling = body.sampling(service.served.defaults)
        return [Request(tokens, body.max_output_tokens or UNLIMITED, sampling, constraint=body.constraint())]

    job = await service.job(http, body, requests)
    return Answer(job, ResponseForm(service.served.name, body), bool(body.stream))
