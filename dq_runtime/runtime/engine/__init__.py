"""Continuous batching: many requests on one model, joining and leaving between passes (Orca, OSDI 2022).

``engine`` is the thread and its public face, ``scheduler`` decides what the next pass computes, ``blocks`` owns the
memory of keys and values, ``sequence`` is one request under way, ``constraint`` and ``logprobs`` what it may ask for.
No torch where the model has none.
"""

from dq_runtime.runtime.engine.engine import Engine, Handle
from dq_runtime.runtime.engine.events import (
    Alternative,
    Event,
    FinishedEvent,
    FinishReason,
    TextEvent,
    TokenLogprob,
    Usage,
)
from dq_runtime.runtime.engine.request import Constraint, EngineClosedError, EngineSettings, QueueFullError, Request
from dq_runtime.runtime.engine.stats import EngineStats

__all__ = [
    "Alternative",
    "Constraint",
    "Engine",
    "EngineClosedError",
    "EngineSettings",
    "EngineStats",
    "Event",
    "FinishReason",
    "FinishedEvent",
    "Handle",
    "QueueFullError",
    "Request",
    "TextEvent",
    "TokenLogprob",
    "Usage",
]
