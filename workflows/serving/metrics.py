"""Every Prometheus metric of the service, in one table, and what records them.

The service exposes them at `/metrics`. Dashboards and alert rules read `TABLE`; a metric that is not
in it cannot be recorded.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric as Family

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Bucket bounds of every histogram, in seconds."""


@dataclass(frozen=True)
class Metric:
    """`type` as Prometheus names it; `help` with its unit; `labels` in order.

    A counter's name ends in `_total`; a histogram adds `_bucket`, `_sum` and `_count`. `source` is
    the process that records it: the one that answers HTTP, or the one that holds the engine.
    """

    type: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    source: Literal["ingress", "engine"] = "ingress"


def _engine(type: Literal["counter", "gauge", "histogram"], help: str, *labels: str) -> Metric:
    return Metric(type, help, labels, "engine")


# `model` is the registry name without version, the name with `:full_context` or `:retrieval` where the corpus
# itself or passages of it were in the prompt, or the base model's name: bounded by the registry.
MODEL = ("model",)

TABLE: dict[str, Metric] = {
    "cartridges_requests_total": Metric("counter", "Requests finished, by HTTP status", ("model", "status")),
    "cartridges_request_seconds": Metric("histogram", "Seconds from arrival to the last byte", MODEL),
    "cartridges_ttft_seconds": Metric("histogram", "Seconds from arrival to the first token", MODEL),
    "cartridges_tpot_seconds": Metric("histogram", "Seconds per output token after the first", MODEL),
    "cartridges_in_flight": Metric("gauge", "Requests accepted and not finished", MODEL),
    "cartridges_queued": Metric("gauge", "Requests accepted that wait for their first token", MODEL),
    "cartridges_rejected_total": Metric(
        "counter", "Requests refused before the engine, by reason (queue_full, draining)", ("reason",)),
    "cartridges_disconnects_total": Metric("counter", "Requests whose client left before the end", MODEL),
    "cartridges_audit_lost_total": Metric("counter", "Lines that could not be written to the audit log"),
    "cartridges_fallbacks_total": Metric(
        "counter", "Answers taken from the corpus' text because the cartridge was unsure", MODEL),
    "cartridges_prompt_tokens_total": Metric("counter", "Prompt tokens, the prefix included", MODEL),
    "cartridges_cached_tokens_total": Metric(
        "counter", "Prompt tokens taken from a cartridge instead of a prefill", MODEL),
    "cartridges_generation_tokens_total": Metric("counter", "Tokens generated", MODEL),
    "cartridges_engine_active": _engine("gauge", "Answers that an engine is generating or has queued"),
    "cartridges_cache_hits_total": _engine("counter", "Requests whose cartridge was resident", "model"),
    "cartridges_cache_misses_total": _engine(
        "counter", "Requests whose cartridge had to be loaded", "model"),
    "cartridges_loads_total": _engine(
        "counter", "Cartridges loaded, by result (ok, error)", "model", "result"),
    "cartridges_load_seconds": _engine(
        "histogram", "Seconds to load a cartridge from the registry", "model"),
    "cartridges_evictions_total": _engine(
        "counter", "Cartridges put out, by reason (lru, ttl, unload)", "model", "reason"),
    "cartridges_resident_bytes": _engine("gauge", "Bytes of a resident cartridge's keys and values", "model"),
    "cartridges_resident_limit_bytes": _engine("gauge", "Bytes that resident cartridges may take"),
}

_KINDS = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}


class Metrics:
    """One process's values, of its part of `TABLE`. Unknown names and labels raise.

    `replica`: who this is among several, a further label of everything told. They are not added up, because a sum
    falls when one of them goes, and Prometheus would take that for a restart and count all over again.
    """

    def __init__(self, source: Literal["ingress", "engine"]):
        self.registry = CollectorRegistry()
        self.replica = ""
        self._metrics = {name: self._build(name, metric) for name, metric in TABLE.items()
                         if metric.source == source}

    def _build(self, name: str, metric: Metric):
        extra = {"buckets": SECONDS} if metric.type == "histogram" else {}
        return _KINDS[metric.type](name, metric.help, metric.labels, registry=self.registry, **extra)

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        """Raise a counter or gauge by `value`."""
        self._child(name, labels).inc(value)

    def put(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        self._child(name, labels).set(value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add one observation to a histogram, in seconds."""
        self._child(name, labels).observe(value)

    def forget(self, name: str, **labels: str) -> None:
        """Drop one labelled series: a cartridge that is gone is not shown as 0 for ever."""
        self._metrics[name].remove(*[labels[label] for label in TABLE[name].labels])

    def families(self) -> list[Family]:
        """What was recorded so far, in a form that can be sent to another process."""
        told = list(self.registry.collect())
        for sample in (sample for family in told for sample in family.samples if self.replica):
            sample.labels["replica"] = self.replica
        return told

    def _child(self, name: str, labels: dict[str, str]):
        metric = self._metrics[name]
        return metric.labels(**labels) if TABLE[name].labels else metric


def add_up(replicas: Iterable[list[Family]]) -> list[Family]:
    """The families of several replicas as one: values with equal labels are added."""
    merged: dict[str, Family] = {}
    for family in (family for families in replicas for family in families):
        total = merged.setdefault(family.name, Family(family.name, family.documentation, family.type))
        values = {(sample.name, tuple(sample.labels.items())): sample.value for sample in total.samples}
        for sample in family.samples:
            if not sample.name.endswith("_created"):  # A time, which does not add up.
                key = (sample.name, tuple(sample.labels.items()))
                values[key] = values.get(key, 0.0) + sample.value
        total.samples = []
        for (name, labels), value in values.items():
            total.add_sample(name, dict(labels), value)
    return list(merged.values())


def exposition(families: Iterable[Family]) -> bytes:
    """Prometheus text format."""
    return generate_latest(_Collected(add_up([list(families)])))


class _Collected(CollectorRegistry):
    def __init__(self, families: list[Family]):
        super().__init__()
        self._families = families

    def collect(self) -> Iterable[Family]:
        return self._families
