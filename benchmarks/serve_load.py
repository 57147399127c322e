"""Clients of a server with OpenAI's HTTP API: so many at once, each asking again as soon as it is answered.

aiohttp and asyncio in one process, for either server alike: it parses HTTP in C, where httpx does it in Python, and
every microsecond of a client is taken from the server on the same cores. The load tools that exist (guidellm, aiperf)
keep a core busy by themselves, which on a machine of two cores would measure the tool.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

# Nobody waits longer for anything here; a server that hangs ends the benchmark with an error.
PATIENCE = 300.0


@dataclass
class Answer:
    """One streamed completion: seconds from asking to the first text, between the pieces that followed, and until the
    end; tokens as the server counts them; why it failed, if it did."""

    first: float = 0.0
    gaps: list[float] = field(default_factory=list)
    seconds: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    error: str | None = None


async def ask(client: aiohttp.ClientSession, prompt: str, tokens: int) -> Answer:
    """One greedy completion of exactly ``tokens`` tokens."""
    answer = Answer()
    body = {
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began = last = time.perf_counter()
    try:
        async with client.post("/v1/completions", json=body) as response:
            if response.status != 200:
                answer.error = f"{response.status}: {(await response.read())[:200]!r}"
                return answer
            async for event in events(response):
                now = time.perf_counter()
                if usage := event.get("usage"):
                    answer.prompt_tokens, answer.tokens = usage["prompt_tokens"], usage["completion_tokens"]
                if event.get("error"):
                    answer.error = str(event["error"])
                if any(choice.get("text") for choice in event.get("choices", [])):
                    if answer.first:
                        answer.gaps.append(now - last)
                    else:
                        answer.first = now - began
                    last = now
    except (aiohttp.ClientError, TimeoutError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.seconds = time.perf_counter() - began
    return answer


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream."""
    rest = b""
    async for piece in response.content.iter_any():
        *whole, rest = (rest + piece).split(b"\n\n")
        for text in whole:
            if text.startswith(b"data: ") and text != b"data: [DONE]":
                yield json.loads(text[6:])


async def _load(url: str, prompts: Sequence[str], concurrency: int, tokens: int) -> tuple[list[Answer], float]:
    waiting, answers = list(reversed(prompts)), list[Answer]()
    # A connection a request: llama.cpp's server closes idle ones at a moment when the next request may be under way.
    connector = aiohttp.TCPConnector(limit=concurrency, force_close=True)
    patience = aiohttp.ClientTimeout(total=PATIENCE)
    async with aiohttp.ClientSession(url, connector=connector, timeout=patience) as client:

        async def one() -> None:
            while waiting:
                answers.append(await ask(client, waiting.pop(), tokens))

        began = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(concurrency)))
    return answers, time.perf_counter() - began


def load(url: str, prompts: Sequence[str], concurrency: int, tokens: int) -> dict[str, Any]:
    """Every prompt once, ``concurrency`` at a time. ``tokens_per_second`` counts generated tokens of all answers over
    the whole time, prompts included; times to first token and between pieces of text are in seconds."""
    answers, seconds = asyncio.run(_load(url, prompts, concurrency, tokens))
    good = [a for a in answers if a.error is None]
    firsts, gaps = sorted(a.first for a in good), sorted(gap for a in good for gap in a.gaps)
    return {
        "concurrency": concurrency,
        "requests": len(answers),
        "errors": [a.error for a in answers if a.error is not None],
        "prompt_tokens": sum(a.prompt_tokens for a in good),
        "tokens": sum(a.tokens for a in good),
        "seconds": seconds,
        "tokens_per_second": sum(a.tokens for a in good) / seconds,
        "first_token_p50": quantile(firsts, 0.5),
        "first_token_p95": quantile(firsts, 0.95),
        "between_tokens_p50": quantile(gaps, 0.5),
        "between_tokens_p95": quantile(gaps, 0.95),
    }


def quantile(ordered: Sequence[float], share: float) -> float | None:
    """Of sorted values, with linear interpolation; None of nothing."""
    if len(ordered) < 2:
        return ordered[0] if ordered else None
    return statistics.quantiles(ordered, n=100, method="inclusive")[round(share * 100) - 1]
