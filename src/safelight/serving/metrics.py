"""What Prometheus is told. Base units, and one registry for each application."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from safelight.errors import SafelightError
from safelight.runtime.client import EngineClient, EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0)
_GAUGES: Mapping[str, tuple[str, Callable[[EngineStats], float]]] = {
    "requests_running": ("requests that have begun", lambda stats: stats.num_running),
    "requests_waiting": ("requests that have not begun", lambda stats: stats.num_waiting),
    "gpu_memory_bytes": ("allocated on the device", lambda stats: stats.device_memory_bytes),
    "model_load_seconds": ("what loading the model took", lambda stats: stats.load_seconds),
    "compiled": ("1 when what begins runs compiled", lambda stats: stats.compiled),
    "worker_restarts": ("workers started after the first", lambda stats: stats.num_restarts),
}


class Metrics:
    """The server's figures. It has itself told by the engine of each denoising step.

    Args:
        engine: whose state the gauges read when they are asked.

    """

    def __init__(self, engine: EngineClient) -> None:
        self._registry = registry = CollectorRegistry()
        for name, (described, read) in _GAUGES.items():
            gauge = Gauge(f"safelight_{name}", described, registry=registry)
            gauge.set_function(lambda read=read: read(engine.stats))  # type: ignore[misc]  # read is bound now
        self._requests = Counter(
            "safelight_requests", "generations by how they ended, as HTTP has it", ["task", "status"], registry=registry
        )
        self._errors = Counter("safelight_errors", "errors answered", ["code"], registry=registry)
        self._outputs = Counter("safelight_outputs", "pictures and videos made", registry=registry)
        self._duration = self._histogram("request_duration_seconds", "from acceptance to the last output")
        self._queue = self._histogram("queue_seconds", "from acceptance to the first step")
        self._stage = self._histogram("stage_seconds", "in one stage, over a request's outputs", ["stage"])
        self._step = self._histogram("step_seconds", "of one denoising step")
        self._batch_size = Histogram(
            "safelight_batch_size", "model calls that ran as one", buckets=(1, 2, 4, 8, 16, 32), registry=registry
        )
        engine.on_step = self._stepped

    def completed(
        self, task: str, seconds: float | None, queue_seconds: float | None, timings: Mapping[str, float], outputs: int
    ) -> None:
        """Count a generation that ended well.

        Args:
            task: what the model does.
            seconds, queue_seconds: since its acceptance, and of these before it began; None where that is not known.
            timings: seconds of each stage.
            outputs: how many pictures or videos.

        """
        self._requests.labels(task, "200").inc()
        self._outputs.inc(outputs)
        for histogram, known in ((self._duration, seconds), (self._queue, queue_seconds)):
            if known is not None:
                histogram.observe(known)
        for stage, spent in timings.items():
            self._stage.labels(stage).observe(spent)

    def _stepped(self, seconds: float, batch_size: int) -> None:
        self._step.observe(seconds)
        self._batch_size.observe(batch_size)

    def ended(self, task: str | None, status: int) -> None:
        """Count a generation that did not end well, by its HTTP status; what had no task was none."""
        if task is not None:
            self._requests.labels(task, str(status)).inc()

    def failed(self, task: str | None, error: SafelightError) -> None:
        """Count an error, and the generation that it ended."""
        self.ended(task, error.status)
        self._errors.labels(error.code).inc()

    def exposition(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, described: str, labels: tuple[str, ...] | list[str] = ()) -> Histogram:
        return Histogram(f"safelight_{name}", described, labels, buckets=_SECONDS, registry=self._registry)
