"""Text that the teacher writes: what it begins with, and that a seed decides it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dq_runtime.runtime import self_text
from dq_runtime.runtime.dense import load_dense
from dq_runtime.runtime.self_text import PIECE, continue_windows, sample_windows


@pytest.mark.parametrize("length", [2, 7, 63, 80])
def test_windows_go_on_from_pieces_of_the_given_ones(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    monkeypatch.setattr(self_text, "BATCH", 4)
    lm = load_dense(str(tiny_model), "cpu")
    # Every window holds ids of its own, so that a piece tells where it is from.
    windows = torch.arange(3 * length).view(3, length) % lm.vocabulary
    shown: list[tuple[int, int]] = []
    made = continue_windows(lm, windows, 10, 5, torch.float32, lambda done, total: shown.append((done, total)))
    piece = min(PIECE, length // 2)
    assert made.shape == (10, length)
    assert made.dtype == torch.int64
    assert 0 <= int(made.min()) <= int(made.max()) < lm.vocabulary
    for i, row in enumerate(made):
        pieces = windows[i % 3].unfold(0, piece, 1)
        assert bool((pieces == row[:piece]).all(1).any())
    assert shown[-1] == (10 * (length - 1),) * 2
    assert [done for done, _ in shown] == sorted(done for done, _ in shown)
    assert torch.equal(made, continue_windows(lm, windows, 10, 5, torch.float32))
    assert not torch.equal(made, continue_windows(lm, windows, 10, 6, torch.float32))


def test_what_follows_a_piece_is_the_models_own(tiny_model: Path) -> None:
    """At a temperature of nearly 0 the text would be the likeliest; at 1 its tokens are as likely as the model says."""
    lm = load_dense(str(tiny_model), "cpu")
    windows = torch.randint(0, lm.vocabulary, (64, 24), generator=torch.Generator().manual_seed(0))
    made = continue_windows(lm, windows, 64, 0, torch.float32)
    with torch.no_grad():
        log_probs = lm.logits(made).log_softmax(-1)
    expected = -(log_probs.exp() * log_probs).sum(-1)[:, 11:-1]
    seen = -log_probs[:, :-1].gather(-1, made[:, 1:, None])[:, 11:, 0]
    spread = float((seen - expected).std()) / seen.numel() ** 0.5
    assert abs(float((seen - expected).mean())) < 5 * spread


def test_bfloat16_leaves_the_model_as_it_was(tiny_model: Path) -> None:
    lm = load_dense(str(tiny_model), "cpu")
    before = dict(lm.model.named_parameters())
    windows = torch.randint(0, lm.vocabulary, (3, 24), generator=torch.Generator().manual_seed(0))
    made = continue_windows(lm, windows, 70, 0, torch.bfloat16)  # more than a batch
    assert made.shape == (70, 24)
    assert torch.equal(made, continue_windows(lm, windows, 70, 0, torch.bfloat16))
    after = dict(lm.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] and after[name].dtype is torch.float32 for name in before)


def test_windows_from_nothing_begin_anywhere_in_the_vocabulary(tiny_model: Path) -> None:
    lm = load_dense(str(tiny_model), "cpu")
    made = sample_windows(lm, 40, 3, 0)
    assert made.tokens.shape == (40, 3)
    assert len(made.tokens[:, 0].unique()) > 20
    assert (
        made.fingerprint() == sample_windows(lm, 40, 3, 0).fingerprint() != sample_windows(lm, 40, 3, 1).fingerprint()
    )
