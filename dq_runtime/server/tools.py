"""Tool calls in a model's text: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, the format of Hermes and
Qwen that most open chat templates teach (NousResearch/Hermes-Function-Calling)."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from typing import Any

from dq_runtime.runtime.engine import Constraint

BEGIN, END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Call:
    """One call: ``arguments`` is JSON text, as OpenAI sends it."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def form(self) -> dict[str, Any]:
        """As it stands in a message."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def read_call(text: str) -> Call | None:
    """The call that ``text`` is, or None if it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    return Call(found["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))


class CallReader:
    """Text in, pieces of content and whole calls out, as a stream. What looks like a call and is none is content.

    ``whole``: the text is one call without tags, as :func:`constraint` enforces it."""

    def __init__(self, whole: bool) -> None:
        self._whole = whole
        self._held = ""
        self._inside = whole
        self.called = False

    def push(self, text: str) -> tuple[str, list[Call]]:
        """What is certain after ``text``."""
        self._held += text
        content, calls = "", []
        while not self._whole:
            tag = END if self._inside else BEGIN
            before, found, after = self._held.partition(tag)
            if not found:
                break
            if self._inside:
                call = read_call(before)
                content += "" if call else f"{BEGIN}{before}{END}"
                calls += [call] if call else []
            else:
                # Templates put calls on lines of their own; those line breaks are no content.
                content += before.rstrip("\n")
            self._held, self._inside = after.removeprefix("\n") if self._inside else after, not self._inside
        if not self._inside:
            keep = _beginning(self._held)
            content, self._held = content + self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self.called |= bool(calls)
        return content, calls

    def finish(self) -> tuple[str, list[Call]]:
        """What is left when the text has ended: a call whose end tag never came is still a call if it is whole."""
        call = read_call(self._held) if self._inside else None
        rest = "" if call else (BEGIN if self._inside and not self._whole else "") + self._held
        self._held, self._inside = "", False
        self.called |= call is not None
        return rest, [call] if call else []


def _beginning(text: str) -> int:
    """Length of the longest end of ``text`` that may be line breaks before a tag, and the beginning of one."""
    bare = text.rstrip("\n")
    for n in range(len(BEGIN) - 1, 0, -1):
        if text.endswith(BEGIN[:n]):
            return n + len(text[:-n]) - len(text[:-n].rstrip("\n"))
    return len(text) - len(bare)


def constraint(functions: list[dict[str, Any]]) -> Constraint:
    """What enforces that the text is a call of one of ``functions`` (their definitions)."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": f["name"]}, "arguments": f.get("parameters") or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for f in functions
    ]
    return Constraint("json_schema", json.dumps({"anyOf": calls}))
