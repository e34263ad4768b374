"""A worker's blocks and those of other workers: what it reads from them, what it serves to them.

Covers: whether a worker takes part, where it listens, the hints that come with jobs. Does not cover: reading and
serving (`kvstore.peer`), whom the router names (the router).

Of a worker of several ranks each serves its own share and reads from the same rank elsewhere. The worker's address is
that of its ranks, in their order, between commas; routers pass it on as it is. Ranks of different numbers hold other
bytes under the same names, and refuse one another when they meet (`HashScheme.tp_rank` is part of what they claim).
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence

from kvstore.acquisition import Promise
from kvstore.codec import BlockCodec
from kvstore.host.tier import HostTier
from kvstore.peer.hints import Holder
from kvstore.peer.peers import PeersTier
from kvstore.peer.promises import PromiseBoard
from kvstore.peer.server import PeerServer
from kvstore.promised import promise_of
from kvstore.tier import Clock
from workers.addresses import advertised_host, authority
from workers.config import WorkerConfig
from workers.protocol import Job

TIMEOUT_S = 0.1  # longest wait for another worker's answer, and for each block of it
RANKS_BETWEEN = ","

log = logging.getLogger(__name__)


class Peers:
    """What one rank of a worker reads and serves. `tier` belongs to the store, which closes it; `close` ends the rest
    before.

    Attributes:
        tier: what other workers hold. address: where others read from this rank; empty: it serves none.
    """

    def __init__(
        self, tier: PeersTier, server: PeerServer | None = None, address: str = "", *, rank: int = 0, size: int = 1
    ) -> None:
        """`rank`, of `size`: of this worker, and of the others that are read from."""
        self.tier = tier
        self.address = address
        self._server = server
        self._rank, self._size = rank, size

    def learn(self, job: Job) -> None:
        """Believe the hints of a job; what it is promised is for the store to wait for (`promise`)."""
        named = [(self.in_rank(hint.address), hint.blocks) for hint in job.peers]
        holders = [Holder(address, blocks) for address, blocks in named if address not in ("", self.address)]
        if holders:
            self.tier.learn(job.block_hashes, holders)

    @property
    def board(self) -> PromiseBoard | None:
        """Where others hear of what this worker makes for them; None: it serves none."""
        return None if self._server is None else self._server.promises

    def promise(self, job: Job, now: float) -> Promise | None:
        """What another worker makes for a job; None: nothing, or it is this one."""
        told = job.promise
        if told is None or job.no_read or (address := self.in_rank(told.address)) == self.address:
            return None
        return promise_of(
            job.block_hashes, address, told.blocks, ready_ms=told.ready_ms, margin_ms=told.margin_ms, now=now
        )

    def hold(self, key: Hashable, for_s: float) -> None:
        """As `PeersTier.hold`."""
        self.tier.hold(key, for_s)

    def release(self, key: Hashable) -> None:
        """As `PeersTier.release`."""
        self.tier.release(key)

    def in_rank(self, address: str) -> str:
        """Where a worker's rank of this number serves, of the worker's address; empty: it has not as many ranks."""
        ranks = address.split(RANKS_BETWEEN)
        return ranks[self._rank] if len(ranks) == self._size else ""

    def close(self) -> None:
        """Serve nobody any more; when it returns no block of the host tier is being sent."""
        if self._server is not None:
            self._server.close()


def address_of(ranks: Sequence[str]) -> str:
    """A worker's address, of those of its ranks in their order; empty: one of them serves none."""
    return RANKS_BETWEEN.join(ranks) if all(ranks) else ""


def open_peers(
    config: WorkerConfig, host: HostTier | None, codec: BlockCodec, clock: Clock, *, rank: int = 0, size: int = 1
) -> Peers | None:
    """What the settings ask for, for one rank of a worker; None: it neither reads nor serves.

    Raises:
        TierError: it cannot listen at its address.
    """
    if problem := _refusal(config):
        log.warning("blocks of other workers are not used", extra={"worker": config.name, "problem": problem})
        return None
    if not config.peers:
        return None
    tier = PeersTier(codec=codec, secret=config.fleet_secret, timeout_s=TIMEOUT_S, clock=clock)
    if host is None:
        return Peers(tier, rank=rank, size=size)
    server = PeerServer(host, codec=codec, secret=config.fleet_secret, host=config.bind_host, port=config.peer_port)
    address = authority(advertised_host(config), server.port)
    log.info("blocks are served to other workers", extra={"worker": config.name, "address": address})
    return Peers(tier, server, address, rank=rank, size=size)


def _refusal(config: WorkerConfig) -> str:
    """Why a worker whose settings ask for it takes no part; empty: it does."""
    if not config.peers:
        return ""
    if not config.fleet_secret:
        return "workers give blocks to one another only with a fleet secret; set auth.fleet_secret"
    if config.tls_cert is not None and not (config.store_keys and config.protection == "encrypt"):
        return (
            "the streams to routers are encrypted, and blocks between workers would not be; set store.keys_file and "
            "store.protection=encrypt, or turn store.peers off"
        )
    return ""
