"""RedisTier: blocks in a Redis server that the whole fleet shares.

Covers: what a tier promises, in terms of one server (`node`) and books (`books`). Does not cover: the
stored value (`codec`), several servers (`cluster`), whether reading is worth it (`store`).

Key: `warmkv:{first 8 bytes of the scheme's digest, hex}:{block hash, hex}`, without braces, which would bind keys to
one slot of a cluster. Value: see `values`. A name says all that the bytes depend on, so a value is never changed,
only written, lengthened and dropped; of two writers either may win.

Room is the server's business: it evicts by its own policy, and a block may vanish between any two of our questions. Of
one that is gone nobody can say whether it was evicted or had expired: both are misses with the reason `absent`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import compress

from kvstore.blocks import BlockHash
from kvstore.codec import BlockCodec
from kvstore.errors import MissReason, TierError
from kvstore.events import RemovalCause
from kvstore.redis.books import MAX_BELIEFS, FromBooks
from kvstore.redis.clear import choose
from kvstore.redis.commands import BlockCommands
from kvstore.redis.link import Purpose, UnavailableError
from kvstore.redis.node import RedisNode, end_of, flattened
from kvstore.redis.watch import Watching, start_watch
from kvstore.tier import NOTHING_ASKED, BlockMeta, Clock, Delivery, TierStats

DEFAULT_TIMEOUT_S = 0.05
DEFAULT_WRITE_TIMEOUT_S = 1.0


class RedisTier(FromBooks):
    """Blocks in a shared Redis server. Thread-safe. Keeps the contract of `kvstore.tier.SharedTier`.

    Every method may wait for the server, except `stats`, `drain_events`, `sweep`, `check` and `run_id`. A server that
    does not answer costs a caller one timeout, connecting included; after three in a row the breaker answers for it in
    microseconds. The breaker's probes are ordinary calls: go on calling an unhealthy tier, or call `probe`.
    """

    def __init__(
        self,
        url: str,
        *,
        codec: BlockCodec,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        write_timeout_s: float = DEFAULT_WRITE_TIMEOUT_S,
        clock: Clock = time.monotonic,
        wall_clock: Clock = time.time,
        watching: Watching = Watching.OFF,
    ) -> None:
        """Ask the server who it is. A server that is down is a problem (see `stats`), not an error.

        Args:
            url: see `address.URL_FORMS`, not of a cluster.
            codec: of the blocks; the first 8 bytes of its namespace go into the keys.
            timeout_s: longest silence that a look-up or a read bears: the wait for an answer, and within one for the
                next `resp.FLOW_NBYTES` of it. How long a whole read may take is its `deadline_s`.
            write_timeout_s: longest wait for each block that is written, and for each step of a removal or a clear,
                which are in nobody's way.
            clock: of the breaker. wall_clock: seconds since the epoch, for headers.
            watching: whether a thread listens for blocks that the server drops, so that events tell of them.

        Raises:
            TierError: the URL cannot be used.
        """
        super().__init__(wall_clock=wall_clock)
        self._block_nbytes = codec.layout.block_nbytes
        self._write_timeout_s = write_timeout_s
        commands = BlockCommands(key_prefix(codec.namespace), codec)
        self._server = RedisNode(
            url,
            commands,
            timeout_s=timeout_s,
            write_timeout_s=write_timeout_s,
            clock=clock,
            wall_clock=wall_clock,
            on_restart=self._books.emptied,
            watch=start_watch(watching, url, prefix=commands.prefix, books=self._books),
        )
        self.probe()

    def run_id(self) -> str:
        """Names this run of the server; empty: unknown. A run holds nothing of what an earlier one held."""
        return self._server.link.facts.run_id

    def probe(self) -> bool:
        """Ask the server for a sign of life, if the breaker lets us; whether there was one."""
        return self._server.probe()

    def match(self, hashes: Sequence[BlockHash], *, deadline_s: float | None = None) -> int:
        """As `Tier.match`; one round trip up to 1024 blocks. A fault is counted as a miss, an answer is not."""
        try:
            count, absent = self._server.look_up(hashes, end_of(deadline_s))
        except UnavailableError as fault:
            self._books.missed(fault.reason)
            return 0
        self._books.absent(absent)
        return count

    def read(
        self, hashes: Sequence[BlockHash], into: Sequence[memoryview], *, deadline_s: float | None = None
    ) -> Delivery:
        """As `Tier.read`; a few values are under way at a time. The timeout is for silence, the deadline for all."""
        if not hashes:
            return NOTHING_ASKED
        known = self._books.believed(hashes)
        reading = self._server.read(hashes, [flattened(buffer) for buffer in into], end_of(deadline_s), known)
        count = len(reading.arrived)
        if reading.reason is not None:
            self._books.missed(reading.reason)
        self._books.delivered(reading.arrived, self._block_nbytes)
        if reading.dropped:
            self._books.removed(reading.dropped, RemovalCause.INVALID)
        if reading.reason is MissReason.ABSENT:
            self._books.absent(hashes[count : count + 1])
        return Delivery(count, reading.reason)

    def write(self, metas: Sequence[BlockMeta], payloads: Sequence[memoryview]) -> int:
        """As `Tier.write`, but the server makes the room. A block whose key holds a whole value is not sent again."""
        writing = self._server.write(metas, [flattened(payload) for payload in payloads])
        if writing.fault is not None:
            self._books.failed_to_store(writing.fault.failure, len(metas) - len(writing.held))
        kept = [meta for meta in metas if meta.hash in writing.held]
        self._books.stored(kept, written=writing.written, nbytes=self._block_nbytes)
        return len(kept)

    def touch(self, hashes: Sequence[BlockHash]) -> None:
        """As `Tier.touch`. A block that this tier has not seen yet is touched by the TTL in its header."""
        believed = self._books.believed(hashes)
        unseen = [name for name in hashes if name not in believed]
        with suppress(UnavailableError):  # noted as a problem; a block that is not touched is a miss one day
            headers = self._server.headers(unseen, Purpose.TOUCHES) if unseen else []
            self._server.touch([*believed.values(), *(header.meta for _, header in headers if header is not None)])

    def refresh(self, metas: Sequence[BlockMeta]) -> list[BlockHash] | None:
        """As `SharedTier.refresh`."""
        try:
            there = self._server.refresh(metas)
        except UnavailableError:
            return None  # noted as a problem
        missing = [meta.hash for meta, is_there in zip(metas, there, strict=True) if not is_there]
        self._books.stored(list(compress(metas, there)), written=0, nbytes=0)
        self._books.absent(missing)
        return missing

    def remove(self, hashes: Sequence[BlockHash], cause: RemovalCause) -> int:
        """As `Tier.remove`. Of a server that does not answer, nothing is dropped."""
        dropped, _ = self._server.drop(hashes, self._write_timeout_s)
        self._books.removed(dropped, cause)
        return len(dropped)

    def clear(self, *, root: BlockHash | None = None, prefix: BlockHash | None = None) -> int:
        """As `Tier.clear`: walks all keys of the namespace, and all their headers unless everything goes.

        In small steps, so that the server goes on serving others. Blocks that others write meanwhile may stay. What a
        clear of a root or a prefix takes where headers or ancestors are missing: see `redis_clear.choose`.

        Raises:
            TierError: the server did not drop all of them; clear again when it answers.
        """
        dropped: list[BlockHash] = []
        fault: UnavailableError | None = None
        try:
            names = self._server.names()
            if root is not None or prefix is not None:
                remembered = self._books.believed(self._books.names())
                names = choose(dict(self._server.headers(names)), remembered.values(), root, prefix)
            dropped, fault = self._server.drop(names, self._write_timeout_s)
        except UnavailableError as error:
            fault = error
        if root is None and prefix is None and fault is None:
            self._books.emptied(len(dropped))
        else:
            self._books.removed(dropped, RemovalCause.CLEARED)
        if fault is not None:
            raise TierError(f"Redis was not cleared, {len(dropped)} blocks went; {fault}; then clear again") from fault
        return len(dropped)

    def recall(self) -> int:
        """Learn what lies there already, for events to tell; how many blocks are known now that were not before.

        Walks the keys of the namespace and asks for a header each, in small steps; at most `books.MAX_BELIEFS`. What
        goes or comes meanwhile is told as always. Of a server that gives no answer nothing is learnt.
        """
        run = self.run_id()
        with self._books.recalling() as recalled:
            try:
                found = self._server.survey(MAX_BELIEFS)
            except UnavailableError:
                return 0
            return recalled(found) if self.run_id() == run else 0

    def stats(self) -> TierStats:
        """As `Tier.stats`, without asking: fill is the whole server's, some seconds old; blocks are those believed."""
        stats = self._books.stats()
        stats.used_bytes = self._server.link.facts.used_memory
        stats.capacity_bytes = self._server.link.facts.maxmemory
        stats.healthy = self._server.link.is_healthy
        stats.problem = self._server.problem
        return stats

    @property
    def advice(self) -> str:
        """What could be better about the server, though nothing is wrong, and what to do; empty when nothing could.

        How it could tell of removals sooner, if it is watched; how it is set up.
        """
        return self._server.advice

    def close(self) -> None:
        """Close all connections. Calls that come later are misses."""
        self._server.close()


def key_prefix(namespace: bytes) -> bytes:
    """What the keys of a namespace begin with, before the hash in hex."""
    return b"warmkv:" + namespace[:8].hex().encode() + b":"
