"""RedisTier: blocks in a Redis server that the whole fleet shares.

Covers: what a tier promises, in terms of commands (`redis_commands`), a link that may fail (`redis_link`) and books
(`redis_books`). Does not cover: the stored value (`codec`), whether reading is worth it (`store`).

Key: `warmkv:{first 8 bytes of the scheme's digest, hex}:{block hash, hex}`, without braces, which would bind keys to
one slot of a cluster. Value: header and payload as one string. A name says all that the bytes depend on, so a value is
never changed, only written, lengthened and dropped; of two writers either may win.

Room is the server's business: it evicts by its own policy, and a block may vanish between any two of our questions.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import compress

from kvstore.blocks import BlockHash
from kvstore.errors import CodecError, MissReason, TierError
from kvstore.events import KvEvent, RemovalCause, TierName
from kvstore.layout import KVLayout
from kvstore.redis_books import RedisBooks
from kvstore.redis_commands import BlockCommands
from kvstore.redis_link import NEVER, Purpose, RedisLink, UnavailableError
from kvstore.resp import Wire
from kvstore.tier import BlockMeta, Clock, Honours, TierStats, select

log = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 0.1
DEFAULT_WRITE_TIMEOUT_S = 1.0


class RedisTier:
    """Blocks in a shared Redis server. Thread-safe. Keeps the contract of `kvstore.tier.Tier`.

    Every method may wait for the server, except `stats`, `drain_events`, `sweep`, `check` and `run_id`. A server that
    does not answer costs a caller one timeout, connecting included; after three in a row the breaker answers for it in
    microseconds. The breaker's probes are ordinary calls: go on calling an unhealthy tier, or call `probe`.
    """

    name = TierName.REDIS
    honours = Honours(capacity=False, ttl=True, named_eviction=False, injected_clock=False)

    def __init__(
        self,
        url: str,
        *,
        layout: KVLayout,
        namespace: bytes,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        write_timeout_s: float = DEFAULT_WRITE_TIMEOUT_S,
        clock: Clock = time.monotonic,
        wall_clock: Clock = time.time,
    ) -> None:
        """Ask the server who it is. A server that is down is a problem (see `stats`), not an error.

        Args:
            url: see `resp_pool.URL_FORMS`.
            layout: of the blocks.
            namespace: `HashScheme.digest()`; its first 8 bytes go into the keys.
            timeout_s: longest wait for the answer to a look-up, and for each value of a read.
            write_timeout_s: the same for writes, removals and clearing, which are in nobody's way.
            clock: of the breaker. wall_clock: seconds since the epoch, for headers.

        Raises:
            TierError: the URL cannot be used.
        """
        self._commands = BlockCommands(b"warmkv:" + namespace[:8].hex().encode() + b":", layout)
        self._layout = layout
        self._timeout_s = timeout_s
        self._write_timeout_s = write_timeout_s
        self._wall_clock = wall_clock
        self._books = RedisBooks()
        self._link = RedisLink(url, clock=clock, on_restart=self._books.emptied)
        self.probe()

    def run_id(self) -> str:
        """Names this run of the server; empty: unknown. A run holds nothing of what an earlier one held."""
        return self._link.facts.run_id

    def probe(self) -> bool:
        """Ask the server for a sign of life, if the breaker lets us; whether there was one."""
        return self._link.probe(self._write_timeout_s)

    def match(self, hashes: Sequence[BlockHash], *, deadline_s: float | None = None) -> int:
        """As `Tier.match`; one round trip up to 1024 blocks. A fault is counted as a miss, an answer is not."""
        try:
            with self._link.contact(Purpose.LOOK_UPS, self._timeout_s, _end(deadline_s)) as wire:
                count, absent = self._commands.look_up(wire, hashes)
        except UnavailableError as fault:
            self._books.missed(fault.reason)
            return 0
        self._books.absent(absent)
        return count

    def read(self, hashes: Sequence[BlockHash], into: Sequence[memoryview], *, deadline_s: float | None = None) -> int:
        """As `Tier.read`; a few values are under way at a time, and each may take the timeout."""
        ends_at = _end(deadline_s)
        arrived: list[BlockMeta] = []
        reason = self._receive(hashes, into, arrived, ends_at) if hashes else None
        if reason is not None:
            self._books.missed(reason)
        self._books.delivered(arrived, self._layout.block_nbytes)
        if reason in (MissReason.CORRUPT, MissReason.TRUNCATED, MissReason.FOREIGN):
            log.warning("value in redis was wrong", extra={"block": hashes[len(arrived)].hex(), "reason": str(reason)})
            self._drop(hashes[len(arrived) : len(arrived) + 1], RemovalCause.INVALID, self._timeout_s, ends_at)
        elif reason is MissReason.ABSENT:
            self._books.absent(hashes[len(arrived) : len(arrived) + 1])
        if reason not in (MissReason.DEADLINE, MissReason.BREAKER, MissReason.ERROR):
            self._refresh(arrived, ends_at)
        return len(arrived)

    def write(self, metas: Sequence[BlockMeta], payloads: Sequence[memoryview]) -> int:
        """As `Tier.write`, but the server makes the room. A block whose key holds a whole value is not sent again."""
        held: set[BlockHash] = set()
        written: list[BlockMeta] = []
        try:
            with self._link.contact(Purpose.WRITES, self._write_timeout_s) as wire:
                self._link.refresh_facts(wire)
                there = self._commands.holds(wire, [meta.hash for meta in metas])
                self._lengthen(wire, list(compress(metas, there)))
                held.update(meta.hash for meta in compress(metas, there))
                missing = [(m, _as_bytes(p)) for m, p in zip(metas, payloads, strict=True) if m.hash not in held]
                written.extend(self._commands.send(wire, missing, self._wall_clock()))
        except UnavailableError as fault:
            self._books.failed_to_store(fault.failure, len(metas) - len(held) - len(written))
        held.update(meta.hash for meta in written)
        kept = [meta for meta in metas if meta.hash in held]
        self._books.stored(kept, written=len(written), nbytes=self._layout.block_nbytes)
        return len(kept)

    def touch(self, hashes: Sequence[BlockHash]) -> None:
        """As `Tier.touch`. A block that this tier has not seen yet is touched by the TTL in its header."""
        ttls = {name: meta.ttl_s for name, meta in self._books.believed(hashes).items()}
        with (
            suppress(UnavailableError),  # noted as a problem; a block that is not touched is a miss one day
            self._link.contact(Purpose.TOUCHES, self._write_timeout_s) as wire,
        ):
            unseen = [name for name in hashes if name not in ttls]
            ttls.update((name, header.ttl_s) for name, header in self._commands.headers(wire, unseen) if header)
            self._commands.lengthen(wire, _timed(ttls.items()), by_script=not self._link.facts.can_only_lengthen)
            self._commands.use(wire, [name for name, ttl_s in ttls.items() if ttl_s is None])

    def find(self, name: BlockHash) -> BlockMeta | None:
        """As `SharedTier.find`."""
        return self._books.believed([name]).get(name)

    def refresh(self, metas: Sequence[BlockMeta]) -> list[BlockHash] | None:
        """As `SharedTier.refresh`."""
        try:
            with self._link.contact(Purpose.TOUCHES, self._write_timeout_s) as wire:
                self._link.refresh_facts(wire)
                there = self._commands.holds(wire, [meta.hash for meta in metas])
                held = list(compress(metas, there))
                self._lengthen(wire, held)
                self._commands.use(wire, [meta.hash for meta in held if meta.ttl_s is None])
        except UnavailableError:
            return None  # noted as a problem
        missing = [meta.hash for meta, is_there in zip(metas, there, strict=True) if not is_there]
        self._books.stored(held, written=0, nbytes=0)
        self._books.absent(missing)
        return missing

    def forget(self, *, root: BlockHash | None = None, prefix: BlockHash | None = None) -> list[BlockMeta]:
        """As `SharedTier.forget`."""
        return self._books.forget(root=root, prefix=prefix)

    def remove(self, hashes: Sequence[BlockHash], cause: RemovalCause) -> int:
        """As `Tier.remove`. Of a server that does not answer, nothing is dropped."""
        return self._drop(hashes, cause, self._write_timeout_s, NEVER)

    def clear(self, *, root: BlockHash | None = None, prefix: BlockHash | None = None) -> int:
        """As `Tier.clear`: walks all keys of the namespace, and all their headers unless everything goes.

        Blocks that others write meanwhile may stay. With `root`, what has no readable header goes too.

        Raises:
            TierError: the server did not drop all of them; clear again when it answers.
        """
        dropped: list[BlockHash] = []
        try:
            with self._link.contact(Purpose.REMOVALS, self._write_timeout_s) as wire:
                names = list(dict.fromkeys(self._commands.scan(wire)))
                chosen = names if root is None and prefix is None else self._choose(wire, names, root, prefix)
                dropped.extend(self._commands.unlink(wire, chosen))
        except UnavailableError as fault:
            self._books.removed(dropped, RemovalCause.CLEARED)
            raise TierError(f"Redis was not cleared, {len(dropped)} blocks went; {fault}; then clear again") from fault
        if root is None and prefix is None:
            self._books.emptied(len(dropped))
        else:
            self._books.removed(dropped, RemovalCause.CLEARED)
        return len(dropped)

    def sweep(self) -> float | None:
        """Nothing to do: the server drops what has expired."""
        return None

    def drain_events(self) -> list[KvEvent]:
        """As `Tier.drain_events`. A removal is told of blocks only that this tier believed on the server."""
        return self._books.drain_events()

    def stats(self) -> TierStats:
        """As `Tier.stats`, without asking: fill is the whole server's, some seconds old; blocks are those believed."""
        stats = self._books.stats()
        stats.used_bytes = self._link.facts.used_memory
        stats.capacity_bytes = self._link.facts.maxmemory
        stats.healthy = self._link.is_healthy
        stats.problem = self._link.problem
        return stats

    def check(self) -> None:
        """As `Tier.check`; of what is on the server nothing is known for sure, so only our own books are audited."""
        self._books.check()

    def close(self) -> None:
        """Close all connections. Calls that come later are misses."""
        self._link.close()

    def _receive(
        self, hashes: Sequence[BlockHash], into: Sequence[memoryview], arrived: list[BlockMeta], ends_at: float
    ) -> MissReason | None:
        """Append what arrives; why it ended early, None when it did not."""
        try:
            with self._link.contact(Purpose.READS, self._timeout_s, ends_at) as wire:
                headers = self._commands.receive(wire, hashes, [_as_bytes(buffer) for buffer in into])
                arrived.extend(header.meta for header in headers)
        except (UnavailableError, CodecError) as fault:
            return fault.reason
        return MissReason.ABSENT if len(arrived) < len(hashes) else None

    def _drop(self, hashes: Sequence[BlockHash], cause: RemovalCause, patience_s: float, ends_at: float) -> int:
        dropped: list[BlockHash] = []
        with suppress(UnavailableError), self._link.contact(Purpose.REMOVALS, patience_s, ends_at) as wire:
            dropped.extend(self._commands.unlink(wire, hashes))
        self._books.removed(dropped, cause)
        return len(dropped)

    def _refresh(self, metas: Sequence[BlockMeta], ends_at: float) -> None:
        if not any(meta.ttl_s for meta in metas):
            return
        with (
            suppress(UnavailableError),  # noted as a problem; the blocks have arrived all the same
            self._link.contact(Purpose.TOUCHES, self._timeout_s, ends_at) as wire,
        ):
            self._lengthen(wire, metas)

    def _lengthen(self, wire: Wire, metas: Sequence[BlockMeta]) -> None:
        ttls = _timed((meta.hash, meta.ttl_s) for meta in metas)
        self._commands.lengthen(wire, ttls, by_script=not self._link.facts.can_only_lengthen)

    def _choose(
        self, wire: Wire, names: Sequence[BlockHash], root: BlockHash | None, prefix: BlockHash | None
    ) -> list[BlockHash]:
        headers = list(self._commands.headers(wire, names))
        chosen = select([header.meta for _, header in headers if header is not None], root, prefix)
        unreadable = [] if root is None else [name for name, header in headers if header is None]
        return chosen + unreadable


def _end(deadline_s: float | None) -> float:
    return NEVER if deadline_s is None else time.monotonic() + deadline_s


def _as_bytes(buffer: memoryview) -> memoryview:
    return buffer if buffer.format == "B" and buffer.ndim == 1 else buffer.cast("B")


def _timed(ttls: Iterable[tuple[BlockHash, float | None]]) -> list[tuple[BlockHash, float]]:
    return [(name, ttl_s) for name, ttl_s in ttls if ttl_s is not None]
