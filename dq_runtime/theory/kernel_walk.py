"""Coresets by the discrepancy method: half of the points that represents all of them in the eyes of a kernel.

Points x_1 .. x_n, kernel k, feature map phi with <phi(x), phi(z)> = k(x, z). Take the points in pairs, f_i =
phi(x_{2i-1}) - phi(x_{2i}), and walk psi_i = psi_{i-1} + s_i f_i with signs that lean against where it has come
(self-balancing walk: Alweiss, Liu, Sawhney, arXiv 2006.14009; on kernels with these constants: kernel halving,
Dwivedi and Mackey, arXiv 2105.05842, algorithm 3):

    alpha = <psi_{i-1}, f_i>,   a_i = max(b_i sigma_{i-1} sqrt(2 log(2 / p)), b_i^2),   b_i = ||f_i||,   p = fail / n
    s_i = -1 with probability (1 + alpha / a_i) / 2 clipped to [0, 1], else +1
    sigma_i^2 = sigma_{i-1}^2 + b_i^2 max(0, 1 + sigma_{i-1}^2 (b_i^2 - 2 a_i) / a_i^2)

With probability 1 - fail no probability is clipped, and then <psi, h> is sub-Gaussian with scale sigma for every h of
norm 1: P(|<psi, h>| > t sigma) <= 2 exp(-t^2 / 2). Each pair gives one point to either half, and the means of phi over
a half and over all points differ by psi / n. For random halves sigma^2 would be the sum of b_i^2.

A coreset is halved out of the pool and then refined (KT-SWAP there, algorithm 1b): one point after the other gives its
place to whichever point of the pool brings the discrepancy down most, itself included, so it can only fall.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dq_runtime.errors import SpecError
from dq_runtime.theory.arrays import Floats, kernel_matrix, shares

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Halving:
    """``chosen`` int64 [n/2]; ``sigma``, the sub-Gaussian scale of psi; ``clipped``, how often the walk had to."""

    chosen: Indices
    sigma: float
    clipped: int


def gaussian_kernel(features: ArrayLike, width: float | None = None) -> Floats:
    """exp(-||x - z||^2 / (2 width^2)) for rows of ``features`` [n, d] -> [n, n]. ``width`` None: the median distance
    between two points, the usual choice."""
    x = np.asarray(features, np.float64)
    if x.ndim != 2 or not np.isfinite(x).all():
        raise SpecError(f"gaussian_kernel: features must be finite numbers [n, d], got shape {list(x.shape)}")
    squares = (x**2).sum(1)
    distances = np.maximum(squares[:, None] + squares - 2 * x @ x.T, 0)
    np.fill_diagonal(distances, 0)
    if width is None:
        apart = np.sqrt(distances[np.triu_indices(len(x), 1)])
        median = float(np.median(apart)) if len(apart) else 0.0
        width = median if median > 0 else 1.0  # nearly all points are the same: any width will do
    kernel: Floats = np.exp(-distances / (2 * width**2))
    return kernel


def kernel_halving(gram: ArrayLike, seed: int, fail: float = 0.5) -> Halving:
    """Choose one of each pair of neighbours; ``gram`` [n, n] of an even number of points. Time O(n^2), memory O(n^2).

    Pairs are neighbours in the given order, which should be random.
    """
    k = kernel_matrix("kernel_halving", gram)
    shares("kernel_halving", fail, "fail")
    n = len(k)
    if n % 2:
        raise SpecError(f"kernel_halving: {n} points cannot be paired; leave one out")
    rng = np.random.default_rng(seed)
    signed = np.zeros(n)  # psi = sum_i signed_i phi(x_i)
    chosen = np.empty(n // 2, np.int64)
    variance, clipped = 0.0, 0
    spread = math.sqrt(2 * math.log(2 * n / fail))
    for pair in range(n // 2):
        i, j = 2 * pair, 2 * pair + 1
        b2 = max(0.0, k[i, i] + k[j, j] - 2 * k[i, j])
        alpha = float(signed[:i] @ (k[:i, i] - k[:i, j]))
        a = max(math.sqrt(b2 * variance) * spread, b2)
        lean = alpha / a if a > 0 else 0.0
        clipped += abs(lean) > 1
        sign = -1 if rng.random() < (1 + lean) / 2 else 1
        signed[i], signed[j] = sign, -sign
        chosen[pair] = i if sign > 0 else j
        if a > 0:
            variance += b2 * max(0.0, 1 + variance * (b2 - 2 * a) / a**2)
    return Halving(chosen, math.sqrt(variance), clipped)


def coreset(gram: ArrayLike, count: int, seed: int) -> Indices:
    """``count`` of the n points of ``gram`` [n, n], increasing: a random count * 2^h of them (h as large as n allows)
    in random order, halved h times, then refined once. Time O(n^2), memory O(n^2)."""
    k = kernel_matrix("coreset", gram)
    n = len(k)
    if not 1 <= count <= n:
        raise SpecError(f"coreset: {count} of {n} points cannot be chosen; ask for 1 to {n}")
    rng = np.random.default_rng(seed)
    turns = int(math.log2(n / count))
    kept: Indices = rng.permutation(n)[: count * 2**turns]
    for _ in range(turns):
        kept = kept[kernel_halving(k[np.ix_(kept, kept)], int(rng.integers(2**62))).chosen]
        kept = rng.permutation(kept)
    return np.sort(refine(k, kept))


def refine(gram: ArrayLike, chosen: ArrayLike) -> Indices:
    """One pass of swaps over c ``chosen`` points of ``gram`` [n, n]: c points of no larger discrepancy. Time O(c n).

    Squared, that of a set S of c points is (sum of k over S x S) / c^2 - 2 (sum of mu over S) / c + const, where mu are
    the row means of k.
    """
    k = kernel_matrix("refine", gram)
    kept = np.array(chosen, np.int64)
    count, mean, diagonal = len(kept), k.mean(1), np.diagonal(k)
    sums = k[:, kept].sum(1)
    for place in range(count):
        sums -= k[:, kept[place]]  # what is left without this point
        cost = (2 * sums + diagonal) / count**2 - 2 * mean / count
        cost[np.delete(kept, place)] = np.inf  # taken
        kept[place] = int(cost.argmin())
        sums += k[:, kept[place]]
    return kept


def discrepancy(gram: ArrayLike, chosen: ArrayLike) -> float:
    """||mean of phi over the ``chosen`` points - mean over all||, also called maximum mean discrepancy."""
    k = kernel_matrix("discrepancy", gram)
    weights = np.full(len(k), -1 / len(k))
    rows = np.asarray(chosen, np.int64)
    weights[rows] += 1 / len(rows)
    return math.sqrt(max(0.0, float(weights @ k @ weights)))
