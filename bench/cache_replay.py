"""Replays of a trace against one cache: the share of prompt tokens that it would have had.

Covers: the store's own policies (`Cache`) and the clairvoyant one (`Belady`). Does not cover: time that requests take,
several tiers or workers.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.eviction.policies import Eviction, Hint, make_eviction
from kvstore.eviction.tail import spare_blocks
from replay.traces import Request, Trace, segments

THRESHOLD_S = 1.0  # of `tail_optimized`
PREFILL_TOKENS_PER_S = 8000.0


@dataclass(slots=True)
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


class Replay:
    """A trace ready to be replayed against caches of several sizes.

    Attributes:
        counted: number of the first request that counts.
    """

    def __init__(self, trace: Trace, *, longest: int | None = None) -> None:
        if trace.block_size is None:
            raise ValueError(f"{trace.name} knows no prefixes; choose another trace")
        self.trace = trace
        self.block_size = trace.block_size
        self.segments = segments(trace.requests, longest=longest)
        self.counted = len(trace.requests) // 10
        self.tokens = sum(request.input_length for request in trace.requests[self.counted :])

    def hit(self, policy: str, capacity_tokens: int) -> float:
        """Share of the prompt tokens that one cache of that size would have had."""
        capacity = capacity_tokens // self.block_size
        cache: Belady | Cache = Belady(self, capacity) if policy == "belady" else Cache(self, policy, capacity)
        hits = 0
        for number, request in enumerate(self.trace.requests):
            blocks = self._leading(self.segments.chains[number], cache.held)
            if number >= self.counted:
                hits += min(blocks * self.block_size, request.input_length)
            cache.take(number, request)
        return hits / self.tokens

    def _leading(self, chain: Sequence[int], held: dict[int, int]) -> int:
        blocks = 0
        for segment in chain:
            there = held.get(segment, 0)
            blocks += there
            if there < self.segments.lengths[segment]:
                break
        return blocks


class Cache:
    """One cache under a policy of the store. Segments are evicted from their end, block by block.

    Attributes:
        held: blocks of each segment that is not gone.
    """

    def __init__(self, replay: Replay, policy: str, capacity: int) -> None:
        self._segments = replay.segments
        self._capacity = capacity
        self._clock = Clock()
        self._used = 0
        self.held: dict[int, int] = {}
        entries = max(1, capacity * len(self._segments.lengths) // max(1, sum(self._segments.lengths)))
        spare = spare_blocks(THRESHOLD_S, lambda tokens: tokens / PREFILL_TOKENS_PER_S * 1e3, replay.block_size)
        self._eviction: Eviction[int] = make_eviction(policy, self._clock, entries, spare_blocks=spare)

    def take(self, number: int, request: Request) -> None:
        """Serve the request: use its blocks, last ones first, and evict what does not fit."""
        self._clock.now = request.time_s
        for segment in reversed(self._segments.chains[number]):
            length = self._segments.lengths[segment]
            if segment in self.held:
                self._eviction.use(segment)
            else:
                self._eviction.add(segment, None, hint=self._hint(segment, request))
            self._used += length - self.held.get(segment, 0)
            self.held[segment] = length
        while self._used > self._capacity:
            self._evict()

    def _evict(self) -> None:
        victim = self._eviction.victim()
        if victim is None:
            raise RuntimeError("nothing can be evicted from a cache in which nothing is in use")
        gone = min(self.held[victim], self._used - self._capacity)
        self._used -= gone
        self.held[victim] -= gone
        if self.held[victim] == 0:
            del self.held[victim]
            self._eviction.remove(victim)

    def _hint(self, segment: int, request: Request) -> Hint:
        return Hint(
            name=segment,
            parent=self._segments.parents[segment],
            position=self._segments.ends[segment] - 1,
            turn=request.turn,
            awaits_tool=None if request.stop is None else request.stop == "tool_use",
        )


class Belady:
    """The clairvoyant cache: furthest next use first, suffixes first; what is not used again goes at once.

    Attributes:
        held: blocks of each segment that is not gone.
    """

    def __init__(self, replay: Replay, capacity: int) -> None:
        self._segments = replay.segments
        self._capacity = capacity
        self._used = 0
        self.held: dict[int, int] = {}
        self._next: dict[int, float] = {}  # number of the request that uses it next
        self._latest: list[tuple[float, int, int]] = []
        self._future = self._next_uses()

    def take(self, number: int, request: Request) -> None:
        """As `Cache.take`."""
        for depth, segment in enumerate(self._segments.chains[number]):
            self._used += self._segments.lengths[segment] - self.held.get(segment, 0)
            self.held[segment] = self._segments.lengths[segment]
            self._next[segment] = self._future[number][depth]
            heapq.heappush(self._latest, (-self._next[segment], -depth, segment))
        while self._latest and (self._used > self._capacity or self._latest[0][0] == float("-inf")):
            self._evict()

    def _evict(self) -> None:
        latest, _, segment = self._latest[0]
        if segment not in self.held or self._next[segment] != -latest:
            heapq.heappop(self._latest)
            return
        never = latest == float("-inf")
        gone = self.held[segment] if never else min(self.held[segment], self._used - self._capacity)
        self._used -= gone
        self.held[segment] -= gone
        if self.held[segment] == 0:
            del self.held[segment]
            heapq.heappop(self._latest)

    def _next_uses(self) -> list[list[float]]:
        seen: dict[int, float] = {}
        uses: list[list[float]] = []
        for number, chain in reversed(list(enumerate(self._segments.chains))):
            uses.append([seen.get(segment, float("inf")) for segment in chain])
            seen.update(dict.fromkeys(chain, float(number)))
        return uses[::-1]
