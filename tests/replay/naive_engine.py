"""The oracle of the batched engine: one worker, one step at a time, one entry a block. Slow and plain on purpose."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from replay.batched_profile import BatchedProfile
from replay.tiers import TierProfile, Tiers
from replay.workload import Workload

Name = Hashable


class NaiveCache:
    """Blocks by name, the least recently used first; those with users stay."""

    def __init__(self, capacity: int, ttl_s: float | None) -> None:
        self.capacity, self.ttl_s = capacity, ttl_s
        self.idle: OrderedDict[Name, float] = OrderedDict()
        self.users: dict[Name, int] = {}
        self.nameless = 0

    def __contains__(self, name: Name) -> bool:
        return name in self.idle or name in self.users

    @property
    def available(self) -> int:
        return self.capacity - self.nameless - len(self.users)

    def run(self, names: Sequence[Name], first: int = 0) -> int:
        while first < len(names) and names[first] in self:
            first += 1
        return first

    def pin(self, name: Name) -> None:
        self.users[name] = self.users.get(name, 0) + 1
        self.idle.pop(name, None)

    def unpin(self, names: Sequence[Name], now: float) -> None:
        for name in reversed(names):
            self.users[name] -= 1
            if not self.users[name]:
                del self.users[name]
                self.idle[name] = now

    def touch(self, names: Sequence[Name], now: float) -> None:
        for name in reversed(names):
            if name in self.idle:
                self.idle[name] = now
                self.idle.move_to_end(name)

    def put(self, name: Name, now: float) -> None:
        self.idle[name] = now
        self.idle.move_to_end(name)
        self.shrink(0)

    def reserve(self, count: int) -> bool:
        if count > self.available:
            return False
        self.nameless += count
        self.shrink(0)
        return True

    def shrink(self, extra: int) -> None:
        while len(self.idle) + len(self.users) + self.nameless + extra > self.capacity:
            self.idle.popitem(last=False)

    def expire(self, now: float) -> None:
        if self.ttl_s is not None:
            for name in [name for name, used in self.idle.items() if used <= now - self.ttl_s]:
                del self.idle[name]


@dataclass(eq=False)
class Job:
    number: int
    rank: tuple[int, int]
    names: list[Name]  # of the prompt's blocks, and of the answer's
    prompt: int
    output: int
    tokens: int
    base: int = 0
    computed: int = 0
    table: int = 0
    mine: int = 0  # blocks without a name
    pinned: list[Name] = field(default_factory=list)
    committed: int = 0
    ready_at: float = 0.0
    reach: int = 0
    cached: dict[str, int] | None = None
    first_token_s: float | None = None
    end_s: float | None = None

    @property
    def remaining(self) -> int:
        return self.tokens - self.computed


class NaiveEngine:
    def __init__(self, work: Workload, profile: BatchedProfile, tiers: Tiers) -> None:
        self.work, self.profile, self.size = work, profile, work.block_size
        self.capacity = profile.pool_tokens // self.size
        self.pool = NaiveCache(self.capacity, tiers.ttl_s)
        self.tiers: dict[str, tuple[TierProfile, NaiveCache]] = {
            name.value: (tier, NaiveCache(tier.tokens // self.size, tiers.ttl_s))
            for name, tier in tiers.profiles().items()
        }
        self.lines = dict.fromkeys(self.tiers, 0.0)
        self.jobs: list[Job] = []
        self.waiting: list[Job] = []
        self.loading: list[Job] = []
        self.running: list[Job] = []
        self.short = False
        self.preemptions = 0

    def run(self) -> list[Job]:
        now, order = 0.0, 0
        coming = sorted(range(len(self.work.requests)), key=lambda n: self.work.arrivals_s[n])
        while True:
            while coming and self.work.arrivals_s[coming[0]] <= now:
                order += 1
                self.waiting.append(self.job(coming.pop(0), order))
            self.expire(now)
            self.admit(now)
            chunks = self.schedule(now)
            if not chunks:
                nexts = [self.work.arrivals_s[n] for n in coming[:1]] + [job.ready_at for job in self.loading]
                if not nexts:
                    return self.jobs
                now = max(now, min(nexts))
                continue
            now += self.duration(chunks)
            self.expire(now)
            for job, length in chunks:
                self.advance(job, length, now)
            for job in [job for job, _ in chunks if job.tokens - job.prompt >= job.output]:
                job.end_s = now
                self.running.remove(job)
                self.give_back(job, now)
                self.short = False

    def job(self, number: int, order: int) -> Job:
        request, chain = self.work.requests[number], self.work.chains[number]
        length, size = request.input_length, self.size
        output = max(1, min(request.output_length, self.capacity * size - length))
        answer = [("answer", number, n) for n in range((length + output) // size + 1)]
        job = Job(number, (-request.priority, order), [*chain, *answer], length, output, length, base=len(chain))
        self.jobs.append(job)
        return job

    def holders(self) -> list[Job]:
        return [*self.loading, *self.running]

    def expire(self, now: float) -> None:
        for cache in (self.pool, *(cache for _, cache in self.tiers.values())):
            cache.expire(now)

    def admit(self, now: float) -> None:
        if not self.holders():
            self.short = False
        for job in sorted(self.waiting, key=lambda each: each.rank):
            if len(self.holders()) >= self.profile.max_running:
                break
            if self.short and not any(job.rank < other.rank for other in self.holders()):
                break
            if not self.awaits(job):
                self.take(job, now)
                self.waiting.remove(job)
                self.loading.append(job)
        for job in [job for job in self.loading if job.ready_at <= now]:
            self.loading.remove(job)
            self.commit(job, job.reach, now)
            job.computed = job.reach * self.size
            self.running.append(job)

    def readable(self, job: Job) -> list[Name]:
        return job.names[: (job.tokens - 1) // self.size]

    def awaits(self, job: Job) -> bool:
        names = self.readable(job)
        near = [self.pool, *(cache for name, (_, cache) in self.tiers.items() if name == "host")]
        for name in names:
            # Only prompts' blocks have a maker that others may wait for.
            makers = [m for m in self.holders() if name in self.readable(m)[m.committed :] and m.computed < m.prompt]
            if makers:
                return min(makers, key=lambda maker: maker.rank).rank < job.rank
            if not any(name in cache for cache in near):
                return False
        return False

    def take(self, job: Job, now: float) -> None:
        names = self.readable(job)
        found = self.pool.run(names)
        for name in names[:found]:
            self.pool.pin(name)
        job.pinned = list(names[:found])
        most = min(len(names), found + max(0, self.pool.available - self.capacity // 64))
        spans, at, took = [("device", found)], found, 0.0
        while at < most:
            best: tuple[float, str, int, float] | None = None
            for tier, (priced, cache) in self.tiers.items():
                end = min(most, cache.run(names, at))
                tokens = (end - at) * self.size
                wait = max(0.0, self.lines[tier] - now) * 1e3
                ms = wait + priced.latency_ms + tokens * priced.token_ms
                fit = self.profile.prefill
                compute_ms = fit.token_ms * tokens + fit.pair_ms * tokens * (at * self.size + tokens / 2)
                if end > at and ms < compute_ms:
                    pace = -1.0 if tier == "host" else ms / (end - at)
                    if best is None or pace < best[0]:
                        best = (pace, tier, end, priced.latency_ms + tokens * priced.token_ms)
            if best is None:
                break
            spans.append((best[1], best[2]))
            at = best[2]
        for (tier, end), (_, before) in zip(spans[1:], spans, strict=False):
            priced = self.tiers[tier][0]
            start = max(self.lines[tier], now + took / 1e3)
            self.lines[tier] = start + (priced.latency_ms + (end - before) * self.size * priced.token_ms) / 1e3
            took = (self.lines[tier] - now) * 1e3
        assert self.pool.reserve(at - found)
        job.mine, job.table, job.committed, job.reach = at - found, at, found, at
        job.ready_at = now + took / 1e3
        for tier, (priced, cache) in self.tiers.items():
            if tier != "host" and priced.admission == "second_hit":
                for name in names[:found]:
                    cache.put(name, now)
            cache.touch(names[:found], now)
        if job.cached is None:
            job.cached, before = {}, 0
            for tier, end in spans:
                job.cached[tier] = job.cached.get(tier, 0) + (end - before) * self.size
                before = end

    def schedule(self, now: float) -> list[tuple[Job, int]]:
        while True:
            decoding = [job for job in self.running if job.remaining == 1]
            need = sum(self.lacks(job, 1) for job in decoding)
            if need <= self.pool.available:
                break
            self.preempt(max(self.holders(), key=lambda each: each.rank), now)
        chunks = [(job, 1) for job in decoding]
        for job in decoding:
            self.grow(job, self.lacks(job, 1))
        budget = self.profile.max_batch_tokens - len(decoding)
        for job in sorted((j for j in self.running if j.remaining > 1), key=lambda each: each.rank):
            length = min(job.remaining, budget)
            if length < 1:
                break
            if job not in self.running:
                continue
            while not self.grow(job, self.lacks(job, length)):
                victim = max(self.holders(), key=lambda each: each.rank)
                if victim.rank <= job.rank:
                    break
                chunks = [chunk for chunk in chunks if chunk[0] is not victim]
                self.preempt(victim, now)
            else:
                chunks.append((job, length))
                budget -= length
        return chunks

    def lacks(self, job: Job, length: int) -> int:
        return max(0, math.ceil((job.computed + length) / self.size) - job.table)

    def grow(self, job: Job, count: int) -> bool:
        if not self.pool.reserve(count):
            return False
        job.table += count
        job.mine += count
        return True

    def preempt(self, job: Job, now: float) -> None:
        (self.running if job in self.running else self.loading).remove(job)
        self.give_back(job, now)
        self.waiting.append(job)
        self.short = True
        self.preemptions += 1

    def duration(self, chunks: list[tuple[Job, int]]) -> float:
        profile = self.profile
        decoding = [job for job, _ in chunks if job.remaining == 1]
        context = sum(job.tokens for job in decoding)
        ms = 0.0
        if len(decoding) == len(chunks):
            return profile.decode_step_ms(len(decoding), context) / 1e3
        for job, length in chunks:
            if job.remaining > 1:
                pairs = length * (job.computed + length / 2)
                ms += profile.chunk_ms + profile.prefill.token_ms * length + profile.prefill.pair_ms * pairs
        return (ms + profile.prefill.fixed_ms + profile.mixed_part_ms(len(decoding), context)) / 1e3

    def advance(self, job: Job, length: int, now: float) -> None:
        last = length == job.remaining
        job.computed += length
        # Names of an answer's blocks are told at the end: nobody looks for them before.
        self.commit(job, min(job.base, job.computed // self.size), now)
        if last:
            job.tokens += 1
            if job.first_token_s is None:
                job.first_token_s = now

    def commit(self, job: Job, blocks: int, now: float) -> None:
        fresh = job.names[job.committed : blocks]
        for name in fresh:
            if name not in self.pool:
                job.mine -= 1
                self.pool.nameless -= 1
            self.pool.pin(name)
            job.pinned.append(name)
        if fresh:
            for tier, (priced, cache) in self.tiers.items():
                for name in reversed(fresh):
                    if tier == "host" or priced.admission == "always":
                        cache.put(name, now)
                    else:
                        cache.touch([name], now)
                cache.touch(job.names[: job.committed], now)
            job.committed = blocks

    def give_back(self, job: Job, now: float) -> None:
        if job.computed >= job.prompt:
            self.commit(job, job.computed // self.size, now)
        self.pool.unpin(job.pinned, now)
        self.pool.nameless -= job.mine
        for _, cache in self.tiers.values():
            cache.touch(job.pinned, now)
        job.pinned, job.mine, job.table, job.computed, job.committed = [], 0, 0, 0, 0


def naive(work: Workload, profile: BatchedProfile, tiers: Tiers) -> tuple[list[Job], Any]:
    engine = NaiveEngine(work, profile, tiers)
    return engine.run(), engine
