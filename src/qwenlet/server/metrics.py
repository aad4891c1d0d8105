"""GET /metrics: what the engine counts, under the names of vLLM's series, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from starlette.responses import Response

from qwenlet.engine.stats import Histogram, Stats
from qwenlet.server.service import Service

GAUGES = {
    "vllm:num_requests_running": ("Requests that run.", lambda s: s.running),
    "vllm:num_requests_waiting": ("Requests that wait.", lambda s: s.waiting),
    "vllm:kv_cache_usage_perc": ("Share of the cache's pages that requests hold.", lambda s: s.pages_used / s.pages),
}
COUNTERS = {
    "vllm:prompt_tokens": ("Tokens of prompts.", lambda s: s.prompt_tokens),
    "vllm:generation_tokens": ("Tokens of replies.", lambda s: s.generated_tokens),
    "vllm:prefix_cache_queries": (
        "Tokens of prompts that were looked up in the prefix cache.",
        lambda s: s.asked_tokens,
    ),
    "vllm:prefix_cache_hits": ("Tokens of prompts that were found there.", lambda s: s.cached_tokens),
    "vllm:num_preemptions": ("Times a request gave its pages back.", lambda s: s.preemptions),
    "vllm:spec_decode_num_draft_tokens": ("Tokens that were guessed.", lambda s: s.guessed),
    "vllm:spec_decode_num_accepted_tokens": ("Guesses that were right.", lambda s: s.accepted),
    "qwenlet:engine_steps": ("Calls of the model.", lambda s: s.steps),
    "qwenlet:engine_failed_steps": ("Calls of the model that failed.", lambda s: s.failed_steps),
}
HISTOGRAMS = {
    "vllm:time_to_first_token_seconds": ("From submission to the first token.", lambda s: s.first_token),
    "vllm:inter_token_latency_seconds": ("From token to token.", lambda s: s.between_tokens),
    "vllm:e2e_request_latency_seconds": ("From submission to the end.", lambda s: s.whole),
    "vllm:request_queue_time_seconds": ("From submission to the first step.", lambda s: s.queued),
    "vllm:request_prefill_time_seconds": ("From the first step to the first token.", lambda s: s.prefill),
    "vllm:request_decode_time_seconds": ("From the first token to the last.", lambda s: s.decode),
}


class EngineCollector(Collector):
    """Reads the engine's counters when they are asked for."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def describe(self) -> Iterable[Metric]:
        return ()  # else registering would ask a model that is not there yet

    def collect(self) -> Iterator[Metric]:
        answers = CounterMetricFamily("qwenlet:http_responses", "Answers by status.", labels=["code"])
        for status, count in sorted(self._service.answers.items()):
            answers.add_metric([str(status)], count)
        yield answers
        if self._service.state != "loading":
            yield from _series(self._service.own_names[0], self._service.llm.engine.stats)


def _series(model: str, stats: Stats) -> Iterator[Metric]:
    names, values = ["model_name", "engine"], [model, "0"]
    for name, (words, of) in GAUGES.items():
        gauge = GaugeMetricFamily(name, words, labels=names)
        gauge.add_metric(values, of(stats))
        yield gauge
    for name, (words, of) in COUNTERS.items():
        counter = CounterMetricFamily(name, words, labels=names)
        counter.add_metric(values, of(stats))
        yield counter
    ended = CounterMetricFamily(
        "vllm:request_success", "Requests by how they ended.", labels=[*names, "finished_reason"]
    )
    for reason, count in sorted(stats.finished.items()):
        # vLLM's word for a request that its client left
        ended.add_metric([*values, "abort" if reason == "cancelled" else reason], count)
    yield ended
    spent = CounterMetricFamily("qwenlet:engine_seconds", "Where the engine's time went.", labels=[*names, "part"])
    for part, seconds in stats.seconds.items():
        spent.add_metric([*values, part], seconds)
    yield spent
    for name, (words, of_histogram) in HISTOGRAMS.items():
        histogram = HistogramMetricFamily(name, words, labels=names)
        shown = of_histogram(stats)
        histogram.add_metric(values, buckets=_buckets(shown), sum_value=shown.total)
        yield histogram


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Each with all that is smaller, as Prometheus wants them."""
    so_far, buckets = 0, []
    for bound, count in zip([*map(str, histogram.bounds), "+Inf"], histogram.counts, strict=True):
        so_far += count
        buckets.append((bound, float(so_far)))
    return buckets


def add(app: FastAPI, service: Service) -> None:
    registry = CollectorRegistry()
    registry.register(EngineCollector(service))

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_LATEST})
