"""``dq``: the command line. Every error a user can cause is one sentence on standard error and exit code 2."""

from __future__ import annotations

import os
import sys

import typer

from dq_runtime.errors import DQError, Interrupted

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its fork warning is noise in a one-shot command

app = typer.Typer(
    name="dq",
    help="Round language models onto a low-bit grid, save standard packed checkpoints, and run them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _register() -> None:
    from dq_runtime.cli import backends, generate, inspect, quantize

    for module in (quantize, generate, inspect, backends):
        module.register(app)


def main(arguments: list[str] | None = None) -> int:
    """Run ``dq`` with ``arguments`` (default: the process's) and return the exit code."""
    _register_once()
    try:
        app(args=arguments, standalone_mode=True)
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 1
    except Interrupted as e:
        print(f"dq: {e}", file=sys.stderr)
        return 130
    except DQError as e:
        print(f"dq: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dq: interrupted; nothing was written", file=sys.stderr)
        return 130
    except OSError as e:
        print(f"dq: {e.filename or 'input or output'}: {e.strerror or e}", file=sys.stderr)
        return 2
    return 0


def _register_once() -> None:
    if not app.registered_commands:
        _register()


def console_script() -> None:
    """Entry point of the ``dq`` command."""
    sys.exit(main())
