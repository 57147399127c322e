"""Name -> "module:attribute", imported on first use, so that listing the members of an axis costs nothing."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

from dq_runtime.errors import SpecError


class Registry:
    """An axis of the design: its members by name. A second registration of one name raises."""

    def __init__(self, kind: str, members: dict[str, str]) -> None:
        self.kind = kind
        self._members: dict[str, str] = {}
        for name, target in members.items():
            self.add(name, target)

    def add(self, name: str, target: str) -> None:
        """Register ``target`` ("package.module:Class") under ``name``."""
        if name in self._members:
            raise ValueError(f"{self.kind} {name!r} is registered twice: {self._members[name]} and {target}")
        if target.count(":") != 1:
            raise ValueError(f"{self.kind} {name!r}: expected 'module:attribute', got {target!r}")
        self._members[name] = target

    def get(self, name: str) -> Any:
        """The registered object; an unknown name raises :class:`SpecError` naming the known ones."""
        if name not in self._members:
            raise SpecError(f"unknown {self.kind} {name!r}; known: {', '.join(self)}")
        module, attribute = self._members[name].split(":")
        return getattr(import_module(module), attribute)

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def __len__(self) -> int:
        return len(self._members)
