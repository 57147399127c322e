"""Is rounding a first-order affair? The measured change of each sample's loss against what its gradient predicts.

f(w; s) is the mean cross-entropy of window s, g_s its gradient at the original weights w, dW what a rounding adds to
them: f(w + dW; s) - f(w; s) is measured, <g_s, dW> predicted, on windows that no method was calibrated on. Beside it
the figures of the paper's table 1, over all quantized weights: ||E g||^2, estimated without bias from pairs of
different samples, and E ||g||^2. Their ratio says how well the model has converged: at a minimum of the loss E g = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from theory_common import Parts, Subject, finish, options, panels, rows_of, run, smol, stories
from theory_rounding import LEAST_STEPS, ROUNDING_DTYPE, Lab
from torch import Tensor, nn

from dq_runtime.modules.student_linear import Mode
from dq_runtime.packing import PackedWeight, unpack_codes
from dq_runtime.rounding.base import fixed

BITS = (3, 4)
METHODS = ("nearest", "gptq", "discquant-paper")
REMOTE = (6, 8)  # bits of nearest at which the change is small: where first order should hold if anywhere
# (calibration windows, held-out windows, tokens of each)
SETTINGS = {"stories260K": (64, 64, 128), "SmolLM2-135M-Instruct": (64, 16, 128)}


def losses(lab: Lab, held_out: Tensor, packed: dict[str, PackedWeight]) -> list[float]:
    found = lab.quality(held_out, {"rounded": packed})
    return [b - a for a, b in zip(found["reference"].nll_windows, found["rounded"].nll_windows, strict=True)]


def differences(lab: Lab, packed: dict[str, PackedWeight]) -> dict[str, Callable[[], Tensor]]:
    """dW of each layer, float32 [N, K], built when it is asked for: six of all layers would be 2.5 GB of SmolLM2."""

    def of(name: str, codes: Tensor) -> Tensor:
        layer = lab.layers[name]
        return layer.grid.decode(codes, layer.scales) - layer.weight()

    codes = {name: unpack_codes(w.packed, w.bits, w.k) for name, w in packed.items()}
    return {name: lambda name=name: of(name, codes[name]) for name in packed}


class Slopes:
    """Gradients of one window's loss, reduced layer by layer as they arrive: never all of them at once."""

    def __init__(self, lab: Lab, changes: dict[str, dict[str, Callable[[], Tensor]]]) -> None:
        self.lab, self.changes = lab, changes
        self.leaves = {name: nn.Parameter(layer.weight()) for name, layer in lab.layers.items()}
        self.total = {name: torch.zeros_like(leaf, requires_grad=False) for name, leaf in self.leaves.items()}
        self.squared: list[float] = []
        for name, leaf in self.leaves.items():
            leaf.register_post_accumulate_grad_hook(lambda leaf, name=name: self._reduce(name, leaf))

    def _reduce(self, name: str, leaf: Tensor) -> None:
        grad, leaf.grad = leaf.grad, None
        assert grad is not None
        self.total[name] += grad
        self.norm += float(grad.double().square().sum())
        for label, change in self.changes.items():
            self.products[label] += float((grad.double() * change[name]()).sum())

    def of(self, window: Tensor) -> dict[str, float]:
        """<g, dW> by rounding."""
        self.products, self.norm = dict.fromkeys(self.changes, 0.0), 0.0
        for name, layer in self.lab.layers.items():
            layer.mode, layer.compute_dtype, layer.candidate = Mode.CANDIDATE, torch.float32, fixed(self.leaves[name])
        logits = self.lab.student.logits(window)
        nn.functional.cross_entropy(logits[:-1], window[1:]).backward()
        self.squared.append(self.norm)
        return self.products

    def table(self) -> dict[str, float]:
        """E ||g||^2, and the mean of <g_s, g_t> over s != t: ||E g||^2 = (||sum g||^2 - sum ||g||^2) / (m (m - 1))."""
        m = len(self.squared)
        whole = sum(float(total.double().square().sum()) for total in self.total.values())
        return {
            "mean_of_squares": sum(self.squared) / m,
            "square_of_mean": (whole - sum(self.squared)) / (m * (m - 1)),
            "weights": sum(total.numel() for total in self.total.values()),
        }


def round_all(subject: Subject, bits: int) -> dict[str, Any]:
    """Measured and predicted changes of one bit width, by method."""
    *counts, length = SETTINGS[subject.name]
    train, held_out = subject.windows(counts, length)
    lab = Lab(subject.path, bits, train)
    packed = {m: lab.round(m, 0) for m in (METHODS if bits in BITS else METHODS[:1])}
    measured = {method: losses(lab, held_out, p) for method, p in packed.items()}
    slopes = Slopes(lab, {method: differences(lab, p) for method, p in packed.items()})
    predicted: dict[str, list[float]] = {method: [] for method in packed}
    for window in held_out:
        for method, value in slopes.of(window).items():
            predicted[method].append(value)
    rows = [
        {
            "method": m,
            "bits": bits,
            "measured": measured[m],
            "predicted": predicted[m],
            **summary(measured[m], predicted[m]),
        }
        for m in packed
    ]
    return {"rows": rows, "gradients": slopes.table()}


def summary(measured: list[float], predicted: list[float]) -> dict[str, float]:
    """How much of the change over samples the gradient explains, and how much of its mean."""
    a, b = np.array(measured), np.array(predicted)
    return {
        "mean_measured": float(a.mean()),
        "mean_predicted": float(b.mean()),
        "correlation": float(np.corrcoef(a, b)[0, 1]),
        "rms_measured": float(np.sqrt((a**2).mean())),
        "rms_predicted": float(np.sqrt((b**2).mean())),
        "rms_unexplained": float(np.sqrt(((a - b) ** 2).mean())),
    }


def draw(result: dict[str, Any]) -> Any:
    colours = {"nearest": "black", "gptq": "tab:blue", "discquant-paper": "tab:orange"}
    markers = {3: "o", 4: "^", 6: "s", 8: "D"}
    figure, found = panels(len(result["models"]), 6.0, 4.8)
    for model, axes in zip(result["models"], found, strict=True):
        for row in model["rows"]:
            axes.plot(
                row["predicted"],
                row["measured"],
                markers[row["bits"]],
                color=colours[row["method"]],
                alpha=0.6,
                markersize=4,
                label=f"{row['method']}, {row['bits']} bits",
            )
        low, high = axes.get_xlim()
        axes.plot([low, high], [low, high], color="grey", linewidth=1, label="first order exact")
        axes.set_xscale("symlog", linthresh=0.01)
        axes.set_yscale("symlog", linthresh=0.01)
        axes.set(xlabel="predicted, <g, dW>, nats per token", title=model["model"])
        axes.legend(fontsize=7)
    found[0].set_ylabel("measured change of the loss, nats per token")
    return figure


def table(result: dict[str, Any]) -> list[str]:
    """A line a rounding, and what the gradients are."""
    head = ["model, rounding", "mean measured", "mean predicted", "correlation", "rms measured", "rms unexplained"]
    lines = []
    for model in result["models"]:
        for row in model["rows"]:
            means = [f"{row['mean_measured']:.4f}", f"{row['mean_predicted']:.4f}", f"{row['correlation']:.2f}"]
            sizes = [f"{row['rms_measured']:.4f}", f"{row['rms_unexplained']:.4f}"]
            lines.append([f"{model['model']}, {row['method']}, {row['bits']} bits", *means, *sizes])
    norms = []
    for model in result["models"]:
        found = model["gradients"]
        norms.append([model["model"], f"{found['square_of_mean']:.2f}", f"{found['mean_of_squares']:.2f}"])
    head_of_norms = ["gradients of the loss", "norm of the mean, squared", "mean squared norm"]
    return [*rows_of(head, lines), "", *rows_of(head_of_norms, norms)]


def main() -> None:
    chosen, parts = options(__doc__), Parts("first_order")
    question = "change of each held-out sample's loss under rounding, measured and by its gradient"
    models = []
    for subject in [*stories(chosen), smol(chosen)]:
        train_count, held_count, length = SETTINGS[subject.name]
        rows: list[dict[str, Any]] = []
        for bits in (*BITS, *REMOTE):
            settings = {"settings": SETTINGS[subject.name], "text": subject.sha256(), "bits": bits, "methods": METHODS}
            settings["dtype"] = str(ROUNDING_DTYPE)
            part = parts.get(
                f"{subject.name} {bits} bits", settings, lambda subject=subject, bits=bits: round_all(subject, bits)
            )
            rows += part["rows"]
        model = {"model": subject.name, "text": subject.text_name(), "text_sha256": subject.sha256()}
        model |= {"calibration_windows": train_count, "samples": held_count, "tokens": length}
        models.append(model | {"gradients": part["gradients"], "rows": rows})
        result = {"question": question, "rounding_dtype": str(ROUNDING_DTYPE)}
        result |= {"discquant_steps_at_least": LEAST_STEPS, "models": models}
        finish("first_order", chosen, result, draw, table)


if __name__ == "__main__":
    run(main)
