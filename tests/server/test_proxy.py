"""nginx with what docs/scale.md shows: streams pass unbuffered, and what a full server refuses goes to the other."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from dq_runtime.runtime.engine import Request
from server.live_server import nothing_held, until

ROOT = Path(__file__).parents[2]
MAIN = """
daemon off;
master_process off;
pid {folder}/pid;
error_log {folder}/error;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {shown}
}}
"""


@contextmanager
def nginx(folder: Path, *backends: str) -> Iterator[str]:
    """nginx with what the page shows, only its ports replaced."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        pytest.skip("nginx is not installed")
    shown = re.search(r"```nginx\n(.*?)```", (ROOT / "docs" / "scale.md").read_text(), re.DOTALL)
    assert shown is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = shown.group(1).replace("listen 8000;", f"listen 127.0.0.1:{port};")
    for number, backend in enumerate(backends, 1):
        text = text.replace(f"127.0.0.1:800{number} ", backend.removeprefix("http://") + " ")
    (folder / "nginx.conf").write_text(MAIN.format(folder=folder, shown=text))
    running = subprocess.Popen([program, "-c", str(folder / "nginx.conf"), "-e", str(folder / "error")])
    try:
        url = f"http://127.0.0.1:{port}"

        def up() -> bool:
            try:
                return httpx.get(url + "/health").status_code == 200
            except httpx.TransportError:
                return False

        until(up)
        yield url
    finally:
        running.terminate()
        running.wait(10)


def slowly(request: Request) -> Iterator[Any]:
    for number in range(5):
        yield f"word{number} "
        yield 0.2


def test_streams_pass_the_proxy_as_they_come(fake: Callable[..., Any], tmp_path: Path) -> None:
    with fake(slowly) as one, fake(slowly, max_live=0) as full, nginx(tmp_path, one.url, full.url) as url:
        for _ in range(3):  # whichever nginx asks first, the one that is full or the other
            times = []
            with httpx.stream("POST", url + "/v1/completions", json={"prompt": "a", "stream": True}) as stream:
                assert stream.status_code == 200
                for line in stream.iter_lines():
                    if "word" in line:
                        times.append(time.monotonic())
            assert len(times) == 5
            assert times[-1] - times[0] > 0.5, "collected by the proxy"
        with httpx.stream("POST", url + "/v1/completions", json={"prompt": "a", "stream": True}) as stream:
            next(stream.iter_lines())
        nothing_held(one.engine)  # the client's leaving passes the proxy too
