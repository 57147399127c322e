"""``POST /v1/completions``: OpenAI's older endpoint, which continues plain text."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from pydantic import Field

from dq_runtime.runtime.engine import Request
from dq_runtime.server.answer import DONE, Answer, event
from dq_runtime.server.documents import Completion, generating
from dq_runtime.server.errors import APIError
from dq_runtime.server.fields import MOST_CHOICES, ChoiceFields, Count
from dq_runtime.server.job import Choice, Job, Piece, copies
from dq_runtime.server.logprobs import completion_form
from dq_runtime.server.served import Served
from dq_runtime.server.service import new_id, service_of

router = APIRouter()
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(ChoiceFields):
    """OpenAI's completion request. ``max_tokens`` is 16 where it is left out, as there."""

    prompt: str | Annotated[list[str], Field(min_length=1)] | Ids | Annotated[list[Ids], Field(min_length=1)]
    max_tokens: Count | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=20)] | None = None
    suffix: str | None = None

    def check(self) -> None:
        """Fields that contradict each other, or that no model here can follow."""
        if self.suffix:
            raise APIError(400, "suffix is not supported: these models were not made to fill in the middle", "suffix")
        if self.echo and self.logprobs is not None:
            raise APIError(400, "echo with logprobs is not supported: prompts are not scored", "echo")
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise APIError(400, f"best_of must be at least n, got {self.best_of} and {self.n}", "best_of")
        if self.best_of is not None and self.best_of > (self.n or 1) and self.stream:
            raise APIError(400, "best_of cannot be streamed: which is best is known at the end", "best_of")

    def prompts(self, served: Served) -> list[list[int]]:
        """Token ids of each prompt."""
        if isinstance(self.prompt, str):
            return [served.encode_text(self.prompt)]
        if isinstance(self.prompt[0], int):
            return [served.check_ids(self.prompt)]
        return [served.encode_text(p) if isinstance(p, str) else served.check_ids(p) for p in self.prompt]


class CompletionForm:
    """Completions of ``echoes`` (the texts that come first, "" for none), ``n`` kept of ``drawn`` for each."""

    def __init__(self, model: str, echoes: list[str], n: int, drawn: int, logprobs: int | None, usage: bool) -> None:
        self._id, self._model, self._created = new_id("cmpl-"), model, int(time.time())
        self._echoes, self._n, self._drawn, self._logprobs, self._usage = echoes, n, drawn, logprobs, usage
        self._offsets = [len(echo) for echo in echoes for _ in range(n)]
        fields = {**self._head()} | ({"usage": None} if usage else {})
        self._chunk_head = f"data: {json.dumps(fields, separators=(',', ':'))[:-1]}"

    def begin(self) -> bytes:
        echoes = enumerate(echo for echo in self._echoes for _ in range(self._n))
        return b"".join(self._chunk(number, echo, "null", None) for number, echo in echoes if echo)

    def pieces(self, pieces: Sequence[Piece]) -> bytes:
        found = b""
        for piece in pieces:
            number = piece.choice.number
            told = "null"
            if self._logprobs is not None and piece.logprobs:
                told = json.dumps(completion_form(piece.logprobs, self._offsets[number]))
                self._offsets[number] += sum(len(token.text) for token in piece.logprobs)
            if piece.text or piece.ended or piece.logprobs:
                found += self._chunk(number, piece.text, told, _reason(piece.choice) if piece.ended else None)
        return found

    def end(self, job: Job) -> bytes:
        return (event(self._head() | {"choices": [], "usage": job.usage()}) if self._usage else b"") + DONE

    def whole(self, job: Job) -> dict[str, Any]:
        kept = []
        for i, echo in enumerate(self._echoes):
            drawn = job.choices[i * self._drawn : (i + 1) * self._drawn]
            if self._drawn > self._n:
                drawn = sorted(drawn, key=_mean_logprob, reverse=True)[: self._n]
            kept += [(echo, choice) for choice in drawn]
        choices = [self._whole(number, echo, choice) for number, (echo, choice) in enumerate(kept)]
        return self._head() | {"choices": choices, "usage": job.usage()}

    def _head(self) -> dict[str, Any]:
        return {"id": self._id, "object": "text_completion", "created": self._created, "model": self._model}

    def _chunk(self, number: int, text: str, logprobs: str, reason: str | None) -> bytes:
        ended = "null" if reason is None else f'"{reason}"'
        choice = f'{{"index":{number},"text":{json.dumps(text)},"logprobs":{logprobs},"finish_reason":{ended}}}'
        return f'{self._chunk_head},"choices":[{choice}]}}\n\n'.encode()

    def _whole(self, number: int, echo: str, choice: Choice) -> dict[str, Any]:
        told = None if self._logprobs is None else completion_form(choice.logprobs, len(echo))
        text = echo + "".join(choice.text)
        return {"index": number, "text": text, "logprobs": told, "finish_reason": _reason(choice)}


def _reason(choice: Choice) -> str:
    return "length" if choice.reason == "length" else "stop"


def _mean_logprob(choice: Choice) -> float:
    """OpenAI's measure of the best: log probability per token."""
    return sum(token.logprob for token in choice.logprobs) / max(1, len(choice.logprobs))


@router.post("/v1/completions", responses=generating(Completion))
async def completions(body: CompletionRequest, http: HTTPRequest) -> Answer:
    """Continue a text."""
    service = service_of(http)
    service.served.check_name(body.model)
    body.check()
    n = body.n or 1
    drawn = max(n, body.best_of or 1)
    if not isinstance(body.prompt, str) and len(body.prompt) * drawn > MOST_CHOICES and not _is_ids(body.prompt):
        raise APIError(400, f"{len(body.prompt)} prompts times {drawn} are more than {MOST_CHOICES} choices", "prompt")
    scored = 0 if drawn > n and body.logprobs is None else body.logprobs
    echoes: list[str] = []

    def requests() -> list[Request]:
        sampling = body.choice_sampling(service.served.defaults)
        most, ends = body.max_tokens or 16, bool(body.ignore_eos)
        found = []
        for tokens in body.prompts(service.served):
            echoes.append(service.served.token_text(tokens) if body.echo else "")
            request = Request(tokens, most, sampling, body.stops(), scored, body.constraint(), ends)
            found += copies(request, drawn)
        return found

    job = await service.job(http, body, requests, drawn)
    form = CompletionForm(service.served.name, echoes, n, drawn, body.logprobs, body.wants_usage())
    return Answer(job, form, bool(body.stream))


def _is_ids(prompt: Sequence[Any]) -> bool:
    return isinstance(prompt[0], int)
