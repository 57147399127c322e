"""``dq serve``."""

from __future__ import annotations

from typing import Annotated

import typer

from dq_runtime.errors import DQError, SpecError

EPILOG = """
[bold]Examples[/bold]

dq serve out

dq serve out --host 0.0.0.0 --api-key "$(cat key.txt)" --max-running 8 --kv-memory 2G

curl http://127.0.0.1:8000/v1/chat/completions -H "content-type: application/json" -d '{"messages": \
[{"role": "user", "content": "Why is the sky blue?"}], "stream": true}'
"""

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def bytes_of(text: str, option: str) -> int:
    """``512M``, ``4G`` or plain bytes as a number; :class:`SpecError` for anything else."""
    digits, unit = (text[:-1], _UNITS[text[-1].upper()]) if text[-1:].upper() in _UNITS else (text, 1)
    try:
        return int(float(digits) * unit)
    except (ValueError, OverflowError):
        raise SpecError(f"{option} must be a number of bytes such as 4000000, 512M or 4G, got {text!r}") from None


def serve(
    checkpoint: Annotated[str, typer.Argument(help="A packed checkpoint directory.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    exact: Annotated[
        bool, typer.Option("--exact", help="Do not round activations to 8 bits; slower on a CPU.")
    ] = False,
    api_key: Annotated[
        str | None, typer.Option(envvar="DQ_API_KEY", help="Key that clients must send as a bearer token.")
    ] = None,
    served_name: Annotated[str | None, typer.Option(help="Name of the model; by default the directory's.")] = None,
    max_running: Annotated[int, typer.Option(help="Most texts generated in one pass.")] = 16,
    max_queue: Annotated[int, typer.Option(help="Most requests that wait; 429 beyond.")] = 256,
    max_model_len: Annotated[
        int | None, typer.Option(help="Most tokens of prompt and answer; by default the model's context.")
    ] = None,
    kv_memory: Annotated[
        str | None, typer.Option(help="Memory of keys and values, such as 512M or 4G; by default what is needed.")
    ] = None,
    max_body: Annotated[str, typer.Option(help="Largest request body, such as 512K or 4M; 413 beyond.")] = "4M",
    timeout: Annotated[float, typer.Option(help="Most seconds for one request; 504 beyond.")] = 600.0,
    drain: Annotated[float, typer.Option(help="Seconds that running answers are given on SIGTERM.")] = 30.0,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Origin whose web pages may call the API; may be repeated; * is any.")
    ] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts into the log.")] = False,
) -> None:
    """Serve a packed CHECKPOINT with OpenAI's HTTP API, and a chat page at /. Says on standard output where it listens
    once it is ready; the log goes to standard error, a JSON object a line."""
    from dq_runtime.runtime.engine import EngineSettings

    try:
        from dq_runtime.server.app import Application
        from dq_runtime.server.run import bind, open_served, serve_on, server_for
        from dq_runtime.server.settings import ServerSettings
    except ImportError as error:
        raise DQError(f'dq serve needs {error.name}; install it with: pip install "dq_runtime[serve]"') from None

    memory = None if kv_memory is None else bytes_of(kv_memory, "--kv-memory")
    engine_settings = EngineSettings(memory, max_running, max_queue, max_model_len)
    settings = ServerSettings(
        api_key=api_key,
        max_body=bytes_of(max_body, "--max-body"),
        timeout=timeout,
        drain=drain,
        # Beyond what the engine holds, some that are still being read, so that the engine's own estimate is what a
        # client is told when it has to come back.
        in_flight=2 * (max_queue + max_running),
        cors_origins=tuple(cors_origin or ()),
        log_prompts=log_prompts,
    )
    sock = bind(host, port)  # before minutes of loading: a taken port is reported at once
    engine, served = open_served(checkpoint, served_name, device, exact, engine_settings)
    address, number = sock.getsockname()[:2]
    url = f"http://{f'[{address}]' if ':' in address else address}:{number}"
    size = served.size
    packed = "not packed" if size.bits_per_weight is None else f"{size.bits_per_weight:g} bits per weight"
    what = f"{served.name}: {packed}, {size.size_bytes / 1e6:.1f} MB"
    ready = f"{what}, at {url}"
    serve_on(sock, server_for(Application(engine, served, settings), drain, lambda: print(ready, flush=True)))


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(serve)
