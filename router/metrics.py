"""Every metric of a router, declared once: name, unit, help, labels.

Covers: what this router served, how it decided, and its workers' tiers and queues as they report them. Does not cover:
hit rates and other quotients (they are queries: see docs/metrics.md). Token counters count only what this router
served, so the sum over routers is the fleet's. Each router has a registry of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.ledger import Entry
from router.worker_facts import WorkerFacts
from warmkv.v1 import admin_pb2, common_pb2, worker_pb2

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
OTHER_TENANTS = "other"
_MICRO = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 0.1, 0.5, 2.5)


@dataclass(frozen=True, slots=True)
class WorkerGauges:
    """What is exported of a worker. `load` is None until it reported, `facts` until it joined."""

    worker: str
    state: str
    incarnation: int
    load: worker_pb2.Load | None
    trust: admin_pb2.IndexTrust | None = None
    facts: WorkerFacts | None = None


@dataclass(frozen=True, slots=True)
class RouterGauges:
    """Numbers that are read when the metrics are asked for."""

    in_flight: int
    index_blocks: int
    fleet_version: int
    utilisation: float
    workers: list[WorkerGauges]
    index_runs: int = 0
    index_bytes: int = 0
    index_limit_bytes: int = 0
    index_evicted_blocks: int = 0
    catching_up: int = 0
    queued: int = 0
    queued_tokens: int = 0


class Metrics:
    """The metrics of one router. `registry` is what /metrics exports."""

    def __init__(self, *, router: str, model: str, version: str, tenants: Collection[str] = ()) -> None:
        """`tenants`: those that get series of their own; the rest share one."""
        self.registry = CollectorRegistry()
        self._tenants = frozenset(tenants)
        self._model = model
        declare = _Declare(self.registry)
        self.prompt_tokens = declare.counter(
            "prompt_tokens",
            "Prompt tokens of finished requests, by where their K/V lay at admission.",
            "model",
            "worker",
            "fate",
        )
        self.generation_tokens = declare.counter("generation_tokens", "Generated tokens.", "model", "worker")
        self.requests = declare.counter("requests", "Finished requests by gRPC status.", "model", "code")
        self.retries = declare.counter(
            "request_retries",
            "Requests sent again because their worker was lost, or lost something of them, before a token came.",
            "worker",
        )
        self.handovers = declare.counter(
            "handovers",
            "Answers under way that a worker left and that were to go on at another one: lost, gap, failed, draining.",
            "worker",
            "reason",
        )
        self.handover_pause_seconds = declare.histogram(
            "handover_pause_seconds",
            "From the last token of an answer before a handover to the first one after it.",
            _SECONDS,
        )
        self.handover_tokens = declare.counter(
            "handover_tokens",
            "Tokens of prompts and answers that came to another worker by a handover, by where their K/V lay then.",
            "fate",
        )
        self.prefills = declare.counter(
            "prefill_jobs",
            "Prompts that a worker prefilled for another one: done, cancelled, failed, or lost with it.",
            "worker",
            "outcome",
        )
        self.constraints = declare.counter(
            "constraints",
            "Requests with a constraint on their answer, by its kind and whether it could be used.",
            "kind",
            "verdict",
        )
        self.decisions = declare.counter("route_decisions", "Routing decisions.", "policy", "reason")
        self.shadow_decisions = declare.counter(
            "shadow_decisions",
            "Decisions that a shadow policy scored, by whether it would have agreed.",
            "policy",
            "same",
        )
        self.shadow_ttft_seconds = declare.counter(
            "shadow_predicted_ttft_seconds",
            "Predicted times to the first token of scored decisions, of the policy in force and of the shadow.",
            "side",
        )
        self.overlap = declare.counter(
            "route_overlap_tokens",
            "Prompt tokens expected to be reused (predicted), reused, and expected in vain (overrated).",
            "worker",
            "kind",
        )
        self.route_seconds = declare.histogram(
            "route_duration_seconds", "Time of a decision, by stage.", _MICRO, "stage"
        )
        self.ttft_seconds = declare.histogram(
            "time_to_first_token_seconds",
            "From a request's arrival at the router to its first token.",
            _SECONDS,
            "model",
        )
        self.ttft_error_seconds = declare.histogram(
            "time_to_first_token_error_seconds",
            "Real minus predicted time from sending a request to a worker to its first token, by worker and sign.",
            _SECONDS,
            "worker",
            "sign",
        )
        self.itl_seconds = declare.histogram(
            "inter_token_latency_seconds", "Time between two tokens of an answer.", _SECONDS, "model"
        )
        self.request_seconds = declare.histogram(
            "request_duration_seconds", "From a request's arrival to its end.", _SECONDS, "model"
        )
        self.resyncs = declare.counter("index_resyncs", "Snapshots asked for because events were missed.", "worker")
        self.probed_blocks = declare.counter(
            "index_probed_blocks",
            "Blocks that the index asked workers for, to audit itself, by what it believed and what was so; weighed.",
            "worker",
            "verdict",
        )
        self.fates_corrected = declare.counter(
            "fates_corrected", "Finished requests whose worker reported fates that did not sum to the prompt.", "worker"
        )
        self.refused = declare.counter(
            "requests_refused", "Requests that were refused, by the limit that refused them.", "limit"
        )
        self.queue_wait_seconds = declare.histogram(
            "queue_wait_seconds",
            "How long requests waited in the router until they were sent or refused; those sent at once do not count.",
            _SECONDS,
        )
        self.tenant_tokens = declare.counter(
            "tenant_tokens",
            "Tokens served to tenants that have a weight or a quota; other: to all the rest.",
            "tenant",
            "kind",
        )
        self.losses = declare.counter("worker_losses", "Streams to workers that broke or fell silent.", "worker")
        info = Gauge(
            "warmkv_build_info",
            "Always 1; which router and version this is.",
            ["router", "version"],
            registry=self.registry,
        )
        info.labels(router, version).set(1)

    def count(self, entry: Entry) -> None:
        """Export a ledger entry."""
        self.requests.labels(self._model, entry.code).inc()
        for worker, tokens in (entry.generated_by or {entry.worker: entry.generated_tokens}).items():
            if tokens:
                self.generation_tokens.labels(self._model, worker).inc(tokens)
        admitted_by = entry.admitted_by or entry.worker
        for fate, tokens in entry.fates.items():
            self.prompt_tokens.labels(self._model, admitted_by, fate).inc(tokens)
        self._count_tenant(entry)
        if entry.fates:
            self.overlap.labels(admitted_by, "predicted").inc(entry.predicted_cached)
            self.overlap.labels(admitted_by, "reused").inc(entry.reused)
            self.overlap.labels(admitted_by, "overrated").inc(max(0, entry.predicted_cached - entry.reused))

    def count_shadow(self, policy: str, *, same: bool, ttft_ms: float, shadow_ttft_ms: float) -> None:
        """A decision was scored by a shadow policy: whether it agreed, and what was predicted for either choice."""
        self.shadow_decisions.labels(policy, "yes" if same else "no").inc()
        self.shadow_ttft_seconds.labels("in_force").inc(ttft_ms / 1000.0)
        self.shadow_ttft_seconds.labels("shadow").inc(shadow_ttft_ms / 1000.0)

    def _count_tenant(self, entry: Entry) -> None:
        tenant = entry.tenant if entry.tenant in self._tenants else OTHER_TENANTS
        computed = entry.fates.get("computed", 0)
        for kind, tokens in (("computed", computed), ("cached", entry.reused), ("generated", entry.generated_tokens)):
            if tokens:
                self.tenant_tokens.labels(tenant, kind).inc(tokens)

    def observe_ttft(self, seconds: float) -> None:
        """A first token came, so long after its request."""
        self.ttft_seconds.labels(self._model).observe(seconds)

    def observe_ttft_error(self, seconds: float, predicted_ms: float, worker: str) -> None:
        """A first token came so long after the worker was sent the request; `predicted_ms` zero: it was no forecast."""
        if predicted_ms:
            error = seconds - predicted_ms / 1000.0
            self.ttft_error_seconds.labels(worker, "late" if error >= 0 else "early").observe(abs(error))

    def observe_gap(self, seconds: float, tokens: int) -> None:
        """`tokens` tokens came `seconds` after those before."""
        histogram = self.itl_seconds.labels(self._model)
        for _ in range(tokens):
            histogram.observe(seconds / tokens)

    def observe_pause(self, seconds: float) -> None:
        """The first token after a handover came, so long after the last one before it."""
        self.handover_pause_seconds.observe(seconds)

    def count_resumed(self, fates: Mapping[str, int]) -> None:
        """An answer that was handed over was admitted with so many tokens of each fate."""
        for fate, tokens in fates.items():
            if tokens:
                self.handover_tokens.labels(fate).inc(tokens)

    def observe_request(self, seconds: float) -> None:
        """A request ended."""
        self.request_seconds.labels(self._model).observe(seconds)

    def export_gauges(self, read: Callable[[], RouterGauges]) -> None:
        """Ask `read` whenever the metrics are collected."""
        self.registry.register(_Gauges(read))


class _Declare:
    """Declares with the prefix, on one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f"warmkv_{name}", help, labels, registry=self._registry)

    def histogram(self, name: str, help: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"warmkv_{name}", help, labels, buckets=buckets, registry=self._registry)


# (name, help, field of TierLoad) of what is exported of every tier of every worker.
_TIER_GAUGES = (
    ("warmkv_kv_blocks", "Blocks that a tier holds.", "blocks"),
    ("warmkv_kv_pinned_blocks", "Blocks of a tier that are pinned: neither evicted nor expired.", "leased"),
    ("warmkv_kv_tier_bytes", "Bytes of a tier that hold blocks.", "used_bytes"),
    ("warmkv_kv_tier_capacity_bytes", "Bytes that a tier may hold; zero: unknown.", "capacity_bytes"),
    ("warmkv_kv_tier_healthy", "1 while a tier works, 0 while its breaker is open.", "healthy"),
)
_TIER_COUNTERS = (
    ("warmkv_kv_hits", "Blocks read from a tier and found whole.", "hits"),
    ("warmkv_kv_stores", "Blocks written to a tier.", "stores"),
    ("warmkv_kv_read_bytes", "Bytes of blocks read from a tier.", "read_bytes"),
    ("warmkv_kv_written_bytes", "Bytes of blocks written to a tier.", "written_bytes"),
    ("warmkv_kv_loads", "Reads of a tier for requests that delivered something.", "loads"),
    ("warmkv_kv_bad_hits", "Loads of a tier that took longer than computing would have.", "bad_hits"),
)
_TIER_SECONDS = (
    ("warmkv_kv_load_seconds", "Time that loads of a tier took.", "load_ms"),
    ("warmkv_kv_load_vs_compute_seconds", "Time that computing what was loaded was predicted to take.", "compute_ms"),
)
_TIER_COUNTERS_BY = (
    ("warmkv_kv_misses", "Blocks looked for in a tier and not delivered.", "misses", "reason"),
    ("warmkv_kv_removals", "Blocks that left a tier.", "removals", "cause"),
    ("warmkv_kv_store_failures", "Blocks that were to be written to a tier and were not.", "store_failures", "reason"),
)
_LOAD_GAUGES = (
    ("warmkv_requests_running", "Sequences in a worker's batch, of all routers.", "running", 1.0),
    ("warmkv_requests_waiting", "Sequences that wait on a worker, of all routers.", "waiting", 1.0),
    ("warmkv_pending_prefill_tokens", "Prompt tokens still to be computed on a worker.", "pending_prefill_tokens", 1.0),
    ("warmkv_decode_step_seconds", "Time of one decode step.", "decode_step_ms", 1e-3),
    ("warmkv_prefill_busy_ratio", "Share of a worker's last half minute that prefills took.", "prefill_share", 1.0),
    ("warmkv_prefill_fit_error_ratio", "Mean relative error of a worker's fitted prefill time.", "prefill_error", 1.0),
)
_LOAD_COUNTERS = (
    ("warmkv_engine_steps", "Engine steps since the worker started.", "steps"),
    ("warmkv_preemptions", "Sequences that were preempted since the worker started.", "preemptions"),
)
_STATES = ("joining", "ready", "drained", "suspect", "lost", "refused")


class _Gauges(Collector):
    """Reads the workers' last reports at scrape time, so that a worker that is gone leaves no stale series."""

    def __init__(self, read: Callable[[], RouterGauges]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        """All families."""
        now = self._read()
        yield _gauge("warmkv_requests_in_flight", "Requests in flight on this router.", now.in_flight)
        yield _gauge(
            "warmkv_requests_queued",
            "Of the requests in flight those that wait in this router for a worker's queue to be short enough.",
            now.queued,
        )
        yield _gauge("warmkv_queued_tokens", "Tokens of the prompts that wait in this router.", now.queued_tokens)
        yield _gauge("warmkv_index_blocks", "Blocks in the prefix index.", now.index_blocks)
        yield _gauge("warmkv_index_runs", "Stretches of blocks with the same holders.", now.index_runs)
        yield _gauge("warmkv_index_bytes", "Memory that the prefix index takes.", now.index_bytes)
        yield _gauge("warmkv_index_limit_bytes", "Memory that the prefix index may take.", now.index_limit_bytes)
        yield CounterMetricFamily(
            "warmkv_index_evicted_blocks",
            "Blocks that the prefix index forgot for want of memory, those of the least recently placed run first.",
            value=now.index_evicted_blocks,
        )
        yield _gauge("warmkv_fleet_version", "Version of the fleet record in force.", now.fleet_version)
        yield _gauge(
            "warmkv_fleet_utilisation_ratio",
            "Share of the ready workers' time that prefills take, as `cache_aware` prices with.",
            now.utilisation,
        )
        yield _gauge(
            "warmkv_router_catching_up",
            "Workers whose first snapshot a new router still waits for before it decides.",
            now.catching_up,
        )
        yield _states(now.workers)
        yield _facts([(w.worker, w.facts) for w in now.workers if w.facts is not None])
        yield from _trusts([(w.worker, w.trust) for w in now.workers if w.trust is not None])
        reporting = [(w.worker, w.load) for w in now.workers if w.load is not None]
        yield from _loads(reporting)
        yield from _tiers(reporting)

    def describe(self) -> Iterable[Metric]:
        """Nothing: the names are ours alone, and `read` may not be ready yet."""
        return ()


_Reporting = list[tuple[str, worker_pb2.Load]]


def _states(workers: list[WorkerGauges]) -> Metric:
    family = GaugeMetricFamily(
        "warmkv_worker_state", "1 for the state that a worker is in, 0 for the others.", labels=("worker", "state")
    )
    for worker in workers:
        for state in _STATES:
            family.add_metric((worker.worker, state), float(worker.state == state))
    return family


def _facts(workers: list[tuple[str, WorkerFacts]]) -> Metric:
    family = GaugeMetricFamily(
        "warmkv_worker_info",
        "Always 1; what a worker is there for, and how it computes and stores K/V.",
        labels=("worker", "role", "ranks", "kv_dtype", "deterministic"),
    )
    for worker, facts in workers:
        mode = "yes" if facts.deterministic else "no"
        family.add_metric((worker, facts.role, str(facts.ranks), facts.kv_dtype, mode), 1.0)
    return family


def _trusts(trusts: list[tuple[str, admin_pb2.IndexTrust]]) -> Iterator[Metric]:
    credit = GaugeMetricFamily(
        "warmkv_index_credit_ratio",
        "What a worker's believed blocks count, 1 is in full: lower after a gap, behind events, or when probes refute.",
        labels=("worker",),
    )
    approximate = GaugeMetricFamily(
        "warmkv_index_approximate", "1 for a worker without K/V events, 0 for others.", labels=("worker",)
    )
    for worker, trust in trusts:
        credit.add_metric((worker,), trust.credit)
        approximate.add_metric((worker,), float(trust.approximate))
    yield from (credit, approximate)


def _loads(reporting: _Reporting) -> Iterator[Metric]:
    for name, text, field, scale in _LOAD_GAUGES:
        gauge = GaugeMetricFamily(name, text, labels=("worker",))
        for worker, load in reporting:
            gauge.add_metric((worker,), getattr(load, field) * scale)
        yield gauge
    for name, text, field in _LOAD_COUNTERS:
        counter = CounterMetricFamily(name, text, labels=("worker",))
        for worker, load in reporting:
            counter.add_metric((worker,), getattr(load, field))
        yield counter


def _tiers(reporting: _Reporting) -> Iterator[Metric]:
    tiers = [(worker, _tier_name(tier.tier), tier) for worker, load in reporting for tier in load.tiers]
    for name, text, field in _TIER_GAUGES:
        gauge = GaugeMetricFamily(name, text, labels=("worker", "tier"))
        for worker, tier_name, tier in tiers:
            gauge.add_metric((worker, tier_name), float(getattr(tier, field)))
        yield gauge
    for name, text, field in _TIER_COUNTERS:
        counter = CounterMetricFamily(name, text, labels=("worker", "tier"))
        for worker, tier_name, tier in tiers:
            counter.add_metric((worker, tier_name), getattr(tier, field))
        yield counter
    for name, text, field in _TIER_SECONDS:
        counter = CounterMetricFamily(name, text, labels=("worker", "tier"))
        for worker, tier_name, tier in tiers:
            counter.add_metric((worker, tier_name), getattr(tier, field) / 1e3)
        yield counter
    for name, text, field, label in _TIER_COUNTERS_BY:
        counter = CounterMetricFamily(name, text, labels=("worker", "tier", label))
        for worker, tier_name, tier in tiers:
            for key, value in sorted(getattr(tier, field).items()):
                counter.add_metric((worker, tier_name, key), value)
        yield counter


def _tier_name(tier: common_pb2.Tier.ValueType) -> str:
    return common_pb2.Tier.Name(tier).removeprefix("TIER_").lower()


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)
