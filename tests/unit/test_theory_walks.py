"""The walks keep what they promise: constraints for certain, the rest statistically, seeds fixed and bounds derived.

Where an average over R walks is judged, the bound is Hoeffding's: the mean of R independent numbers from [-1, 1] is
farther than sqrt(2 log(2 K / MISS) / R) from its expectation for any of K of them with probability at most MISS.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from dq_runtime.errors import SpecError
from dq_runtime.theory.covariance import Gradients, power_law
from dq_runtime.theory.edge_walk import VARIANCE, edge_round, edge_walk, step_size, widths_allowed
from dq_runtime.theory.linear_rounding import discquant_objective, linear_vertex
from dq_runtime.theory.null_space_walk import null_space_walk
from dq_runtime.theory.subspace import Subspace

MISS = 1e-6


def hoeffding(walks: int, quantities: int) -> float:
    return math.sqrt(2 * math.log(2 * quantities / MISS) / walks)


def vectors(m: int, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((m, n)) * np.logspace(-3, 3, m)[:, None]


def inside(n: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.8, 0.8, n)


def widest(m: int, n: int) -> float:
    """The c at which m equal widths just meet the theorem's condition."""
    return 4 * math.sqrt(math.log(16 * m / n)) if 16 * m > n else 0.0


@pytest.mark.parametrize(("m", "n"), [(0, 7), (1, 17), (3, 48), (40, 96), (130, 65)])
def test_the_edge_walk_keeps_its_polytope_and_freezes_what_the_theorem_says(m: int, n: int) -> None:
    """The proof of theorem 4: E ||x||^2 <= n bounds the mean dimension left by 3 n / 16, and fewer than n / 4
    constraints become tight on average, so at least 9 n / 16 coordinates are frozen on average. The mean over walks may
    fall short of that by Hoeffding's bound (a share lies in [0, 1], so half the bound for [-1, 1])."""
    v, x0, delta = vectors(m, n), inside(n), 0.1
    widths = np.full(m, widest(m, n) + 1e-9)
    shares = []
    for seed in range(30):
        walked = edge_walk(v, x0, widths, seed, delta)
        lengths = np.linalg.norm(v, axis=1)
        products = np.abs(v @ (walked.x - x0))
        assert (np.abs(walked.x) <= 1).all()
        assert (products <= widths * lengths + 1e-9 * lengths).all()
        np.testing.assert_array_equal(walked.frozen, np.abs(walked.x) >= 1 - delta)
        near = products >= (widths - delta) * lengths * (1 - 1e-9)
        assert (near == walked.tight).all()
        shares.append(walked.frozen.mean())
    assert np.mean(shares) >= 9 / 16 - hoeffding(30, 1) / 2
    assert np.mean(np.array(shares) >= 0.5) > 0.1  # the theorem itself


def test_without_constraints_the_edge_walk_has_the_covariance_of_coin_flips() -> None:
    """From 0 and without constraints no coordinate knows of another: flipping the sign of one is a symmetry of the
    walk, so E x = 0 and E x_i x_j = 0 for i != j, while x_i^2 >= (1 - delta)^2 wherever it is frozen."""
    n, walks, delta = 12, 400, 0.25
    x = np.array([edge_walk(np.zeros((0, n)), np.zeros(n), np.zeros(0), s, delta).x for s in range(walks)])
    covariance = x.T @ x / walks
    off_diagonal = covariance[~np.eye(n, dtype=bool)]
    assert np.abs(off_diagonal).max() < hoeffding(walks, n * (n - 1) // 2)
    assert np.abs(x.mean(0)).max() < hoeffding(walks, n)
    assert (np.diagonal(covariance) <= 1).all()
    frozen = (np.abs(x) >= 1 - delta).mean(0)
    assert (np.diagonal(covariance) >= frozen * (1 - delta) ** 2).all()


def test_held_out_directions_see_a_covariance_near_the_identity() -> None:
    """Whatever was constrained, E <u, x - x_0>^2 <= gamma^2 T = 16/3 for a unit vector u, and its mean over random u
    is E ||x - x_0||^2 / n: from 0, between (1 - delta)^2 of the frozen share and 1. Fresh directions from the
    distribution of the constraints themselves and unrelated ones. Five standard errors, from the walks."""
    m, n, walks, delta = 3, 48, 150, 0.25
    gradients = Gradients.with_spectrum(power_law(n, 1.5), 0)
    v, fresh = gradients.sample(m, 1), gradients.sample(40, 2)
    unrelated = np.random.default_rng(3).standard_normal((2000, n))
    walked = [edge_walk(v, np.zeros(n), np.zeros(m), seed, delta) for seed in range(walks)]
    moved = np.array([w.x for w in walked])
    for held_out in (fresh, unrelated):
        unit = held_out / np.linalg.norm(held_out, axis=1)[:, None]
        squares = (moved @ unit.T) ** 2  # [walks, directions]
        error = squares.std(0) / math.sqrt(walks)
        assert (squares.mean(0) <= VARIANCE + 5 * error).all()
    mean = squares.mean()
    slack = 5 * squares.mean(0).std() / math.sqrt(len(unrelated))
    share = np.mean([w.frozen.mean() for w in walked])
    assert share * (1 - delta) ** 2 - slack <= mean <= 1 + slack
    # What was constrained is seen less than what was not: the sample covariance of x has a hole there.
    assert (np.abs(moved @ v.T) <= 1e-9 * np.linalg.norm(v, axis=1)).all()
    seen = ((moved @ fresh.T) ** 2).mean() / np.mean([np.sum(moved**2) / walks / n * gradients.eigenvalues.sum()])
    assert seen < 1, "gradients of the same distribution must be hit less than random directions"


def test_the_step_size_makes_leaving_the_polytope_as_rare_as_it_says() -> None:
    for n, m, delta in ((10, 3, 0.25), (1000, 500, 0.1), (5, 0, 0.01)):
        gamma, steps = step_size(n, m, delta)
        assert gamma**2 * steps == pytest.approx(VARIANCE, rel=1e-3)
        assert 2 * steps * (n + m) * math.exp(-(delta**2) / (2 * gamma**2)) == pytest.approx(1e-3, rel=0.01)


@pytest.mark.parametrize(("m", "n"), [(1, 33), (4, 128)])
def test_edge_rounding_changes_products_only_by_what_it_snaps(m: int, n: int) -> None:
    v, x0, delta = vectors(m, n), inside(n), 0.1
    x = edge_round(v, x0, 0, delta)
    free = np.abs(x) < 1
    assert free.sum() < 16 * m
    assert (np.abs(v @ (x - x0)) <= delta * np.abs(v[:, ~free]).sum(1) + 1e-9 * np.linalg.norm(v, axis=1)).all()


@pytest.mark.parametrize(("m", "n"), [(0, 5), (1, 2), (7, 33), (64, 64), (80, 65), (20, 257)])
def test_the_null_space_walk_ends_on_a_vertex(m: int, n: int) -> None:
    v, x0 = vectors(m, n), inside(n)
    x = null_space_walk(v, x0, 3)
    assert (np.abs(x) <= 1).all()
    assert (np.abs(x) < 1).sum() <= m
    # Each of at most n turns is exact to some n * 2^-52 of the lengths involved.
    assert (np.abs(v @ (x - x0)) <= n * n * 2.0**-52 * 10 * np.linalg.norm(v, axis=1)).all()
    np.testing.assert_array_equal(x, null_space_walk(v, x0, 3))


def test_repeated_constraints_count_once() -> None:
    v, x0 = np.repeat(vectors(2, 40), 3, axis=0), inside(40)
    assert (np.abs(null_space_walk(v, x0, 0)) < 1).sum() <= 2


def test_the_null_space_walk_is_unbiased() -> None:
    n, walks = 24, 600
    v, x0 = vectors(3, n), inside(n)
    x = np.array([null_space_walk(v, x0, seed) for seed in range(walks)])
    # x - x0 lies in [-1.8, 1.8].
    assert np.abs((x - x0).mean(0)).max() < 1.8 * hoeffding(walks, n)


def test_a_subspace_stays_orthonormal_and_orthogonal_to_what_was_forbidden() -> None:
    n = 30
    v = vectors(6, n)
    space = Subspace(np.arange(n) % 7 != 0, v)
    space.freeze(np.array([0, 4, 9]))
    late = np.random.default_rng(5).standard_normal(len(space.free))
    space.forbid(late)
    space.forbid(late)  # a second time changes nothing
    f = n - 5 - 3
    assert space.basis.shape == (f, f - 7)
    np.testing.assert_allclose(space.basis.T @ space.basis, np.eye(f - 7), atol=1e-12)
    unit = v[:, space.free] / np.linalg.norm(v, axis=1)[:, None]
    assert np.abs(unit @ space.basis).max() < 1e-9
    assert np.abs(late @ space.basis).max() < 1e-12


@pytest.mark.parametrize(("m", "n"), [(1, 10), (9, 70)])
def test_a_vertex_of_the_linear_programme(m: int, n: int) -> None:
    """With f <= m fractional coordinates of an arbitrary vertex x', <c*, x'> + ||y||^2 exceeds ||x' - y||^2 by at most
    f / 4, and that of the best vertex is no smaller than its distance: so it is within m / 4 of the nearest vertex."""
    g = np.random.default_rng(0).standard_normal((m, n))
    y = np.random.default_rng(1).random(n)
    best = linear_vertex(g, y, discquant_objective(y))
    for x in (best, *(linear_vertex(g, y, np.random.default_rng(s).standard_normal(n)) for s in range(5))):
        assert ((x > 1e-9) & (x < 1 - 1e-9)).sum() <= m
        np.testing.assert_allclose(g @ x, g @ y, atol=1e-6)  # HiGHS' own tolerance is 1e-7 a row
        assert np.sum((best - y) ** 2) <= np.sum((x - y) ** 2) + m / 4 + 1e-6


def test_gradients_have_the_spectrum_they_were_made_with() -> None:
    """<g, d>^2 / d^T Sigma d is chi squared with one degree of freedom: its mean over m samples has variance 2 / m."""
    eigenvalues = power_law(50, 1.5)
    assert eigenvalues.sum() == pytest.approx(50)
    assert eigenvalues[9] / eigenvalues[0] == pytest.approx(10**-1.5)
    np.testing.assert_allclose(power_law(50, 0), 1)
    made = Gradients.with_spectrum(eigenvalues, 0)
    np.testing.assert_allclose(made.rotation.T @ made.rotation, np.eye(50), atol=1e-12)
    d, m = np.random.default_rng(1).standard_normal(50), 4000
    ratio = ((made.sample(m, 2) @ d) ** 2).mean() / made.error(d)
    assert abs(ratio - 1) < 5 * math.sqrt(2 / m)


def test_a_fast_falling_spectrum_can_be_rounded_and_a_flat_one_cannot() -> None:
    """With Sigma = 1 the error is ||x - y||^2, which nearest minimises. With eigenvalues k^-2 the m = 16 samples span
    nearly all of the variance. Averages over 5 problems, on which nearest's expectation is n / 12."""
    n, m = 128, 16
    errors: dict[float, list[list[float]]] = {0.0: [], 2.0: []}
    for alpha, rows in errors.items():
        for seed in range(5):
            gradients = Gradients.with_spectrum(power_law(n, alpha), seed)
            y = np.random.default_rng(100 + seed).random(n)
            sample = gradients.sample(m, 50 + seed)
            walked = (1 + null_space_walk(sample, 2 * y - 1, seed)) / 2
            chosen = linear_vertex(sample, y, discquant_objective(y))
            rows.append([gradients.error(np.round(x) - y) for x in (y, walked, chosen)])
    nearest, walk, discquant = np.mean(errors[0.0], 0)
    assert nearest < discquant < walk
    nearest, walk, discquant = np.mean(errors[2.0], 0)
    assert max(walk, discquant) < nearest / 2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: edge_walk(np.ones((9, 16)), np.zeros(16), np.zeros(9), 0), "more than n / 16"),
        (lambda: edge_walk(np.ones((1, 16)), np.zeros(16), np.array([-1.0]), 0), "not negative"),
        (lambda: edge_walk(np.ones((1, 16)), np.zeros(16), np.zeros(1), 0, delta=1.5), "delta must lie between"),
        (lambda: edge_walk(np.ones((1, 16)), np.full(16, 2.0), np.zeros(1), 0), "must lie in"),
        (lambda: null_space_walk(np.ones((1, 3)), np.zeros(4), 0), "must be"),
        (lambda: null_space_walk(np.full((1, 3), np.nan), np.zeros(3), 0), "finite"),
        (lambda: linear_vertex(np.ones((1, 3)), np.full(3, 0.5), np.ones(2)), "one number for each"),
        (lambda: linear_vertex(np.ones((1, 3)), np.full(3, -0.5), np.ones(3)), r"\[0, 1\]"),
        (lambda: power_law(0, 1.0), "must be positive"),
    ],
)
def test_bad_input_gets_one_sentence(call: object, words: str) -> None:
    assert callable(call)
    with pytest.raises(SpecError, match=words):
        call()


def test_the_condition_of_the_theorem() -> None:
    assert widths_allowed(np.zeros(4), 64)
    assert not widths_allowed(np.zeros(5), 64)
    assert widths_allowed(np.full(40, widest(40, 64) + 1e-9), 64)
