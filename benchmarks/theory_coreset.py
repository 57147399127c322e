"""Does it matter which windows calibrate? A kernel coreset against random windows: discrepancy, then held-out KL.

Windows are points by their mean hidden state, compared by a Gaussian kernel of median width. The discrepancy of a
choice is the distance between its mean and that of the whole pool in the kernel's space, as the choice grows; then
discquant-paper calibrates on equally many windows chosen in either way, from the same pool, in several draws.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from theory_common import Parts, Subject, finish, options, original, panels, rows_of, run, smol, stories
from theory_rounding import LEAST_STEPS, ROUNDING_DTYPE, Lab
from torch import Tensor

from dq_runtime.data.selection import mean_hidden_states
from dq_runtime.theory.kernel_walk import coreset, discrepancy, gaussian_kernel

BITS = 3
DRAWS = 20  # of the discrepancy, which costs nothing
# (windows of the pool, held-out windows, tokens of each, sizes whose KL is measured, draws)
SETTINGS: dict[str, tuple[int, int, int, list[int], int]] = {
    "stories260K": (512, 32, 128, [16, 64], 4),
    "SmolLM2-135M-Instruct": (256, 12, 128, [32], 2),
}


def hidden_states(subject: Subject) -> list[list[float]]:
    """Mean hidden state of every window of the pool."""
    pool, _ = windows(subject)
    model = original(subject.path).model
    found: list[list[float]] = mean_hidden_states(model, pool, lambda title: lambda *_: None).tolist()
    return found


def windows(subject: Subject) -> tuple[Tensor, Tensor]:
    pool, held_out, length, *_ = SETTINGS[subject.name]
    first, last = subject.windows([pool, held_out], length)
    return first, last


def choose(kernel: np.ndarray, how: str, size: int, seed: int) -> np.ndarray:
    if how == "coreset":
        return coreset(kernel, size, seed)
    return np.sort(np.random.default_rng(1000 + seed).permutation(len(kernel))[:size])


def sizes(pool: int) -> list[int]:
    """Powers of two from 8 to half of the pool."""
    return [2**h for h in range(3, pool.bit_length() - 1)]


def discrepancies(kernel: np.ndarray) -> list[dict[str, Any]]:
    rows = []
    for size in sizes(len(kernel)):
        for how in ("random", "coreset"):
            found = [discrepancy(kernel, choose(kernel, how, size, seed)) for seed in range(DRAWS)]
            rows.append({"how": how, "size": size, "mean": float(np.mean(found)), "std": float(np.std(found))})
    return rows


def measure(subject: Subject, chosen: np.ndarray, seed: int) -> dict[str, float]:
    """Held-out KL of discquant-paper on the ``chosen`` windows of the pool."""
    pool, held_out = windows(subject)
    lab = Lab(subject.path, BITS, pool[torch.from_numpy(chosen)])
    quality = lab.quality(held_out, {"rounded": lab.round("discquant-paper", seed)})["rounded"]
    return {"kl": quality.kl, "kl_stderr": quality.kl_stderr}


def draw(result: dict[str, Any]) -> Any:
    figure, found = panels(2 * len(result["models"]), 4.2, 3.8)
    colours = {"random": "black", "coreset": "tab:orange"}
    for number, model in enumerate(result["models"]):
        left, right = found[2 * number : 2 * number + 2]
        for how, colour in colours.items():
            rows = [row for row in model["discrepancy"] if row["how"] == how]
            left.errorbar(
                [row["size"] for row in rows],
                [row["mean"] for row in rows],
                yerr=[row["std"] for row in rows],
                color=colour,
                marker="o",
                markersize=4,
                capsize=2,
                label=how,
            )
            points = [row for row in model["rows"] if row["how"] == how]
            shift = 0.94 if how == "random" else 1.06
            right.plot(
                [row["size"] * shift for row in points], [row["kl"] for row in points], "o", color=colour, label=how
            )
        left.set(xscale="log", yscale="log", xlabel="windows chosen", ylabel="kernel discrepancy", title=model["model"])
        right.set(xscale="log", xlabel="windows chosen", ylabel="held-out KL, nats per token")
        right.set_xticks(model["sizes"], [str(size) for size in model["sizes"]])
        right.set_title(f"discquant-paper, {result['bits']} bits", fontsize=10)
        left.set_xticks(sizes(model["pool"]), [str(size) for size in sizes(model["pool"])])
        for axes in (left, right):
            axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        left.legend(fontsize=8)
        right.legend(fontsize=8)
    return figure


def table(result: dict[str, Any]) -> list[str]:
    """A line a size whose KL was measured: means over draws, and the draws' standard deviation."""
    lines = []
    for model in result["models"]:
        for size in model["sizes"]:
            cells: list[str] = []
            for how in ("random", "coreset"):
                cells += [
                    f"{row['mean']:.4f}" for row in model["discrepancy"] if (row["how"], row["size"]) == (how, size)
                ]
            for how in ("random", "coreset"):
                kl = np.array([row["kl"] for row in model["rows"] if (row["how"], row["size"]) == (how, size)])
                cells.append(f"{kl.mean():.3f} ± {kl.std(ddof=1):.3f}")
            lines.append([model["model"], size, *cells])
    head = ["model", "windows", "discrepancy, random", "coreset", "KL, random", "coreset"]
    return rows_of(head, lines)


def main() -> None:
    chosen, parts = options(__doc__), Parts("coreset")
    question = "kernel discrepancy and held-out KL of discquant-paper: coreset against random windows, equal tokens"
    rounding = {"bits": BITS, "rounding_dtype": str(ROUNDING_DTYPE)}
    models = []
    for subject in [*stories(chosen), smol(chosen)]:
        pool, held_out, length, measured, draws = SETTINGS[subject.name]
        same = {"pool": [pool, held_out, length], "text": subject.sha256()}
        kernel = gaussian_kernel(
            parts.get(f"{subject.name} states", same, lambda subject=subject: hidden_states(subject))
        )
        rows = []
        for size in measured:
            for seed in range(draws):
                for how in ("random", "coreset"):
                    windows_chosen = choose(kernel, how, size, seed)
                    part = parts.get(
                        f"{subject.name} {how} {size} draw {seed}",
                        {**same, **rounding, "chosen": windows_chosen.tolist(), "seed": seed},
                        lambda subject=subject, c=windows_chosen, seed=seed: measure(subject, c, seed),
                    )
                    rows.append({"how": how, "size": size, "draw": seed, **part})
        model = {"model": subject.name, "text": subject.text_name(), "text_sha256": subject.sha256(), "pool": pool}
        model |= {"held_out_windows": held_out, "tokens": length, "sizes": measured, "draws": draws}
        models.append({**model, "discrepancy": discrepancies(kernel), "rows": rows})
        finish(
            "coreset",
            chosen,
            {"question": question, **rounding, "discquant_steps_at_least": LEAST_STEPS, "models": models},
            draw,
            table,
        )


if __name__ == "__main__":
    run(main)
