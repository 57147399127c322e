"""The command line: every mistake of a user is one sentence and exit code 2; --json is JSON; help has examples."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dq_runtime.cli import main

ROOT = Path(__file__).parents[2]
COMMANDS = ("quantize", "compare", "generate", "inspect", "backends", "serve", "chat", "export", "check", "eval")
SMALL = ["--windows", "2", "--window-length", "32", "--held-out-windows", "2"]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("DQ_BACKEND", raising=False)


def one_sentence(captured: Any) -> str:
    """Standard error is exactly one line of dq's, standard output is empty."""
    assert captured.out == ""
    assert "Traceback" not in captured.err
    lines = [line for line in captured.err.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("dq: ")]
    assert len(said) == 1, captured.err
    assert lines[-1] == said[0]
    assert len(said[0]) < 500
    return said[0]


def strict(text: str) -> Any:
    """JSON without Python's NaN and Infinity, which other parsers refuse."""

    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def damaged(model: Path, to: Path, name: str, change: Callable[[torch.Tensor], object] | None) -> Path:
    """A copy of a model with one tensor changed in place, or removed."""
    shutil.copytree(model, to)
    tensors = load_file(to / "model.safetensors")
    if change is None:
        del tensors[name]
    else:
        change(tensors[name])
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--calibration", "{tmp}/empty.txt"], ["empty.txt"]),
        (["--calibration", "{tmp}/blank.jsonl"], ["blank.jsonl"]),
        (["--calibration", "{tmp}/bad.jsonl"], ["bad.jsonl", "line 1"]),
        (["--calibration", "{tmp}/missing.txt"], ["missing.txt"]),
        (["--calibration", "{tmp}/latin.txt"], ["latin.txt"]),
        (["--calibration", "{text}", "--held-out", "{tmp}/empty.txt"], ["empty.txt"]),
        (["--calibration", "{text}", "--held-out", "{text}"], ["nothing is left"]),
        (["--calibration", "{text}", "--held-out-windows", "9999"], ["9999 windows", "tiny.txt"]),
        (["--group-size", "128"], ["group size 128", "in_features 64"]),
        (["--group-size", "48"], ["48"]),
        (["--group-size", "-64"], ["-64"]),
        (["--group-size", "many"], ["many"]),
        (["--bits", "9"], ["bits", "9"]),
        (["--bits", "three"], ["--bits", "quantize --help"]),
        (["--scale", "median"], ["median", "absmax"]),
        (["--scale-dtype", "float32"], ["float32", "bfloat16"]),
        (["--rounding", "magic"], ["magic", "nearest", "discquant"]),
        (["--transform", "magic"], ["magic", "identity"]),
        (["--transform-set", "lr=1"], ["identity", "lr"]),
        (["--transform-set", "lr"], ["--transform-set", "NAME=VALUE"]),
        (["--transform", "spinquant", "--transform-set", "steps=0"], ["spinquant", "steps", "at least 1"]),
        (["--rounding", "nearest", "--set", "lr=1"], ["nearest", "lr"]),
        (["--rounding", "discquant-paper", "--set", "speed=1"], ["speed", "clamp"]),
        (["--rounding", "discquant", "--set", "lr=fast"], ["lr", "fast"]),
        (["--rounding", "discquant", "--set", "lr=-1"], ["lr", "0 or more"]),
        (["--rounding", "discquant", "--set", "lr"], ["--set", "NAME=VALUE"]),
        (["--override", "nonsense"], ["nonsense", "PATTERN=BITS"]),
        (["--override", "*=17"], ["17"]),
        (["--override", "nowhere.*=8"], ["nowhere.*", "matches no layer"]),
        (["--ignore", "*"], ["no linear layer is left"]),
        (["--seed", "-1"], ["seed"]),
        (["--seed", "99999999999999999999"], ["seed"]),
        (["--windows", "0"], ["windows"]),
        (["--window-length", "1"], ["window_length"]),
        (["--window-length", "512"], ["512", "256"]),
        (["--compute-dtype", "float64"], ["float64"]),
        (["--device", "abacus"], ["abacus"]),
        (["--bogus"], ["--bogus", "quantize --help"]),
    ],
    ids=lambda v: " ".join(v).replace("{tmp}/", "").replace("{text}", "text") if v and v[0].startswith("--") else "",
)
def test_a_mistake_in_quantize_is_one_sentence_and_leaves_nothing(
    arguments: list[str],
    names: list[str],
    tiny_model: Path,
    tiny_text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.txt").write_text("\n \n\n")
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n')
    (tmp_path / "bad.jsonl").write_text('{"txt": "hello"}\n')
    (tmp_path / "latin.txt").write_bytes("café\n\ncafé".encode("latin-1"))
    before = sorted(tmp_path.iterdir())
    filled = [a.format(tmp=tmp_path, text=tiny_text) for a in arguments]
    if "--calibration" not in filled:
        filled += ["--calibration", str(tiny_text)]
    small = [
        a for flag, value in zip(SMALL[::2], SMALL[1::2], strict=True) if flag not in filled for a in (flag, value)
    ]
    code = main(["quantize", str(tiny_model), "-o", str(tmp_path / "out"), *small, *filled])
    sentence = one_sentence(capsys.readouterr())
    assert code == 2
    for name in names:
        assert name in sentence
    assert sorted(tmp_path.iterdir()) == before, "nothing was written"


def test_a_bad_model_is_one_sentence_and_leaves_nothing(
    tiny_model: Path, packed_model: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(value: float) -> Callable[[torch.Tensor], object]:
        return lambda t: t.view(-1)[7].fill_(value)

    embedding = "model.embed_tokens.weight"
    bad: dict[Path, str] = {
        damaged(tiny_model, tmp_path / "nan", Q_PROJ, fill(torch.nan)): Q_PROJ,
        damaged(tiny_model, tmp_path / "inf", Q_PROJ, fill(torch.inf)): Q_PROJ,
        damaged(tiny_model, tmp_path / "nan-embedding", embedding, fill(torch.nan)): embedding,
        damaged(tiny_model, tmp_path / "incomplete", Q_PROJ, None): Q_PROJ,
        tmp_path / "missing": "does not exist",
        tmp_path / "empty": "config.json",
        tmp_path / "text.txt": "not a GGUF",
        tmp_path / "fake.gguf": "fake.gguf",
        tmp_path / "missing.gguf": "missing.gguf does not exist",
        packed_model: "already quantized",
        tmp_path / "no-weights": "no-weights",
        tmp_path / "truncated": "truncated",
        tmp_path / "broken-config": "config.json",
    }
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "fake.gguf").write_bytes(b"GGUF" + bytes(range(200)))
    shutil.copytree(tiny_model, tmp_path / "no-weights")
    (tmp_path / "no-weights" / "model.safetensors").unlink()
    shutil.copytree(tiny_model, tmp_path / "truncated")
    content = (tiny_model / "model.safetensors").read_bytes()
    (tmp_path / "truncated" / "model.safetensors").write_bytes(content[: len(content) // 2])
    shutil.copytree(tiny_model, tmp_path / "broken-config")
    (tmp_path / "broken-config" / "config.json").write_text("{")
    before = sorted(tmp_path.iterdir())
    for model, named in bad.items():
        code = main(["quantize", str(model), "-o", str(tmp_path / "out"), "--calibration", str(tiny_text), *SMALL])
        sentence = one_sentence(capsys.readouterr())
        assert code == 2, model
        assert named in sentence, model
        assert sorted(tmp_path.iterdir()) == before, model


def test_an_existing_output_is_refused_and_untouched(
    tiny_model: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("data")
    command = ["quantize", str(tiny_model), "-o", str(output), "--calibration", str(tiny_text)]
    assert main(command) == 2
    assert "exists" in one_sentence(capsys.readouterr())
    assert main([*command, "--overwrite"]) == 2
    assert "not a checkpoint" in one_sentence(capsys.readouterr())
    assert main([*command[:3], str(output / "precious"), "--overwrite"]) == 2
    assert "not a checkpoint" in one_sentence(capsys.readouterr())
    assert (output / "precious").read_text() == "data"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_after_a_mistake_the_corrected_command_runs(
    tiny_model: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A refused run must not leave an unfinished state that blocks the next one."""
    command = ["quantize", str(tiny_model), "-o", str(tmp_path / "out"), "--rounding", "nearest", *SMALL]
    assert main([*command, "--calibration", str(tmp_path / "missing")]) == 2
    capsys.readouterr()
    assert main([*command, "--calibration", str(tiny_text)]) == 0
    captured = capsys.readouterr()
    assert "top-1" in captured.out
    assert "reference" in captured.out
    assert "Checkpoint: " in captured.out
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("held_out_windows", ["1", "2"])
def test_quantize_json_is_the_report_and_nothing_else(
    held_out_windows: str, tiny_model: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(tiny_model), "-o", str(tmp_path / "out"), "--calibration", str(tiny_text), "--json"]
    command += [*SMALL[:4], "--held-out-windows", held_out_windows, "--report", str(tmp_path / "report")]
    command += ["--set", "iters=2", "--set", "epochs=1"]
    assert main(command) == 0
    printed = strict(capsys.readouterr().out)
    assert printed == strict((tmp_path / "out" / "report.json").read_text())
    assert printed == strict((tmp_path / "report" / "report.json").read_text())
    assert set(printed["held_out"]["kl"]) == {"nearest", "discquant"}
    assert set(printed["held_out"]["perplexity"]) == {"reference", "nearest", "discquant"}
    assert printed["bits_per_weight"] == 3.25
    assert printed["seconds"] > 0
    assert printed["peak_memory_bytes"] > 0
    for name in ("report.html", "report.png"):
        assert (tmp_path / "report" / name).stat().st_size > 1000


def test_inspect_json_is_stable(packed_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(packed_model), "--json"]) == 0
    info = strict(capsys.readouterr().out)
    assert set(info) >= {"path", "model_type", "quantized_weights", "bits_per_weight", "packed_bytes", "layers"}
    assert set(info) >= {"dense_parameters", "dense_bytes", "size_bytes"}
    keys = {"name", "bits", "group_size", "symmetric", "out_features", "in_features", "bytes", "bits_per_weight"}
    assert all(set(row) >= keys for row in info["layers"])
    assert info["bits_per_weight"] == 3.25
    assert len(info["layers"]) == 14
    assert info["size_bytes"] == (packed_model / "model.safetensors").stat().st_size


def test_inspect_shows_a_table(packed_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(packed_model)]) == 0
    assert "3.250 bits" in capsys.readouterr().out


def test_backends_json_is_stable(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backends", "--json"]) == 0
    rows = strict(capsys.readouterr().out)
    assert [row["name"] for row in rows][-1] == "reference"
    for row in rows:
        assert set(row) >= {"name", "ops", "unavailable"}
        assert row["unavailable"] is None or isinstance(row["unavailable"], str)
    assert rows[-1]["unavailable"] is None
    assert main(["backends"]) == 0
    assert "reference" in capsys.readouterr().out


def test_generate_json_and_text_agree(packed_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(packed_model), "Yesterday my uncle", "--max-tokens", "12"]
    assert main([*command, "--json"]) == 0
    answer = strict(capsys.readouterr().out)
    assert set(answer) >= {"text", "tokens", "prompt_tokens", "finish", "prefill_per_second", "decode_per_second"}
    assert len(answer["tokens"]) <= 12
    assert main(command) == 0
    captured = capsys.readouterr()
    assert captured.out == answer["text"] + "\n"
    assert "tokens/s" in captured.err


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--temperature", "-1"], ["temperature"]),
        (["--top-p", "0"], ["top_p"]),
        (["--top-k", "-1"], ["top_k"]),
        (["--min-p", "2"], ["min_p"]),
        (["--repetition-penalty", "0"], ["repetition_penalty"]),
        (["--max-tokens", "0"], ["max_tokens"]),
        (["--stop", ""], ["stop"]),
        (["--device", "abacus"], ["abacus"]),
        (["--device", "cuda:99"], ["cuda:99"]),
        (["--seed", "one"], ["--seed"]),
        (["--seed", "99999999999999999999"], ["seed"]),
        (["--bogus"], ["--bogus"]),
    ],
    ids=lambda v: " ".join(v),
)
def test_a_mistake_in_generate_is_one_sentence(
    arguments: list[str], names: list[str], packed_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(packed_model), "hi", *arguments]) == 2
    sentence = one_sentence(capsys.readouterr())
    assert all(name in sentence for name in names)


def test_a_prompt_that_cannot_be_run_is_one_sentence(
    packed_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(packed_model), ""]) == 2
    assert "prompt is empty" in one_sentence(capsys.readouterr())
    assert main(["generate", str(packed_model), "word " * 400]) == 2
    assert "context is 256" in one_sentence(capsys.readouterr())
    assert main(["generate", str(tmp_path / "missing"), "hi"]) == 2
    assert "missing" in one_sentence(capsys.readouterr())


def test_an_impossible_backend_request_is_one_sentence(
    packed_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DQ_BACKEND", "no-such")
    assert main(["generate", str(packed_model), "hi"]) == 2
    assert "no-such" in one_sentence(capsys.readouterr())


@pytest.mark.parametrize("command", ["inspect", "generate"])
def test_a_damaged_checkpoint_is_one_sentence(
    command: str, packed_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "copy"
    shutil.copytree(packed_model, path)
    content = bytearray((path / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "model.safetensors").write_bytes(content)
    assert main([command, str(path), *(["hi"] if command == "generate" else [])]) == 2
    assert "model.safetensors" in one_sentence(capsys.readouterr())


@pytest.mark.parametrize("arguments", [["frobnicate"], ["--bogus"], ["inspect"], ["generate", "only-one"]])
def test_a_wrong_command_line_is_one_sentence(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "--help" in one_sentence(capsys.readouterr())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_complete_sentences_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Examples" in text
    assert f"dq {command}" in text


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], []):
        assert main(arguments) == 0
        text = capsys.readouterr().out
        assert all(command in text for command in COMMANDS)


def test_text_is_streamed_by_a_fresh_process(packed_model: Path, tmp_path: Path) -> None:
    # 24 tokens come so fast that a busy reader may find them all at once
    command = [sys.executable, "-m", "dq_runtime.generate", str(packed_model), "Later the baker", "--max-tokens", "200"]
    command += ["--temperature", "1", "--seed", "3"]
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=environment
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        pieces = list(iter(lambda: running.stdout.read1(4096), b""))  # type: ignore[union-attr]
        errors = running.stderr.read().decode()
    assert running.returncode == 0, errors
    assert len(pieces) > 3, "the text must come in pieces, not at the end"
    assert b"".join(pieces).endswith(b"\n")
    assert "tokens/s" in errors
