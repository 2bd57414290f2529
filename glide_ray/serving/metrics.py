"""Prometheus metrics of the server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from ..sampling.engine import Load
from .admission import Admission

# Bucket boundaries of the histograms, in seconds.
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 2, 3, 5, 8, 13, 20, 30, 60, 120, 300)
# Help texts of the metrics of a stage replica, by field of `Load`.
LOAD_HELP = {
    "in_flight": "samples in progress",
    "queued": "samples in the queue",
    "width": "largest batch of a denoising step, in samples",
    "steps": "denoising steps, each of a batch",
    # Divided by steps x width: mean fill of the batches.
    "sample_steps": "denoising steps, summed over samples",
    "busy_seconds": "seconds spent in denoising steps",
    "finished": "samples finished",
    "cancelled": "samples dropped because the client disconnected",
    "failed": "samples ended by an error",
    "not_finite": "samples ended because their image had NaN or infinite values",
}
GAUGES = ("in_flight", "queued", "width")

Instrument = TypeVar("Instrument", Counter, Gauge, Histogram)


@dataclass(frozen=True)
class StageLoad:
    """Load of one stage replica."""

    model: str
    stage: str
    replica: str
    load: Load
    lora_bytes: int = 0  # adapters of requests in its memory, in bytes


class Metrics:
    """Metrics of one ingress replica."""

    def __init__(self, replica: str = "0"):
        self.registry, self._replica = CollectorRegistry(), {"replica": replica}
        self._requests = self._make(
            Counter, "glide_requests", "HTTP requests answered", "path", "status"
        )
        self._seconds = self._make(
            Histogram,
            "glide_request_seconds",
            "seconds from a request to the end of its response",
            "path",
            buckets=SECONDS,
        )
        self._stages = self._make(
            Histogram,
            "glide_stage_seconds",
            "seconds of an image in each stage, waiting included",
            "model",
            "stage",
            buckets=SECONDS,
        )
        self._images = self._make(Counter, "glide_images", "images made", "model", "task")
        self._retries = self._make(
            Counter,
            "glide_retries",
            "stage calls repeated because their replica was lost",
            "model",
            "stage",
        )
        self._left = self._make(
            Counter, "glide_clients_left", "requests whose client disconnected before the response"
        )
        self._inside = self._make(
            Gauge, "glide_images_inside", "images admitted and not finished", "model"
        )
        self._capacity = self._make(
            Gauge, "glide_images_capacity", "most images admitted at the same time", "model"
        )

    def _make(
        self, kind: Callable[..., Instrument], name: str, help: str, *labels: str, **options: Any
    ) -> Instrument:
        return kind(name, help, ["replica", *labels], registry=self.registry, **options)

    def request(self, path: str, status: int, seconds: float) -> None:
        self._requests.labels(**self._replica, path=path, status=str(status)).inc()
        self._seconds.labels(**self._replica, path=path).observe(seconds)

    def image(self, model: str, task: str, seconds: dict[str, float]) -> None:
        self._images.labels(**self._replica, model=model, task=task).inc()
        for stage, value in seconds.items():
            self._stages.labels(**self._replica, model=model, stage=stage).observe(value)

    def retry(self, model: str, stage: str) -> None:
        self._retries.labels(**self._replica, model=model, stage=stage).inc()

    def client_left(self) -> None:
        self._left.labels(**self._replica).inc()

    def text(self, admission: Admission) -> str:
        """All metrics in Prometheus' text format, with the admitted images and the capacity."""
        for model, capacity in admission.capacity.items():
            self._inside.labels(**self._replica, model=model).set(admission.in_progress[model])
            self._capacity.labels(**self._replica, model=model).set(capacity)
        return generate_latest(self.registry).decode()


def exposition(ingresses: Iterable[str], stages: Sequence[StageLoad]) -> bytes:
    """Merge the metrics of all ingress replicas (`Metrics.text`) and the loads of all stages."""
    return generate_latest(_Families([*_joined(ingresses), *_loads(stages)]))


@dataclass(frozen=True)
class _Families(Collector):
    """A fixed list of metrics, for `generate_latest`."""

    families: list[Metric]

    def collect(self) -> list[Metric]:
        return self.families


def _joined(texts: Iterable[str]) -> list[Metric]:
    """Merge metric families of the same name: Prometheus accepts each family only once."""
    families: dict[str, Metric] = {}
    for text in texts:
        for family in text_string_to_metric_families(text):
            if family.name.endswith("_created"):  # creation times of the series: not needed
                continue
            families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            ).samples += family.samples
    return list(families.values())


def _loads(stages: Sequence[StageLoad]) -> list[Metric]:
    labels = ["model", "stage", "replica"]
    families: list[Metric] = []
    for name in (field.name for field in fields(Load)):
        kind = GaugeMetricFamily if name in GAUGES else CounterMetricFamily
        family: GaugeMetricFamily | CounterMetricFamily = kind(
            f"glide_stage_{name}", LOAD_HELP[name], labels=labels
        )
        for stage in stages:
            family.add_metric([stage.model, stage.stage, stage.replica], getattr(stage.load, name))
        families.append(family)
    adapters = GaugeMetricFamily(
        "glide_stage_lora_bytes", "bytes of requests' adapters in memory", labels=labels
    )
    for stage in stages:
        adapters.add_metric([stage.model, stage.stage, stage.replica], stage.lora_bytes)
    return [*families, adapters]
