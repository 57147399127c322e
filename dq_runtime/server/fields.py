"""What requests of all endpoints have in common: the sampling fields, with OpenAI's names and limits and vLLM's for the
rest. Wrong types and values out of range are refused; fields that nobody here knows are ignored and logged, as vLLM
does, because clients send new ones before servers learn of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dq_runtime.runtime.engine import Constraint
from dq_runtime.runtime.sampling import Sampling
from dq_runtime.server.errors import APIError

MOST_CHOICES = 128  # OpenAI's limit of n; here also of prompts times n
MOST_SEED = 2**63 - 1

Count = Annotated[int, Field(ge=1)]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
Mass = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]


class Strict(BaseModel):
    """No coercion ("1" is no number), and extra fields are kept, so that they can be logged."""

    model_config = ConfigDict(strict=True, extra="allow")


class StreamOptions(Strict):
    """``include_usage``: a last chunk says how many tokens there were."""

    include_usage: bool | None = None


class JSONSchema(Strict):
    """The schema that the answer must follow, and its name."""

    name: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """``text``, any JSON object, or JSON of a schema: enforced token by token."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    def constraint(self) -> Constraint | None:
        """What the engine must enforce; :class:`APIError` where the schema is missing."""
        if self.type == "json_object":
            return Constraint("json_object")
        if self.type == "text":
            return None
        if self.json_schema is None:
            raise APIError(400, "response_format json_schema needs the field json_schema", "response_format")
        return Constraint("json_schema", json.dumps(self.json_schema.schema_))


class SamplingFields(Strict):
    """How tokens are chosen. None means the checkpoint's own default (generation_config.json), else OpenAI's."""

    model: str | None = None
    temperature: Temperature | None = None
    top_p: Mass | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None  # 0 and -1: all tokens
    min_p: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] | None = None
    # Nearer to 0, logits divided by it leave float32.
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-MOST_SEED, le=MOST_SEED)] | None = None
    stream: bool | None = None
    user: str | None = None

    def sampling(self, defaults: Mapping[str, Any], **more: Any) -> Sampling:
        """The engine's object; ``defaults`` are the checkpoint's, ``more`` what only some endpoints have."""
        asked = self.model_dump(include={"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"})
        given = {"temperature": 1.0, **defaults} | {name: value for name, value in asked.items() if value is not None}
        given["top_k"] = max(0, given.get("top_k", 0))
        return Sampling(**given, **more)


class ChoiceFields(SamplingFields):
    """What the two older endpoints add."""

    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, Field(pattern=r"^[0-9]{1,9}$")],
                Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)],
            ],
            Field(max_length=1024),
        ]
        | None
    ) = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    ignore_eos: bool | None = None  # vLLM's name: benchmarks ask for it

    def choice_sampling(self, defaults: Mapping[str, Any]) -> Sampling:
        """:meth:`sampling` with the penalties and biases."""
        return self.sampling(
            defaults,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
        )

    def stops(self) -> tuple[str, ...]:
        """The stop strings, however they were given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def wants_usage(self) -> bool:
        """Whether a stream ends with a count of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def constraint(self) -> Constraint | None:
        """What ``response_format`` asks for."""
        return None if self.response_format is None else self.response_format.constraint()


def seed_of(sampling: Sampling, number: int) -> int | None:
    """The seed of choice ``number``: choices of one request differ, and the first is what n=1 would give."""
    if sampling.seed is None or number == 0:
        return sampling.seed
    return (sampling.seed + number) % (MOST_SEED + 1)
