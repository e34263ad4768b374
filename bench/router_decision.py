"""What the router does of its own for a request: names of blocks, the decision, the memory of what is in flight.

Every decision is asked with names that were just made (fresh objects have no remembered hash and share no identity with
the index's keys), of prompts whose beginnings lie on several workers and tiers, while 64 requests are in flight that
share parts of them, and after a new report of one worker. Times are those of the asking thread's processor: the code
waits for nothing, and what else the machine does would be all that a clock on the wall adds.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import cast

from bench.report import Report, ratios
from bench.router_peer import add_peer_rows
from bench.router_submit import submits
from kvstore.blocks import BlockHash, block_hashes, short
from kvstore.events import BlockStored, TierName
from router.beliefs import Beliefs
from router.decide import Decider, Question
from router.discovery import StaticDiscovery
from router.fleet import Fleet, _Member
from router.fleet_record import FleetRecord
from router.handshake import Expected
from router.hash_memo import HashMemo, Names
from router.index import PrefixIndex
from router.link import Report as LinkReport
from router.link import WorkerLink
from router.metrics import Metrics
from router.other_routers import OtherRouters
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
        beliefs = Beliefs(self.index, time.monotonic)
        self.fleet = Fleet(
            StaticDiscovery([]),
            self.index,
            Metrics(router="bench", model="bench", version="0"),
            LinkSettings("bench", "0", "secret", None),
            Expected("bench", b""),
            FleetRecord(0, "bench", "cache_aware"),
            clock=time.monotonic,
            jitter=self._rng.random,
            others=OtherRouters(self.traffic),
            beliefs=beliefs,
        )
        self.decider = Decider(self.fleet, beliefs, self.traffic, time.monotonic)
        self.links = [self._join(f"worker-{n:02}") for n in range(workers)]
        beginning = self.tokens(SYSTEM)
        self.sessions = [beginning + self.tokens(tokens - SYSTEM) for _ in range(sessions)]
        for session in self.sessions:
            self._place(session)
        self._keys = count()
        for number in range(IN_FLIGHT):
            session = self.sessions[number % sessions]
            names = _names(session[: self._rng.randint(SYSTEM, tokens)])
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

    def asked(self, session: Sequence[int], memo: HashMemo) -> float:
        """Microseconds to hash, match and choose after a worker has reported."""
        self._rng.choice(self.links).report = self._report()
        return seconds(lambda: self.ask(session, memo)) * 1e6

    def ask(self, session: Sequence[int], memo: HashMemo) -> None:
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
        starts = range(0, len(names), 64)
        pieces = [BlockStored(tier, tuple(names[at : at + 64]), names[at - 1] if at else None) for at in starts]
        self.index.apply(worker, 1, pieces)

    def _place(self, session: list[int]) -> None:
        """Its beginning everywhere, ever more of it on some workers, all of it on one."""
        names = _names(session)
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


def add_decision_rows(report: Report, *, quick: bool) -> None:
    """The rows of the decision and of what surrounds it.

    Bars are for an idle core on which the bare chain takes 0.9 ms (`hash_32k_raw_ms`); elsewhere scale them by it.
    """
    for workers, suffix, factor in ((8, "", 1), (64, "_64_workers", 2)):
        world = World(workers, SHORT)
        report.add(f"decision_2k{suffix}_us", decisions(world, 60 if quick else 400), "us", bar=f"<= {120 * factor}")
    world = World(8, LONG)
    report.add("decision_32k_us", decisions(world, 16 if quick else 60), "us", bar="<= 1500")
    report.add("decision_32k_seen_us", decisions_of_seen(world, 24 if quick else 100), "us", bar="<= 350")
    report.add("traffic_2048_us", in_and_out(world, 40 if quick else 200), "us", bar="<= 100")
    world = World(64, LONG, sessions=8)
    report.add("decision_32k_64_workers_us", decisions(world, 8 if quick else 40), "us", bar="<= 3000")
    add_hash_rows(report, 12 if quick else 60)
    report.add("submit_32k_seen_us", asyncio.run(submits(24 if quick else 100)), "us")
    world, memo = World(8, LONG, sessions=8), HashMemo()
    for session in world.sessions:
        memo.names(session, ROOT, BLOCK)
    asks = {"decision": lambda s: world.ask(s, HashMemo()), "decision_seen": lambda s: world.ask(s, memo)}
    add_peer_rows(report, world.sessions, asks, 16 if quick else 64)


def add_hash_rows(report: Report, rounds: int) -> None:
    """Names of a prompt nobody has seen, beside the bare chain over the same tokens, and of one that has grown.

    Tokens come as a list, as tokenizers give them; to pack it is most of what a seen prompt costs, so that it is also
    shown without.
    """
    rng, memo = random.Random(1), HashMemo()
    samples: dict[str, list[float]] = {name: [] for name in ("bare", "cold", "seen", "packed")}

    def take(name: str, work: Callable[[Sequence[int]], object], tokens: Sequence[int]) -> None:
        samples[name].append(seconds(lambda: work(tokens)))

    def names(tokens: Sequence[int]) -> Names:
        return memo.names(tokens, ROOT, BLOCK)

    for _ in range(rounds):
        tokens = [rng.randrange(128_000) for _ in range(LONG)]
        take("bare", bare_chain, tokens)
        take("cold", names, tokens)
        take("seen", names, tokens + tokens[:TURN])
        take("packed", names, array("I", tokens + tokens[: 2 * TURN]))
    cold = samples["cold"]
    report.add("hash_32k_ms", [s * 1e3 for s in cold], "ms", bar="<= 0.9")
    report.add("hash_32k_raw_ms", [s * 1e3 for s in samples["bare"]], "ms")
    report.add("hash_32k_vs_raw_ratio", ratios(cold, samples["bare"]), "ratio", bar="<= 1.15")
    report.add("hash_32k_seen_us", [s * 1e6 for s in samples["seen"]], "us")
    report.add("hash_32k_seen_ratio", ratios(samples["seen"], cold), "ratio")
    report.add("hash_32k_seen_packed_ratio", ratios(samples["packed"], cold), "ratio", bar="<= 0.1")


def bare_chain(tokens: Sequence[int]) -> list[bytes]:
    """What hashing takes at least: packing, two compressions a block, and cutting the names."""
    data, name, names, sha256 = array("I", tokens).tobytes(), bytes(ROOT), [], hashlib.sha256
    for at in range(0, len(data), 4 * BLOCK):
        name = sha256(name + data[at : at + 4 * BLOCK]).digest()
        names.append(name[:16])
    return names


def decisions(world: World, rounds: int) -> list[float]:
    """Microseconds to hash, match and choose, of prompts that no memo has seen."""
    return [world.asked(world.sessions[n % len(world.sessions)], HashMemo()) for n in range(rounds)]


def decisions_of_seen(world: World, rounds: int) -> list[float]:
    """The same of sessions that grow by a turn at a time."""
    memo = HashMemo()
    for session in world.sessions:
        memo.names(session, ROOT, BLOCK)
    samples = []
    for n in range(rounds):
        session = world.sessions[n % len(world.sessions)]
        session.extend(world.tokens(TURN))
        samples.append(world.asked(session, memo))
    return samples


def in_and_out(world: World, rounds: int) -> list[float]:
    """Microseconds to note that a request was sent, had its first token and ended."""

    def walk(names: list[bytes]) -> None:
        world.traffic.ended(world.send(names, cached_blocks=len(names) // 2, prefilling=False))

    chains = [_names(world.sessions[n % len(world.sessions)]) for n in range(rounds)]
    return [seconds(partial(walk, names)) * 1e6 for names in chains]


def seconds(work: Callable[[], object]) -> float:
    """Of this thread's processor: what else the machine does is not counted."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def _names(session: Sequence[int]) -> list[bytes]:
    return [short(name) for name in block_hashes(session, ROOT, BLOCK)]
