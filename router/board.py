"""The numbers behind the dashboard: the last decisions, recent times to the first token, who holds which prefix.

Covers: bounded memories, and the statistics message built from them. Does not cover: totals (`ledger`) or export
(`metrics`). Nothing here is on a request's path but appending to rings.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType

from router.decide import Choice
from router.fleet import Fleet
from router.index import PrefixIndex
from router.ledger import FATES, Totals
from router.link import WorkerLink
from router.policy import POLICIES, Policy, checked_weights, find_policy
from router.prefix_map import PrefixMap, UsedPrefix
from router.worker_facts import facts_of
from warmkv.v1 import admin_pb2, common_pb2

WINDOW_S = 60.0
_MAX_TIMES = 8192
_MAX_PAUSES = 1000
_RECENT = 50
_PREFIXES = 12
_LABEL_HEX = 12


class Recent:
    """The last decisions, one record a request; the times to first token of a window; what workers did for one another.

    Bounded rings, and totals since start.

    Attributes:
        reasons: decisions, by reason; a request that is sent again counts again. handovers: answers under way that a
        worker left, by why. prefill_jobs: prompts that a worker prefilled for another one, by outcome.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._times: deque[tuple[float, float]] = deque(maxlen=_MAX_TIMES)
        self._pauses: deque[float] = deque(maxlen=_MAX_PAUSES)
        self.decisions: deque[admin_pb2.DecisionRecord] = deque(maxlen=_RECENT)
        self.reasons: Counter[str] = Counter()
        self.handovers: Counter[str] = Counter()
        self.prefill_jobs: Counter[str] = Counter()

    def decided(self, choice: Choice, *, request_id: str, tenant: str, prompt_tokens: int) -> admin_pb2.DecisionRecord:
        """Note a request's first decision; the record, for its outcome to be filled in."""
        record = admin_pb2.DecisionRecord(
            time_ms=time.time_ns() // 1_000_000, request_id=request_id, tenant=tenant, prompt_tokens=prompt_tokens
        )
        self._write(record, choice)
        self.decisions.appendleft(record)
        return record

    def tried_again(self, record: admin_pb2.DecisionRecord, left: str, choice: Choice) -> None:
        """Before a token came its worker `left` was lost, and this was decided.

        Of several answers beside one another, that have one record, the first to be sent again says where to.
        """
        if left not in record.tried:
            record.tried.append(left)
        if record.worker == left:
            self._write(record, choice)
        else:
            self.reasons[choice.decision.reason] += 1

    def went_on(self, record: admin_pb2.DecisionRecord, choice: Choice) -> None:
        """Tokens had come, and the answer was sent on to this worker."""
        record.went_on_at.append(choice.worker)
        self.reasons[choice.decision.reason] += 1

    def first_token(self, ms: float) -> None:
        """Note a time to first token."""
        self._times.append((self._clock(), ms))

    def paused(self, ms: float) -> None:
        """A handover was over after so long."""
        self._pauses.append(ms)

    def latency(self) -> admin_pb2.Latency:
        """Percentiles of the window."""
        since = self._clock() - WINDOW_S
        return _percentiles([ms for at, ms in self._times if at >= since])

    def handover_pause(self) -> admin_pb2.Latency:
        """Percentiles of the last handovers."""
        return _percentiles(self._pauses)

    def _write(self, record: admin_pb2.DecisionRecord, choice: Choice) -> None:
        record.worker, record.policy, record.reason = choice.worker, choice.policy.name, choice.decision.reason
        record.predicted_cached_tokens = choice.price.cached_tokens
        record.predicted_ttft_ms = choice.predicted_ttft_ms
        record.runner_up, record.runner_up_extra_ms = choice.runner_up, choice.runner_up_extra_ms
        record.prefill_worker = choice.pair.worker if choice.pair else ""
        self.reasons[choice.decision.reason] += 1


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
            handovers=dict(self._recent.handovers),
            handover_pause=self._recent.handover_pause(),
            prefill_jobs=dict(self._recent.prefill_jobs),
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
        )
        if link.hello is not None:
            facts = facts_of(link.hello)
            info.role, info.ranks, info.kv_dtype = facts.role, facts.ranks, facts.kv_dtype
            info.deterministic = facts.deterministic
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


def _percentiles(samples: Collection[float]) -> admin_pb2.Latency:
    if not samples:
        return admin_pb2.Latency()
    p50, p95, p99 = (percentile(samples, quantile) for quantile in (0.50, 0.95, 0.99))
    return admin_pb2.Latency(count=len(samples), p50_ms=p50, p95_ms=p95, p99_ms=p99)


def percentile(samples: Iterable[float], quantile: float) -> float:
    """Nearest rank: the smallest sample that at least that share does not exceed; 0 for no samples."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(quantile * len(ordered)) - 1)] if ordered else 0.0
