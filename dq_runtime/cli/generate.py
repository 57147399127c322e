"""``dq generate``."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

EPILOG = """
[bold]Examples[/bold]

dq generate out "Once upon a time" --max-tokens 64

dq generate out "Why is the sky blue?" --chat --temperature 0.7 --top-p 0.9 --seed 1

dq generate out "List three fruits:" --stop "\\n\\n" --json
"""


def generate(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint: a directory, a .gguf file or a hub name.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue, or the question with --chat.")],
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy; 1 samples from the model's distribution.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the smallest set of tokens with this probability mass.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Keep tokens at least this fraction as likely as the best.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages tokens already seen.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes a sampled text repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End at this string; may be repeated.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    exact: Annotated[
        bool, typer.Option("--exact", help="Do not round activations to 8 bits; slower on a CPU.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> None:
    """Generate text from a CHECKPOINT, best a packed one, streamed as it comes; speeds go to standard error."""
    import sys

    from dq_runtime.runtime.generate import generate as run
    from dq_runtime.runtime.load import load_for_text
    from dq_runtime.runtime.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    stops = [s.replace("\\n", "\n").replace("\\t", "\t") for s in stop or []]

    def show(piece: str) -> None:
        print(piece, end="", flush=True)

    result = run(
        load_for_text(checkpoint, device, exact),
        prompt,
        max_tokens=max_tokens,
        chat=chat,
        stop=stops,
        sampling=sampling,
        on_text=None if as_json else show,
    )
    if as_json:
        print(json.dumps(asdict(result), ensure_ascii=False))
        return
    print()
    speed = f"prompt {result.prefill_per_second:.1f} tokens/s, answer {result.decode_per_second:.1f} tokens/s"
    print(f"[{len(result.tokens)} tokens, {result.finish}; {speed}]", file=sys.stderr)


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(generate)
