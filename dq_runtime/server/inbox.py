"""Engine events into the event loop: one wake-up of the loop for everything that arrived, however many streams.

A pass of the engine ends with an event for each of its requests. ``call_soon_threadsafe`` writes to a pipe each time;
with 8 streams at 100 tokens a second that would be 800 wake-ups, here it is about as many as there are passes.
"""

from __future__ import annotations

import asyncio
from collections import deque

from dq_runtime.runtime.engine import Event

MOST_EVENTS = 2048  # of one answer waiting to be sent: 20 s at 100 tokens/s, about 1 MB


class Inbox:
    """What the engine said to one HTTP request and nobody has read yet: (number of the choice, event)."""

    def __init__(self) -> None:
        self.events: deque[tuple[int, Event]] = deque()
        self.ready = asyncio.Event()
        self.overflowed = False

    def take(self) -> list[tuple[int, Event]]:
        """All of it, in order; afterwards the inbox is empty and not ready."""
        self.ready.clear()
        # Not list(): the engine may append meanwhile, and what it appends after the last popleft sets ready again.
        found = []
        while self.events:
            found.append(self.events.popleft())
        return found


class Mailroom:
    """Carries events from the engine's thread to inboxes of the loop that made it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._written: deque[Inbox] = deque()
        self._called = False

    def post(self, inbox: Inbox, choice: int, event: Event) -> None:
        """Put ``event`` into ``inbox``, from any thread, without ever waiting. A reader that is MOST_EVENTS behind gets
        no more: its inbox is marked instead, for whoever reads it to give up."""
        if len(inbox.events) < MOST_EVENTS:
            inbox.events.append((choice, event))
        else:
            inbox.overflowed = True
        self._written.append(inbox)
        if not self._called:
            self._called = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._called = False  # before looking: what is written from now on calls again
        while self._written:
            self._written.popleft().ready.set()
