"""Clients that leave, stall, flood and lie, and an engine short of memory: after each, no memory is held and the server
answers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from dq_runtime.runtime.engine import EngineSettings, Request
from dq_runtime.server import answer, inbox
from dq_runtime.server.run import open_served
from server.live_server import Live, nothing_held, serving, until

ROOT = Path(__file__).parents[2]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LONG = {"prompt": "Anna found", "max_tokens": 200, "ignore_eos": True, "stream": True}


def alive(live: Live) -> None:
    """It still answers, and nobody's memory is held."""
    nothing_held(live.engine)
    found = httpx.post(live.url + TEXT, json={"prompt": "Later", "max_tokens": 2}, timeout=30)
    assert found.status_code == 200, found.text
    assert httpx.get(live.url + "/health").json()["status"] == "ok"


@contextmanager
def raw(live: Live, body: dict[str, Any], path: str = TEXT) -> Iterator[socket.socket]:
    """A socket that has sent a request and read nothing."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    host, _, port = live.url.removeprefix("http://").partition(":")
    sock.connect((host, int(port)))
    try:
        sock.sendall(head.encode() + data)
        yield sock
    finally:
        sock.close()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_memory(live: Live, stream: bool) -> None:
    cancelled = live.engine.stats().requests_finished.get("cancelled", 0)
    with raw(live, LONG | {"n": 3, "stream": stream}):
        until(lambda: live.engine.stats().running == 3)
    until(lambda: live.engine.stats().requests_finished.get("cancelled", 0) == cancelled + 3)
    alive(live)


def test_a_client_that_leaves_while_it_waits_is_forgotten(live: Live) -> None:
    with raw(live, LONG | {"n": 4}), raw(live, LONG | {"n": 2}):
        until(lambda: live.engine.stats().waiting == 2)
    alive(live)


def endless(request: Request) -> Iterator[Any]:
    while True:
        yield "x" * 20_000


def test_a_client_that_reads_nothing_is_given_up(fake: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The socket stays full: after STALL seconds the answer is cancelled; memory meanwhile is bounded by the inbox."""
    monkeypatch.setattr(answer, "STALL", 0.5)
    monkeypatch.setattr(inbox, "MOST_EVENTS", 20)
    with fake(endless) as live:
        with raw(live, {"prompt": "a", "max_tokens": 100, "stream": True}):
            until(lambda: live.engine.stats().blocks_used == 1)
            nothing_held(live.engine)
        assert httpx.get(live.url + "/health").json()["status"] == "ok"
        until(lambda: 'outcome="slow_reader"' in httpx.get(live.url + "/metrics").text)


def test_500_clients_at_once_are_answered_or_told_to_come_back(live: Live) -> None:
    body = json.dumps({"prompt": "Anna", "max_tokens": 4, "ignore_eos": True})
    head = f"POST {TEXT} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\nconnection: close\r\n"
    request = f"{head}content-length: {len(body)}\r\n\r\n{body}".encode()
    host, _, port = live.url.removeprefix("http://").partition(":")

    async def flood() -> list[str]:
        streams = await asyncio.gather(*(asyncio.open_connection(host, int(port)) for _ in range(500)))
        for _, writer in streams:
            writer.write(request)
        found = await asyncio.gather(*(reader.read() for reader, _ in streams))
        for _, writer in streams:
            writer.close()
        return [response.decode() for response in found]

    found = asyncio.run(flood())
    statuses = [int(response.split(" ", 2)[1]) for response in found]
    assert set(statuses) <= {200, 429}
    assert statuses.count(200) >= 20  # what runs and waits at least: 4 and 16
    for status, response in zip(statuses, found, strict=True):
        if status == 429:
            assert "\r\nretry-after: " in response
            assert '"code":"queue_full"' in response
    alive(live)


def test_a_megabyte_of_prompt_is_refused_and_holds_nobody_up(live: Live) -> None:
    text = "Anna found a red lamp. " * 45_000
    # Told all at once, four texts are 9 events. The tiny model writes a token in 0.2 ms: only long ones are going on.
    with httpx.stream("POST", live.url + TEXT, json=LONG | {"n": 4, "max_tokens": 450}, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        found = httpx.post(live.url + CHAT, json={"messages": [{"role": "user", "content": text}]}, timeout=60)
        assert found.status_code == 400
        assert "tokens" in found.json()["error"]["message"]
        assert sum(line.startswith("data: ") for line in lines) > 30
    alive(live)


def test_prompts_that_only_just_fit(live: Live) -> None:
    limit = live.engine.max_model_len
    asked = {"max_tokens": 50, "ignore_eos": True, "temperature": 0}
    found = httpx.post(live.url + TEXT, json=asked | {"prompt": [5] * (limit - 3)}, timeout=30).json()
    assert found["usage"]["completion_tokens"] == 3
    assert found["choices"][0]["finish_reason"] == "length"
    assert httpx.post(live.url + TEXT, json=asked | {"prompt": [5] * limit}, timeout=30).status_code == 400
    assert httpx.post(live.url + TEXT, json=asked | {"prompt": [10**8]}, timeout=30).status_code == 400


def test_a_prompt_of_many_equal_beginnings_is_found_in_memory(live: Live) -> None:
    beginning = "".join(f"{i} lamps, " for i in range(12))
    asked = {"max_tokens": 2, "temperature": 0}
    first, second = (
        httpx.post(live.url + TEXT, json=asked | {"prompt": beginning + end}, timeout=30).json()["usage"]
        for end in ("one", "two")
    )
    assert second["prompt_tokens_details"]["cached_tokens"] >= 64
    assert first["prompt_tokens"] >= second["prompt_tokens_details"]["cached_tokens"]


def test_memory_for_one_sequence_serves_many_one_after_another(packed_model: Path) -> None:
    """KV memory that a single full-length text fills: others wait or are preempted, and all are answered."""
    probe, _ = open_served(str(packed_model), None, "cpu", True, EngineSettings(max_running=1))
    block = probe.stats().block_bytes
    probe.close()
    settings = EngineSettings(kv_bytes=4 * block, max_running=4, max_queue=16)
    engine, served = open_served(str(packed_model), "tiny", "cpu", True, settings)
    with serving(engine, served) as live:
        body = {"prompt": "Anna found", "max_tokens": 100, "ignore_eos": True, "temperature": 0}

        async def several() -> list[httpx.Response]:
            async with httpx.AsyncClient(timeout=60) as client:
                return await asyncio.gather(*(client.post(live.url + TEXT, json=body) for _ in range(6)))

        found = asyncio.run(several())
        assert [response.status_code for response in found] == [200] * 6
        assert len({response.json()["choices"][0]["text"] for response in found}) == 1
        assert engine.stats().blocks_total == 4
        alive(live)


def test_a_decoder_that_fails_ends_its_requests_only(packed_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, served = open_served(str(packed_model), "tiny", "cpu", True, EngineSettings(max_running=4))
    run = engine._decoder.run
    poison = 7

    def failing(segments: Any, memory: Any) -> Any:
        if any(poison in segment.tokens for segment in segments):
            raise RuntimeError("out of luck")
        return run(segments, memory)

    with serving(engine, served) as live:
        monkeypatch.setattr(engine._decoder, "run", failing)
        body = {"max_tokens": 3, "temperature": 0}
        bad = httpx.post(live.url + TEXT, json=body | {"prompt": [5, poison]}, timeout=30)
        assert bad.status_code == 500
        assert bad.json()["error"]["code"] == "engine_error"
        alive(live)


@contextmanager
def process(checkpoint: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``dq serve`` as a process of its own, and its address."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", "dq_runtime", "serve", str(checkpoint), "--port", "0", "--device", "cpu", *options]
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )
    try:
        assert started.stdout is not None
        line = started.stdout.readline()
        assert " bits per weight, " in line, line + (started.stderr.read() if started.stderr and not line else "")
        yield started, line.split()[-1]
    finally:
        started.kill()
        started.wait(10)


def test_sigterm_lets_a_stream_finish_and_takes_no_more(packed_model: Path) -> None:
    with process(packed_model, "--exact", "--served-name", "tiny") as (server, url):
        # 64 choices take the tiny model seconds: one alone was done before the signal had been heard.
        with httpx.stream("POST", url + TEXT, json=LONG | {"n": 64}, timeout=30) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            with pytest.raises(httpx.TransportError):
                httpx.get(url + "/health", timeout=2)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert len(rest) > 5
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        _, log = server.communicate(timeout=15)
        assert server.returncode == 0
    lines_of_log = [json.loads(line) for line in log.splitlines()]
    assert [line["message"] for line in lines_of_log] == ["stopping", "request", "stopped"]
    assert "Anna" not in log


def test_sigterm_ends_streams_that_outlast_the_drain(packed_model: Path) -> None:
    with process(packed_model, "--exact", "--drain", "1") as (server, url):
        with raw(Live(url, None, None, None), LONG | {"n": 8}) as sock:  # type: ignore[arg-type]
            sock.recv(64)
            server.send_signal(signal.SIGTERM)
            server.send_signal(signal.SIGTERM)
            server.communicate(timeout=15)
        assert server.returncode == 0


def test_mistakes_of_the_command_line_are_one_sentence(packed_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dq_runtime.cli import main

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for options, said in (
            (["--port", port], f"cannot listen on 127.0.0.1 port {port}"),
            (["--max-body", "many"], "--max-body must be a number of bytes"),
            (["--kv-memory", "-1G"], "kv_bytes must be positive"),
            (["--max-running", "0"], "max_running must be at least 1"),
            (["--timeout", "0"], "--timeout must be positive"),
            (["--api-key", ""], "the API key is empty"),
            (["--port", "70000"], "--port"),
        ):
            assert main(["serve", str(packed_model), *options]) == 2, options
            captured = capsys.readouterr()
            assert captured.out == ""
            assert len(captured.err.splitlines()) == 1
            assert captured.err.startswith("dq: ")
            assert said in captured.err
    assert main(["serve", "/nowhere", "--port", "0"]) == 2
    assert "/nowhere" in capsys.readouterr().err
