"""Events from many threads reach their inboxes in order, with few wake-ups, and never without bound."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from dq_runtime.runtime.engine import FinishedEvent, Request, TextEvent
from dq_runtime.runtime.sampling import Sampling
from dq_runtime.server import inbox
from dq_runtime.server.inbox import Inbox, Mailroom
from dq_runtime.server.job import Job


def test_nothing_is_lost_or_out_of_order() -> None:
    streams, each = 8, 1000

    async def receive() -> list[list[str]]:
        mailroom, boxes = Mailroom(asyncio.get_running_loop()), [Inbox() for _ in range(streams)]

        def write(number: int) -> None:
            for i in range(each):
                mailroom.post(boxes[number], 0, TextEvent(str(i)))

        async def read(box: Inbox) -> list[str]:
            found: list[str] = []
            while len(found) < each:
                await asyncio.wait_for(box.ready.wait(), 10)
                found += [event.text for _, event in box.take() if isinstance(event, TextEvent)]
            return found

        threads = [threading.Thread(target=write, args=(n,)) for n in range(streams)]
        for thread in threads:
            thread.start()
        return await asyncio.gather(*(read(box) for box in boxes))

    assert asyncio.run(receive()) == [[str(i) for i in range(each)]] * streams


def test_what_comes_at_once_wakes_the_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def count() -> int:
        loop = asyncio.get_running_loop()
        mailroom, boxes, calls = Mailroom(loop), [Inbox() for _ in range(8)], []
        call = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda work: calls.append(1) or call(work), raising=False)
        for box in boxes:
            mailroom.post(box, 0, TextEvent("a"))
        await asyncio.gather(*(box.ready.wait() for box in boxes))
        return len(calls)

    assert asyncio.run(count()) == 1


def test_many_streams_are_told_less_often_than_the_engine_speaks_but_an_end_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inbox, "PAUSE", 0.01)

    async def times() -> tuple[float, float, int]:
        loop = asyncio.get_running_loop()
        mailroom, boxes = Mailroom(loop), [Inbox() for _ in range(8)]
        for box in boxes:
            mailroom.post(box, 0, TextEvent("first"))
        await boxes[0].ready.wait()
        began = loop.time()
        boxes[0].take()
        for text in ("second", "third"):
            mailroom.post(boxes[0], 0, TextEvent(text))
            await asyncio.sleep(0)
        await boxes[0].ready.wait()
        paused, read = loop.time() - began, len(boxes[0].take())
        for box in boxes:  # again a pause of 80 ms
            mailroom.post(box, 0, TextEvent("fourth"))
        await boxes[0].ready.wait()
        boxes[0].take()
        began = loop.time()
        mailroom.post(boxes[0], 0, FinishedEvent("length"))
        await boxes[0].ready.wait()
        return paused, loop.time() - began, read

    paused, ended, read = asyncio.run(times())
    assert paused > 0.07
    assert read == 2
    assert ended < paused / 2


def test_a_reader_that_falls_behind_is_marked_and_gets_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox, "MOST_EVENTS", 3)

    async def fill() -> Inbox:
        mailroom, box = Mailroom(asyncio.get_running_loop()), Inbox()
        for i in range(5):
            mailroom.post(box, 0, TextEvent(str(i)))
        await box.ready.wait()
        return box

    box = asyncio.run(fill())
    assert box.overflowed
    assert [event.text for _, event in box.take() if isinstance(event, TextEvent)] == ["0", "1", "2"]


def test_tokens_that_come_together_share_the_time_since_the_last() -> None:
    seen: list[float] = []
    metrics: Any = SimpleNamespace(
        first_token=SimpleNamespace(observe=lambda seconds: None), between_tokens=SimpleNamespace(observe=seen.append)
    )
    told: list[Any] = []
    engine: Any = SimpleNamespace(submit=lambda request, on_event: told.append(on_event))

    async def read() -> list[str]:
        job = Job(engine, Mailroom(asyncio.get_running_loop()), metrics, 1, 10.0)
        job.submit([Request([1], 4, Sampling())])
        texts = []
        told[0](TextEvent("a", (1,)))
        async for pieces in job.pieces(10.0):
            texts += [piece.text for piece in pieces]
            if len(texts) == 1:
                await asyncio.sleep(0.03)
                for word in ("b", "c", "d"):
                    told[0](TextEvent(word, (1,)))
            else:
                break
        return texts

    assert asyncio.run(read()) == ["a", "bcd"]
    assert len(seen) == 3
    assert min(seen) == max(seen) > 0.009
