"""The engine on real decoders: a request says the same alone, in any company, and however little memory there is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_fakes import Listener, request

from dq_runtime.packing.checkpoint import open_checkpoint
from dq_runtime.runtime.engine import Engine, EngineSettings, EngineStats, Request
from dq_runtime.runtime.generate import generate
from dq_runtime.runtime.language_model import LanguageModel
from dq_runtime.runtime.load import load, load_for_text
from dq_runtime.runtime.sampling import Sampling
from dq_runtime.runtime.skeleton import load_through_transformers

native = pytest.mark.skipif(os.environ.get("DQ_NATIVE") == "0", reason="DQ_NATIVE=0: built without the extension")

COMMON = [7 + i * 13 % 200 for i in range(70)]  # more than a block
PROMPTS = [[*COMMON, 3, 9], [*COMMON, 4], [5, 6, 7], COMMON[:64], [8], [*COMMON, *COMMON[:40]]]
LENGTH = 100


@pytest.fixture(scope="module")
def exact(packed_model: Path) -> LanguageModel:
    return load_for_text(packed_model, "cpu", exact=True)


def together(
    model: LanguageModel, requests: Sequence[Request], blocks: int = 64, **settings: Any
) -> tuple[list[Listener], EngineStats]:
    """All of them submitted at once, to an engine of their own; what they said, and the stats afterwards."""
    from dq_runtime.runtime.engine.paged_model import paged_decoder

    engine = Engine(model, EngineSettings(kv_bytes=blocks * paged_decoder(model).block_bytes, **settings))
    try:
        listeners = [Listener() for _ in requests]
        with engine._changed:  # the engine sees all of them at once, so that every run schedules alike
            for asked, listener in zip(requests, listeners, strict=True):
                engine.submit(asked, listener)
        for listener in listeners:
            finished = listener.wait(120)
            assert finished.reason == "length", finished
        stats = engine.stats()
        assert stats.blocks_used == 0
        return listeners, stats
    finally:
        engine.close()


def greedy(prompt: list[int], count: int = LENGTH, **changes: Any) -> Request:
    return request(prompt, count, ignore_end=True, **changes)


@pytest.fixture(scope="module")
def alone(exact: LanguageModel) -> list[list[int]]:
    """What each prompt is answered by itself, in an engine that has seen nothing else."""
    return [together(exact, [greedy(prompt)])[0][0].tokens for prompt in PROMPTS]


@native
@pytest.mark.parametrize(
    ("blocks", "settings"),
    [
        (64, {}),
        (64, {"prefix_reuse": False}),
        (64, {"step_tokens": 7, "max_running": 6}),
        (64, {"max_running": 2}),
        (8, {}),
        (6, {}),
        (5, {"step_tokens": 33}),
    ],
    ids=str,
)
def test_greedy_tokens_are_the_same_alone_and_in_any_batch(
    exact: LanguageModel, alone: list[list[int]], blocks: int, settings: dict[str, Any]
) -> None:
    listeners, stats = together(exact, [greedy(prompt) for prompt in PROMPTS], blocks, **settings)
    assert [listener.tokens for listener in listeners] == alone
    assert (stats.preemptions > 0) == (blocks < 10)
    if settings.get("prefix_reuse", True):
        assert stats.cached_tokens > 0


@native
def test_a_beginning_that_was_kept_changes_nothing(exact: LanguageModel, alone: list[list[int]]) -> None:
    """The second round finds what the first has left."""
    listeners, stats = together(exact, [greedy(prompt) for prompt in PROMPTS * 2], max_running=6)
    assert [listener.tokens for listener in listeners] == alone * 2
    assert stats.cached_tokens == 5 * 64  # two of the first round, three of the second


@native
def test_an_engine_says_what_a_single_stream_says(exact: LanguageModel, alone: list[list[int]]) -> None:
    ends, exact.end_tokens = exact.end_tokens, set  # type: ignore[method-assign]
    try:
        for prompt, tokens in zip(PROMPTS, alone, strict=True):
            assert generate(exact, prompt, max_tokens=LENGTH).tokens == tokens
    finally:
        exact.end_tokens = ends  # type: ignore[method-assign]


@native
def test_a_seeded_text_does_not_depend_on_its_neighbours(exact: LanguageModel) -> None:
    def asked(seed: int) -> Request:
        return greedy(PROMPTS[seed % 6], 40, sampling=Sampling(0.9, top_p=0.95, seed=seed))

    single = [together(exact, [asked(seed)])[0][0].text for seed in range(3)]
    crowd, _ = together(exact, [asked(seed) for seed in range(10)], 12)
    assert [listener.text for listener in crowd[:3]] == single


@native
def test_a_text_is_that_of_its_tokens(exact: LanguageModel) -> None:
    (listener,), _ = together(exact, [greedy(PROMPTS[0], logprobs=2)])
    assert listener.text == exact.decode(listener.tokens)
    entries = [entry for piece in listener.pieces for entry in piece.logprobs]
    assert [entry.token for entry in entries] == listener.tokens
    assert all(entry.top[0].token == entry.token for entry in entries)


@pytest.fixture
def on_torch(packed_model: Path, monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    monkeypatch.setenv("DQ_DECODER", "torch")
    return load(packed_model, "cpu", exact=True)


def test_on_torch_tokens_agree_as_far_as_rounding_lets_them(on_torch: LanguageModel) -> None:
    """torch sums in an order that depends on the shape of the batch: float32 logits move by up to 1e-4
    (test_engine_paged.py), so tokens must agree until two of them are closer than that."""
    asked = [greedy(prompt, 40, logprobs=2) for prompt in PROMPTS]
    crowd, _ = together(on_torch, asked, 12)
    compared = 0
    for listener, one in zip(crowd, asked, strict=True):
        (single,), _ = together(on_torch, [one])
        for there, here in zip(listener.pieces, single.pieces, strict=True):
            assert list(there.tokens) == list(here.tokens)
            compared += 1
            best, second = here.logprobs[0].top
            if best.logprob - second.logprob < 1e-3:
                break
    assert compared > 150


def test_a_model_of_transformers_is_served_too(packed_model: Path) -> None:
    model = load_through_transformers(open_checkpoint(packed_model), "cpu", torch.float32)
    listeners, stats = together(model, [greedy(prompt, 12) for prompt in PROMPTS], 8)
    for prompt, listener in zip(PROMPTS, listeners, strict=True):
        (single,), _ = together(model, [greedy(prompt, 12)])
        assert listener.tokens == single.tokens
    assert (stats.cached_tokens, stats.blocks_cached) == (0, 0)


@native
def test_an_engine_runs_without_torch(packed_model: Path) -> None:
    code = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
import threading
from dq_runtime.runtime.engine import Engine, EngineSettings, FinishedEvent, Request
from dq_runtime.runtime.load import load_for_text
from dq_runtime.runtime.sampling import Sampling
model, done = load_for_text(sys.argv[1], "cpu"), threading.Event()
engine = Engine(model, EngineSettings(kv_bytes=2**22))
sampling = Sampling(1.0, top_p=0.9, seed=1)
engine.submit(Request([5, 6], 9, sampling, logprobs=1, ignore_end=True),
              lambda event: done.set() if isinstance(event, FinishedEvent) else None)
assert done.wait(20)
print(engine.stats().completion_tokens)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(packed_model)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "9\n"), done.stderr
