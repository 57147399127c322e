"""What every route needs: the model, the engine, the limits, and threads for the work that must not hold up streams."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from fastapi import Request

from dq_runtime.runtime.engine import Engine
from dq_runtime.runtime.engine import Request as Generation
from dq_runtime.server.fields import SamplingFields
from dq_runtime.server.gate import Record
from dq_runtime.server.inbox import Mailroom
from dq_runtime.server.job import Job
from dq_runtime.server.metrics import Metrics
from dq_runtime.server.served import Served
from dq_runtime.server.settings import ServerSettings

UNLIMITED = 2**31 - 1  # tokens: the engine stops at the context's end


@dataclass
class Service:
    """Lives as long as the application; ``mailroom`` belongs to its event loop."""

    served: Served
    engine: Engine
    settings: ServerSettings
    metrics: Metrics
    mailroom: Mailroom
    # Two threads: a prompt of a megabyte takes a second to tokenize, and the next one should not wait for it.
    _threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "tokenizer"))

    async def job(
        self, http: Request, body: SamplingFields, requests: Callable[[], Sequence[Generation]], group: int = 1
    ) -> Job:
        """A job with what ``requests`` returns, made and submitted off the event loop, and logged with ``http``; see
        :class:`Job` for ``group``. Refusals are raised as :class:`APIError`."""
        record: Record = http.state.record
        record.ignored = sorted(name[:50] for name in body.model_extra or {})[:20]
        left = self.settings.timeout - (time.perf_counter() - record.started)
        job = Job(self.engine, self.mailroom, self.metrics, group, left)

        def submit() -> None:
            made = requests()
            if self.settings.log_prompts:
                record.prompt = self.served.token_text(made[0].tokens)
            job.submit(made)

        await asyncio.get_running_loop().run_in_executor(self._threads, submit)
        record.job = job
        return job

    def close(self) -> None:
        """Let the threads go."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def service_of(http: Request) -> Service:
    """The service of the application that ``http`` came to."""
    found: Service = http.app.state.service
    return found


def new_id(prefix: str) -> str:
    """An id nobody else has, in OpenAI's style."""
    return f"{prefix}{uuid.uuid4().hex}"
