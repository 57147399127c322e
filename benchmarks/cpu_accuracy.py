"""How far the native decoder is from the torch one, which is the definition, on SmolLM2-135M; part of cpu.py.

In exact mode both must say the same: 64 greedy tokens after each of 20 prompts. With integer activations (the default)
what matters is the KL to the definition on held-out text, for weights rounded to nearest at 4 bits and for a DiscQuant
checkpoint at 3 bits, whose weights lie further from any the model was trained to.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from cpu_models import once

PROMPTS, PROMPT_TOKENS, GREEDY_TOKENS = 20, 32, 64
WINDOWS, WINDOW = 8, 512
# DiscQuant on few windows: enough to move weights off their nearest values, in two minutes.
CALIBRATION_WINDOWS = 16


def prompt_text() -> str:
    """CPython's own language reference: prose that every installation carries."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def prompt_ids(checkpoint: Path, count: int, skip: int = 0) -> list[int]:
    """``count`` ids of the language reference, after the first ``skip``."""
    from dq_runtime.runtime.tokenizer import load_tokenizer

    ids: list[int] = load_tokenizer(checkpoint).encode(prompt_text()[: (skip + count) * 16])[skip : skip + count]
    assert len(ids) == count
    return ids


def _models(checkpoint: Path, exact: bool) -> tuple[Any, Any]:
    """The checkpoint on the native decoder and, with the same weights, on the one in plain torch."""
    import dq_runtime

    os.environ["DQ_DECODER"] = "native"
    native = dq_runtime.load(checkpoint, "cpu", exact=exact)
    os.environ["DQ_DECODER"] = "torch"
    reference = dq_runtime.load(checkpoint, "cpu", exact=True)
    del os.environ["DQ_DECODER"]
    return native, reference


def _greedy(model: Any, ids: list[int]) -> list[int]:
    import torch

    cache = model.start(1, len(ids) + GREEDY_TOKENS)
    logits, found = model.step(torch.tensor([ids]), cache), []
    for _ in range(GREEDY_TOKENS):
        found.append(int(logits[0].argmax()))
        logits = model.step(torch.tensor([found[-1:]]), cache)
    return found


def same_greedy(checkpoint: Path) -> int:
    """How many of the prompts both continue alike, in exact mode."""
    ids = prompt_ids(checkpoint, PROMPTS * PROMPT_TOKENS)
    native, reference = _models(checkpoint, exact=True)
    prompts = [ids[i * PROMPT_TOKENS : (i + 1) * PROMPT_TOKENS] for i in range(PROMPTS)]
    return sum(_greedy(native, prompt) == _greedy(reference, prompt) for prompt in prompts)


def integer_kl(checkpoint: Path) -> float:
    """Nats a token, from the definition to integer activations, on the last windows of the language reference."""
    import torch

    from dq_runtime.evaluate.metrics import compare
    from dq_runtime.runtime.tokenizer import load_tokenizer

    ids = load_tokenizer(checkpoint).encode(prompt_text()[-WINDOWS * WINDOW * 16 :])[-WINDOWS * WINDOW :]
    native, reference = _models(checkpoint, exact=False)
    found = compare(
        torch.tensor(ids).view(WINDOWS, WINDOW),
        lambda tokens: reference.logits(tokens[None])[0],
        {"native": lambda tokens: native.logits(tokens[None])[0]},
    )
    return found["native"].kl


def make_discquant(gguf: Path, text: Path, folder: Path) -> None:
    """SmolLM2 at 3 bits by discquant-paper, through the command line as anybody would."""
    text.write_text(prompt_text(), encoding="utf-8")
    command = [sys.executable, "-m", "dq_runtime", "quantize", str(gguf), "-o", str(folder), "--bits", "3"]
    command += ["--group-size", "64", "--calibration", str(text), "--windows", str(CALIBRATION_WINDOWS)]
    command += ["--rounding", "discquant-paper"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[:2])}
    subprocess.run(command, check=True, env=environment)


def measure(nearest: Path, discquant: Path, gguf: Path) -> dict[str, Any]:
    """What cpu.json says of accuracy."""
    once(discquant, lambda path: make_discquant(gguf, discquant.with_name("reference.txt"), path))
    return {
        "prompts": PROMPTS,
        "greedy_tokens": GREEDY_TOKENS,
        "prompts_alike_in_exact_mode": same_greedy(nearest),
        "kl_of_integer_activations": {
            "nearest_4bit": float(f"{integer_kl(nearest):.3g}"),
            "discquant_3bit": float(f"{integer_kl(discquant):.3g}"),
        },
        "windows": [WINDOWS, WINDOW],
    }
