"""The numbers behind the dashboard: the last decisions, recent times to the first token, who holds which prefix.

Covers: bounded memories, and the statistics message built from them. Does not cover: totals (`ledger`) or export
(`metrics`). Nothing here is on a request's path but appending to rings.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from router.decide import Choice
from router.fleet import Fleet
from router.index import PrefixIndex
from router.ledger import FATES, Totals
from router.link import WorkerLink
from router.pairing import ROLE_NAMES
from router.policy import POLICIES, Policy, checked_weights, find_policy
from router.prefix_map import PrefixMap, UsedPrefix
from warmkv.v1 import admin_pb2, common_pb2

WINDOW_S = 60.0
_MAX_TIMES = 8192
_RECENT = 50
_PREFIXES = 12
_LABEL_HEX = 12


class Recent:
    """The last decisions and the times to first token of a window. Bounded rings."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._times: deque[tuple[float, float]] = deque(maxlen=_MAX_TIMES)
        self.decisions: deque[admin_pb2.DecisionRecord] = deque(maxlen=_RECENT)
        self.reasons: Counter[str] = Counter()

    def decided(self, choice: Choice, *, request_id: str, tenant: str, prompt_tokens: int) -> admin_pb2.DecisionRecord:
        """Note a decision; the record, for its outcome to be filled in."""
        record = admin_pb2.DecisionRecord(
            time_ms=time.time_ns() // 1_000_000,
            request_id=request_id,
            tenant=tenant,
            worker=choice.worker,
            policy=choice.policy.name,
            reason=choice.decision.reason,
            prompt_tokens=prompt_tokens,
            predicted_cached_tokens=choice.price.cached_tokens,
            predicted_ttft_ms=choice.predicted_ttft_ms,
            runner_up=choice.runner_up,
            runner_up_extra_ms=choice.runner_up_extra_ms,
        )
        self.decisions.appendleft(record)
        self.reasons[choice.decision.reason] += 1
        return record

    def first_token(self, ms: float) -> None:
        """Note a time to first token."""
        self._times.append((self._clock(), ms))

    def latency(self) -> admin_pb2.Latency:
        """Percentiles of the window."""
        since = self._clock() - WINDOW_S
        times = [ms for at, ms in self._times if at >= since]
        if not times:
            return admin_pb2.Latency()
        return admin_pb2.Latency(
            count=len(times),
            p50_ms=percentile(times, 0.50),
            p95_ms=percentile(times, 0.95),
            p99_ms=percentile(times, 0.99),
        )


class Board:
    """Builds messages for operators."""

    def __init__(
        self,
        fleet: Fleet,
        index: PrefixIndex,
        prefixes: PrefixMap,
        recent: Recent,
        trust: Callable[[WorkerLink], admin_pb2.IndexTrust],
    ) -> None:
        self._trust = trust
        self._fleet = fleet
        self._index = index
        self._prefixes = prefixes
        self._recent = recent

    def stats(
        self,
        totals: Totals,
        *,
        in_flight: int,
        show_prompts: bool,
        queued: tuple[int, int] = (0, 0),
        refused: Mapping[str, int] = MappingProxyType({}),
    ) -> admin_pb2.WatchStatsResponse:
        """Everything at this moment. `queued`: requests that wait in this router, tokens of their prompts."""
        return admin_pb2.WatchStatsResponse(
            time_ms=time.time_ns() // 1_000_000,
            prompt_tokens=admin_pb2.TokensByFate64(**{fate: totals.fates[fate] for fate in FATES}),
            generated_tokens=totals.generated_tokens,
            requests=dict(totals.requests),
            in_flight=in_flight,
            queued=queued[0],
            queued_tokens=queued[1],
            refused=refused,
            ttft=self._recent.latency(),
            decisions=dict(self._recent.reasons),
            workers=self.workers(),
            policy=self.policy(),
            prefixes=self._held_prefixes(show_prompts=show_prompts),
            recent=list(self._recent.decisions),
            window_seconds=WINDOW_S,
            predicted_cached_tokens=totals.predicted_cached,
            reused_tokens=totals.reused,
            shared_tier=self._shared_tier(),
            shared_tier_reads=self._fleet.record.shared_tier_reads,
            catching_up=self._fleet.catching_up,
        )

    def workers(self) -> list[admin_pb2.WorkerInfo]:
        """Every worker known, sorted by name."""
        return [self._worker(link) for link in self._fleet.links()]

    def policy(self) -> admin_pb2.Policy:
        """In force, with all weights."""
        record = self._fleet.record
        return admin_pb2.Policy(name=record.policy, weights=checked_weights(find_policy(record.policy), record.weights))

    def policies(self) -> list[admin_pb2.PolicyInfo]:
        """Those that can be set."""
        return [_policy_info(policy) for policy in POLICIES.values()]

    def _worker(self, link: WorkerLink) -> admin_pb2.WorkerInfo:
        info = admin_pb2.WorkerInfo(
            name=link.name,
            address=link.address,
            state=self._fleet.state(link),
            incarnation=link.incarnation,
            problem=link.problem,
            model=link.hello.model if link.hello else "",
            device=link.hello.device if link.hello else "",
            package_version=link.hello.package_version if link.hello else "",
            protocol_version=link.hello.protocol_version if link.hello else 0,
            layout=link.hello.scheme.layout if link.hello else "",
            index=self._trust(link) if link.synced else None,
            role=ROLE_NAMES.get(link.role, "unknown") if link.hello else "",
        )
        if link.report is not None and link.connected:
            load, fit = link.report.message, link.report.load.fit
            info.running, info.waiting = load.running, load.waiting
            info.prefill_ms_per_1k = fit.ms(1000) if fit else 0.0
            info.tiers.extend(
                admin_pb2.TierUsage(
                    tier=t.tier,
                    used_bytes=t.used_bytes,
                    capacity_bytes=t.capacity_bytes,
                    blocks=t.blocks,
                    healthy=t.healthy,
                )
                for t in load.tiers
                if t.tier != common_pb2.TIER_PEER  # other workers' blocks fill nothing here
            )
            problems = [t.problem for t in load.tiers if t.problem]
            info.problem = "; ".join(filter(None, [info.problem, *problems]))
        return info

    def _held_prefixes(self, *, show_prompts: bool) -> list[admin_pb2.PrefixHolding]:
        size = self._fleet.identity.scheme.block_size if self._fleet.identity else 0
        return [self._holding(p, size, show_prompts=show_prompts) for p in self._prefixes.most_used(_PREFIXES)]

    def _holding(self, prefix: UsedPrefix, size: int, *, show_prompts: bool) -> admin_pb2.PrefixHolding:
        overlaps = self._index.match(prefix.hashes)
        held = [
            admin_pb2.PrefixHolding.Held(worker=name, device_tokens=o.device * size, host_tokens=o.host * size)
            for name, o in sorted(overlaps.items())
            if o.host
        ]
        label = prefix.words if show_prompts and prefix.words else prefix.hashes[-1].hex()[:_LABEL_HEX]
        return admin_pb2.PrefixHolding(
            label=label,
            tenant=prefix.tenant,
            tokens=len(prefix.hashes) * size,
            requests=prefix.requests,
            held=held,
            redis_tokens=self._index.shared_run(prefix.hashes) * size,
        )

    def _shared_tier(self) -> admin_pb2.TierUsage | None:
        """Of the workers' views of the one server the fullest; blocks as the index knows them."""
        reports = [link.report.message for link in self._fleet.links() if link.report is not None and link.connected]
        views = [tier for load in reports for tier in load.tiers if tier.tier == common_pb2.TIER_REDIS]
        if not views:
            return None
        return admin_pb2.TierUsage(
            tier=common_pb2.TIER_REDIS,
            used_bytes=max(t.used_bytes for t in views),
            capacity_bytes=max(t.capacity_bytes for t in views),
            blocks=self._index.shared_blocks(),
            healthy=all(t.healthy for t in views),
        )


def _policy_info(policy: Policy) -> admin_pb2.PolicyInfo:
    weights = [
        admin_pb2.WeightInfo(name=w.name, default_value=w.default, min=w.min, max=w.max, unit=w.unit, help=w.help)
        for w in policy.weights
    ]
    return admin_pb2.PolicyInfo(name=policy.name, help=policy.help, weights=weights)


def percentile(samples: Sequence[float], quantile: float) -> float:
    """Nearest rank: the smallest sample that at least that share does not exceed; 0 for no samples."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(quantile * len(ordered)) - 1)] if ordered else 0.0
