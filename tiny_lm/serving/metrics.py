"""Metrics of a server for Prometheus."""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tiny_lm.serving.models import ServedModel

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters and histograms; each server has its own registry."""

    def __init__(self, models: Iterable[ServedModel]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter("tiny_lm_requests", "Requests answered.", ["path", "status"], registry=self._registry)
        self._seconds = Histogram(
            "tiny_lm_request_seconds",
            "From the arrival of a request to the end of its response.",
            ["path"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._first = Histogram(
            "tiny_lm_time_to_first_token_seconds",
            "From the arrival of a request to its first chunk of text.",
            ["model"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._registry.register(_SchedulerCollector(list(models)))
        ProcessCollector(registry=self._registry)

    def record_response(self, path: str, status: int, seconds: float) -> None:
        """Record a response; ``path`` is the route's, not the client's, to limit the number of labels."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def record_first_token(self, model: str, seconds: float) -> None:
        """Record how long a client waited for its first chunk of text."""
        self._first.labels(model).observe(seconds)

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self._registry)


class _SchedulerCollector(Collector):
    """Collects the stats of all schedulers."""

    def __init__(self, models: list[ServedModel]) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        running = GaugeMetricFamily("tiny_lm_texts_running", "Texts that are being generated.", labels=["model"])
        waiting = GaugeMetricFamily("tiny_lm_texts_waiting", "Texts that wait for a slot.", labels=["model"])
        tokens = CounterMetricFamily("tiny_lm_generated_tokens", "Tokens generated.", labels=["model"])
        failed = GaugeMetricFamily("tiny_lm_model_failed", "1 if the model has failed.", labels=["model"])
        for model in self._models:
            stats = model.scheduler.stats
            running.add_metric([model.name], stats.running)
            waiting.add_metric([model.name], stats.waiting)
            tokens.add_metric([model.name], stats.tokens)
            failed.add_metric([model.name], model.scheduler.failed)
        yield from (running, waiting, tokens, failed)
