"""Values of strangers in messages of ours."""

from __future__ import annotations

from typing import Any

MOST_CHARACTERS = 80


def shown(value: Any) -> str:
    """``repr`` of anything out of a file, in one line that stays short."""
    try:
        text = repr(value)
    except RecursionError:
        return "a value nested without end"
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + "..."
