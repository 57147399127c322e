"""Presence and frequency penalties and logit biases, against their definition token by token, in numpy and torch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from dq_runtime.errors import SpecError
from dq_runtime.runtime.sampling import Sampler, Sampling


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(presence_penalty=1.5),
        Sampling(frequency_penalty=-0.75),
        Sampling(presence_penalty=-2.0, frequency_penalty=0.5, logit_bias=((3, 2.5), (11, -100.0))),
        Sampling(logit_bias=((0, 100.0),)),
    ],
)
def test_greedy_choices_follow_the_definition(sampling: Sampling, make: Any) -> None:
    """logit + bias - presence * [count > 0] - frequency * count, counts of generated tokens only."""
    random = np.random.default_rng(0)
    vocabulary, prompt = 17, [2, 2, 5, 11]
    sampler, generated = Sampler(sampling), []
    for _ in range(40):
        logits = random.normal(size=vocabulary).astype(np.float32)
        before = logits.copy()
        expected = [
            value
            + dict(sampling.logit_bias).get(token, 0.0)
            - sampling.presence_penalty * (token in generated)
            - sampling.frequency_penalty * generated.count(token)
            for token, value in enumerate(logits.tolist())
        ]
        chosen = int(sampler.choose(make(logits), prompt + generated).item())
        assert chosen == int(np.argmax(expected))
        np.testing.assert_array_equal(logits, before)
        generated.append(chosen)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers_are_refused(value: float) -> None:
    for change in ({"presence_penalty": value}, {"frequency_penalty": value}, {"logit_bias": ((1, value),)}):
        with pytest.raises(SpecError, match=next(iter(change))):
            Sampling(**change)  # type: ignore[arg-type]
