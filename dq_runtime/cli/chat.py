"""``dq chat``: the terminal around a :class:`dq_runtime.cli.conversation.Conversation`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dq_runtime.errors import DQError

if TYPE_CHECKING:
    from dq_runtime.cli.conversation import Conversation

EPILOG = """
[bold]Examples[/bold]

dq chat out

dq chat out --system "Answer in one sentence." --temperature 0
"""

HELP = """\
/reset          forget what was said
/system TEXT    set the system prompt and forget what was said; without TEXT, show it
/save FILE      write the conversation to FILE as JSON
/stats          tokens and speed of every answer
/help           this text
Alt-Enter, or a \\ at the end of a line, starts another line. Ctrl-C stops the answer, Ctrl-D leaves."""

Read = Callable[[], str]  # the next message; EOFError at the end, KeyboardInterrupt for a line given up


def history_file() -> Path:
    """Where the lines typed before are kept (XDG Base Directory: state)."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "dq" / "chat_history"


def terminal_reader() -> Read:
    """Reads from a terminal: editing, history, several lines."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    file = history_file()
    history: History
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        history = FileHistory(str(file))
    except OSError:  # a home that cannot be written to costs the history, not the chat
        history = InMemoryHistory()
    session: PromptSession[str] = PromptSession(
        "> ", history=history, key_bindings=keys, multiline=True, prompt_continuation="  "
    )
    return session.prompt


def plain_reader() -> str:
    """Reads a pipe or a file: a message a line, joined while lines end in a backslash."""
    text = ""
    while line := sys.stdin.readline():
        text += line.rstrip("\n")
        if not text.endswith("\\"):
            return text
        text = text[:-1] + "\n"
    if text:
        return text
    raise EOFError


def command(conversation: Conversation, line: str) -> None:
    """Do what a line that begins with / says; :class:`DQError` for one that nobody knows."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/reset":
        conversation.reset()
        note("forgotten")
    elif name == "/system":
        if rest:
            conversation.system = rest
            conversation.reset()
        note(f"system prompt: {conversation.system or 'none'}")
    elif name == "/save":
        if not rest:
            raise DQError("/save needs a file name")
        conversation.save(Path(rest).expanduser())
        note(f"saved to {rest}")
    elif name == "/stats":
        for number, turn in enumerate(conversation.turns, 1):
            note(f"{number}: {turn}")
        if not conversation.turns:
            note("no answers yet")
    elif name == "/help":
        note(HELP)
    else:
        raise DQError(f"{name} is not a command; /help lists them")


def note(text: str) -> None:
    """What is not the model's: on standard error, so that standard output is the conversation alone."""
    print(text, file=sys.stderr, flush=True)


def talk(conversation: Conversation, read: Read) -> None:
    """Read and answer until the input ends."""

    def show(piece: str) -> None:
        print(piece, end="", flush=True)

    while True:
        try:
            line = read().strip()
        except KeyboardInterrupt:
            note("Ctrl-D leaves")
            continue
        except EOFError:
            return
        if not line:
            continue
        try:
            if line.startswith("/"):
                command(conversation, line)
                continue
            turn = conversation.ask(line, show)
            print(flush=True)
            if turn.reason in ("stopped", "length"):
                note(f"[{turn.reason} after {turn.tokens} tokens]")
        except (DQError, OSError) as error:
            note(f"dq: {error}")


def chat(
    checkpoint: Annotated[str, typer.Argument(help="A packed checkpoint directory.")],
    system: Annotated[str, typer.Option(help="System prompt.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 1024,
    temperature: Annotated[float, typer.Option(help="0 is greedy; 1 samples from the model's distribution.")] = 0.7,
    top_k: Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the smallest set of tokens with this probability mass.")] = 0.95,
    min_p: Annotated[float, typer.Option(help="Keep tokens at least this fraction as likely as the best.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages tokens already seen.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampled answers repeatable.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    exact: Annotated[
        bool, typer.Option("--exact", help="Do not round activations to 8 bits; slower on a CPU.")
    ] = False,
) -> None:
    """Talk to a packed CHECKPOINT in the terminal. /help lists what else can be typed."""
    from dq_runtime.cli.conversation import Conversation
    from dq_runtime.runtime.engine import Engine, EngineSettings
    from dq_runtime.runtime.load import load_for_text
    from dq_runtime.runtime.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    if max_tokens < 1:
        raise DQError(f"--max-tokens must be at least 1, got {max_tokens}")
    model = load_for_text(checkpoint, device, exact)
    model.encode_chat([{"role": "user", "content": "a"}])  # a model that cannot chat is refused before anybody types
    engine = Engine(model, EngineSettings(max_running=1))
    try:
        conversation = Conversation(engine, model, sampling, max_tokens, system)
        terminal = sys.stdin.isatty()
        if terminal:
            note(f"{checkpoint}: /help lists what can be typed")
        talk(conversation, terminal_reader() if terminal else plain_reader)
    finally:
        engine.close()


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(chat)
