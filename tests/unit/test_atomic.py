"""Files and directories appear whole or not at all, even when the disk is full."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import dq_runtime
from dq_runtime.errors import DQError
from dq_runtime.packing.atomic import new_directory, replace_file
from dq_runtime.spec import GridSpec, QuantSpec, RoundingSpec

ROOT = Path(__file__).parents[2]


class BoomError(Exception):
    pass


def fill(directory: Path, text: str) -> None:
    (directory / "a").write_text(text)
    (directory / "b").write_text(text)


def test_a_new_directory_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with new_directory(target) as directory:
        fill(directory, "new")
        assert not target.exists()
        assert directory.parent == target.parent, "a rename must not cross file systems"
    assert (target / "a").read_text() == "new"
    assert [p.name for p in target.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [BoomError, KeyboardInterrupt, SystemExit])
def test_a_failure_inside_leaves_nothing_behind(tmp_path: Path, error: type[BaseException]) -> None:
    def write() -> None:
        with new_directory(tmp_path / "out") as directory:
            fill(directory, "half")
            raise error

    with pytest.raises(error):
        write()
    assert list(tmp_path.iterdir()) == []


def test_an_operating_system_error_becomes_one_sentence(tmp_path: Path) -> None:
    def write() -> None:
        with new_directory(tmp_path / "out"):
            raise OSError(28, "No space left on device")

    with pytest.raises(DQError, match="out: No space left on device; nothing was written"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_survives_a_failure(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    fill(target, "old")

    def write() -> None:
        with new_directory(target, overwrite=True) as directory:
            fill(directory, "half")
            raise BoomError

    with pytest.raises(BoomError):
        write()
    assert (target / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_existing_directory_is_replaced_on_success(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    fill(target, "old")
    (target / "stale").write_text("of the old one")
    with new_directory(target, overwrite=True) as directory:
        fill(directory, "new")
        assert (target / "a").read_text() == "old"
    assert (target / "a").read_text() == "new"
    assert not (target / "stale").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failure_between_the_two_renames_brings_the_old_directory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    fill(target, "old")
    rename = Path.rename

    def fail_into_place(self: Path, to: Path) -> Path:
        if ".tmp-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail_into_place)

    def write() -> None:
        with new_directory(target, overwrite=True) as directory:
            fill(directory, "new")

    with pytest.raises(DQError, match="Input/output error"):
        write()
    assert (target / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_directory_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def write() -> None:
        with new_directory(target) as directory:
            fill(directory, "new")
            target.mkdir()
            fill(target, "somebody else's")

    with pytest.raises(DQError, match="appeared while"):
        write()
    assert (target / "a").read_text() == "somebody else's"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "f"
    replace_file(file, lambda p: p.write_text("first"))
    replace_file(file, lambda p: p.write_text("second"))
    assert file.read_text() == "second"

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(DQError, match="f: No space left on device; nothing was changed"):
        replace_file(file, fail)
    assert file.read_text() == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


FULL_DISK = """
import resource, sys
from dq_runtime.cli import main
import dq_runtime.pipeline, transformers.models.llama.modeling_llama  # imports may write caches; the limit comes after
sys.dont_write_bytecode = True  # what is imported later would be cached cut off at the limit, for everyone
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


# The weights have 70 KB, the picture of the report more than 90.
@pytest.mark.parametrize("limit", [30_000, 90_000], ids=["weights", "report"])
def test_a_full_disk_is_one_sentence_and_leaves_no_output(
    limit: int, tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    command = ["quantize", str(tiny_model), "-o", str(tmp_path / "out"), "--calibration", str(tiny_text)]
    command += ["--rounding", "nearest", "--window-length", "32", "--held-out-windows", "1"]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(limit), *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path.parent), "MPLBACKEND": "agg"},
    )
    sentence = [line for line in done.stderr.splitlines() if line.startswith("dq: ")]
    assert done.returncode == 2, done.stderr
    assert len(sentence) == 1
    assert "out" in sentence[0]
    assert "too large" in sentence[0].lower(), "the reason of the operating system"
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_cannot_be_written_leaves_no_output(
    tiny_model: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedTokenizerFast

    def fail(self: object, directory: Path, **kwargs: object) -> None:
        raise Exception("No space left on device (os error 28)")  # the type the Rust library raises

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
    spec = QuantSpec(GridSpec(), rounding=RoundingSpec("nearest"))
    with pytest.raises(DQError, match=r"out: .*tokenizer.*No space left"):
        dq_runtime.quantize(
            str(tiny_model),
            tmp_path / "out",
            spec,
            calibration=str(tiny_text),
            windows=1,
            window_length=32,
            held_out_windows=1,
        )
    assert list(tmp_path.iterdir()) == []


def test_overwrite_keeps_the_old_checkpoint_until_the_new_one_is_complete(
    packed_model: Path, tiny_model: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    import dq_runtime.evaluate.report

    output = tmp_path / "out"
    shutil.copytree(packed_model, output)
    before = (output / "SHA256SUMS").read_text()
    options = {"calibration": str(tiny_text), "windows": 1, "window_length": 32, "held_out_windows": 1}
    spec = QuantSpec(GridSpec(bits=4), rounding=RoundingSpec("nearest"))

    def fail(directory: Path) -> None:
        raise BoomError

    monkeypatch.setattr(dq_runtime.evaluate.report, "write_sums", fail)
    with pytest.raises(BoomError):
        dq_runtime.quantize(str(tiny_model), output, spec, overwrite=True, **options)  # type: ignore[arg-type]
    monkeypatch.undo()
    assert (output / "SHA256SUMS").read_text() == before
    dq_runtime.load(output)
    dq_runtime.quantize(str(tiny_model), output, spec, overwrite=True, **options)  # type: ignore[arg-type]
    assert (output / "SHA256SUMS").read_text() != before
    dq_runtime.load(output)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
