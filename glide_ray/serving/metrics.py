"""Prometheus metrics of the server."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from ..sampling.engine import Load
from .admission import Admission

# Bucket boundaries of the histograms, in seconds.
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 2, 3, 5, 8, 13, 20, 30, 60, 120, 300)
# Help texts of the fields of `Load`.
LOADS = {
    "in_flight": "samples on the way",
    "queued": "samples that wait",
    "width": "samples that one step can advance",
    "steps": "network steps",
    "sample_steps": "steps of all samples; divided by width and steps, how full the steps were",
    "busy_seconds": "seconds spent on steps",
    "finished": "samples finished",
    "cancelled": "samples whose client left",
    "failed": "samples that a fault ended",
}
GAUGES = ("in_flight", "queued", "width")


@dataclass(frozen=True)
class StageLoad:
    """Load of one stage replica."""

    model: str
    stage: str
    replica: str
    load: Load


class Metrics:
    """Metrics of one ingress replica."""

    def __init__(self, replica: str = "0"):
        self.registry, self._replica = CollectorRegistry(), {"replica": replica}
        self._requests = self._make(
            Counter, "glide_requests", "requests answered", "path", "status"
        )
        self._seconds = self._make(
            Histogram,
            "glide_request_seconds",
            "seconds until a request was answered",
            "path",
            buckets=SECONDS,
        )
        self._stages = self._make(
            Histogram,
            "glide_stage_seconds",
            "seconds of an image in each stage, its wait included",
            "model",
            "stage",
            buckets=SECONDS,
        )
        self._images = self._make(Counter, "glide_images", "images made", "model", "task")
        self._retries = self._make(
            Counter,
            "glide_retries",
            "images begun again because their replica had gone",
            "model",
            "stage",
        )
        self._left = self._make(
            Counter, "glide_clients_left", "requests whose client left before the answer"
        )
        self._inside = self._make(
            Gauge, "glide_images_inside", "images admitted and not answered yet", "model"
        )
        self._capacity = self._make(
            Gauge, "glide_images_capacity", "images that are admitted at once", "model"
        )

    def _make(self, kind, name, help, *labels, **options):
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
            self._inside.labels(**self._replica, model=model).set(admission.inside[model])
            self._capacity.labels(**self._replica, model=model).set(capacity)
        return generate_latest(self.registry).decode()


def exposition(ingresses: Iterable[str], stages: Sequence[StageLoad]) -> bytes:
    """Merge the metrics of all ingress replicas (`Metrics.text`) and the loads of all stages."""
    return generate_latest(_All([*_joined(ingresses), *_loads(stages)]))


@dataclass(frozen=True)
class _All:
    families: list[Metric]

    def collect(self):
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
    labels, families = ["model", "stage", "replica"], []
    for name in (field.name for field in fields(Load)):
        kind = GaugeMetricFamily if name in GAUGES else CounterMetricFamily
        family = kind(f"glide_stage_{name}", LOADS[name], labels=labels)
        for stage in stages:
            family.add_metric([stage.model, stage.stage, stage.replica], getattr(stage.load, name))
        families.append(family)
    return families
