"""The tiers below a worker's pool, on a virtual clock: what lies there, and whether reading it beats computing it.

Covers: host, disk and the tier that all workers share; capacities, latency and bandwidth with queues, TTL, admission;
the plan of a load by the same rule as the store's (`kvstore.estimate.worth_loading`). Does not cover: the pool
(`segment_cache`), when loads start (`scheduling`). Writes take no time: they are behind, off every request's path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvstore.estimate import worth_loading
from kvstore.events import TierName
from replay.engine import CacheChange
from replay.segment_cache import SegmentCache
from replay.workload import Chain, Workload
from router.cost import PrefillFit, TierRead

ADMISSIONS = ("always", "second_hit", "on_eviction")


@dataclass(frozen=True, slots=True)
class TierProfile:
    """One tier. Below the host, `admission` is the store's rule of what is written there.

    Attributes:
        tokens: tokens whose blocks it holds: of one worker, or of all for the shared tier.
        latency_ms: of a read. token_ms: that a token adds to it; reads of one worker queue behind each other.
        total_token_ms: of the shared tier: that a token takes of what all workers share; zero: no such limit.
        admission: `always`: what was computed is written at once. `second_hit`: when it is used a second time.
            `on_eviction`: when host loses it.
    """

    tokens: int
    latency_ms: float
    token_ms: float
    total_token_ms: float = 0.0
    admission: str = "always"

    def __post_init__(self) -> None:
        """Raises ValueError for what makes no sense."""
        if self.admission not in ADMISSIONS:
            raise ValueError(f"unknown admission rule {self.admission!r}; choose one of {', '.join(ADMISSIONS)}")
        if min(self.tokens, self.latency_ms, self.token_ms, self.total_token_ms) < 0:
            raise ValueError(f"{self}: nothing here is negative; give zero or more")


@dataclass(frozen=True, slots=True)
class Tiers:
    """What lies below each worker's pool; None: without. `ttl_s`: of every block in every tier, from its last use.

    `peer`: the way between two workers, on which blocks come that one makes for another; its `tokens` say nothing.
    """

    host: TierProfile | None = None
    disk: TierProfile | None = None
    redis: TierProfile | None = None
    ttl_s: float | None = None
    peer: TierProfile | None = None

    def profiles(self) -> dict[TierName, TierProfile]:
        """Those that there are, fastest first."""
        named = ((TierName.HOST, self.host), (TierName.DISK, self.disk), (TierName.REDIS, self.redis))
        return {name: profile for name, profile in named if profile is not None}


class Read(NamedTuple):
    """A run of blocks that comes from a tier: from block `first` of the prompt to block `end`."""

    tier: TierName
    first: int
    end: int
    ms: float


class Line:
    """What transfers queue for."""

    def __init__(self) -> None:
        self._free_at = 0.0

    def wait_ms(self, now: float) -> float:
        """Until it is free."""
        return max(0.0, self._free_at - now) * 1e3

    def take(self, now: float, ms: float) -> float:
        """Transfer for so long; milliseconds from now to the end."""
        self._free_at = max(self._free_at, now) + ms / 1e3
        return (self._free_at - now) * 1e3


class SharedTier:
    """The tier that every worker reads and writes. `redis` of `Tiers`."""

    def __init__(self, profile: TierProfile, work: Workload, *, ttl_s: float | None) -> None:
        self.cache = SegmentCache(TierName.REDIS, profile.tokens // work.block_size, work.lengths, ttl_s=ttl_s)
        self.line = Line()


class WorkerTiers:
    """What one worker has below its pool."""

    def __init__(self, tiers: Tiers, work: Workload, shared: SharedTier | None) -> None:
        """`shared`: the one of all workers; None where `tiers` has none."""
        self._profiles, self._peer = tiers.profiles(), tiers.peer
        self._work = work
        self._shared = shared
        self._caches: dict[TierName, SegmentCache] = {}
        for name, profile in self._profiles.items():
            if name is TierName.REDIS and shared is not None:
                self._caches[name] = shared.cache
                continue
            self._caches[name] = SegmentCache(
                name,
                profile.tokens // work.block_size,
                work.lengths,
                ttl_s=tiers.ttl_s,
                evicting=self._evicted if name is TierName.HOST else None,
            )
        self._lines = {name: Line() for name in self._profiles}
        self._now = 0.0

    @property
    def reads(self) -> Mapping[TierName, TierRead]:
        """What a worker would measure of them."""
        size, peer = self._work.block_size, self._peer
        named = {**self._profiles, **({} if peer is None else {TierName.PEER: peer})}
        return {name: TierRead(p.latency_ms, p.token_ms * size) for name, p in named.items()}

    def near(self, chain: Chain, first: int) -> int:
        """The end of the run of blocks from `first` on that host holds."""
        host = self._caches.get(TierName.HOST)
        return first if host is None else host.run(chain, first)

    def plan(self, chain: Chain, first: int, most: int, fit: PrefillFit, now: float) -> list[Read]:
        """How blocks `first` to `most` at most of a prompt come sooner than by computing them; ends at the first that
        do not. Changes nothing."""
        reads: list[Read] = []
        while first < most and (read := self._best(chain, first, most, fit, now)) is not None:
            reads.append(read)
            first = read.end
        return reads

    def start(self, reads: Sequence[Read], now: float) -> float:
        """Read them one after the other; milliseconds until the last one is there."""
        done = 0.0
        for read in reads:
            profile, tokens = self._profiles[read.tier], (read.end - read.first) * self._work.block_size
            at = now + done / 1e3
            took = self._lines[read.tier].take(at, profile.latency_ms + tokens * profile.token_ms)
            if read.tier is TierName.REDIS and self._shared is not None:
                took = max(took, self._shared.line.take(at, tokens * profile.total_token_ms))
            done += took
        return done

    def computed(self, segments: Sequence[int], lengths: Sequence[int], fresh: int, now: float) -> None:
        """The pool has these leading blocks of a prompt's segments now, those from segment `fresh` on newly so."""
        self._now = now
        for name, cache in self._caches.items():
            admission = "always" if name is TierName.HOST else self._profiles[name].admission
            if admission != "always":
                cache.touch(segments, now)
                continue
            for at in range(len(segments) - 1, fresh - 1, -1):
                cache.put(segments[at], lengths[at], now)
            cache.touch(segments[:fresh], now)

    def used(self, segments: Sequence[int], lengths: Sequence[int], now: float) -> None:
        """A request found these in the pool: lower tiers keep them, and those that ask for a second use get them."""
        self._now = now
        for name, cache in self._caches.items():
            if name is not TierName.HOST and self._profiles[name].admission == "second_hit":
                for segment, length in zip(segments, lengths, strict=True):
                    cache.put(segment, length, now)
            cache.touch(segments, now)

    def touch(self, segments: Sequence[int], now: float) -> None:
        """The end of a request is a use, too."""
        for cache in self._caches.values():
            cache.touch(segments, now)

    def expire(self, now: float) -> None:
        """Drop what is over its TTL."""
        for cache in self._caches.values():
            cache.expire(now)

    def changes(self) -> list[CacheChange]:
        """What changed since the last call."""
        found = (cache.changes() for cache in self._caches.values())
        return [change for change in found if change is not None]

    def all(self) -> list[CacheChange]:
        """All that it holds, the shared tier's included."""
        return [cache.all() for cache in self._caches.values()]

    def lose(self) -> None:
        """The worker's process died: host is empty. Disk and the shared tier outlive it."""
        if TierName.HOST in self._caches:
            self._caches[TierName.HOST].clear()

    def check(self) -> None:
        """Raises InvariantError when the books are wrong."""
        for cache in self._caches.values():
            cache.check()

    def _best(self, chain: Chain, first: int, most: int, fit: PrefillFit, now: float) -> Read | None:
        """Host is asked first; of the slow ones the one that takes least a block."""
        found: list[Read] = []
        for name, cache in self._caches.items():
            end = min(most, cache.run(chain, first))
            if end > first and (read := self._priced(name, first, end, fit, now)) is not None:
                if name is TierName.HOST:
                    return read
                found.append(read)
        return min(found, key=lambda read: read.ms / (read.end - read.first), default=None)

    def _priced(self, name: TierName, first: int, end: int, fit: PrefillFit, now: float) -> Read | None:
        profile, size = self._profiles[name], self._work.block_size
        tokens = (end - first) * size
        ms = self._lines[name].wait_ms(now) + profile.latency_ms + tokens * profile.token_ms
        if name is TierName.REDIS and self._shared is not None and profile.total_token_ms:
            ms = max(ms, self._shared.line.wait_ms(now) + tokens * profile.total_token_ms)
        compute_ms = fit.ms(tokens, first * size) - fit.fixed_ms
        return Read(name, first, end, ms) if worth_loading(ms, compute_ms) else None

    def _evicted(self, segment: int, blocks: int) -> None:
        for name, cache in self._caches.items():
            if name is not TierName.HOST and self._profiles[name].admission == "on_eviction":
                cache.put(segment, blocks, self._now)


NO_TIERS = Tiers()
