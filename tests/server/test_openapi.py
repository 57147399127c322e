"""schemathesis writes requests from our OpenAPI document, right and wrong ones, and compares the answers with it."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings

from server.live_server import Live

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
from schemathesis.checks import positive_data_acceptance  # noqa: E402 (only where it is installed)

OPERATIONS = [
    ("GET", "/health"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
]


@pytest.fixture(scope="module")
def document(live: Live) -> Any:
    return schemathesis.openapi.from_url(live.url + "/openapi.json")


CASES = [
    (*operation, mode)
    for operation in OPERATIONS
    for mode in schemathesis.GenerationMode
    if mode.is_positive or operation[0] == "POST"  # without a body there is nothing that can be wrong
]


@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_the_api_is_what_its_document_says(method: str, path: str, mode: Any, document: Any) -> None:
    operation = document[path][method]

    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(case=operation.as_strategy(generation_mode=mode))
    def try_it(case: Any) -> None:
        check(case)

    try_it()


def is_more(tokens: Any) -> bool:
    return isinstance(tokens, int) and tokens > 3


def check(case: Any) -> None:
    """The answer to ``case`` is one that the document promises."""
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        # As valid as it was, and short: how long texts are is not what is tested here.
        if isinstance(case.body, dict) and (case.body.get(name) is None or is_more(case.body[name])):
            case.body[name] = 3
    # All checks but one: what is well-formed may still be refused, as a prompt that is too long.
    case.call_and_validate(excluded_checks=[positive_data_acceptance])


def test_the_document_is_whole(live: Live) -> None:
    found = httpx.get(live.url + "/openapi.json").json()
    operations = {(method.upper(), path) for path, found in found["paths"].items() for method in found}
    assert operations == {("GET", "/"), *OPERATIONS}
    for path, operations in found["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"], path
