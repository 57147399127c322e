"""docs/serve.md names what there is, and the command loads no more than it needs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from dq_runtime.cli import main
from dq_runtime.runtime.engine import FinishedEvent

ROOT = Path(__file__).parents[2]


def test_the_page_lists_the_options_of_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["serve", "--help"]) == 0
    known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out)) - {"--help"}
    rows = "\n".join(re.findall(r"^\| `--.*$", (ROOT / "docs" / "serve.md").read_text(), re.M))
    assert set(re.findall(r"--[a-z][a-z-]+", rows)) == known


def test_the_command_line_does_not_load_the_server_before_it_is_asked_to() -> None:
    code = """
import json, sys
from dq_runtime.cli import main
main(["serve", "--help"]); main(["chat", "--help"])
print(json.dumps(sorted({"fastapi", "uvicorn", "prometheus_client", "prompt_toolkit", "torch"} & set(sys.modules))))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_the_extra_is_named_where_it_is_missing(
    packed_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("dq_runtime.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", str(packed_model)]) == 2
    assert 'pip install "dq_runtime[serve]"' in capsys.readouterr().err


def test_openais_client_hears_of_an_error_in_the_middle_of_a_stream(fake: Callable[..., Any]) -> None:
    def failing(request: Any) -> Any:
        yield from ("one ", 0.1, "two ", 0.1, FinishedEvent("error", message="out of luck"))

    with fake(failing) as live:
        client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(model="fake", prompt="a", stream=True)
        said = (chunk.choices[0].text for chunk in stream)
        assert [next(said), next(said)] == ["one ", "two "]
        with pytest.raises(openai.APIError, match="out of luck"):
            next(said)
