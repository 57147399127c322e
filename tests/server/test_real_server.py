"""SmolLM2-135M-Instruct behind the server: OpenAI's client, four texts at once, and the page in a browser."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from dq_runtime.runtime.engine import EngineSettings
from dq_runtime.server.run import open_served
from server.live_server import Live, nothing_held, serving

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(300)]

FRANCE: Any = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def real(smollm2_gguf: Path) -> Iterator[Live]:
    settings = EngineSettings(max_running=8, max_model_len=1024)
    engine, served = open_served(str(smollm2_gguf), "smollm2", "cpu", True, settings)
    with serving(engine, served) as found:
        yield found
        nothing_held(engine)


def test_it_knows_the_capital_of_france_streamed_and_whole(real: Live) -> None:
    client = openai.OpenAI(base_url=f"{real.url}/v1", api_key="none")
    asked: Any = {"model": "smollm2", "messages": FRANCE, "max_tokens": 10, "temperature": 0}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    assert whole is not None
    assert "Paris" in whole
    stream = client.chat.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole


def test_four_at_once_say_what_each_says_alone(real: Live) -> None:
    asked: list[Any] = [
        {"model": "smollm2", "prompt": f"The capital of {name} is", "max_tokens": 4, "temperature": 0}
        for name in ("France", "Italy", "Japan", "Peru")
    ]

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{real.url}/v1", api_key="none") as client:
            found = await asyncio.gather(*(client.completions.create(**one) for one in asked))
            return [one.choices[0].text for one in found]

    client = openai.OpenAI(base_url=f"{real.url}/v1", api_key="none")
    assert asyncio.run(together()) == [client.completions.create(**one).choices[0].text for one in asked]


def test_the_second_turn_finds_the_first_in_memory(real: Live) -> None:
    client = openai.OpenAI(base_url=f"{real.url}/v1", api_key="none")
    system: Any = {"role": "system", "content": "You know geography. " * 30}
    asked: Any = {"model": "smollm2", "max_tokens": 4, "temperature": 0}
    client.chat.completions.create(messages=[system, *FRANCE], **asked)
    usage = client.chat.completions.create(messages=[system, {"role": "user", "content": "And Italy?"}], **asked).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert (usage.prompt_tokens_details.cached_tokens or 0) >= 64
