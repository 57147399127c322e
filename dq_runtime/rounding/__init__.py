"""Axis 3: which grid value does each weight get? One file a method, one line here."""

from dq_runtime.registry import Registry
from dq_runtime.rounding.base import (
    Block,
    Blocks,
    Choice,
    Fisher,
    Gram,
    Job,
    LayerProblem,
    Monitor,
    Needs,
    Relaxation,
    Rounded,
    Rounding,
    StateStore,
    Student,
    Weights,
)

ROUNDINGS = Registry(
    "rounding",
    {
        "nearest": "dq_runtime.rounding.nearest:Nearest",
        "discquant": "dq_runtime.rounding.discquant:DiscQuant",
        "discquant-paper": "dq_runtime.rounding.discquant_paper:DiscQuantPaper",
        "obc": "dq_runtime.rounding.obc:Obc",
        "gptq": "dq_runtime.rounding.gptq:Gptq",
        "cdquant": "dq_runtime.rounding.cdquant:CdQuant",
        "qronos": "dq_runtime.rounding.qronos:Qronos",
        "gptaq": "dq_runtime.rounding.gptaq:Gptaq",
        "magr": "dq_runtime.rounding.magr:Magr",
        "yaqa": "dq_runtime.rounding.yaqa:Yaqa",
        "qat": "dq_runtime.rounding.qat:QAT",
        "autoround": "dq_runtime.rounding.autoround:AutoRound",
        "gsq": "dq_runtime.rounding.gsq:GSQ",
        "omniquant": "dq_runtime.rounding.omniquant:OmniQuant",
        "flexround": "dq_runtime.rounding.flexround:FlexRound",
        "adaquant": "dq_runtime.rounding.adaquant:AdaQuant",
        "adaround": "dq_runtime.rounding.adaround:AdaRound",
    },
)

__all__ = [
    "ROUNDINGS",
    "Block",
    "Blocks",
    "Choice",
    "Fisher",
    "Gram",
    "Job",
    "LayerProblem",
    "Monitor",
    "Needs",
    "Relaxation",
    "Rounded",
    "Rounding",
    "StateStore",
    "Student",
    "Weights",
]
