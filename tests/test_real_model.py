"""SmolLM2-135M-Instruct from its GGUF file, end to end: load, round, save, measure, chat."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dq_runtime
from dq_runtime import pipeline
from dq_runtime.runtime.dense import licence_of, load_dense
from dq_runtime.runtime.engine import Engine, EngineSettings, Event, FinishedEvent, Request
from dq_runtime.runtime.language_model import LanguageModel
from dq_runtime.runtime.load import load_for_text
from dq_runtime.runtime.sampling import Sampling
from dq_runtime.spec import QuantSpec, RoundingSpec

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(900)]

Run = tuple[Path, dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def quantized(smollm2_gguf: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """(checkpoint, report, facts about the model as it was loaded). Loading takes 15 s: it is watched, not repeated."""
    import torch

    output = tmp_path_factory.mktemp("smollm2") / "out"
    facts: dict[str, Any] = {}

    def watched(source: str, device: str) -> LanguageModel:
        lm = load_dense(source, device)
        facts["dtypes"] = {p.dtype for p in lm.model.parameters()}
        facts["context"] = lm.context_length
        facts["digits"] = [lm.tokenizer.decode([i]) for i in lm.tokenizer.encode("   12", add_special_tokens=False)]
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor([lm.encode("The capital of France is")])).logits[0, -1]
        facts["capital"] = lm.tokenizer.decode([int(logits.argmax())])
        return lm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "load_dense", watched)
        report = dq_runtime.quantize(
            str(smollm2_gguf),
            output,
            QuantSpec(rounding=RoundingSpec("discquant-paper", {"steps": 2})),
            calibration=str(tiny_text),
            windows=2,
            window_length=64,
            held_out_windows=2,
        )
    return output, report, facts


def test_the_gguf_tokenizer_splits_digits(quantized: Run, smollm2_gguf: Path) -> None:
    tokenizer = dq_runtime.load(quantized[0], "cpu").tokenizer
    for text in ("   12", "   12345 and 67", "a1b22", "\n\n 2024"):
        pieces = [tokenizer.decode([i]) for i in tokenizer.encode(text, add_special_tokens=False)]
        assert "".join(pieces) == text
        assert all(len(p) == 1 for p in pieces if any(c.isdigit() for c in p)), pieces
    assert licence_of(str(smollm2_gguf)) == "apache-2.0"


def test_two_steps_of_discquant_make_a_complete_checkpoint(quantized: Run) -> None:
    output, report, _ = quantized
    assert json.loads((output / "report.json").read_text())["bits_per_weight"] == 3.25
    assert report["quantized_weights"] == 106_168_320
    assert len(report["layers"]) == 210
    assert len(report["history"]) == 2
    held = report["held_out"]
    assert all(math.isfinite(v) for v in held["kl"].values())
    assert held["kl"]["nearest"] > 0.5
    assert held["perplexity"]["nearest"] > held["perplexity"]["reference"] > 1
    # On disk: 3.25 bits a quantized weight and 16 an embedding, nothing dense besides.
    weights = (output / "model.safetensors").stat().st_size
    assert weights < 1.01 * (106_168_320 * 3.25 / 8 + 28_350_000 * 2)


def test_the_packed_model_chats(quantized: Run) -> None:
    pieces: list[str] = []
    model = dq_runtime.load(quantized[0], "cpu")
    result = dq_runtime.generate(model, "Why is the sky blue?", chat=True, max_tokens=8, on_text=pieces.append)
    assert result.finish in ("length", "end")
    assert len(result.tokens) == 8 or result.finish == "end"
    assert "".join(pieces) == result.text == model.decode(result.tokens)
    assert result.prompt_tokens > 20


@pytest.mark.skipif(os.environ.get("DQ_NATIVE") == "0", reason="torch's sums depend on the batch")
def test_eight_requests_at_once_say_what_each_says_alone(quantized: Run) -> None:
    """In exact mode, with a common system prompt, on memory for half of them."""
    model = load_for_text(quantized[0], "cpu", exact=True)
    system = {"role": "system", "content": "You are a helpful assistant who answers briefly. " * 8}
    questions = ["Why is the sky blue?", "What is 2+2?", "Name a colour.", "Who wrote Hamlet?"]
    questions += ["Tell a story.", "What is Python?", "How do planes fly?", "List three animals."]
    requests = [
        Request(model.encode_chat([system, {"role": "user", "content": q}]), 24, Sampling(), ignore_end=True)
        for q in questions
    ]
    alone = []
    ends: list[FinishedEvent] = []

    def said(engine: Engine, together: list[Request]) -> list[list[int]]:
        texts: list[list[int]] = [[] for _ in together]
        done = threading.Semaphore(0)

        def listener(text: list[int]) -> Callable[[Event], None]:
            def on_event(event: Event) -> None:
                if isinstance(event, FinishedEvent):
                    ends.append(event)
                    done.release()
                else:
                    text.extend(event.tokens)

            return on_event

        for request, text in zip(together, texts, strict=True):
            engine.submit(request, listener(text))
        for _ in together:
            assert done.acquire(timeout=300)
        return texts

    for request in requests[:3]:
        engine = Engine(model, EngineSettings(kv_bytes=2**28))
        alone += said(engine, [request])
        engine.close()
    block = engine.stats().block_bytes
    engine = Engine(model, EngineSettings(kv_bytes=12 * block, max_running=8))
    assert said(engine, requests)[:3] == alone
    stats = engine.stats()
    engine.close()
    assert {end.reason for end in ends} == {"length"}
    assert stats.blocks_used == 0
    assert stats.cached_tokens > 0


def test_the_reference_is_the_model_itself_in_float32(quantized: Run) -> None:
    import torch

    facts = quantized[2]
    assert facts["dtypes"] == {torch.float32}
    assert facts["context"] == 8192
    assert facts["digits"][-2:] == ["1", "2"]
    assert "".join(facts["digits"]) == "   12"
    assert facts["capital"] == " Paris"
