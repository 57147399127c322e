"""The toy: weights with gradients of a known spectrum, rounded by five rules, judged on gradients nobody has seen.

n weights lie at y, uniform between their two neighbours. Gradients have covariance Sigma with eigenvalues k^-alpha in
a random basis; m of them are given. A rounding x is judged by (x - y)^T Sigma (x - y), the mean squared first-order
change of the loss over fresh gradients, relative to n / 12, what nearest has on average. ``kept`` is the same before
what is still fractional (m of n weights, or fewer) is rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from theory_common import Parts, finish, options, panels, rows_of, run

from dq_runtime.theory.covariance import Gradients, power_law
from dq_runtime.theory.edge_walk import edge_round
from dq_runtime.theory.linear_rounding import discquant_objective, linear_vertex
from dq_runtime.theory.null_space_walk import null_space_walk

N = 1024
ALPHAS = (0.0, 1.0, 1.5, 2.0)
SAMPLES = (8, 16, 32, 64, 128, 256)
SEEDS = 5
Rule = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
RULES: dict[str, Rule] = {
    "edge walk": lambda g, y, seed: (1 + edge_round(g, 2 * y - 1, seed)) / 2,
    "null-space walk": lambda g, y, seed: (1 + null_space_walk(g, 2 * y - 1, seed)) / 2,
    "arbitrary vertex": lambda g, y, seed: linear_vertex(g, y, np.random.default_rng(seed).standard_normal(len(y))),
    "DiscQuant's vertex": lambda g, y, seed: linear_vertex(g, y, discquant_objective(y)),
}
STYLES = {
    "nearest": ("black", "-"),
    "edge walk": ("tab:green", "s"),
    "null-space walk": ("tab:blue", "o"),
    "arbitrary vertex": ("tab:red", "^"),
    "DiscQuant's vertex": ("tab:orange", "D"),
}


def measure(alpha: float, m: int) -> list[dict[str, Any]]:
    """Rows of all rules, figures of every seed."""
    rows: dict[str, dict[str, Any]] = {}
    for seed in range(SEEDS):
        gradients = Gradients.with_spectrum(power_law(N, alpha), seed)
        y = np.random.default_rng(100 + seed).random(N)
        sample = gradients.sample(m, 200 + seed)
        found = {name: rule(sample, y, seed) for name, rule in RULES.items() if name != "edge walk" or 16 * m <= N}
        for name, x in {"nearest": np.round(y), **found}.items():
            row = rows.setdefault(
                name, {"rule": name, "alpha": alpha, "m": m, "error": [], "kept": [], "fractional": []}
            )
            row["error"].append(gradients.error(np.round(x) - y) / (N / 12))
            row["kept"].append(gradients.error(x - y) / (N / 12))
            row["fractional"].append(int(((x > 1e-9) & (x < 1 - 1e-9)).sum()))
    return list(rows.values())


def known_eigenvectors(alpha: float, m: int) -> float:
    """The expected error of an unbiased walk that keeps the m leading eigenvectors: E (x_i - y_i)^2 = 1/6, twice
    nearest's 1/12, on the variance that is left."""
    eigenvalues = power_law(N, alpha)
    return float(2 * eigenvalues[m:].sum() / eigenvalues.sum())


def draw(result: dict[str, Any]) -> Any:
    figure, found = panels(len(result["alphas"]), 3.9, 4.4)
    for alpha, axes in zip(result["alphas"], found, strict=True):
        for name, (colour, marker) in STYLES.items():
            rows = [row for row in result["rows"] if row["rule"] == name and row["alpha"] == alpha]
            m = [row["m"] for row in rows]
            error = [float(np.mean(row["error"])) for row in rows]
            if name == "nearest":
                axes.plot(m, error, color=colour, label=name)
                continue
            axes.plot(m, error, color=colour, marker=marker, markersize=4, label=name)
            kept = [float(np.mean(row["kept"])) for row in rows]
            axes.plot(m, kept, color=colour, linestyle=":", linewidth=1)
        known = [row["known_eigenvectors"] for row in result["theory"] if row["alpha"] == alpha]
        axes.plot(result["samples"], known, color="grey", linestyle="--", linewidth=1, label="told the eigenvectors")
        spectrum = "flat spectrum" if alpha == 0 else f"eigenvalues k^-{alpha:g}"
        axes.set(xscale="log", yscale="log", ylim=(0.02, 6), xlabel="gradients seen, m", title=spectrum)
        axes.set_xticks(result["samples"], [str(m) for m in result["samples"]])
    found[0].set_ylabel("held-out error, nearest's expectation = 1")
    found[0].legend(fontsize=7, loc="lower left")
    figure.suptitle(f"{result['n']} weights; solid: all rounded, dotted: fractional ones kept", fontsize=10)
    return figure


def table(result: dict[str, Any]) -> list[str]:
    """Errors at m = n / 16, the most that the edge walk's theorem allows: all rounded, and fractional weights kept."""
    m = result["n"] // 16
    cells = {(row["rule"], row["alpha"]): row for row in result["rows"] if row["m"] == m}
    head = [f"m = {m}", *("flat" if a == 0 else f"k^-{a:g}" for a in result["alphas"])]
    lines = []
    for name in STYLES:
        row = [cells[name, alpha] for alpha in result["alphas"]]
        both = [f"{np.mean(r['error']):.2f} ({np.mean(r['kept']):.2f})" for r in row]
        lines.append([name, *(text.partition(" ")[0] if name == "nearest" else text for text in both)])
    return rows_of(head, lines)


def main() -> None:
    chosen, parts = options(__doc__), Parts("toy")
    settings = {"n": N, "seeds": SEEDS}
    rows = []
    for alpha in ALPHAS:
        for m in SAMPLES:
            case = {**settings, "alpha": alpha, "m": m}
            rows += parts.get(f"alpha {alpha} m {m}", case, lambda alpha=alpha, m=m: measure(alpha, m))
    theory = [{"alpha": a, "m": m, "known_eigenvectors": known_eigenvectors(a, m)} for a in ALPHAS for m in SAMPLES]
    question = "held-out error of roundings that keep m gradients, by how fast the spectrum of gradients falls"
    result = {"question": question, **settings, "alphas": list(ALPHAS), "samples": list(SAMPLES)}
    finish("toy", chosen, {**result, "theory": theory, "rows": rows}, draw, table)


if __name__ == "__main__":
    run(main)
