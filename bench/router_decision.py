"""What the router does of its own for a request: names of blocks, the decision, the memory of what is in flight.

Every decision is asked with names that were just made (fresh objects have no remembered hash and share no identity with
the index's keys), of prompts whose beginnings lie on several workers and tiers, while 64 requests are in flight that
share parts of them, and after a new report of one worker.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, cast

from bench.report import Report, ratios
from kvstore.blocks import BlockHash, block_hashes, short
from kvstore.events import BlockStored, TierName
from router.decide import Decider, Question
from router.discovery import StaticDiscovery
from router.fleet import Fleet, _Member
from router.fleet_record import FleetRecord
from router.handshake import Expected
from router.hash_memo import HashMemo
from router.index import PrefixIndex
from router.link import Report as LinkReport
from router.link import WorkerLink
from router.metrics import Metrics
from router.protocol import WorkerAddress
from router.traffic import Traffic
from router.worker_stream import LinkSettings
from warmkv.v1 import common_pb2, worker_pb2

BLOCK = 16
ROOT = BlockHash(b"r" * 32)
LONG, SHORT = 32_768, 2_048  # tokens
TURN = 256  # tokens by which a session grows
SESSIONS = 16
IN_FLIGHT = 64
SYSTEM = 512  # tokens that all prompts begin with
BACKGROUND_BLOCKS = 8_192  # of each worker, besides the sessions
TIERS = (TierName.DEVICE, TierName.HOST, TierName.DISK)


class World:
    """A fleet that is up, without sockets: what a decider reads of it is real."""

    def __init__(self, workers: int, tokens: int, *, sessions: int = SESSIONS) -> None:
        self._rng = random.Random(f"{workers} {tokens}")
        self.index = PrefixIndex(time.monotonic)
        self.traffic = Traffic(time.monotonic)
        self.fleet = Fleet(
            StaticDiscovery([]),
            self.index,
            Metrics(router="bench", model="bench", version="0"),
            LinkSettings("bench", "0", "secret", None),
            Expected("bench", b""),
            FleetRecord(0, "bench", "cache_aware"),
            clock=time.monotonic,
            jitter=self._rng.random,
            on_worker_gone=self.traffic.forget,
        )
        self.decider = Decider(self.fleet, self.index, self.traffic, time.monotonic)
        self.links = [self._join(f"worker-{n:02}") for n in range(workers)]
        beginning = self.tokens(SYSTEM)
        self.sessions = [beginning + self.tokens(tokens - SYSTEM) for _ in range(sessions)]
        for session in self.sessions:
            self._place(session)
        self._keys = count()
        for number in range(IN_FLIGHT):
            session = self.sessions[number % sessions]
            names = [short(h) for h in block_hashes(session[: self._rng.randint(SYSTEM, tokens)], ROOT, BLOCK)]
            self.send(names, cached_blocks=len(names) // 2, prefilling=number % 4 == 0)

    def tokens(self, number: int) -> list[int]:
        """Random ones."""
        return [self._rng.randrange(128_000) for _ in range(number)]

    def send(self, names: list[bytes], *, cached_blocks: int, prefilling: bool) -> int:
        """One more request in flight; its key."""
        key, link = next(self._keys), self._rng.choice(self.links)
        self.traffic.sent(key, link.name, names, work_ms=50.0, cached_blocks=cached_blocks)
        if not prefilling:
            self.traffic.first_token(key)
        return key

    def report(self) -> None:
        """A worker says how it is."""
        self._rng.choice(self.links).report = self._report()

    def ask(self, session: list[int], memo: HashMemo) -> None:
        """Hash, match, choose."""
        names = memo.names(session, ROOT, BLOCK)
        if self.decider.decide(Question(names.short, len(session), BLOCK, names.last)) is None:
            raise RuntimeError("no worker takes requests; please report this")

    def _join(self, name: str) -> WorkerLink:
        link = WorkerLink(
            WorkerAddress(name, "127.0.0.1:1"),
            self.index,
            self.fleet,
            LinkSettings("bench", "0", "secret", None),
            clock=time.monotonic,
            jitter=self._rng.random,
        )
        link.hello = worker_pb2.WorkerHello(worker=name, incarnation=1, peer_address=f"{name}:1")
        link.connected = link.synced = link.was_up = True
        link.report = self._report()
        self.fleet._members[name] = _Member(link, cast("asyncio.Task[None]", None))
        self.index.join(name, 1)
        self.index.begin_snapshot(name, 1)
        self.index.end_snapshot(name, 1)
        self._hold(name, TierName.DEVICE, [self._rng.randbytes(16) for _ in range(BACKGROUND_BLOCKS)])
        return link

    def _hold(self, worker: str, tier: TierName, names: list[bytes]) -> None:
        """In runs of 64, as engines tell of them."""
        events = []
        for at in range(0, len(names), 64):
            events.append(BlockStored(tier, tuple(names[at : at + 64]), names[at - 1] if at else None))
        self.index.apply(worker, 1, events)

    def _place(self, session: list[int]) -> None:
        """Its beginning everywhere, ever more of it on some workers, all of it on one."""
        names = [short(h) for h in block_hashes(session, ROOT, BLOCK)]
        for link in self.links:
            self._hold(link.name, TierName.DEVICE, names[: SYSTEM // BLOCK])
        holders = self._rng.sample(self.links, 4)
        for number, link in enumerate(holders, 1):
            depth = len(names) * number // len(holders)
            self._hold(link.name, TierName.DEVICE, names[: depth // 2])
            self._hold(link.name, TIERS[number % 3], names[:depth])

    def _report(self) -> LinkReport:
        rng = self._rng
        tiers = [
            worker_pb2.TierLoad(tier=tier, healthy=True, read_latency_ms=0.2 * n, read_block_ms=0.3 * n)
            for n, tier in enumerate((common_pb2.TIER_HOST, common_pb2.TIER_DISK, common_pb2.TIER_REDIS), 1)
        ]
        load = worker_pb2.Load(
            prefill_fixed_ms=10.0,
            prefill_token_ms=0.12 * rng.uniform(0.95, 1.05),
            pending_prefill_tokens=rng.randrange(4_000),
            running=rng.randrange(16),
            decoding=4,
            decode_step_ms=20.0,
            tiers=tiers,
        )
        return LinkReport(load, time.monotonic())
