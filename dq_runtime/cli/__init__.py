"""``dq``: the command line. Every error a user can cause is one sentence on standard error and exit code 2."""

from __future__ import annotations

import os
import sys
from typing import Any

import typer

from dq_runtime.errors import DQError, Interrupted

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its fork warning is noise in a one-shot command

USAGE_ERROR: Any = typer.BadParameter.__base__  # click's, wherever this version of typer keeps its copy of click

app = typer.Typer(
    name="dq",
    help="Round language models onto a low-bit grid, save standard packed checkpoints, and run them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _register_once() -> None:
    if app.registered_commands:
        return
    from dq_runtime.cli import (
        backends,
        bench,
        chat,
        check,
        compare,
        evaluate,
        export,
        generate,
        inspect,
        plan,
        quantize,
        serve,
    )

    for module in (quantize, plan, compare, evaluate, export, check, generate, chat, serve, inspect, backends, bench):
        module.register(app)


def main(arguments: list[str] | None = None) -> int:
    """Run ``dq`` with ``arguments`` (default: the process's) and return the exit code."""
    _register_once()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        # Not standalone: its usage errors would be boxes of several lines instead of one sentence.
        code = app(args=arguments or ["--help"], prog_name="dq", standalone_mode=False)
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 1
    except USAGE_ERROR as e:
        path = e.ctx.command_path if e.ctx is not None else "dq"
        print(f"dq: {' '.join(e.format_message().split()).rstrip('.')}; see {path} --help", file=sys.stderr)
        return 2
    except Interrupted as e:
        print(f"dq: {e}", file=sys.stderr)
        return 130
    except DQError as e:
        print(f"dq: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        code = 130
    except OSError as e:
        print(f"dq: {e.filename or 'input or output'}: {e.strerror or e}", file=sys.stderr)
        return 2
    if code == 130:  # what typer makes of most KeyboardInterrupts
        print("dq: interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0


def console_script() -> None:
    """Entry point of the ``dq`` command."""
    sys.exit(main())
