"""Documents in, windows of token ids out; what is held out never enters calibration."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from dq_runtime.data import Windows, pack_windows, read_documents, split_documents
from dq_runtime.errors import DataError


class Letters:
    """One token a character; the end token is 0."""

    eos_token_id: int | None = 0

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(c) for c in text]


def _file(directory: Path, name: str, content: str | bytes) -> str:
    path = directory / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        ("one\n\nstill one<|endoftext|>two<|endoftext|>\n", ["one\n\nstill one", "two"]),
        ("one\nstill one\n\n  \n\ntwo\n", ["one\nstill one", "two"]),
        ("one\r\nstill one\r\n\r\ntwo\r\n", ["one\nstill one", "two"]),
        ("one\ntwo\nthree", ["one", "two", "three"]),
        ("one\x0cstill one\ntwo\u2028still two", ["one\x0cstill one", "two\u2028still two"]),
        ("\ufeffone\ntwo", ["one", "two"]),
        ("alone", ["alone"]),
    ],
    ids=["endoftext", "blank lines", "windows line ends", "one a line", "odd separators", "byte order mark", "single"],
)
def test_text_formats(tmp_path: Path, content: str, documents: list[str]) -> None:
    assert read_documents(_file(tmp_path, "a.txt", content)) == documents


def test_jsonl_reads_the_text_field_and_skips_blank_lines(tmp_path: Path) -> None:
    texts = ["two\n\nparagraphs", "naïve ☃ 😀", "line\u2028separator\u0085inside"]
    # ensure_ascii=False writes U+2028 and U+0085 as they are; only "\n" ends a line of JSONL.
    lines = [json.dumps({"text": t, "id": i}, ensure_ascii=False) for i, t in enumerate(texts)]
    assert read_documents(_file(tmp_path, "a.jsonl", "\n\n".join(lines) + "\n")) == texts
    assert read_documents(_file(tmp_path, "bom.jsonl", "\ufeff" + "\n".join(lines))) == texts


@pytest.mark.parametrize("bad", ["{", '{"body": "x"}', '{"text": 3}', '{"text": null}', '["text"]', '"text"', "7"])
def test_bad_jsonl_names_the_line(tmp_path: Path, bad: str) -> None:
    source = _file(tmp_path, "a.jsonl", f'{{"text": "fine"}}\n\n{bad}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 3: expected a JSON object with a string field"):
        read_documents(source)


def test_a_lone_surrogate_in_jsonl_does_not_reach_the_tokenizer(tmp_path: Path) -> None:
    documents = read_documents(_file(tmp_path, "a.jsonl", '{"text": "half \\ud83d of an emoji"}\n'))
    documents[0].encode("utf-8")  # what every tokenizer does first


def test_not_utf8_names_the_byte(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="byte 4 is not UTF-8"):
        read_documents(_file(tmp_path, "a.txt", b"cafe\xe9 au lait"))


@pytest.mark.parametrize("content", ["", "\n \n\t\n", "<|endoftext|>\n<|endoftext|>"])
def test_empty_sources_are_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match="holds no text"):
        read_documents(_file(tmp_path, "a.txt", content))


def test_empty_jsonl_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no text"):
        read_documents(_file(tmp_path, "a.jsonl", '{"text": "  "}\n'))


def test_missing_files_and_directories_are_refused(tmp_path: Path) -> None:
    for source in (str(tmp_path / "none.txt"), str(tmp_path), ""):
        with pytest.raises(DataError, match="is not a file"):
            read_documents(source)


def test_hub_sources_need_the_datasets_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # makes the import fail, installed or not
    with pytest.raises(DataError, match="pip install datasets"):
        read_documents("hf:allenai/c4")


def test_hub_source_names_its_parts_and_reports_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    class Package:
        @staticmethod
        def load_dataset(name: str, config: str | None, split: str) -> list[dict[str, str]]:
            asked.append((name, config, split))
            return [{"text": "a"}, {"text": " "}, {"text": "b"}]

    monkeypatch.setitem(sys.modules, "datasets", Package)
    assert read_documents("hf:allenai/c4:en:validation") == ["a", "b"]
    assert read_documents("hf:allenai/c4") == ["a", "b"]
    assert asked == [("allenai/c4", "en", "validation"), ("allenai/c4", None, "train")]
    monkeypatch.setattr(Package, "load_dataset", lambda *a, **k: [{"body": "x"}])
    with pytest.raises(DataError, match="could not be read"):
        read_documents("hf:allenai/c4")


@pytest.mark.parametrize("count", [2, 3, 10, 137, 500])
@pytest.mark.parametrize("seed", [0, 1])
def test_split_is_a_partition_and_repeats_for_a_seed(count: int, seed: int) -> None:
    documents = [f"{i} " + "word " * (i % 7) for i in range(count)]
    train, held = split_documents(documents, seed)
    assert sorted(train + held) == sorted(documents)
    assert train
    assert held
    assert (train, held) == split_documents(documents, seed)


def test_split_holds_out_about_its_share_and_depends_on_the_seed() -> None:
    documents = [f"document {i:04}" for i in range(1000)]
    for seed in range(5):
        _, held = split_documents(documents, seed)
        assert 0.1 <= len(held) / 1000 <= 0.13
    assert split_documents(documents, 0)[1] != split_documents(documents, 1)[1]


def test_a_document_that_occurs_twice_is_never_on_both_sides() -> None:
    documents = [f"document {i % 40}" for i in range(120)]
    for seed in range(5):
        train, held = split_documents(documents, seed)
        assert not set(train) & set(held)
        assert train


def test_one_document_cannot_be_split() -> None:
    with pytest.raises(DataError, match="give a held-out file"):
        split_documents(["alone"], 0)
    with pytest.raises(DataError, match="give a held-out file"):
        split_documents(["the same"] * 5, 0)


def test_windows_are_exact_pieces_of_the_shuffled_stream() -> None:
    documents = ["abc", "defgh", "ij", "klmnop"]
    windows = pack_windows(documents, Letters(), 3, 5, seed=3, source="here")
    assert windows.tokens.shape == (3, 5)
    assert windows.tokens.dtype is torch.int64
    assert windows.source == "here"
    joined = "".join(chr(t) for t in windows.tokens.flatten().tolist())
    # Whole documents in some order, each followed by the end token; only the last may be cut.
    whole = joined.split("\0")
    assert set(whole[:-1]) <= set(documents)
    assert any(d.startswith(whole[-1]) for d in documents)
    assert len(set(whole)) == len(whole)


def test_windows_repeat_for_a_seed_and_differ_between_seeds() -> None:
    documents = [f"document number {i}" for i in range(50)]
    first, again, other = (pack_windows(documents, Letters(), 4, 16, seed, "x") for seed in (0, 0, 1))
    assert torch.equal(first.tokens, again.tokens)
    assert first.fingerprint() == again.fingerprint()
    assert first.fingerprint() != other.fingerprint()


def test_the_fingerprint_depends_on_how_tokens_are_cut_into_windows() -> None:
    tokens = torch.arange(64)
    assert Windows(tokens.view(4, 16), "x").fingerprint() != Windows(tokens.view(8, 8), "x").fingerprint()


def test_a_tokenizer_without_end_token_joins_documents_directly() -> None:
    class NoEnd(Letters):
        eos_token_id = None

    windows = pack_windows(["aaa", "aaa"], NoEnd(), 1, 6, 0, "x")
    assert windows.tokens.tolist() == [[97] * 6]


@pytest.mark.parametrize(("count", "length"), [(3, 8), (1, 24), (24, 1)])
def test_too_little_text_is_one_sentence_with_a_number_that_would_work(count: int, length: int) -> None:
    documents = ["abcdef", "ghijklmnop"]  # 18 tokens with the two end tokens
    with pytest.raises(
        DataError, match=r"^tiny\.txt gives 18 tokens, fewer than \d+ windows of \d+; [^\n]*$"
    ) as caught:
        pack_windows(documents, Letters(), count, length, 0, "tiny.txt")
    possible = 18 // length
    assert ("at most 0" in str(caught.value)) is False
    if possible:
        assert f"at most {possible} window" in str(caught.value)
        pack_windows(documents, Letters(), possible, length, 0, "tiny.txt")
