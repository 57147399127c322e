"""How low is the rank of gradients? Spectra of per-sample gradients, exactly, and after the paper's random projection.

A sample is one window of text, its gradient g [N K] that of the window's mean cross-entropy with respect to one weight
[N, K] of the original model. With G [m, N K] the gradients of m samples, the eigenvalues of (1/m) G G^T [m, m] are the
non-zero ones of the covariance (1/m) sum g g^T [N K, N K], exactly and without that matrix. The paper (figure 4) first
projects each g by a random matrix of signs to 2048 numbers, which reviewers doubted: both are measured.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from theory_common import Parts, Subject, finish, options, original, panels, rows_of, run, smol, stories

PROJECTED = 2048
COLUMNS = 8192  # of the projection at once: 67 MB of signs
# (samples, tokens per sample, blocks, layers of a block)
SETTINGS: dict[str, tuple[int, int, list[int], list[str]]] = {
    "stories260K": (256, 128, [0, 1, 2, 4], ["self_attn.q_proj", "mlp.down_proj"]),
    "SmolLM2-135M-Instruct": (96, 128, [0, 1, 10, 20, 29], ["self_attn.q_proj", "mlp.down_proj"]),
}


def gradients(subject: Subject) -> tuple[dict[str, np.ndarray], list[float]]:
    """(layer -> [m, N K] float32, loss of each sample)."""
    count, length, blocks, kinds = SETTINGS[subject.name]
    tokens, _ = subject.windows([count, 1], length)
    model = original(subject.path).model.requires_grad_(False)
    names = [f"model.layers.{i}.{kind}" for kind in kinds for i in blocks]
    weights = {name: model.get_submodule(name).weight.requires_grad_(True) for name in names}
    found = {name: np.empty((count, w.numel()), np.float32) for name, w in weights.items()}
    losses = []
    for i, window in enumerate(tokens):
        loss = model(input_ids=window[None], labels=window[None], use_cache=False).loss
        for name, grad in zip(names, torch.autograd.grad(loss, list(weights.values())), strict=True):
            found[name][i] = grad.flatten().numpy()
        losses.append(loss.item())
    model.requires_grad_(False)
    return found, losses


def spectrum(rows: np.ndarray) -> list[float]:
    """Eigenvalues of (1/m) rows rows^T, falling; [m, n] -> m numbers."""
    wide = np.zeros((len(rows), len(rows)))
    for start in range(0, rows.shape[1], COLUMNS):  # float64 sums: the smallest eigenvalues are 1e-4 of the largest
        part = rows[:, start : start + COLUMNS].astype(np.float64)
        wide += part @ part.T
    return [float(v) for v in np.maximum(np.linalg.eigvalsh(wide / len(rows))[::-1], 0)]


def projected(rows: np.ndarray, seed: int) -> np.ndarray:
    """``rows`` [m, n] times random signs [n, 2048] / sqrt(2048): lengths and angles are kept on average."""
    rng = np.random.default_rng(seed)
    result = np.zeros((len(rows), PROJECTED), np.float32)
    for start in range(0, rows.shape[1], COLUMNS):
        part = rows[:, start : start + COLUMNS]
        signs = rng.integers(0, 2, (part.shape[1], PROJECTED), dtype=np.int8).astype(np.float32) * 2 - 1
        result += part @ signs
    return result / np.float32(np.sqrt(PROJECTED))


def exponent(eigenvalues: list[float]) -> float:
    """alpha of k^-alpha by least squares in logarithms over 2 <= k <= m / 4: the first is the mean gradient's, and the
    last ones of m samples fall for want of samples, not of directions."""
    top = len(eigenvalues) // 4
    k = np.log(np.arange(2, top + 1))
    return float(-np.polyfit(k, np.log(eigenvalues[1:top]), 1)[0])


def measure(subject: Subject) -> dict[str, Any]:
    count, length, *_ = SETTINGS[subject.name]
    found, losses = gradients(subject)
    layers = []
    for number, (name, rows) in enumerate(found.items()):
        exact, by_projection = spectrum(rows), spectrum(projected(rows, number))
        mean = rows.mean(0, dtype=np.float64)
        layers.append(
            {
                "layer": name,
                "weights": rows.shape[1],
                "trace": sum(exact),
                "mean_squared": float(mean @ mean),
                "top1_share": exact[0] / sum(exact),
                "top10_share": sum(exact[:10]) / sum(exact),
                "alpha": exponent(exact),
                "alpha_projected": exponent(by_projection),
                # The largest relative error that the projection makes in any of the first m / 4 eigenvalues.
                "projection_error": max(
                    abs(p / e - 1) for e, p in zip(exact[: count // 4], by_projection, strict=False)
                ),
                "eigenvalues": exact,
                "eigenvalues_projected": by_projection,
            }
        )
    return {
        "model": subject.name,
        "samples": count,
        "tokens": length,
        "text": subject.text_name(),
        "text_sha256": subject.sha256(),
        "mean_loss": float(np.mean(losses)),
        "layers": layers,
    }


def draw(result: dict[str, Any]) -> Any:
    from matplotlib import colormaps

    cases = [(model, kind) for model in result["models"] for kind in ("q_proj", "down_proj")]
    figure, found = panels(len(cases), 4.2, 4.2)
    for (model, kind), axes in zip(cases, found, strict=True):
        layers = [layer for layer in model["layers"] if layer["layer"].endswith(kind)]
        for number, layer in enumerate(layers):
            colour = colormaps["viridis"](number / max(1, len(layers) - 1) * 0.85)
            k = range(1, model["samples"] + 1)
            label = f"block {layer['layer'].split('.')[2]}, alpha {layer['alpha']:.2f}"
            axes.plot(k, [v / layer["trace"] for v in layer["eigenvalues"]], color=colour, label=label)
            axes.plot(k, [v / layer["trace"] for v in layer["eigenvalues_projected"]], ":", color=colour, linewidth=1)
        axes.axhline(1 / model["samples"], color="grey", linestyle="--", linewidth=1, label="no structure at all")
        axes.set(xscale="log", yscale="log", xlabel="k", title=f"{model['model']}, {kind}")
        axes.legend(fontsize=7)
    found[0].set_ylabel("k-th eigenvalue / trace")
    figure.suptitle("Covariance of per-sample gradients; solid: exact, dotted: projected to 2048", fontsize=10)
    return figure


def table(result: dict[str, Any]) -> list[str]:
    """A line a layer."""
    head = ["model, layer", "weights", "share of the first", "of ten", "alpha", "alpha, projected", "worst projected"]
    lines = []
    for model in result["models"]:
        for layer in model["layers"]:
            name = layer["layer"].removeprefix("model.layers.")
            shares = [f"{layer['top1_share']:.0%}", f"{layer['top10_share']:.0%}"]
            alphas = [f"{layer['alpha']:.2f}", f"{layer['alpha_projected']:.2f}", f"{layer['projection_error']:.0%}"]
            lines.append([f"{model['model']} {name}", layer["weights"], *shares, *alphas])
    return rows_of(head, lines)


def main() -> None:
    chosen, parts = options(__doc__), Parts("gradients")
    question = "eigenvalues of the covariance of per-sample gradients, exact and after a random projection"
    models = []
    for subject in [*stories(chosen), smol(chosen)]:
        settings = {"settings": SETTINGS[subject.name], "text": subject.sha256(), "projected": PROJECTED}
        models.append(parts.get(subject.name, settings, lambda subject=subject: measure(subject)))
        finish("gradients", chosen, {"question": question, "projected": PROJECTED, "models": models}, draw, table)


if __name__ == "__main__":
    run(main)
