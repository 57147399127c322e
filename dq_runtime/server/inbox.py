"""Engine events into the event loop: one wake-up of the loop for everything that arrived, however many streams.

A pass of the engine ends with an event for each of its requests. ``call_soon_threadsafe`` writes to a pipe each time;
with 8 streams at 100 tokens a second that would be 800 wake-ups, here it is about as many as there are passes. And a
send costs the same whether it holds one token or three: many streams are told less often what there is to tell, and the
cores that the engine computes on are not spent on sockets.
"""

from __future__ import annotations

import asyncio
from collections import deque

from dq_runtime.runtime.engine import Event, FinishedEvent

MOST_EVENTS = 2048  # of one answer waiting to be sent: 20 s at 100 tokens/s, about 1 MB
# Seconds until the loop is woken again, for each stream that it told something: 8 streams hear 50 times a second. A
# send takes 0.12 ms in the server and 0.1 ms in a client on the same machine. One stream has 4 ms between tokens.
PAUSE = 0.0025


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
        self._next = 0.0  # on the loop's clock: not to be woken before

    def post(self, inbox: Inbox, choice: int, event: Event) -> None:
        """Put ``event`` into ``inbox``, from any thread, without ever waiting. A reader that is MOST_EVENTS behind gets
        no more: its inbox is marked instead, for whoever reads it to give up."""
        if len(inbox.events) < MOST_EVENTS:
            inbox.events.append((choice, event))
        else:
            inbox.overflowed = True
        self._written.append(inbox)
        if isinstance(event, FinishedEvent):  # whoever waits for a place in the engine should not wait for this too
            self._loop.call_soon_threadsafe(self._deliver)
        elif not self._called:
            self._called = True
            self._loop.call_soon_threadsafe(self._knock)

    def _knock(self) -> None:
        if self._next > self._loop.time():
            self._loop.call_at(self._next, self._deliver)
        else:
            self._deliver()

    def _deliver(self) -> None:
        self._called = False  # before looking: what is written from now on calls again
        told = set[Inbox]()
        while self._written:
            inbox = self._written.popleft()
            inbox.ready.set()
            told.add(inbox)
        if told:
            self._next = self._loop.time() + PAUSE * len(told)
