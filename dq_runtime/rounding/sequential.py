"""Layer after layer or block after block: the loop that methods without a global objective share.

Earlier choices are installed before the next layer is looked at ("true sequential" in GPTQ's words), progress is shown
per layer, and the state is saved between layers, so that a killed run continues bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from dq_runtime.environment import give_back_memory
from dq_runtime.errors import DQError
from dq_runtime.rounding.base import (
    Block,
    Choice,
    Gram,
    Job,
    LayerProblem,
    Needs,
    Rounded,
    choices_from_tensors,
    choices_to_tensors,
    shared_choice,
)


@dataclass(frozen=True)
class Outcome:
    """A choice with the objective it was made for: ``loss`` of the choice and ``loss_nearest`` of plain nearest on the
    layer's own scales, in the same units. For the report; the contract tests ask loss <= loss_nearest."""

    choice: Choice
    figures: Mapping[str, float] = field(default_factory=dict)


LayerRule = Callable[[LayerProblem, Gram, torch.Generator], Outcome]
BlockRule = Callable[[Block, torch.Generator, Callable[[float], None]], Mapping[str, Outcome]]
LoneRule = Callable[[str, LayerProblem], Outcome]


def round_layers(job: Job, rule: LayerRule, cross: bool = False) -> Rounded:
    """Round each layer by ``rule(layer, gram, generator)``; the gram comes from the rounded stream (with ``cross``,
    also against the original one). A layer that no calibration token reached falls back to nearest, and its row of
    the history says so (``uncalibrated`` 1)."""
    run = _Run(job)
    assert job.blocks is not None, "the pipeline builds the blocks that `needs` declares"
    for block in job.blocks:
        for stage in block.stages:
            if missing := [name for name in stage if not run.install_finished(block, name)]:
                grams = block.grams(missing, cross)
                for name in missing:
                    layer = block.layers[name]
                    if grams[name].tokens:
                        try:
                            outcome = rule(layer, grams[name], run.generator(name))
                        except DQError as error:
                            raise DQError(f"{name}: {error}") from None
                    else:
                        outcome = Outcome(nearest_choice(layer), {"uncalibrated": 1.0})
                    run.finish(block, {name: outcome})
    return run.result()


def round_blocks(job: Job, rule: BlockRule) -> Rounded:
    """Round each block by ``rule(block, generator, progress)``; ``progress`` takes the finished share of the block.
    What a rule made of a layer that no calibration token reached is noise: nearest replaces it, and its row says so."""
    run = _Run(job)
    assert job.blocks is not None, "the pipeline builds the blocks that `needs` declares"
    for block in job.blocks:
        names = list(block.layers)
        finished = [run.install_finished(block, name) for name in names]  # a block is saved whole
        if all(finished):
            continue
        outcomes = dict(rule(block, run.generator(names[0]), run.within(len(names))))
        for name, moments in block.second_moments().items():  # one more forward pass: 1% of 200 iterations
            if not bool(moments.any()):
                outcomes[name] = Outcome(nearest_choice(block.layers[name]), {"uncalibrated": 1.0})
        run.finish(block, outcomes)
    return run.result()


def round_independently(job: Job, rule: LoneRule) -> Rounded:
    """Round each layer by ``rule(name, layer)``, which asks nothing of the layers before it."""
    run = _Run(job)
    for name, layer in job.layers.items():
        if not run.finished(name):
            run.record({name: rule(name, layer)})
    return run.result()


class LayerMethod(ABC):
    """A method that rounds each layer from its weight and its Gram (with ``cross``, also against the original stream);
    ``recipe`` is the frozen dataclass of its options."""

    needs = Needs.WEIGHTS | Needs.BLOCKS
    between_neighbours = False
    any_grid = True
    adjustable = frozenset[str]()
    cross = False
    recipe: Any

    def options(self) -> dict[str, Any]:
        return asdict(self.recipe)

    def round(self, job: Job) -> Rounded:
        return round_layers(job, self.layer, self.cross)

    @abstractmethod
    def layer(self, layer: LayerProblem, gram: Gram, generator: torch.Generator) -> Outcome:
        """One layer."""


def nearest_choice(layer: LayerProblem) -> Choice:
    """Nearest on the layer's own scales."""
    return Choice(layer.grid.nearest(layer.weight(), layer.scales))


class _Run:
    """What is finished, and the bookkeeping around it."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._order = list(job.layers)
        self._choices: dict[str, Choice] = {}
        self._history: list[dict[str, float]] = []
        saved = job.store.load()
        if saved is not None:
            _, tensors, extra = saved
            self._choices = choices_from_tensors(tensors)
            self._history = list(extra["history"])

    def generator(self, name: str) -> torch.Generator:
        """Random numbers of one layer or block: the same whether or not the run was interrupted before it."""
        return torch.Generator().manual_seed((self._job.seed * 1_000_003 + self._job.place(name)) % 2**63)

    def finished(self, name: str) -> bool:
        """Whether an earlier try rounded this layer."""
        return name in self._choices

    def install_finished(self, block: Block, name: str) -> bool:
        """The same; its choice is put in place then."""
        if self.finished(name):
            block.install(name, self._choices[name])
        return self.finished(name)

    def within(self, layers: int) -> Callable[[float], None]:
        """Progress inside a block of so many layers."""
        done = len(self._choices)

        def progress(share: float) -> None:
            # The bar counts layers; a block's steps move it by whole layers only.
            self._job.monitor(done + int(share * layers), len(self._order))

        return progress

    def finish(self, block: Block, outcomes: Mapping[str, Outcome]) -> None:
        """Install and record."""
        shared = {name: shared_choice(outcome.choice, self._job.ranks) for name, outcome in outcomes.items()}
        outcomes = {name: replace(outcome, choice=shared[name]) for name, outcome in outcomes.items()}
        for name, outcome in outcomes.items():
            block.install(name, outcome.choice)
        self.record(outcomes)

    def record(self, outcomes: Mapping[str, Outcome]) -> None:
        """Keep, show, save when it is time, stop when asked."""
        for name, outcome in outcomes.items():
            self._choices[name] = outcome.choice
            self._history.append({"step": len(self._history) + 1, **outcome.figures})
        give_back_memory(sum(4 * outcome.choice.codes.numel() for outcome in outcomes.values()))
        job, done, total = self._job, len(self._choices), len(self._order)
        job.monitor(done, total)
        stop = job.store.stop_requested()
        if done < total and (stop or job.store.due()):
            job.store.save(done, choices_to_tensors(self._choices), {"history": self._history})
        if stop and done < total:
            job.store.stop(done, total)

    def result(self) -> Rounded:
        return Rounded({name: self._choices[name] for name in self._order}, self._history)
