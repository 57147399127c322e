"""``POST /v1/chat/completions``."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from pydantic import Field

from dq_runtime.runtime.engine import Constraint, Request, TokenLogprob
from dq_runtime.server.answer import DONE, Answer, event
from dq_runtime.server.documents import ChatCompletion, generating
from dq_runtime.server.errors import APIError
from dq_runtime.server.fields import ChoiceFields, Count
from dq_runtime.server.job import Choice, Job, Piece, copies
from dq_runtime.server.logprobs import chat_form
from dq_runtime.server.messages import Message, NamedTool, Tool, for_template
from dq_runtime.server.service import UNLIMITED, new_id, service_of
from dq_runtime.server.tools import Call, CallReader, constraint

router = APIRouter()


class ChatRequest(ChoiceFields):
    """OpenAI's chat completion request."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    def check(self) -> None:
        """Fields that contradict each other, or that would be dropped in silence."""
        if self.top_logprobs is not None and not self.logprobs:
            raise APIError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        for old in ("functions", "function_call"):
            if (self.model_extra or {}).get(old) is not None:
                raise APIError(400, f"{old} is the old form; use tools and tool_choice", old)
        if self.must_call and self.response_format is not None and self.response_format.type != "text":
            raise APIError(400, "tool_choice and response_format cannot both be enforced", "tool_choice")

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a tool call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    def functions(self) -> list[dict[str, Any]]:
        """Definitions of the functions that may be called now; 400 where the one asked for is not among them."""
        found = [tool.function.model_dump(exclude_none=True) for tool in self.tools or []]
        if isinstance(self.tool_choice, NamedTool):
            found = [f for f in found if f["name"] == self.tool_choice.function.name]
        if self.must_call and not found:
            raise APIError(400, "tool_choice names no function of tools", "tool_choice")
        return [] if self.tool_choice == "none" else found

    def enforced(self, functions: list[dict[str, Any]]) -> Constraint | None:
        """What the text must be: a tool call, or what ``response_format`` says."""
        return constraint(functions) if self.must_call else self.constraint()


class ChatForm:
    """Chat completions; with ``readers`` (one a choice) tool calls are taken out of the text."""

    def __init__(self, model: str, choices: int, logprobs: bool, usage: bool, readers: list[CallReader] | None) -> None:
        self._id, self._model, self._created = new_id("chatcmpl-"), model, int(time.time())
        self._choices, self._logprobs, self._usage, self._readers = choices, logprobs, usage, readers
        self._calls = [0] * choices
        fields = {**self._head("chat.completion.chunk")} | ({"usage": None} if usage else {})
        self._chunk_head = f"data: {json.dumps(fields, separators=(',', ':'))[:-1]}"

    def begin(self) -> bytes:
        first = {"role": "assistant", "content": ""}
        return b"".join(self._chunk(i, json.dumps(first), None, ()) for i in range(self._choices))

    def pieces(self, pieces: Sequence[Piece]) -> bytes:
        return b"".join(self._piece(piece) for piece in pieces)

    def end(self, job: Job) -> bytes:
        if not self._usage:
            return DONE
        return event(self._head("chat.completion.chunk") | {"choices": [], "usage": job.usage()}) + DONE

    def whole(self, job: Job) -> dict[str, Any]:
        choices = [self._whole(choice) for choice in job.choices]
        return self._head("chat.completion") | {"choices": choices, "usage": job.usage()}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _piece(self, piece: Piece) -> bytes:
        number = piece.choice.number
        text, calls = self._read(number, piece.text, piece.ended)
        found = b""
        if text or piece.logprobs:
            found += self._chunk(number, f'{{"content":{json.dumps(text)}}}', None, piece.logprobs)
        for call in calls:
            delta = {"tool_calls": [{"index": self._calls[number]} | call.form()]}
            self._calls[number] += 1
            found += self._chunk(number, json.dumps(delta), None, ())
        if piece.ended:
            found += self._chunk(number, "{}", self._reason(piece.choice), ())
        return found

    def _chunk(self, number: int, delta: str, reason: str | None, logprobs: Sequence[TokenLogprob]) -> bytes:
        """One event, put together as text: 3 us, where building and dumping the whole object takes 4 times that."""
        told = json.dumps(chat_form(logprobs)) if logprobs else "null"
        ended = "null" if reason is None else f'"{reason}"'
        choice = f'{{"index":{number},"delta":{delta},"logprobs":{told},"finish_reason":{ended}}}'
        return f'{self._chunk_head},"choices":[{choice}]}}\n\n'.encode()

    def _read(self, number: int, text: str, ended: bool) -> tuple[str, list[Call]]:
        if self._readers is None:
            return text, []
        content, calls = self._readers[number].push(text)
        if ended:
            rest, more = self._readers[number].finish()
            content, calls = content + rest, calls + more
        return content, calls

    def _reason(self, choice: Choice) -> str:
        if self._readers is not None and self._readers[choice.number].called:
            return "tool_calls"
        return "length" if choice.reason == "length" else "stop"

    def _whole(self, choice: Choice) -> dict[str, Any]:
        text, calls = self._read(choice.number, "".join(choice.text), True)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": [call.form() for call in calls]}
        return {
            "index": choice.number,
            "message": message,
            "logprobs": chat_form(choice.logprobs) if self._logprobs else None,
            "finish_reason": self._reason(choice),
        }


@router.post("/v1/chat/completions", responses=generating(ChatCompletion))
async def chat_completions(body: ChatRequest, http: HTTPRequest) -> Answer:
    """Answer a conversation."""
    service = service_of(http)
    service.served.check_name(body.model)
    body.check()
    functions = body.functions()
    tools = [{"type": "function", "function": f} for f in functions] or None
    n = body.n or 1

    def requests() -> list[Request]:
        request = Request(
            service.served.encode_chat(for_template(body.messages), tools),
            body.max_completion_tokens or body.max_tokens or UNLIMITED,
            body.choice_sampling(service.served.defaults),
            body.stops(),
            (body.top_logprobs or 0) if body.logprobs else None,
            body.enforced(functions),
            bool(body.ignore_eos),
        )
        return copies(request, n)

    job = await service.job(http, body, requests, n)
    readers = [CallReader(body.must_call) for _ in range(n)] if tools else None
    form = ChatForm(service.served.name, n, bool(body.logprobs), body.wants_usage(), readers)
    return Answer(job, form, bool(body.stream))
