"""HTTP as OpenAI's clients expect it, on an engine that misbehaves on request: statuses, errors, keys, streams."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from dq_runtime.runtime.engine import EngineClosedError, FinishedEvent, Request
from dq_runtime.server import answer, gate
from dq_runtime.server.logs import JSONLines
from server.live_server import Live, nothing_held, until

Fake = Callable[..., Any]
CHAT = "/v1/chat/completions"
ASKED: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}


def post(live: Live, path: str = CHAT, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    return httpx.post(live.url + path, json=ASKED | body if path == CHAT else body, headers=headers, timeout=20)


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error, in OpenAI's schema."""
    assert response.status_code == status, response.text
    found: dict[str, Any] = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert found["message"]
    return found


def events(response: httpx.Response) -> list[Any]:
    """Data of all events but [DONE], which must be last."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "nobody", "content": "hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ""}, "stop.constrained-str"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a.[key]"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),  # this template takes none
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"stream": "yes"}, "stream"),
    ],
    ids=str,
)
def test_bad_input_is_400_and_names_the_field(change: dict[str, Any], param: str, fake: Fake) -> None:
    with fake() as live:
        found = error_of(post(live, **change), 400)
        assert found["param"] == param
        assert live.engine.requests == []


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "not valid JSON"),
        (b"", "required"),
        (b"\xff\xfe{}", "body"),
        (b'{"messages": ' + b"[" * 200_000, "body"),
        (b"[" * 100_000 + b"]" * 100_000, "body"),
        (b"[]", "dictionary"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "valid Unicode"),
        (b'{"messages": [{"role": "user", "content": "hi"}], "logit_bias": {"\\ud800": 1}}', "logit_bias"),
        (b'{"messages": [{"role": "user", "content": "hi"}], "temperature": NaN}', "finite"),
        (b'{"messages": [{"role": "user", "content": "hi"}], "temperature": -1e999}', "temperature"),
        (b'{"messages": [{"role": "user", "content": "hi"}], "seed": ' + b"9" * 5000 + b"}", "body"),
        (b'{"messages": [{"role": "user", "content": "hi"}], "max_tokens": -5}', "max_tokens"),
    ],
    ids=[
        "cut",
        "empty",
        "utf8",
        "deep",
        "nested",
        "list",
        "surrogate",
        "surrogate key",
        "nan",
        "infinite",
        "digits",
        "negative",
    ],
)
def test_hostile_bodies_are_400(body: bytes, said: str, fake: Fake) -> None:
    with fake() as live:
        response = httpx.post(live.url + CHAT, content=body, headers={"content-type": "application/json"})
        assert said in error_of(response, 400)["message"]
        assert post(live).status_code == 200


def test_huge_but_legal_parameters_are_taken(fake: Fake) -> None:
    with fake() as live:
        found = post(
            live, max_tokens=10**18, seed=-(2**63) + 1, top_k=10**12, presence_penalty=-2, stop=["x"] * 16, n=5
        )
        assert found.status_code == 200
        assert len({request.sampling.seed for request in live.engine.requests}) == 5


def test_unknown_fields_are_ignored_and_logged(fake: Fake, caplog: pytest.LogCaptureFixture) -> None:
    with fake() as live, caplog.at_level(logging.INFO, "dq.serve"):
        assert post(live, invented=1, another={"deep": [1]}).status_code == 200
        until(lambda: any(getattr(record, "ignored", None) for record in caplog.records))
    (record,) = [record for record in caplog.records if getattr(record, "ignored", None)]
    assert record.ignored == ["another", "invented"]  # type: ignore[attr-defined]
    assert record.levelno == logging.WARNING


def test_the_log_is_json_without_prompts_unless_asked_for(fake: Fake, caplog: pytest.LogCaptureFixture) -> None:
    secret = "Anna\nfound\u2028lamps"
    for wanted in (False, True):
        caplog.clear()
        with fake(log_prompts=wanted) as live, caplog.at_level(logging.INFO, "dq.serve"):
            response = post(live, messages=[{"role": "user", "content": secret}], max_tokens=3)
            until(lambda: any(hasattr(record, "status") for record in caplog.records))
        lines = [JSONLines().format(record) for record in caplog.records]
        assert all("\n" not in line and "\u2028" not in line for line in lines)
        (found,) = [json.loads(line) for line in lines if "status" in line]
        assert found["id"] == response.headers["x-request-id"]
        assert (found["path"], found["status"], found["outcome"]) == (CHAT, 200, "ok")
        assert found["completion_tokens"] == 3
        assert found["prompt_tokens"] > 3
        assert 0 <= found["first_token_seconds"] <= found["seconds"]
        assert (secret in found.get("prompt", "")) == wanted


def test_a_key_is_asked_for_everywhere_but_at_the_page_and_health(fake: Fake) -> None:
    with fake(api_key="s3cret") as live:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
            assert httpx.get(live.url + path).status_code == 401
        for path in ("/", "/health"):
            assert httpx.get(live.url + path).status_code == 200
        for wrong in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s3cret"}, {"authorization": "Bearer"}):
            found = post(live, headers=wrong)
            assert error_of(found, 401)["code"] == "invalid_api_key"
            assert found.headers["www-authenticate"] == "Bearer"
        odd = httpx.get(live.url + "/v1/models", headers={"authorization": b"Bearer s3cret\xe9"})
        assert odd.status_code == 401
        assert post(live, headers={"authorization": "bearer s3cret"}).status_code == 200


def test_unknown_models_paths_and_methods(fake: Fake) -> None:
    with fake() as live:
        assert error_of(post(live, model="gpt-4"), 404)["code"] == "model_not_found"
        assert error_of(httpx.get(live.url + "/v1/models/gpt-4"), 404)["param"] == "model"
        assert error_of(httpx.get(live.url + "/v2"), 404)["type"] == "not_found_error"
        error_of(httpx.get(live.url + CHAT), 405)
        without = {name: value for name, value in ASKED.items() if name != "model"}
        assert httpx.post(live.url + CHAT, json=without).status_code == 200


def test_a_body_that_is_too_large_is_413_however_it_comes(fake: Fake) -> None:
    with fake(max_body=10_000) as live:
        error_of(post(live, padding="x" * 20_000), 413)

        def chunks() -> Iterator[bytes]:
            yield b'{"padding": "'
            for _ in range(40):
                yield b"x" * 1000

        headers = {"content-type": "application/json"}
        error_of(httpx.post(live.url + CHAT, content=chunks(), headers=headers), 413)
        assert post(live).status_code == 200


def test_a_body_that_never_comes_is_408(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.2)
    with fake() as live:

        def slowly() -> Iterator[bytes]:
            yield b"{"
            time.sleep(1)
            yield b"}"

        error_of(httpx.post(live.url + CHAT, content=slowly(), headers={"content-type": "application/json"}), 408)


def test_a_full_queue_is_429_with_the_time_to_wait(fake: Fake) -> None:
    with fake(max_live=2) as live:
        found = post(live, n=3)
        assert error_of(found, 429)["code"] == "queue_full"
        assert found.headers["retry-after"] == "2"
        nothing_held(live.engine)  # what was submitted before the refusal is cancelled
        assert post(live, n=2).status_code == 200
    with fake(lambda request: iter([1.0]), in_flight=1) as live:
        stream = httpx.stream("POST", live.url + CHAT, json=ASKED | {"stream": True})
        import threading

        thread = threading.Thread(target=lambda: stream.__enter__().read())
        thread.start()
        until(lambda: len(live.engine.requests) == 1)
        assert error_of(post(live), 429)["code"] == "queue_full"
        thread.join(10)


def failing(request: Request) -> Iterator[Any]:
    """Fails after as many words as ``max_tokens`` says, less one."""
    for _ in range(request.max_tokens - 1):
        yield "word "
        yield 0.05  # so that it is sent before the failure
    yield FinishedEvent("error", message="RuntimeError: out of luck")


def test_an_engine_that_fails_is_500_and_the_server_lives(fake: Fake) -> None:
    with fake(failing) as live:
        for max_tokens in (1, 3):
            found = error_of(post(live, max_tokens=max_tokens), 500)
            assert found["code"] == "engine_error"
            assert "out of luck" in found["message"]
        error_of(post(live, max_tokens=1, stream=True), 500)  # nothing was sent yet: the status can still say it
        late = post(live, max_tokens=3, stream=True)
        assert late.status_code == 200
        assert "[DONE]" not in late.text
        assert late.text.count("word ") == 2
        assert json.loads(late.text.strip().rpartition("data: ")[2])["error"]["code"] == "engine_error"
        assert httpx.get(live.url + "/health").json()["status"] == "ok"
        nothing_held(live.engine)


def test_a_bug_in_the_server_is_500_in_the_schema(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake() as live:

        def broken(*arguments: object) -> None:
            raise ZeroDivisionError("a secret")

        monkeypatch.setattr(live.engine, "submit", broken)
        found = error_of(post(live), 500)
        assert "ZeroDivisionError" in found["message"]
        assert "a secret" not in found["message"]


def test_an_answer_that_takes_too_long_is_504(fake: Fake) -> None:
    with fake(lambda request: iter(["word ", 5.0]), timeout=0.3) as live:
        assert error_of(post(live), 504)["code"] == "timeout"
        nothing_held(live.engine)
        late = post(live, stream=True)
        assert late.status_code == 200
        assert '"code":"timeout"' in late.text
        nothing_held(live.engine)


def test_an_engine_that_stops_is_503(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake() as live:

        def closed(*arguments: object) -> None:
            raise EngineClosedError("it drains")

        monkeypatch.setattr(live.engine, "submit", closed)
        found = post(live)
        assert error_of(found, 503)["code"] == "stopping"
        assert int(found.headers["retry-after"]) > 0
        live.application.stop_accepting()
        error_of(post(live), 503)
        health = httpx.get(live.url + "/health")
        assert (health.status_code, health.json()["status"]) == (503, "stopping")


def test_a_quiet_stream_is_kept_alive(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "KEEP_ALIVE", 0.05)
    with fake(lambda request: iter([0.4, "word"])) as live:
        found = post(live, stream=True)
        assert found.text.count(": still working\n\n") >= 3
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in events(found)) == "word"
        assert found.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert found.headers["x-accel-buffering"] == "no"


def test_other_origins_are_refused_unless_named(fake: Fake) -> None:
    origin = {"origin": "https://a.example"}
    preflight = origin | {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    with fake() as live:
        assert "access-control-allow-origin" not in httpx.get(live.url + "/v1/models", headers=origin).headers
    with fake(cors_origins=("https://a.example",), api_key="k") as live:
        allowed = httpx.options(live.url + CHAT, headers=preflight)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        other = httpx.options(live.url + CHAT, headers=preflight | {"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers
        with_key = origin | {"authorization": "Bearer k"}
        assert httpx.get(live.url + "/v1/models", headers=with_key).headers["access-control-allow-origin"]


def test_metrics_count_what_happened(fake: Fake) -> None:
    with fake() as live:
        post(live)
        post(live, stream=True)
        post(live, temperature=9)
        httpx.post(live.url + "/v1/tried", json={})
        until(lambda: 'path="other"' in httpx.get(live.url + "/metrics").text)
        found = httpx.get(live.url + "/metrics")
        assert found.headers["content-type"].startswith("text/plain")
        lines = dict(line.rsplit(" ", 1) for line in found.text.splitlines() if not line.startswith("#"))
        assert lines[f'dq_requests_total{{outcome="ok",path="{CHAT}"}}'] == "2.0"
        assert lines[f'dq_requests_total{{outcome="400",path="{CHAT}"}}'] == "1.0"
        assert lines['dq_requests_total{outcome="404",path="other"}'] == "1.0"
        assert lines["dq_time_to_first_token_seconds_count"] == "2.0"
        assert int(float(lines["dq_time_between_tokens_seconds_count"])) > 0
        assert lines["dq_kv_blocks_total"] == "1000.0"
        assert lines["dq_kv_blocks_used"] == "0.0"
        assert lines["dq_engine_healthy"] == "1.0"
        assert lines['dq_finished_total{reason="length"}'] == "2.0"


def test_half_a_pair_goes_back_escaped(fake: Fake) -> None:
    with fake() as live:
        headers = {"content-type": "application/json"}
        body = b'{"input": "hi", "text": {"format": {"type": "text", "name": "\\ud800"}}}'
        found = httpx.post(live.url + "/v1/responses", content=body, headers=headers)
        assert found.status_code == 200
        assert "\\ud800" in found.text
        lost = httpx.post(live.url + CHAT, content=b'{"model": "\\ud800", "messages": []}', headers=headers)
        assert lost.status_code in (400, 404)
