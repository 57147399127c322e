"""The lean tokenizer against transformers' own: the same ids, the same text, the same conversations."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from dq_runtime.errors import CheckpointError
from dq_runtime.runtime.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
    "plain words only",
    " leading blank and  two",
    "naïve café ☃ snow 😀 日本語",
    "12 apples, don't you've 's . , ?",
    "<|user|>special inside<|endoftext|>",
    "tab\tnewline\n\nend ",
    "",
]
CHATS = [
    [{"role": "user", "content": "Who sold it?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": 'Quotes " and <tags> & umlauts ü'},
        {"role": "assistant", "content": " Tom. "},
        {"role": "user", "content": "When?"},
    ],
]
# What published templates use: whitespace control, namespaces, loop control, tojson, the markers for training.
TEMPLATES = {
    "chatml": "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "blocks": "{{ bos_token }}\n{% for m in messages %}\n    {%- if m.role == 'system' %}\n    [{{ m.content | trim }}]"
    "\n    {% elif loop.first %}\n  first\n    {% endif %}\n{{ m.content }}{{ eos_token }}\n{% endfor %}\n",
    "namespace": "{% set ns = namespace(found=false) %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set ns.found = true %}{% continue %}{% endif %}{{ m.content }}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{% endfor %}{{ ns.found }}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}\n"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ messages | tojson(sort_keys=true) }}",
    "tools": "{% if tools is none and not documents %}none{% endif %}{{ tools }}{{ undefined_name }}",
}


def _pair(directory: Path) -> tuple[Tokenizer, Any]:
    from transformers import AutoTokenizer

    ours = load_tokenizer(directory)
    assert isinstance(ours, Tokenizer)
    return ours, AutoTokenizer.from_pretrained(directory)


def _check(ours: Tokenizer, theirs: Any) -> None:
    for text in TEXTS:
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == ids, text
            assert ours.decode(ids, skip_special_tokens=special) == theirs.decode(ids, skip_special_tokens=special)
    broken = [[i] for i in range(3, 80)]  # single bytes, most of them no text by themselves
    assert [ours.decode(ids) for ids in broken] == [theirs.decode(ids) for ids in broken]
    assert ours.eos_token_id == theirs.eos_token_id
    assert len(ours) == len(theirs)
    assert ours.chat_template == theirs.chat_template
    for messages in CHATS if ours.chat_template else ():
        for prompt in (True, False):
            expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert ours.apply_chat_template(messages, add_generation_prompt=prompt) == expected


def _copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (source / name).exists():
            shutil.copy(source / name, target / name)
    return target


def _change(directory: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads((directory / name).read_text())
    change(value)
    (directory / name).write_text(json.dumps(value))


def test_the_tiny_model(tiny_model: Path) -> None:
    _check(*_pair(tiny_model))


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates_render_as_in_transformers(name: str, tiny_model: Path, tmp_path: Path) -> None:
    directory = _copy(tiny_model, tmp_path / "t")
    (directory / "chat_template.jinja").write_text(TEMPLATES[name])
    _check(*_pair(directory))


def test_chat_templates_of_older_checkpoints(tiny_model: Path, tmp_path: Path) -> None:
    directory = _copy(tiny_model, tmp_path / "t")
    (directory / "chat_template.jinja").unlink()
    _check(*_pair(directory))
    assert load_tokenizer(directory).chat_template is None
    _change(directory, "tokenizer_config.json", lambda c: c.update(chat_template=TEMPLATES["chatml"]))
    _check(*_pair(directory))
    several = [{"name": n, "template": TEMPLATES[t]} for n, t in (("tool_use", "tools"), ("default", "chatml"))]
    _change(directory, "tokenizer_config.json", lambda c: c.update(chat_template=several))
    assert load_tokenizer(directory).chat_template == TEMPLATES["chatml"]


def test_a_template_may_ask_for_the_date_and_refuse(tiny_model: Path, tmp_path: Path) -> None:
    directory = _copy(tiny_model, tmp_path / "t")
    (directory / "chat_template.jinja").write_text(
        "{% if messages | length > 1 %}{{ raise_exception('one question only') }}{% endif %}{{ strftime_now('%Y') }}"
    )
    tokenizer = load_tokenizer(directory)
    assert tokenizer.apply_chat_template(CHATS[0]) == str(datetime.now().year)
    with pytest.raises(CheckpointError, match="one question only"):
        tokenizer.apply_chat_template(CHATS[1])


def test_a_template_cannot_leave_its_sandbox(tiny_model: Path, tmp_path: Path) -> None:
    directory = _copy(tiny_model, tmp_path / "t")
    attacks = ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ raise_exception.__globals__['json'] }}"]
    for attack in attacks:
        (directory / "chat_template.jinja").write_text(attack)
        with pytest.raises(CheckpointError, match="cannot render"):
            load_tokenizer(directory).apply_chat_template(CHATS[0])


def test_special_tokens_that_only_the_config_names(tiny_model: Path, tmp_path: Path) -> None:
    directory = _copy(tiny_model, tmp_path / "t")

    def describe(config: dict[str, Any]) -> None:
        config["eos_token"] = {"__type": "AddedToken", "content": "<|user|>", "special": True}
        config["pad_token"] = "<|pad|>"

    _change(directory, "tokenizer_config.json", describe)
    ours, theirs = _pair(directory)
    _check(ours, theirs)
    assert ours.encode("a<|pad|>b") == theirs.encode("a<|pad|>b")
    assert ours.eos_token_id == ours.token_id("<|user|>")


def test_special_tokens_added_by_the_post_processor_and_settings_of_training(tiny_model: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing

    directory = _copy(tiny_model, tmp_path / "t")
    backend = Backend.from_file(str(directory / "tokenizer.json"))
    backend.post_processor = TemplateProcessing(
        single="<|user|> $A", pair="<|user|> $A $B", special_tokens=[("<|user|>", backend.token_to_id("<|user|>"))]
    )
    backend.enable_truncation(max_length=3)
    backend.enable_padding(length=8, pad_id=0, pad_token="<|endoftext|>")
    backend.save(str(directory / "tokenizer.json"))
    ours, theirs = _pair(directory)
    assert ours.encode("many words to be cut")[0] == ours.token_id("<|user|>")
    _check(ours, theirs)


def test_words_that_are_cleaned_up_after_decoding(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "it", "is", "n't", "'s", ".", ",", "?", "fine", "we", "'ve", "'"]
    backend = Backend(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", clean_up_tokenization_spaces=True)
    fast.save_pretrained(tmp_path)
    ours, theirs = _pair(tmp_path)
    for text in ("it 's fine , is n't it ?", "we 've ' fine .", "it is"):
        ids = theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.decode(ours.encode("it 's fine .")) == "it's fine."


def test_directories_without_or_with_broken_files(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    assert load_tokenizer(tmp_path / "none") is None
    directory = _copy(tiny_model, tmp_path / "t")
    (directory / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(CheckpointError, match="tokenizer files of"):
        load_tokenizer(directory)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer files of"):
        load_tokenizer(directory)
