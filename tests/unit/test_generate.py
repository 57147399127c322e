"""Generation: the same tokens as transformers, text streamed without a wrong or leaked character, clear refusals."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dq_runtime
from dq_runtime.errors import DQError, SpecError
from dq_runtime.packing.checkpoint import open_checkpoint
from dq_runtime.runtime import transformers_model
from dq_runtime.runtime.generate import generate, stream
from dq_runtime.runtime.language_model import LanguageModel, LeanModel
from dq_runtime.runtime.load import load
from dq_runtime.runtime.sampling import Sampling
from dq_runtime.runtime.skeleton import load_through_transformers
from dq_runtime.runtime.text_stream import TextStream
from dq_runtime.runtime.transformers_model import TransformersModel

PROMPTS = ["Anna found a red lamp", "Later", "The mayor sold 12 apples. Then", "naïve ☃ 😀"]


@pytest.fixture(scope="module")
def model(packed_model: Path) -> LeanModel:
    loaded = load(packed_model, "cpu", exact=True)
    assert isinstance(loaded, LeanModel)
    return loaded


@pytest.fixture(scope="module")
def reference(packed_model: Path) -> Any:
    """The same checkpoint in transformers' own code."""
    return load_through_transformers(open_checkpoint(packed_model), "cpu", torch.float32).model


class Scripted(LanguageModel):
    """Says exactly these tokens, whatever it is asked, and then its end token for ever."""

    device = torch.device("cpu")

    def __init__(self, tokens: list[int], vocabulary: int, tokenizer: Any, context: int = 4096) -> None:
        super().__init__(tokenizer, "scripted")
        self.tokens, self.vocabulary, self.context_length = tokens, vocabulary, context
        self.said = 0

    def start(self, batch: int, capacity: int) -> Any:
        self.said = 0

    def step(self, tokens: Tensor, cache: Any) -> Tensor:
        logits = torch.zeros(1, self.vocabulary)
        last = next(iter(self.end_tokens()), self.tokens[-1])
        logits[0, self.tokens[self.said] if self.said < len(self.tokens) else last] = 1.0
        self.said += 1
        return logits

    def logits(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError

    def end_tokens(self) -> set[int]:
        return self._ends(None)


def _speaker(model: LanguageModel, tokens: list[int]) -> LanguageModel:
    """Says ``tokens`` with the tokenizer of ``model``."""
    return Scripted(tokens, len(model.tokenizer), model.tokenizer)


def _ids(model: LanguageModel, text: str) -> list[int]:
    ids: list[int] = model.tokenizer.encode(text, add_special_tokens=False)
    return ids


def _bytes(model: LanguageModel, data: bytes) -> list[int]:
    """One token a byte, so that every character of several bytes is split over tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    ids = []
    for value in data:
        # ByteLevel shows byte b as a printable character; for valid UTF-8 of one byte that is easy to obtain, for the
        # others it is the b-th of the printable substitutes.
        ids.append(model.tokenizer.token_id(_BYTE_CHARACTERS[value]))
    assert None not in ids
    assert len(ByteLevel.alphabet()) == 256
    return ids


def _byte_characters() -> dict[int, str]:
    """GPT-2's table from bytes to printable characters."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {b: chr(b) for b in kept}
    table |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in kept)}
    return table


_BYTE_CHARACTERS = _byte_characters()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_ids_equal_transformers_generate(model: LanguageModel, reference: Any, prompt: str) -> None:
    ids = model.encode(prompt)
    ours = generate(model, prompt, max_tokens=24)
    with torch.no_grad():
        theirs = reference.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=24, pad_token_id=0, return_dict_in_generate=False
        )[0, len(ids) :].tolist()
    ends = model.end_tokens()
    cut = next((i for i, t in enumerate(theirs) if t in ends), len(theirs))
    assert ours.tokens == theirs[:cut]
    assert ours.finish == ("end" if cut < len(theirs) else "length")
    assert ours.prompt_tokens == len(ids)


def test_our_packed_model_says_what_transformers_loads_from_the_same_directory_says(packed_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = load(packed_model, "cpu").encode(PROMPTS[0])
    theirs = AutoModelForCausalLM.from_pretrained(packed_model, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12, pad_token_id=0)
    assert (
        generate(load(packed_model, "cpu", exact=True), ids, max_tokens=12).tokens == expected[0, len(ids) :].tolist()
    )


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_streamed_pieces_make_up_the_text_and_the_one_shot_decode(
    model: LanguageModel, prompt: str, seed: int | None
) -> None:
    # A random model at temperature 3 mixes broken bytes of every kind into its text.
    sampling = None if seed is None else Sampling(3.0, seed=seed)
    pieces: list[str] = []
    result = generate(model, prompt, max_tokens=60, sampling=sampling, on_text=pieces.append)
    assert "".join(pieces) == result.text
    assert result.text == model.decode(result.tokens)
    assert all(pieces), "an empty piece is no news"


@pytest.mark.parametrize(
    "text",
    [
        "plain words only",
        " leading blank and  two",
        "naïve café ☃ snow",
        "😀😃 👩‍👩‍👧 family",
        "日本語のテキスト",
        "e\u0301 combining",
        "tab\tnewline\n\nend ",
        "ends in the middle 😀",
        "a , b . c ' d n't 've",
        "\ufffd was really there \ufffd",
    ],
)
@pytest.mark.parametrize("split", ["tokens", "bytes"])
def test_characters_split_over_tokens_arrive_whole(model: LanguageModel, text: str, split: str) -> None:
    tokens = _ids(model, text) if split == "tokens" else _bytes(model, text.encode())
    pieces: list[str] = []
    result = generate(_speaker(model, tokens), "x", max_tokens=500, on_text=pieces.append)
    assert result.tokens == tokens
    assert result.text == text
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in p for p in pieces)


@pytest.mark.parametrize(
    "data",
    [
        b"abc\xf0\x9f",
        b"\xf0\x9f\x98",
        b"\x80\x80 odd \xff\xfe bytes",
        b"\xe2\x82A\xe2\x82\xacB",
        b"\xf0\x9f" * 40 + b"end",
        b"\x80" * 70 + "😀!".encode(),
    ],
    ids=["cut emoji", "only a cut emoji", "never valid", "broken then whole", "long broken", "many continuation bytes"],
)
def test_broken_bytes_come_out_as_in_a_one_shot_decode(model: LanguageModel, data: bytes) -> None:
    tokens = _bytes(model, data)
    pieces: list[str] = []
    result = generate(_speaker(model, tokens), "x", max_tokens=500, on_text=pieces.append)
    assert "".join(pieces) == result.text == model.decode(tokens) == data.decode(errors="replace")


def test_special_tokens_inside_the_answer_are_not_shown(model: LanguageModel) -> None:
    special = model.tokenizer.token_id("<|user|>")
    tokens = [*_ids(model, "before"), special, *_ids(model, " after")]
    result = generate(_speaker(model, tokens), "x", max_tokens=500)
    assert result.text == "before after" == model.decode(tokens)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", [" two"], "one"),
        ("one two three", ["one"], ""),
        ("one two three", ["o"], ""),
        ("one two three", ["e"], "on"),
        ("one two three", ["three", "two"], "one "),
        ("one two three", ["two three four", "three"], "one two "),
        ("say abc now", ["ab", "abc"], "say "),
        ("say abc now", ["abc", "ab"], "say "),
        ("say abd now", ["abc", "d"], "say ab"),
        ("aaab", ["aab"], "a"),
        ("ababac done", ["abac"], "ab"),
        ("line\n\nnext", ["\n\n"], "line"),
        ("snow ☃ man", ["☃"], "snow "),
        ("smile 😀 more", ["😀 m"], "smile "),
        ("no such thing", ["zzz", "thingy"], "no such thing"),
        ("ends with th", ["the"], "ends with th"),
    ],
)
@pytest.mark.parametrize("split", ["tokens", "bytes"])
def test_stop_strings_never_leak(model: LanguageModel, text: str, stop: list[str], expected: str, split: str) -> None:
    tokens = _ids(model, text) if split == "tokens" else _bytes(model, text.encode())
    pieces: list[str] = []
    result = generate(_speaker(model, tokens), "x", max_tokens=500, stop=stop, on_text=pieces.append)
    assert "".join(pieces) == result.text == expected
    assert result.finish == ("end" if expected == text else "stop")


def test_a_stop_string_before_a_cut_character_does_not_leak_at_the_end(model: LanguageModel) -> None:
    """The stop string and the first byte of a character in one token, and then the answer ends."""
    tokens = [*_ids(model, "hi"), *_bytes(model, b"!\xf0")]
    text = TextStream(model, ["!"])
    text._pending = tokens[:-1]  # as if these bytes were one token
    text._pending.append(tokens[-1])
    assert text.flush() == "hi"
    assert text.text == "hi"
    assert text.matched == "!"


def test_a_stop_string_may_be_given_bare(model: LanguageModel) -> None:
    speaker = _speaker(model, _ids(model, "one two three"))
    assert generate(speaker, "x", stop="two").text == "one "


def test_finish_reasons(model: LanguageModel) -> None:
    tokens = _ids(model, "one two three")
    speaker = _speaker(model, tokens)
    assert generate(speaker, "x", max_tokens=2).finish == "length"
    assert generate(speaker, "x", max_tokens=2).tokens == tokens[:2]
    ended = generate(speaker, "x", max_tokens=50)
    assert (ended.finish, ended.tokens) == ("end", tokens)
    stopped = generate(speaker, "x", max_tokens=50, stop=["two"])
    assert stopped.finish == "stop"
    at_once = generate(_speaker(model, [model.tokenizer.eos_token_id]), "x")
    assert (at_once.finish, at_once.tokens, at_once.text) == ("end", [], "")


def test_end_tokens_of_generation_config_end_the_answer(packed_model: Path, tmp_path: Path) -> None:
    import json

    free = generate(packed_model, "Anna", max_tokens=8)
    copy = shutil.copytree(packed_model, tmp_path / "copy")
    (copy / "SHA256SUMS").unlink()
    settings = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [0, free.tokens[0]]}))
    assert generate(copy, "Anna", max_tokens=8).finish == "end"


def test_speeds_and_counts_are_reported(model: LanguageModel) -> None:
    result = generate(model, PROMPTS[0], max_tokens=4)
    assert result.prompt_tokens == len(model.encode(PROMPTS[0]))
    assert result.prefill_per_second > 0
    assert result.decode_per_second > 0


def test_chat_wraps_the_prompt_in_the_template(model: LanguageModel) -> None:
    wrapped = "<|user|>Who sold it?<|endoftext|><|assistant|>"
    ids = _ids(model, wrapped)
    assert model.encode_chat([{"role": "user", "content": "Who sold it?"}]) == ids
    by_ids = generate(model, ids, max_tokens=8)
    assert generate(model, "Who sold it?", chat=True, max_tokens=8).tokens == by_ids.tokens
    messages = [{"role": "user", "content": "Who sold it?"}]
    assert generate(model, messages, max_tokens=8).tokens == by_ids.tokens
    longer = [*messages, {"role": "assistant", "content": "Tom."}, {"role": "user", "content": "When?"}]
    assert generate(model, longer, max_tokens=2).prompt_tokens > len(ids)


def test_chat_without_a_template_is_one_sentence(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", None)
    with pytest.raises(DQError, match="has no chat template"):
        generate(model, "hi", chat=True)


def test_token_ids_need_no_tokenizer(model: LeanModel) -> None:
    bare = LeanModel(model.decoder, None, None, "bare")
    ids = model.encode(PROMPTS[0])
    pieces: list[str] = []
    result = generate(bare, ids, max_tokens=8, on_text=pieces.append)
    assert result.tokens == generate(model, ids, max_tokens=8).tokens
    assert result.text == ""
    assert pieces == []
    with pytest.raises(DQError, match="has no tokenizer files; pass token ids"):
        generate(bare, "text")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ([-1], "token id outside 0.."),
        ([1, 10**6], "token id outside 0.."),
        ([5] * 256, "the prompt has 256 tokens, but the model's context is 256"),
        ([5] * 300, "the prompt has 300 tokens"),
    ],
    ids=["no text", "no ids", "negative", "beyond the vocabulary", "exactly the context", "longer than the context"],
)
def test_prompts_that_cannot_be_continued(model: LanguageModel, prompt: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        generate(model, prompt)


def test_other_bad_arguments(model: LanguageModel) -> None:
    for tokens in (0, -1):
        with pytest.raises(SpecError, match="max_tokens must be at least 1"):
            generate(model, "hi", max_tokens=tokens)
    for stop in ([""], ["a", ""], ""):
        with pytest.raises(SpecError, match="a stop string is empty"):
            generate(model, "hi", stop=stop)


def test_max_tokens_are_clipped_at_the_context(model: LanguageModel) -> None:
    result = generate(model, [5] * 250, max_tokens=100, sampling=Sampling(1.0, seed=0))
    assert len(result.tokens) == 6 or result.finish == "end"
    # The last position of the context is used: prompt and answer fill it exactly.
    full = Scripted([7] * 100, 300, None, context=20)
    assert len(generate(full, [5] * 15, max_tokens=100).tokens) == 5


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_prompts_in_passes_equal_one_pass_in_transformers_too(
    model: LanguageModel, reference: Any, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    through = TransformersModel(reference, model.tokenizer, "x")
    prompt = model.encode(PROMPTS[2])
    assert 7 < len(prompt) < transformers_model.CHUNK
    whole = generate(through, prompt, max_tokens=12)
    assert whole.tokens == generate(model, prompt, max_tokens=12).tokens
    monkeypatch.setattr(transformers_model, "CHUNK", chunk)
    assert generate(through, prompt, max_tokens=12).tokens == whole.tokens


def test_a_cached_step_gives_the_logits_of_the_whole_sequence(model: LanguageModel, reference: Any) -> None:
    ids = torch.tensor([model.encode(PROMPTS[2])])
    with torch.no_grad():
        expected = reference(input_ids=ids, use_cache=False).logits[0]
    cache = model.start(*ids.shape)
    for i in range(ids.shape[1]):
        torch.testing.assert_close(model.step(ids[:, i : i + 1], cache)[0], expected[i], rtol=1e-4, atol=1e-4)


def test_a_seed_repeats_a_sampled_text(model: LanguageModel) -> None:
    texts = [generate(model, "Anna", max_tokens=20, sampling=Sampling(1.0, seed=s)).tokens for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_stream_is_lazy_and_knows_its_result_afterwards(model: LanguageModel) -> None:
    running = stream(model, "Anna", max_tokens=6)
    assert running.result is None
    text = "".join(running)
    assert running.result is not None
    assert running.result.text == text


def test_generate_is_a_function_whatever_was_imported(packed_model: Path) -> None:
    expected = generate(packed_model, "Anna", max_tokens=3).tokens
    assert dq_runtime.generate(packed_model, "Anna", max_tokens=3).tokens == expected
    imported = importlib.import_module("dq_runtime.generate")
    assert imported is sys.modules["dq_runtime.generate"]
    assert imported(str(packed_model), "Anna", max_tokens=3).tokens == expected
    assert dq_runtime.generate(packed_model, "Anna", max_tokens=3).tokens == expected


def test_python_m_dq_runtime_generate(packed_model: Path) -> None:
    command = [sys.executable, "-m", "dq_runtime.generate", str(packed_model), "Anna", "--max-tokens", "5"]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == generate(packed_model, "Anna", max_tokens=5).text + "\n"
