"""Kernel halving against its guarantee and against random choice, whose expectation is known exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dq_runtime.errors import SpecError
from dq_runtime.theory.kernel_walk import coreset, discrepancy, gaussian_kernel, kernel_halving, refine


def points(n: int, seed: int = 0) -> np.ndarray:
    """A lopsided mixture in the plane."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random((n, 1)) < 0.8, rng.normal(0, 1, (n, 2)), rng.normal(4, 0.3, (n, 2)))


def random_discrepancy(gram: np.ndarray, size: int) -> float:
    """Root of E ||mean of a random subset - mean of all||^2 = (1/size) (n - size)/(n - 1) (mean k(x, x) - mean k)."""
    n = len(gram)
    return math.sqrt((n - size) / (n - 1) / size * (np.trace(gram) / n - gram.mean()))


def test_the_kernel_is_its_definition() -> None:
    x = points(9)
    k = gaussian_kernel(x, width=2.0)
    for i in range(9):
        for j in range(9):
            assert k[i, j] == pytest.approx(math.exp(-np.sum((x[i] - x[j]) ** 2) / 8))
    apart = [np.linalg.norm(x[i] - x[j]) for i in range(9) for j in range(i)]
    np.testing.assert_allclose(gaussian_kernel(x), gaussian_kernel(x, float(np.median(apart))))
    np.testing.assert_array_equal(gaussian_kernel(np.ones((3, 2))), np.ones((3, 3)))


def test_one_of_each_pair_is_chosen_within_the_guarantee() -> None:
    """With probability 1 - fail, here 0.99 a walk, nothing is clipped and every function sees psi as sub-Gaussian with
    scale sigma: |<psi, k_z>| <= sigma sqrt(2 log(2 Z / 1e-6)) sqrt(k(z, z)) for Z functions at once."""
    x, z = points(128), points(40, 1)
    k = gaussian_kernel(np.concatenate([x, z]))
    random_variance = sum(k[i, i] + k[i + 1, i + 1] - 2 * k[i, i + 1] for i in range(0, 128, 2))
    clipped = 0
    for seed in range(50):
        halving = kernel_halving(k[:128, :128], seed, fail=0.01)
        assert (halving.chosen // 2 == np.arange(64)).all()
        clipped += halving.clipped > 0
        signs = -np.ones(128)
        signs[halving.chosen] = 1
        seen = np.abs(signs @ k[:128, 128:])
        assert seen.max() <= halving.sigma * math.sqrt(2 * math.log(2 * 40 * 50 / 1e-6))
        assert halving.sigma**2 <= random_variance * (1 + 1e-9), "never worse than coin flips in its guarantee"
    # Binomial(50, 0.01) exceeds 8 with probability 1e-8.
    assert clipped <= 8


def test_halving_beats_random_choice() -> None:
    k = gaussian_kernel(points(256))
    for count in (64, 128):
        found = []
        for seed in range(60):
            kept = np.random.default_rng(seed).permutation(256)
            while len(kept) > count:
                kept = kept[kernel_halving(k[np.ix_(kept, kept)], seed).chosen]
            found.append(discrepancy(k, kept) ** 2)
        # A mean with its standard error: random's expectation is out of their reach.
        error = np.std(found) / math.sqrt(60)
        assert np.mean(found) + 5 * error < random_discrepancy(k, count) ** 2


def test_a_swap_is_the_best_swap_and_a_coreset_beats_halving() -> None:
    k = gaussian_kernel(points(24))
    start = np.array([3, 7, 8, 20])
    swapped = refine(k, start)
    best = min(discrepancy(k, [z, 7, 8, 20]) for z in range(24) if z not in (7, 8, 20))
    assert discrepancy(k, [swapped[0], 7, 8, 20]) == pytest.approx(best, rel=1e-9)
    assert discrepancy(k, swapped) <= best
    assert len(set(swapped.tolist())) == 4
    k = gaussian_kernel(points(256))
    for seed in range(10):
        chosen = np.random.default_rng(seed).permutation(256)[:32]
        assert discrepancy(k, refine(k, chosen)) <= discrepancy(k, chosen)
        assert discrepancy(k, coreset(k, 32, seed)) < random_discrepancy(k, 32) / 2


def test_the_formula_for_random_choice_is_right() -> None:
    k = gaussian_kernel(points(30))
    rng = np.random.default_rng(0)
    found = [discrepancy(k, rng.permutation(30)[:11]) ** 2 for _ in range(2000)]
    assert abs(np.mean(found) - random_discrepancy(k, 11) ** 2) < 5 * np.std(found) / math.sqrt(2000)


@pytest.mark.parametrize(("n", "count"), [(1, 1), (7, 5), (10, 5), (33, 4), (64, 1), (50, 50)])
def test_a_coreset_has_the_size_it_was_asked_for(n: int, count: int) -> None:
    k = gaussian_kernel(points(n))
    chosen = coreset(k, count, 0)
    assert len(set(chosen.tolist())) == count
    assert (np.sort(chosen) == chosen).all()
    np.testing.assert_array_equal(chosen, coreset(k, count, 0))
    if count == n:
        assert discrepancy(k, chosen) == pytest.approx(0, abs=1e-7)


def test_identical_points_can_be_halved() -> None:
    assert len(kernel_halving(np.ones((8, 8)), 0).chosen) == 4


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: kernel_halving(np.eye(3), 0), "cannot be paired"),
        (lambda: kernel_halving(np.ones((2, 3)), 0), "square"),
        (lambda: kernel_halving(np.eye(4), 0, fail=0.0), "fail must lie between"),
        (lambda: coreset(np.eye(4), 5, 0), "ask for 1 to 4"),
        (lambda: gaussian_kernel(np.array([[np.nan]])), "finite"),
    ],
)
def test_bad_input_gets_one_sentence(call: object, words: str) -> None:
    assert callable(call)
    with pytest.raises(SpecError, match=words):
        call()
