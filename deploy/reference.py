"""The tables of the documentation that code already holds: `python -m deploy.reference` writes them into docs/*.md.

Covers: metrics, label values, policies, settings, what tiers honour, errors. Each table stands between
`<!-- generated: NAME -->` and `<!-- end: NAME -->`; the rest of a page is written by hand. `--check` writes nothing and
exits with 1 when a page is stale. Needs the source tree: an installed package has no docs.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric

from deploy.layers import load_settings
from kvstore.errors import MissReason
from kvstore.events import RemovalCause, TierName
from router.errors import RouterError
from router.ledger import FATES
from router.metrics import Metrics, RouterGauges, WorkerGauges
from router.policy import POLICIES, Policy
from router.worker_facts import facts_of
from warmkv.errors import _BY_CODE, ServerError
from warmkv.v1 import admin_pb2, common_pb2, worker_pb2

DOCS = Path(__file__).resolve().parent.parent / "docs"
_MARKED = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end: \2 -->)", re.DOTALL)
_UNITS = ("seconds", "bytes", "tokens", "blocks", "ratio")

# What a caller can do; the message of the error itself says more.
_REMEDIES = {
    "INVALID_REQUEST": "Correct the request; never retry it as it is.",
    "CONTEXT_LENGTH_EXCEEDED": "Shorten the prompt, or lower `max_tokens`; the metadata holds both lengths.",
    "UNAUTHENTICATED": "Send `authorization: Bearer KEY` with a key of the keys file.",
    "PERMISSION_DENIED": 'Use a key with `role = "admin"`; on HTTP also a Host, origin and CSRF token of ours.',
    "MODEL_NOT_FOUND": "Leave the model's name empty, or send the name in the message.",
    "ADAPTER_NOT_FOUND": "Leave `adapter` empty: none are served yet.",
    "WORKER_NOT_FOUND": "Use a name that `warmkv status` shows.",
    "OVERLOADED": "Retry after `RetryInfo` says; add workers, or raise the limit in `metadata.limit`.",
    "DEADLINE_UNREACHABLE": "Retry after `RetryInfo` says, allow more time, or add workers.",
    "QUOTA_EXCEEDED": "Retry after `RetryInfo` says: the quota has refilled then; ask the operator for a higher one.",
    "POISON_REQUEST": "Do not retry; look for the request id in the logs of the workers in the metadata.",
    "NO_WORKER_AVAILABLE": "Retry after `RetryInfo` says; `warmkv status` tells what each worker is at.",
    "WORKER_LOST": "Send it again, unless `lost_workers` is set: then look into what the prompt does to workers first.",
    "DRAINING": "Send it to another router.",
    "DEADLINE_EXCEEDED": "Allow more time, or ask for less.",
    "NOT_SUPPORTED": "See the message: without Ray nothing can be scaled, and simulated workers keep no constraint.",
    "INTERNAL": "Report it with `metadata.request_id` and the log lines of that id.",
}


def metrics_table() -> str:
    """Every family that /metrics exports."""
    metrics = Metrics(router="", model="", version="")
    declared = {m._name: m._labelnames for m in vars(metrics).values() if isinstance(m, MetricWrapperBase)}
    declared["warmkv_build_info"] = ("router", "version")
    rows = [_metric_row(family, declared) for family in _families(metrics)]
    return _table(("Metric", "Type", "Unit", "Labels", "Meaning"), rows)


def labels_table() -> str:
    """Which values labels take, where they are a closed list."""
    families = _families(Metrics(router="", model="", version=""))
    states = [sample.labels["state"] for f in families if f.name == "warmkv_worker_state" for sample in f.samples]
    rows = [
        ("`fate`", _codes(FATES), "Where a prompt token's K/V lay; `computed`: a forward for this request made it."),
        ("`tier`", _codes(TierName), "Where a block lies."),
        ("`reason` of `warmkv_kv_misses_total`", _codes(MissReason), "Why a tier did not deliver a block."),
        ("`cause` of `warmkv_kv_removals_total`", _codes(RemovalCause), "Why a block left a tier."),
        ("`state`", _codes(states), "Of a worker, as this router sees it."),
        ("`policy`", _codes(POLICIES), "See [tuning](tuning.md)."),
    ]
    return _table(("Label", "Values", "Meaning"), rows)


def policies_table() -> str:
    """One section a policy, one row a weight."""
    return "\n\n".join(_policy_section(policy) for policy in POLICIES.values())


def settings_table() -> str:
    """Every setting with its default."""
    rows = [(f"`{row.key}`", f"`{row.value}`", row.help) for row in load_settings(environ={}).rows()]
    return _table(("Setting", "Default", "Meaning"), rows)


PROMISES = {
    "capacity": "Never holds more than its bytes",
    "ttl": "Drops a block when its lifetime ends",
    "named_eviction": "Evicts by a policy of ours",
    "lease": "Keeps a pinned block",
    "quota": "Keeps each tenant its share",
    "restart": "Outlives its worker",
    "injected_clock": "Goes by our clock",
}


def honours_table() -> str:
    """What each tier promises. Imports torch."""
    from kvstore.device import DeviceTier
    from kvstore.disk.tier import DiskTier
    from kvstore.host.tier import HostTier
    from kvstore.peer.peers import PeersTier
    from kvstore.redis.tier import RedisTier

    tiers = (DeviceTier, HostTier, DiskTier, RedisTier, PeersTier)
    rows = [
        (f"`{tier.name}`", *("yes" if getattr(tier.honours, field) else "no" for field in PROMISES)) for tier in tiers
    ]
    return _table(("Tier", *PROMISES.values()), rows)


def errors_table() -> str:
    """Every error that a router tells its callers."""
    rows = []
    for kind in _descendants(RouterError):
        code, when = kind.code, " ".join((kind.__doc__ or "").split())
        client = f"`{_BY_CODE.get(code, ServerError).__name__}`"
        rows.append((f"`{kind.reason}`", f"`{code.name}`", str(kind.http_status), client, when, _REMEDIES[kind.reason]))
    return _table(("Reason", "gRPC code", "HTTP", "Python client raises", "When", "What to do"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "metrics": metrics_table,
    "labels": labels_table,
    "policies": policies_table,
    "settings": settings_table,
    "honours": honours_table,
    "errors": errors_table,
}


def rewritten(page: str) -> str:
    """The page with every marked part made anew.

    Raises:
        KeyError: a mark names no table.
    """
    return _MARKED.sub(lambda mark: f"{mark[1]}{TABLES[mark[2]]()}\n{mark[3]}", page)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check all pages; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m deploy.reference", description="Write the generated tables.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when a page is stale")
    check, stale = parser.parse_args(arguments).check, []
    for path in sorted(DOCS.glob("*.md")):
        page = path.read_text(encoding="utf-8")
        fresh = rewritten(page)
        if fresh != page:
            stale.append(path.name)
            if not check:
                path.write_text(fresh, encoding="utf-8")
    if stale:
        sys.stdout.write(f"{'stale' if check else 'written'}: {', '.join(stale)}\n")
    return int(check and bool(stale))


def _families(metrics: Metrics) -> list[Metric]:
    """Of a router with one worker that reports one of everything, so that gauges have samples."""
    tier = worker_pb2.TierLoad(
        tier=common_pb2.TIER_DEVICE, misses={"absent": 1}, removals={"evicted": 1}, store_failures={"full": 1}
    )
    worker = WorkerGauges(
        "w0", "ready", 1, worker_pb2.Load(tiers=[tier]), admin_pb2.IndexTrust(), facts_of(worker_pb2.WorkerHello())
    )
    gauges = RouterGauges(
        in_flight=0, queued=0, queued_tokens=0, index_blocks=0, fleet_version=0, utilisation=0.0, workers=[worker]
    )
    metrics.export_gauges(lambda: gauges)
    return list(metrics.registry.collect())


def _metric_row(family: Metric, declared: dict[str, Sequence[str]]) -> tuple[str, ...]:
    labels = declared.get(family.name, tuple(family.samples[0].labels) if family.samples else ())
    unit = next((unit for unit in _UNITS if family.name.endswith(unit)), "")
    unit = unit or ("blocks" if family.documentation.startswith("Blocks") else "")
    name = f"{family.name}_total" if family.type == "counter" else family.name
    return f"`{name}`", family.type, unit, _codes(labels), family.documentation


def _policy_section(policy: Policy) -> str:
    title = f"### `{policy.name}`\n\n{policy.help}"
    if not policy.weights:
        return f"{title} It has no weights."
    limits = [
        (f"`{w.name}`", *(f"{n:.10g}" for n in (w.default, w.min, w.max)), w.unit, w.help) for w in policy.weights
    ]
    return f"{title}\n\n{_table(('Weight', 'Default', 'Min', 'Max', 'Unit', 'Meaning'), limits)}"


def _descendants(kind: type[RouterError]) -> Iterator[type[RouterError]]:
    for child in kind.__subclasses__():
        yield child
        yield from _descendants(child)


def _codes(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
