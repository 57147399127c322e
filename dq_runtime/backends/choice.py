"""The rule by which the members of a registry are asked: in order, and a requested one never falls back silently."""

from __future__ import annotations

from collections.abc import Callable

from dq_runtime.errors import BackendError
from dq_runtime.registry import Registry


def first_willing(
    registry: Registry, refusal: Callable[[str], str | None], what: object, requested: str | None, variable: str
) -> str:
    """The first name of ``registry`` for which ``refusal`` is None, or ``requested`` (by the environment's
    ``variable``) and no other. Raises :class:`BackendError` with every reason when nobody can run ``what``."""
    if requested is not None:
        if requested not in registry:
            raise BackendError(f"{variable}={requested!r} is not a {registry.kind}; known: {', '.join(registry)}")
        reason = refusal(requested)
        if reason is not None:
            raise BackendError(f"{variable}={requested} cannot run {what}: {reason}")
        return requested
    reasons = []
    for name in registry:
        reason = refusal(name)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise BackendError(f"no {registry.kind} can run {what}: {'; '.join(reasons)}")
