"""PeersTier: all peers of a worker as one tier that is only read from.

Covers: whom to ask for which block, connections that are opened when they are needed and closed when they are not, a
request that lies with several peers, pauses while the fleet is cleared. Does not cover: one peer (`tier`), who holds
what (the router tells with each job), whether it is worth it (`store`).

It asks for nothing that nobody told it of, so that a prompt which no peer holds costs no round trip. A hint that was
wrong, a peer that died, stalls or lies is a miss: the next one that was named is asked while there is time, then the
block is computed. The breaker of each peer bounds what it can cost; see `link`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from kvstore.blocks import BlockHash
from kvstore.codec import BlockCodec
from kvstore.errors import MissReason, TierError
from kvstore.peer.hints import Hints, Holder
from kvstore.peer.link import PeerUnavailableError
from kvstore.peer.others import OfOthers
from kvstore.peer.promises import Progress
from kvstore.peer.tier import DEFAULT_TIMEOUT_S, PeerTier
from kvstore.peer.watch import PATIENCE_S, Watch
from kvstore.peer.wire import MAX_HASHES, FleetKey
from kvstore.tier import BlockMeta, Clock, Delivery, TierStats

MAX_PEERS = 16  # connected at once
CANNOT_ASK = Delivery(0, MissReason.ERROR)
IDLE_S = 60.0  # without a question; then its connections are closed

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Peer:
    tier: PeerTier
    used: float


class PeersTier(OfOthers):
    """Thread-safe. Only `read` waits for anybody; `match` answers from hints. Keeps the reading side of `Tier`.

    Attributes:
        watch: hears how far peers are with what they promised to make.
    """

    def __init__(
        self,
        *,
        codec: BlockCodec,
        secret: str,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_peers: int = MAX_PEERS,
        idle_s: float = IDLE_S,
        clock: Clock = time.monotonic,
    ) -> None:
        """Know no peer yet.

        Args:
            codec: of the blocks. secret: of the fleet.
            timeout_s: longest wait for a peer, and for each block of a read.
            max_peers: connected at once; the one not used for longest gives way. idle_s: close those unused so long.
            clock: of hints, breakers and idleness; deadlines are real time.

        Raises:
            TierError: the secret is empty.
        """
        FleetKey(secret)  # says now what would be wrong later
        self._codec, self._secret = codec, secret
        self._timeout_s, self._max_peers, self._idle_s = timeout_s, max_peers, idle_s
        self._clock = clock
        self._lock = threading.Lock()
        self._hints = Hints(clock)
        self._peers: OrderedDict[str, _Peer] = OrderedDict()  # the one not used for longest first
        self._gone = TierStats()  # what peers counted that were closed
        self._holds: dict[Hashable, float] = {}
        self._is_open = True
        self.watch = Watch(self._progress)

    # --- hints ---

    def learn(self, hashes: Sequence[BlockHash], holders: Sequence[Holder]) -> None:
        """These peers seem to hold the leading blocks of a prompt; the first one is asked first."""
        with self._lock:
            self._hints.learn(hashes, holders)

    def hint(self, hashes: Sequence[BlockHash], address: str) -> None:
        """These blocks lie with that peer: it has just said so itself."""
        with self._lock:
            self._hints.learn(hashes, [Holder(address, len(hashes))])

    def forget(self) -> None:
        """Believe no hint any more."""
        with self._lock:
            self._hints.forget()

    def bar(self, hashes: Sequence[BlockHash]) -> None:
        """Peers may hold wrong bytes under these names: nothing is read of them for a while; see `hints.BAR_S`."""
        with self._lock:
            self._hints.bar(hashes)

    def hold(self, key: Hashable, for_s: float) -> None:
        """Nothing is in reach until `release`, or for so long. Reads that run go on. Holds add up, by key."""
        with self._lock:
            self._holds[key] = self._clock() + for_s

    def release(self, key: Hashable) -> None:
        """End a hold; none of that key: nothing happens."""
        with self._lock:
            self._holds.pop(key, None)

    # --- as a tier ---

    def match(self, hashes: Sequence[BlockHash], *, deadline_s: float | None = None) -> int:
        """How many leading blocks some peer seems to hold. Nobody is asked."""
        with self._lock:
            return 0 if self._is_held() else self._hints.run(hashes)

    def read(
        self, hashes: Sequence[BlockHash], into: Sequence[memoryview], *, deadline_s: float | None = None
    ) -> Delivery:
        """As `Tier.read`: run by run from those who were named; who does not deliver is not asked for those again.

        Raises:
            LayoutError: a buffer has not the size of a block.
        """
        ends_at = None if deadline_s is None else time.monotonic() + deadline_s
        done, ended = 0, MissReason.ABSENT
        while done < len(hashes):
            left_s = None if ends_at is None else ends_at - time.monotonic()
            if left_s is not None and left_s <= 0:
                return Delivery(done, MissReason.DEADLINE)
            address, end = self._next_run(hashes, done)
            if address is None:  # what the last one who was asked for it said, or that nobody is known to hold it
                return Delivery(done, ended)
            delivery = self._ask(address, hashes[done:end], into[done:end], left_s)
            done += delivery.count
            ended = MissReason.ABSENT if delivery.ended is None else delivery.ended
            if done < end:
                with self._lock:
                    self._hints.deny(hashes[done:end], address)
        return Delivery(done, None)

    def find(self, name: BlockHash) -> BlockMeta | None:
        """The metadata under which a block was last read from a peer; None: not known. Asks nobody."""
        found = (peer.find(name) for peer in self._tiers())
        return next((meta for meta in found if meta is not None), None)

    def touch(self, hashes: Sequence[BlockHash]) -> None:
        """Nothing: a peer refreshes what is read from it, and the rest is its own business."""

    def sweep(self) -> float | None:
        """Forget old hints and ended holds, and close peers that nobody needed for a while."""
        now = self._clock()
        with self._lock:
            self._hints.sweep()
            for key in [key for key, until in self._holds.items() if until <= now]:
                del self._holds[key]
            idle = [address for address, peer in self._peers.items() if now - peer.used >= self._idle_s]
            closed = [self._drop(address) for address in idle]
        for peer in closed:
            peer.close()
        return None

    def stats(self) -> TierStats:
        """Sums over all peers since the start. Healthy while one of those that are connected is, or none is."""
        with self._lock:
            tiers = [peer.tier.stats() for peer in self._peers.values()]
            total = _sum([self._gone, *tiers])
        broken = [tier for tier in tiers if not tier.healthy]
        total.healthy = not broken or len(broken) < len(tiers)
        total.problem = "; ".join(tier.problem for tier in broken if tier.problem)
        return total

    def check(self) -> None:
        """Nothing to audit: hints may be wrong."""

    def close(self) -> None:
        """Close all connections. Reads that come later deliver nothing."""
        with self._lock:
            self._is_open = False
            self._hints.forget()
            self.watch.close()
            peers = [self._drop(address) for address in list(self._peers)]
        for peer in peers:
            peer.close()

    # --- inside ---

    def _is_held(self) -> bool:
        return bool(self._holds) and any(until > self._clock() for until in self._holds.values())

    def _next_run(self, hashes: Sequence[BlockHash], start: int) -> tuple[str | None, int]:
        """Whom to ask for the block at `start`, and up to where one question goes."""
        last = min(len(hashes), start + MAX_HASHES)
        with self._lock:
            address = self._hints.first(hashes[start])
            others = (i for i in range(start + 1, last) if self._hints.first(hashes[i]) != address)
            return address, next(others, last)

    def _ask(
        self, address: str, hashes: Sequence[BlockHash], into: Sequence[memoryview], deadline_s: float | None
    ) -> Delivery:
        peer = self._peer(address)
        return CANNOT_ASK if peer is None else peer.read(hashes, into, deadline_s=deadline_s)

    def _progress(self, address: str, tickets: Sequence[BlockHash], seen: Sequence[Progress]) -> list[Progress]:
        peer = self._peer(address)
        if peer is None:
            raise PeerUnavailableError(f"peer {address} cannot be asked; see the log", MissReason.ERROR)
        return peer.progress(tickets, seen, patience_s=PATIENCE_S)

    def _peer(self, address: str) -> PeerTier | None:
        """Its tier, made if need be; None: it cannot be asked."""
        crowded_out = None
        with self._lock:
            if not self._is_open:
                return None
            peer = self._peers.get(address)
            if peer is None:
                tier = self._made(address)
                if tier is None:
                    return None
                peer = self._peers[address] = _Peer(tier, 0.0)
                if len(self._peers) > self._max_peers:
                    crowded_out = self._drop(next(iter(self._peers)))
            peer.used = self._clock()
            self._peers.move_to_end(address)
        if crowded_out is not None:
            crowded_out.close()
        return peer.tier

    def _made(self, address: str) -> PeerTier | None:
        try:
            return PeerTier(
                address, codec=self._codec, secret=self._secret, timeout_s=self._timeout_s, clock=self._clock
            )
        except TierError as error:
            log.warning("a peer cannot be asked", extra={"peer": address, "problem": f"{error}"})
            return None

    def _drop(self, address: str) -> PeerTier:
        """Take a peer out, and keep what it counted; the caller closes it without the lock."""
        tier = self._peers.pop(address).tier
        self._gone = _sum([self._gone, tier.stats()])
        return tier

    def _tiers(self) -> list[PeerTier]:
        with self._lock:
            return [peer.tier for peer in self._peers.values()]


def _sum(parts: Sequence[TierStats]) -> TierStats:
    misses: Counter[str] = Counter()
    for part in parts:
        misses.update(part.misses)
    return TierStats(
        hits=sum(part.hits for part in parts),
        misses=dict(misses),
        read_bytes=sum(part.read_bytes for part in parts),
    )
