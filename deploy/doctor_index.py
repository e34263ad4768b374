"""The doctor asks the router of this machine whether it may rely on its index: who is suspect, and what probes found.

Covers: the findings. Does not cover: how a router finds out (`router.self_audit`). No router: nothing to say.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from deploy.finding import Finding
from deploy.settings import Settings
from warmkv.v1 import admin_pb2

_TIMEOUT_S = 3.0


def findings(settings: Settings) -> Iterator[Finding]:
    """What the router that the settings name believes of its workers, and whether that is so."""
    if settings.tls.cert is not None:
        yield Finding("ok", "index", "the router asks for TLS: `warmkv status --tls-ca FILE` shows what it relies on")
        return
    where = f"{settings.router.grpc_host}:{settings.router.grpc_port}"
    stats = _stats(where) if settings.router.grpc_port else None
    if stats is None:
        yield Finding("ok", "index", f"no router answers at {where}: nothing to compare with its workers")
        return
    if stats.catching_up:
        waiting = ", ".join(stats.catching_up)
        yield Finding("warn", "index", f"the router waits for what {waiting} hold", "wait; `warmkv status` tells")
    for worker in stats.workers:
        yield _finding(worker)


def _stats(where: str) -> admin_pb2.WatchStatsResponse | None:
    from warmkv.client import Client, WarmkvError

    try:
        with Client(where, api_key=os.environ.get("WARMKV_API_KEY"), timeout=_TIMEOUT_S) as client:
            return next(iter(client.watch_stats(period_ms=1000, timeout=_TIMEOUT_S)), None)
    except WarmkvError:  # a router that refuses us is another check's matter
        return None


def _finding(worker: admin_pb2.WorkerInfo) -> Finding:
    trust = worker.index
    if trust.suspect:
        remedy = "it heals by a new snapshot; where it stays so, look for `a stream had a gap` in the router's log"
        return Finding("warn", "index", f"{worker.name} is suspect: {trust.suspect}", remedy)
    if not trust.HasField("precision"):
        return Finding("ok", "index", f"{worker.name}: too few blocks were probed to judge it ({trust.probed})")
    kind = "by own decisions" if trust.approximate else "by events"
    recall = f", recall {trust.recall:.1%}" if trust.HasField("recall") else ""
    return Finding("ok", "index", f"{worker.name} {kind}: precision {trust.precision:.1%}{recall}")
