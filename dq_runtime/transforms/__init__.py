"""Axis 2: in which basis do we round? One file a transform, one line here."""

from dq_runtime.registry import Registry
from dq_runtime.transforms.base import Transform

TRANSFORMS = Registry("transform", {"identity": "dq_runtime.transforms.identity:Identity"})

__all__ = ["TRANSFORMS", "Transform"]
