"""Sampling filters against brute-force definitions, and draws against the distribution they claim."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dq_runtime.errors import SpecError
from dq_runtime.runtime.sampling import Sampler, Sampling, filtered_probabilities
from dq_runtime.runtime.top_values import top_ids

NOTHING_SEEN: list[int] = []


def _logits(seed: int, size: int = 50, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def _softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(v - top) for v in logits]
    return [w / sum(weights) for w in weights]


def _brute(logits: Tensor, s: Sampling) -> list[float]:
    """The documented meaning, one token at a time in float64: temperature, top-k, top-p, min-p, renormalise."""
    probs = _softmax([v / s.temperature for v in logits.double().tolist()])
    kept = set(range(len(probs)))

    def renormalised() -> list[float]:
        mass = sum(probs[i] for i in kept)
        return [probs[i] / mass if i in kept else 0.0 for i in range(len(probs))]

    if s.top_k:
        kept = set(sorted(kept, key=lambda i: -probs[i])[: s.top_k])
    if s.top_p < 1:
        now, mass, smallest = renormalised(), 0.0, set()
        for i in sorted(kept, key=lambda i: -now[i]):
            smallest.add(i)
            mass += now[i]
            if mass >= s.top_p:
                break
        kept = smallest
    now = renormalised()
    kept = {i for i in kept if now[i] >= s.min_p * max(now)}
    return renormalised()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.3),
        Sampling(temperature=3.0),
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=1.0, top_k=7),
        Sampling(temperature=1.0, top_k=50),
        Sampling(temperature=1.0, top_k=1000),
        Sampling(temperature=1.0, top_p=0.01),
        Sampling(temperature=1.0, top_p=0.6),
        Sampling(temperature=1.0, top_p=0.999),
        Sampling(temperature=1.0, min_p=0.1),
        Sampling(temperature=2.0, min_p=0.5),
        Sampling(temperature=0.8, top_k=20, top_p=0.9, min_p=0.05),
        Sampling(temperature=1.7, top_k=5, top_p=0.5, min_p=0.3),
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", range(4))
def test_filters_match_their_definition(sampling: Sampling, seed: int) -> None:
    logits = _logits(seed)
    probs = filtered_probabilities(logits, sampling)
    assert probs.dtype is torch.float64
    expected = torch.tensor(_brute(logits, sampling), dtype=torch.float64)
    assert torch.equal(probs > 0, expected > 0)
    torch.testing.assert_close(probs.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("seed", range(4))
def test_numpy_and_torch_agree(seed: int) -> None:
    """One definition, two libraries: the same probabilities to float64 rounding, and the same tokens for a seed."""
    logits = _logits(seed)
    for sampling in (
        Sampling(0.8, 20, 0.9, 0.05, seed=seed),
        Sampling(1.3, repetition_penalty=1.5, seed=seed),
        Sampling(0.0, repetition_penalty=3.0),
    ):
        expected = filtered_probabilities(logits, sampling)
        found = filtered_probabilities(logits.numpy(), sampling)
        assert isinstance(found, np.ndarray)
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-12, atol=0)
        samplers = Sampler(sampling), Sampler(sampling)
        seen: list[int] = []
        for _ in range(50):
            chosen = samplers[0].choose(logits, seen)
            also = samplers[1].choose(logits.numpy(), seen)
            assert chosen.shape == also.shape == (1, 1)
            assert (chosen.dtype, also.dtype) == (torch.int64, np.int64)
            assert chosen.item() == also.item()
            seen.append(chosen.item())
        assert torch.equal(logits, _logits(seed)), "the input is left alone"


@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0, 30.0])
@pytest.mark.parametrize("top_k", [0, 1, 40])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.9999])
def test_numpy_sorts_only_what_can_be_kept_of_a_large_vocabulary(spread: float, top_k: int, top_p: float) -> None:
    """torch sorts all of it; some values tie."""
    logits = _logits(0, 5000, spread)
    logits[::2] = logits[::2].round()
    for temperature in (1e-9, 0.1, 1.0, 3.0):
        sampling = Sampling(temperature, top_k, top_p, seed=top_k)
        expected = filtered_probabilities(logits, sampling).numpy()
        found = filtered_probabilities(logits.numpy(), sampling)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=0)
        samplers = Sampler(sampling), Sampler(sampling)
        for _ in range(5):
            assert samplers[0].choose(logits, []).item() == samplers[1].choose(logits.numpy(), []).item()


@pytest.mark.parametrize("size", [1, 5, 64, 129, 5000])
@pytest.mark.parametrize("count", [1, 2, 39, 5000])
@pytest.mark.parametrize("levels", [3, 40, 10**6])
def test_the_largest_values_and_what_ties_with_them(size: int, count: int, levels: int) -> None:
    values = np.random.default_rng(size).integers(0, levels, size).astype(np.float32)
    values[:: 7 if size > 7 else 1] = -np.inf
    least = np.sort(values)[-min(count, size)]
    assert top_ids(values, count).tolist() == [i for i in range(size) if values[i] >= least]


@pytest.mark.parametrize("sampling", [Sampling(1.0, top_k=2), Sampling(1.0, top_p=0.6)])
def test_what_ties_with_the_last_one_stays(sampling: Sampling) -> None:
    logits = torch.tensor([1.0, 0.0, 2.0, 1.0])
    for kind in (logits, logits.numpy()):
        assert (filtered_probabilities(kind, sampling) > 0).tolist() == [True, False, True, True]


@pytest.mark.parametrize("seed", [-1, -(2**63) + 1, 2**63 - 1])
def test_every_seed_is_its_own(seed: int) -> None:
    def draws(seed: int) -> list[int]:
        sampler = Sampler(Sampling(1.0, seed=seed))
        return [sampler.choose(_logits(0), NOTHING_SEEN).item() for _ in range(30)]

    assert draws(seed) == draws(seed) != draws(-seed)


def test_top_p_acts_on_what_top_k_left() -> None:
    """0.4 0.3 0.2 0.1: of the best two (0.57, 0.43) top_p 0.5 keeps one; of all four it would keep two."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert (filtered_probabilities(logits, Sampling(1.0, top_p=0.5)) > 0).tolist() == [True, True, False, False]
    both = filtered_probabilities(logits, Sampling(1.0, top_k=2, top_p=0.5))
    assert (both > 0).tolist() == [True, False, False, False]


def test_filters_do_not_change_their_input() -> None:
    logits = _logits(0)
    before = logits.clone()
    filtered_probabilities(logits, Sampling(0.5, 5, 0.5, 0.1))
    Sampler(Sampling(0.5, repetition_penalty=2.0, seed=0)).choose(logits, [1, 2, 2])
    assert torch.equal(logits, before)


def test_greedy_is_argmax_whatever_the_filters() -> None:
    for seed in range(20):
        logits = _logits(seed)
        sampler = Sampler(Sampling(temperature=0, top_k=3, top_p=0.2, min_p=0.5))
        assert int(sampler.choose(logits, NOTHING_SEEN)) == int(logits.argmax())


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 5e-324])
def test_a_temperature_close_to_zero_is_greedy_and_not_an_error(temperature: float) -> None:
    logits = _logits(1, spread=20.0)
    assert int(Sampler(Sampling(temperature, seed=0)).choose(logits, NOTHING_SEEN)) == int(logits.argmax())


def test_logits_of_minus_infinity_are_never_drawn() -> None:
    logits = torch.full((8,), -torch.inf)
    logits[[2, 5]] = 0.0
    sampler = Sampler(Sampling(1.0, top_k=6, top_p=0.99, min_p=0.01, seed=0))
    assert {int(sampler.choose(logits, NOTHING_SEEN)) for _ in range(50)} == {2, 5}


def test_a_seed_repeats_and_seeds_differ() -> None:
    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(1.0, seed=seed))
        return [int(sampler.choose(_logits(0), NOTHING_SEEN)) for _ in range(30)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert draws(None) != draws(None)


def test_sampling_leaves_the_global_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    Sampler(Sampling(1.0, seed=3)).choose(_logits(0), NOTHING_SEEN)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_once() -> None:
    logits = torch.tensor([2.0, -1.0, 1.5, 0.0])
    penalised = torch.tensor([1.0, -2.0, 1.5, 0.0])
    seen = [0, 1, 0, 0, 3]  # a token seen three times is penalised once (CTRL)
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=2.0))
    assert int(sampler.choose(logits, seen)) == 2
    draws = Sampler(Sampling(1.0, repetition_penalty=2.0, seed=0))
    counts = torch.bincount(torch.tensor([int(draws.choose(logits, seen)) for _ in range(2000)]), minlength=4)
    torch.testing.assert_close(counts / 2000, penalised.softmax(-1), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0, seed=11), Sampling(0.7, 12, 0.95, 0.02, seed=12)], ids=["plain", "all filters"]
)
def test_twenty_thousand_draws_follow_the_distribution(sampling: Sampling) -> None:
    logits, n = _logits(3, size=20, spread=1.0), 20_000
    sampler = Sampler(sampling)
    counts = torch.bincount(torch.tensor([int(sampler.choose(logits, NOTHING_SEEN)) for _ in range(n)]), minlength=20)
    probs = torch.tensor(_brute(logits, sampling), dtype=torch.float64)
    possible = probs > 0
    assert counts[~possible].sum() == 0
    expected = n * probs[possible]
    chi_square = float(((counts[possible] - expected).square() / expected).sum())
    freedom = int(possible.sum()) - 1
    # Wilson-Hilferty: chi-square is about freedom * (1 - 2/9f + z sqrt(2/9f))^3; z = 4 is a chance of 3e-5.
    assert chi_square < freedom * (1 - 2 / (9 * freedom) + 4 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 1.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.0},
        {"repetition_penalty": math.nan},
        {"repetition_penalty": math.inf},
    ],
    ids=str,
)
def test_invalid_values_are_one_sentence_naming_the_option(bad: dict[str, float]) -> None:
    with pytest.raises(SpecError, match=next(iter(bad))) as caught:
        Sampling(**bad)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
