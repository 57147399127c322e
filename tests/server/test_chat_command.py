"""``dq chat``: the conversation, its commands, a real line editor fed with keys, and Ctrl-C in a terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dq_runtime.cli import chat, main
from dq_runtime.cli.conversation import Conversation
from dq_runtime.errors import DQError
from dq_runtime.runtime.engine import FinishedEvent, Request
from dq_runtime.runtime.generate import generate
from dq_runtime.runtime.load import load
from dq_runtime.runtime.sampling import Sampling
from server.fake_engine import FakeEngine, FakeModel
from server.live_server import nothing_held, until

ROOT = Path(__file__).parents[2]


@pytest.fixture
def talking(tiny_model: Path) -> Iterator[Callable[..., Conversation]]:
    """``talking(script)``: a conversation with an engine that says what the script says."""
    engines: list[FakeEngine] = []

    def start(script: Any = None, system: str = "") -> Conversation:
        engines.append(FakeEngine(script, 4))
        return Conversation(engines[-1], FakeModel(tiny_model, None), Sampling(), 8, system)  # type: ignore[arg-type]

    yield start
    for engine in engines:
        nothing_held(engine)
        engine.close()


def prompt_of(conversation: Conversation, number: int) -> str:
    engine: Any = conversation._engine
    return conversation._model.tokenizer.decode(list(engine.requests[number].tokens))  # type: ignore[no-any-return]


def test_every_turn_carries_what_was_said(talking: Callable[..., Conversation]) -> None:
    conversation = talking(lambda request: iter(["fine ", "thanks"]), "Be brief.")
    pieces: list[str] = []
    turn = conversation.ask("How are you?", pieces.append)
    assert "".join(pieces) == "fine thanks"
    assert turn.tokens == 2
    assert turn.prompt_tokens == len(conversation._engine.requests[0].tokens)  # type: ignore[attr-defined]
    conversation.ask("And now?", pieces.append)
    assert prompt_of(conversation, 1) == (
        "<|system|>Be brief.<|endoftext|><|user|>How are you?<|endoftext|><|assistant|>fine thanks<|endoftext|>"
        "<|user|>And now?<|endoftext|><|assistant|>"
    )
    conversation.reset()
    conversation.ask("Again", pieces.append)
    assert "fine" not in prompt_of(conversation, 2)
    assert "Be brief." in prompt_of(conversation, 2)


def test_a_failed_turn_leaves_the_conversation_as_it_was(talking: Callable[..., Conversation]) -> None:
    conversation = talking(lambda request: iter([FinishedEvent("error", message="out of luck")]))
    with pytest.raises(DQError, match="out of luck"):
        conversation.ask("Hello", print)
    assert conversation.messages == []
    assert conversation.turns == []


def test_an_interrupt_ends_the_answer_and_keeps_what_was_said(talking: Callable[..., Conversation]) -> None:
    def endless(request: Request) -> Iterator[Any]:
        while True:
            yield "word "
            yield 0.01

    conversation = talking(endless)
    said: list[str] = []

    def interrupt() -> None:
        until(lambda: len(said) >= 3)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    turn = conversation.ask("Go on", said.append)
    thread.join()
    assert turn.reason == "stopped"
    assert conversation.messages[-1] == {"role": "assistant", "content": "".join(said)}


def test_commands(talking: Callable[..., Conversation], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = talking(lambda request: iter(["fine"]))
    file = tmp_path / "said.json"
    lines = [
        "",
        "Hello",
        "/stats",
        f"/save {file}",
        "/system Be brief.",
        "/system",
        "/stats",
        "/help",
        "/nope",
        "/save",
    ]
    lines += [f"/save {tmp_path}/nowhere/a.json", "Bye"]
    remaining = iter(lines)

    def read() -> str:
        line = next(remaining, None)
        if line is None:
            raise EOFError
        return line

    chat.talk(conversation, read)
    captured = capsys.readouterr()
    assert captured.out == "fine\nfine\n"
    told = captured.err.splitlines()
    assert told[0] == "[length after 1 tokens]"
    assert told[1].startswith("1: prompt ")
    assert "answer 1 tokens (length)" in told[1]
    assert told[2:6] == [f"saved to {file}", "system prompt: Be brief.", "system prompt: Be brief.", "no answers yet"]
    assert "dq: /nope is not a command; /help lists them" in told
    assert "dq: /save needs a file name" in told
    assert any("No such file" in line for line in told)
    assert json.loads(file.read_text())["messages"] == [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "fine"},
    ]
    assert [m["content"] for m in conversation.messages] == ["Bye", "fine"]


def test_keys_make_lines_and_history_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    def typed(keys: str) -> list[str]:
        with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
            pipe.send_text(keys)
            read = chat.terminal_reader()
            found = []
            while True:
                try:
                    found.append(read())
                except EOFError:
                    return found
                except KeyboardInterrupt:
                    found.append("^C")

    assert typed("one\x1b\rtwo\rthree\\\rfour\rgiven up\x03last\r\x04") == ["one\ntwo", "three\nfour", "^C", "last"]
    assert typed("\x1b[A\r\x04") == ["last"], "the arrow fetches what was typed in the session before"
    assert chat.history_file().stat().st_mode & 0o077 == 0


def test_a_pipe_is_read_line_by_line(
    packed_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "input"
    file.write_text("Anna found\\\na lamp\n/stats\nLater")
    with file.open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        options = ["--temperature", "0", "--max-tokens", "12", "--exact", "--device", "cpu"]
        assert main(["chat", str(packed_model), *options]) == 0
    captured = capsys.readouterr()
    model = load(packed_model, "cpu", exact=True)
    first = generate(model, [{"role": "user", "content": "Anna found\na lamp"}], max_tokens=12).text
    assert captured.out.startswith(first + "\n")
    assert "1: prompt " in captured.err


def test_mistakes_are_one_sentence(packed_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, said in ((["--temperature", "-1"], "temperature"), (["--max-tokens", "0"], "--max-tokens")):
        assert main(["chat", str(packed_model), *options]) == 2
        captured = capsys.readouterr()
        assert len(captured.err.splitlines()) == 1
        assert said in captured.err


PROMPTED = "\x1b[?25h"  # the cursor is shown again: the prompt has been drawn
TERMINAL = """
import sys
from server.fake_engine import FakeEngine, FakeModel
from dq_runtime.cli import chat
from dq_runtime.cli.conversation import Conversation
from dq_runtime.runtime.sampling import Sampling
from pathlib import Path

def endless(request):
    while True:
        yield "word "
        yield 0.02

engine = FakeEngine(endless, 4)
conversation = Conversation(engine, FakeModel(Path(sys.argv[1]), None), Sampling(), 8, "")
chat.note("ready")
chat.talk(conversation, chat.terminal_reader())
engine.close()
print(len(conversation.turns), "turns")
"""


def test_control_c_in_a_terminal_stops_the_answer_not_the_program(tiny_model: Path, tmp_path: Path) -> None:
    """A real terminal: a question, Ctrl-C while it is being answered, another question, Ctrl-C, Ctrl-D."""
    path = f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'tests'}"
    environment = os.environ | {"XDG_STATE_HOME": str(tmp_path), "PYTHONPATH": path, "TERM": "xterm"}
    environment["PROMPT_TOOLKIT_NO_CPR"] = "1"  # nobody is here to say where the cursor is
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, "-c", TERMINAL, str(tiny_model)], environment)
    shown = ""

    def see(text: str, seconds: float = 15.0) -> None:
        nonlocal shown
        deadline = time.monotonic() + seconds
        while text not in shown:
            assert time.monotonic() < deadline, (text, shown)
            if select.select([terminal], [], [], 0.1)[0]:
                shown += os.read(terminal, 4096).decode(errors="replace")
        shown = shown.partition(text)[2]

    try:
        see("ready")
        for _ in range(2):
            see(PROMPTED)
            os.write(terminal, b"Go on\r")
            see("word word word")
            os.write(terminal, b"\x03")
            see("[stopped after")
        see(PROMPTED)
        os.write(terminal, b"\x03")
        see("Ctrl-D leaves")
        see(PROMPTED)
        os.write(terminal, b"\x04")
        see("2 turns")
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    finally:
        os.close(terminal)
