"""Which loss should steer the rounding? The paper's DiscQuant with KL, the text's tokens, intermediate errors, mixed.

All runs see the same windows in the same order and differ in the loss L = a KL + b CE + c MSE alone, in nats per token:

    KL   KL(teacher || student) of the next token, the paper's own
    CE   cross-entropy of the student on the tokens that follow in the text
    MSE  mean over the model's blocks of ||h - h'||^2 / ||h||^2, h and h' what teacher and student hand on

It is the paper's comparison (table 6) on small models. Judged by held-out KL and held-out perplexity. The method's
other options stay as they are, so the losses differ in size as well: a quarter of the KL and four times the MSE say how
much that matters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from theory_common import Parts, Subject, finish, options, panels, rows_of, run, smol, stories
from theory_rounding import LEAST_STEPS, ROUNDING_DTYPE, Lab
from torch import Tensor, nn

from dq_runtime.evaluate.metrics import Quality
from dq_runtime.modules.kl import mean_kl
from dq_runtime.modules.student import StudentModel
from dq_runtime.modules.student_linear import Mode
from dq_runtime.rounding.base import Weights

LOSSES = {
    "KL": (1.0, 0.0, 0.0),
    "CE": (0.0, 1.0, 0.0),
    "MSE": (0.0, 0.0, 1.0),
    "KL + CE": (0.5, 0.5, 0.0),
    "KL + MSE": (0.5, 0.0, 0.5),
    "KL / 4": (0.25, 0.0, 0.0),
    "4 MSE": (0.0, 0.0, 4.0),
}
BITS = 3
# (calibration windows, held-out windows, tokens of each, seeds)
SETTINGS = {"stories260K": (64, 32, 256, 2), "SmolLM2-135M-Instruct": (64, 12, 128, 1)}


class MixedLoss(StudentModel):
    """A student whose backward pass is that of ``weights`` = (a, b, c) on (KL, CE, MSE)."""

    weights = LOSSES["KL"]

    def kl_backward(self, window: int, weights: Weights | None = None) -> Tensor:
        assert weights is None, "only relaxed choices are mixed"
        tokens = self.tokens[window]
        a, b, c = self.weights
        with self._hidden() as original, torch.no_grad():
            self.set_mode(Mode.TEACHER)
            teacher = self.logits(tokens)
        with self._hidden() as rounded:
            self.set_mode(Mode.RELAXED)
            student = self.logits(tokens)
        loss = torch.zeros(())
        if a:
            loss = loss + a * mean_kl(student, teacher)
        if b:
            loss = loss + b * nn.functional.cross_entropy(student[:-1].float(), tokens[1:])
        if c:
            pairs = zip(original, rounded, strict=True)
            errors = [(h - r).square().sum() / h.square().sum() for h, r in pairs]
            loss = loss + c * torch.stack(errors).mean()
        loss.backward()
        return loss.detach()

    @contextmanager
    def _hidden(self) -> Iterator[list[Tensor]]:
        """What each block hands on during one forward pass."""
        seen: list[Tensor] = []

        def keep(block: nn.Module, inputs: Any, output: Any) -> None:
            seen.append((output if isinstance(output, Tensor) else output[0]).float())

        hooks = [block.register_forward_hook(keep) for block in self.model.model.layers]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()


def measure(subject: Subject, name: str, seed: int) -> dict[str, float]:
    """Figures of one run."""
    count, held_count, length, _ = SETTINGS[subject.name]
    train, held_out = subject.windows([count, held_count], length)
    lab = Lab(subject.path, BITS, train, MixedLoss)
    assert isinstance(lab.student, MixedLoss)
    lab.student.weights = LOSSES[name]
    found = lab.quality(held_out, {"rounded": lab.round("discquant-paper", seed)})
    return {**figures(found["rounded"]), "perplexity_reference": found["reference"].perplexity}


def figures(quality: Quality) -> dict[str, float]:
    error = quality.kl_stderr
    return {"kl": quality.kl, "kl_stderr": error, "perplexity": quality.perplexity, "top1": quality.agreement}


def draw(result: dict[str, Any]) -> Any:
    figure, found = panels(len(result["models"]), 6.2, 3.8)
    for model, axes in zip(result["models"], found, strict=True):
        names = list(dict.fromkeys(row["loss"] for row in model["rows"]))
        for number, name in enumerate(names):
            kls = [row["kl"] for row in model["rows"] if row["loss"] == name]
            axes.bar(number, sum(kls) / len(kls), color="tab:blue", alpha=0.6)
            axes.plot([number] * len(kls), kls, ".", color="black")
        axes.set_xticks(range(len(names)), names)
        title = f"{model['model']}, {result['bits']} bits, {model['windows']} windows of {model['tokens']}"
        axes.set_title(title, fontsize=9)
    found[0].set_ylabel("held-out KL, nats per token")
    figure.suptitle("discquant-paper by the loss that steers it (dots: seeds)", fontsize=10)
    return figure


def table(result: dict[str, Any]) -> list[str]:
    """Means over seeds."""
    lines = []
    for model in result["models"]:
        for name in dict.fromkeys(row["loss"] for row in model["rows"]):
            rows = [row for row in model["rows"] if row["loss"] == name]
            kl, perplexity = (sum(row[key] for row in rows) / len(rows) for key in ("kl", "perplexity"))
            error = sum(row["kl_stderr"] for row in rows) / len(rows)
            lines.append([model["model"], name, f"{kl:.3f} ± {error:.3f}", f"{perplexity:.2f}"])
    return rows_of(["model", "loss", "held-out KL", "held-out perplexity"], lines)


def main() -> None:
    chosen, parts = options(__doc__), Parts("loss_choice")
    question = "held-out quality of discquant-paper by its loss, same windows"
    rounding = {"bits": BITS, "rounding_dtype": str(ROUNDING_DTYPE)}
    models = []
    for subject in [*stories(chosen), smol(chosen)]:
        *counts, length, seeds = SETTINGS[subject.name]
        rows = []
        for name, weights in LOSSES.items():
            for seed in range(seeds):
                case = {"settings": [*counts, length], "text": subject.sha256(), "weights": weights, "seed": seed}
                part = parts.get(
                    f"{subject.name} {name} seed {seed}",
                    {**case, **rounding},
                    lambda subject=subject, name=name, seed=seed: measure(subject, name, seed),
                )
                rows.append({"loss": name, "weights": list(weights), "seed": seed, **part})
        model = {"model": subject.name, "text": subject.text_name(), "text_sha256": subject.sha256()}
        models.append(model | {"windows": counts[0], "held_out_windows": counts[1], "tokens": length, "rows": rows})
        finish(
            "loss_choice",
            chosen,
            {"question": question, **rounding, "discquant_steps_at_least": LEAST_STEPS, "models": models},
            draw,
            table,
        )


if __name__ == "__main__":
    run(main)
