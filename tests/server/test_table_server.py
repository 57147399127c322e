"""A checkpoint on a table grid (nf4) behind the server: OpenAI's client gets the text that the model gives alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from unit.packed_checkpoints import pack_model

import dq_runtime
from dq_runtime.runtime.engine import EngineSettings
from dq_runtime.runtime.load import load
from dq_runtime.server.run import open_served
from dq_runtime.spec import GridSpec, QuantSpec
from server.live_server import Live, nothing_held, serving


@pytest.fixture(scope="module")
def table(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nf4") / "tiny"
    return pack_model(tiny_model, folder, QuantSpec(GridSpec.named("nf4", group_size=64)))


@pytest.fixture(scope="module")
def served(table: Path) -> Iterator[Live]:
    engine, served = open_served(str(table), "nf4", "cpu", True, EngineSettings(max_running=4, max_queue=16))
    with serving(engine, served) as found:
        yield found
        nothing_held(engine)


def test_it_says_what_the_model_says_alone_and_what_it_is(served: Live, table: Path) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")
    asked: Any = {"model": "nf4", "prompt": "Anna found", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**asked).choices[0].text
    assert whole == dq_runtime.generate(load(table, "cpu", exact=True), "Anna found", max_tokens=12).text
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)) == whole
    (card,) = client.models.list().data
    assert card.model_extra is not None
    assert (card.model_extra["bits"], card.model_extra["bits_per_weight"]) == ([4], 4.25)
