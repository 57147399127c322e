"""``--calibration-select``: the windows that come first, or those a kernel walk keeps."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dq_runtime.data import Windows, pack_windows
from dq_runtime.data.selection import check_selection, mean_hidden_states, select_windows
from dq_runtime.errors import DataError, DQError, SpecError
from dq_runtime.pipeline import quantize
from dq_runtime.runtime.dense import load_dense
from dq_runtime.spec import GridSpec, QuantSpec, RoundingSpec

DOCUMENTS = [chr(97 + i % 26) * 5 for i in range(120)]


class Letters:
    """One token a letter."""

    eos_token_id = None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [ord(c) - 97 for c in text]


def pack(*, count: int) -> Windows:
    return pack_windows(DOCUMENTS, Letters(), count, 5, 0, "letters")


def refused(tokens: Tensor) -> Tensor:
    raise AssertionError("random selection looks at nothing")


def one_hot(tokens: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(tokens, 26).float().mean(1)


def quiet(title: str) -> Any:
    return lambda *_: None


def test_random_selection_is_what_the_text_begins_with() -> None:
    for count in (0, 7):
        chosen = select_windows(pack, count, "random", 0, refused)
        assert torch.equal(chosen.tokens, pack(count=count).tokens)
        assert chosen.source == "letters"
    assert len(select_windows(pack, 0, "coreset", 0, refused).tokens) == 0


@pytest.mark.parametrize(("count", "pool"), [(30, 120), (7, 28), (50, 100)])
def test_a_coreset_is_chosen_from_four_times_as_many_or_twice(count: int, pool: int) -> None:
    chosen = select_windows(pack, count, "coreset", 0, one_hot)
    everything = {tuple(w) for w in pack(count=pool).tokens.tolist()}
    assert chosen.tokens.shape == (count, 5)
    assert {tuple(w) for w in chosen.tokens.tolist()} <= everything
    assert f"{count} of {pool} windows chosen" in chosen.source
    assert torch.equal(chosen.tokens, select_windows(pack, count, "coreset", 0, one_hot).tokens)


def test_a_coreset_takes_from_every_kind_of_window() -> None:
    """60 windows of two kinds, alternately: the walk's pairs are random, so a random half would hold between 10 and 20
    of 30; the walk leans against every imbalance."""
    kinds = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(30, 1)
    tokens = torch.arange(60).unsqueeze(1).repeat(1, 4)
    for seed in range(10):
        chosen = select_windows(lambda *, count: Windows(tokens[:count], "x"), 15, "coreset", seed, lambda t: kinds)
        share = kinds[chosen.tokens[:, 0]].mean(0)[0].item()
        assert abs(share - 0.5) <= 0.2


def test_a_text_too_short_for_a_choice_is_refused() -> None:
    with pytest.raises(DataError, match=r"at least 122 windows: letters gives 600 tokens.*or use 'random'"):
        select_windows(pack, 61, "coreset", 0, one_hot)


def test_bad_selections_are_refused_by_name() -> None:
    with pytest.raises(SpecError, match="must be one of random, coreset, got 'best'"):
        check_selection("best", "x.txt")
    with pytest.raises(SpecError, match="give calibration text"):
        check_selection("coreset", None)


def test_mean_hidden_states_are_those_of_the_model(tiny_model: Path) -> None:
    model = load_dense(str(tiny_model), "cpu").model
    windows = torch.randint(0, 250, (5, 17), generator=torch.Generator().manual_seed(0))
    seen = []

    def watch(module: Any, args: tuple[Tensor]) -> None:
        seen.append(args[0].mean(1))

    hook = model.get_output_embeddings().register_forward_pre_hook(watch)
    with torch.inference_mode():
        for window in windows:
            model(input_ids=window[None])
    hook.remove()
    found = mean_hidden_states(model, windows, quiet)
    torch.testing.assert_close(found, torch.cat(seen))
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(DQError, match="NaN or infinity"):
        mean_hidden_states(model, windows, quiet)


def test_quantize_calibrates_on_a_coreset(tiny_model: Path, tiny_text: Path, tmp_path: Path) -> None:
    spec = QuantSpec(GridSpec(bits=3, group_size=64), rounding=RoundingSpec("discquant-paper"))
    run = partial(quantize, str(tiny_model), spec=spec, calibration=str(tiny_text), windows=4, window_length=32)
    reports = {
        select: run(tmp_path / select, held_out_windows=2, calibration_select=select)
        for select in ("random", "coreset")
    }
    assert reports["coreset"]["calibration"]["source"].endswith("4 of 16 windows chosen by a kernel walk")
    assert len({r["calibration"]["sha256"] for r in reports.values()}) == 2
    assert len({r["held_out"]["sha256"] for r in reports.values()}) == 1
    with pytest.raises(SpecError, match="calibration_select"):
        run(tmp_path / "other", calibration_select="best")
