"""Prometheus metrics: what the server saw, and the engine's own numbers read at the moment of the scrape."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dq_runtime.runtime.engine import Engine

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """One registry a server, so that two servers in a process do not count for each other."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "dq_requests", "Generating requests by path and outcome.", ("path", "outcome"), registry=self._registry
        )
        self.in_flight = Gauge("dq_requests_in_flight", "Generating requests held now.", registry=self._registry)
        self.first_token = Histogram(
            "dq_time_to_first_token_seconds",
            "From a request's submission to its first token.",
            buckets=_FIRST,
            registry=self._registry,
        )
        self.between_tokens = Histogram(
            "dq_time_between_tokens_seconds",
            "From one piece of a text to the next, by the number of its tokens, for each of them.",
            buckets=_BETWEEN,
            registry=self._registry,
        )
        self._registry.register(_EngineNumbers(engine))

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineNumbers(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        stats = self._engine.stats()
        gauges: tuple[tuple[str, str, float], ...] = (
            ("dq_running", "Sequences that hold memory.", stats.running),
            ("dq_waiting", "Requests that wait for a place.", stats.waiting),
            ("dq_kv_blocks_total", "Blocks of keys and values.", stats.blocks_total),
            ("dq_kv_blocks_used", "Blocks that live requests hold.", stats.blocks_used),
            ("dq_kv_blocks_cached", "Free blocks that hold a reusable beginning.", stats.blocks_cached),
            ("dq_engine_healthy", "1 while the engine's thread lives.", int(self._engine.healthy)),
        )
        counters: tuple[tuple[str, str, float], ...] = (
            ("dq_prompt_tokens", "Prompt tokens of admitted requests.", stats.prompt_tokens),
            ("dq_cached_prompt_tokens", "Prompt tokens found in memory.", stats.cached_tokens),
            ("dq_completion_tokens", "Tokens generated.", stats.completion_tokens),
            ("dq_passes", "Passes of the decoder.", stats.steps),
            ("dq_pass_seconds", "Seconds spent in passes.", stats.step_seconds),
            ("dq_preemptions", "Sequences that lost their blocks to older ones.", stats.preemptions),
        )
        for name, text, value in gauges:
            yield GaugeMetricFamily(name, text, value)
        for name, text, value in counters:
            yield CounterMetricFamily(name, text, value)
        finished = CounterMetricFamily("dq_finished", "Engine requests by how they ended.", labels=("reason",))
        for reason, count in stats.requests_finished.items():
            finished.add_metric((reason,), count)
        yield finished
