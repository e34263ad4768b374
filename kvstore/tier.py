"""The contract of a tier: what the store may ask of any place where blocks lie.

Every tier keeps it, and one suite (`tests/contract/`) runs against all of them. Payloads are writable or readable byte
buffers of exactly `KVLayout.block_nbytes`. Tiers are thread-safe unless they say otherwise: the engine's thread and the
store's I/O threads use them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol, runtime_checkable

from kvstore.blocks import BlockHash
from kvstore.chains import parent_of
from kvstore.chains import select as select
from kvstore.errors import MissReason
from kvstore.events import BlockStored, KvEvent, RemovalCause, TierName
from kvstore.lifetime import Lifetime

Clock = Callable[[], float]  # seconds; monotonic in production, a number that tests move


@dataclass(frozen=True, slots=True)
class BlockMeta:
    """What is known of a block besides its bytes.

    Attributes:
        hash: its name.
        parent: the block before it in the chain, or the root for the first one.
        root: the tenant's root; what `clear(root=...)` goes by.
        ttl_s: seconds that it lives after its last use; None: until it is evicted.
        priority: 0 to 100; eviction policies that look at it keep the higher ones longer.
        until: seconds since the epoch before which it does not expire, used or not; None: no such time.
        turn: of the conversation that it was made in, from 1; None: not known.
        think_s, new_tokens: of that turn, as `eviction.order.Hint` has them. Known to the process that made the block,
        never stored, and no part of equality.
    """

    hash: BlockHash
    parent: BlockHash
    root: BlockHash
    ttl_s: float | None
    priority: int = 0
    until: float | None = None
    turn: int | None = None
    think_s: float | None = field(default=None, compare=False)
    new_tokens: int | None = field(default=None, compare=False)

    @property
    def lifetime(self) -> Lifetime:
        """How long it lives."""
        return Lifetime(self.ttl_s, self.until)

    @property
    def before(self) -> BlockHash | None:
        """The block before it; None when it starts a chain (the root is no block)."""
        return parent_of(self)

    @property
    def link(self) -> tuple[BlockHash, BlockHash | None]:
        """Itself and the block before it, as `chains` takes them."""
        return self.hash, self.before


@dataclass(frozen=True, slots=True)
class Honours:
    """What a tier promises; the documentation prints this table and the contract suite holds each tier to it.

    Attributes:
        capacity: never holds more than its bytes.
        ttl: a block is gone once its TTL has passed since its last use, and its fixed end, if it has one.
        named_eviction: evicts by a policy that we named (else: the server's own).
        injected_clock: its time can be moved by a test.
        lease: does not drop a block before its lease ends (else: `lease` promises nothing and returns 0).
        quota: keeps each root to its share when room is short.
        restart: what it holds outlives the process.
    """

    capacity: bool
    ttl: bool
    named_eviction: bool
    injected_clock: bool
    lease: bool = False
    quota: bool = False
    restart: bool = False


@dataclass(slots=True)
class TierStats:
    """Counters since the tier was made, and its fill now. A copy: nothing changes it later.

    Attributes:
        used_bytes, capacity_bytes, blocks: fill; capacity zero: unknown.
        hits: blocks delivered whole. misses: by MissReason.
        removals: by RemovalCause. stores: blocks written. store_failures: by queue_full, breaker, error, full.
        read_bytes, written_bytes: payload only.
        healthy: False while the breaker is open. problem: what is wrong and what to do; empty when nothing is.
        leased: blocks under a lease.
        loads: reads for requests that delivered something. bad_hits: of them, those that took longer than computing
        would have. load_ms, compute_ms: what they took, and what computing was predicted to take. Filled by the store.
    """

    used_bytes: int = 0
    capacity_bytes: int = 0
    blocks: int = 0
    hits: int = 0
    misses: dict[str, int] = field(default_factory=dict)
    removals: dict[str, int] = field(default_factory=dict)
    stores: int = 0
    store_failures: dict[str, int] = field(default_factory=dict)
    read_bytes: int = 0
    written_bytes: int = 0
    healthy: bool = True
    problem: str = ""
    leased: int = 0
    loads: int = 0
    bad_hits: int = 0
    load_ms: float = 0.0
    compute_ms: float = 0.0


class Delivery(NamedTuple):
    """What a read brought.

    Attributes:
        count: leading blocks that arrived whole and verified.
        ended: why not the next one; None: all that were asked for arrived, or as many as the tier gives in one read.
    """

    count: int  # type: ignore[assignment]  # hides `tuple.count`, which nobody needs of a pair
    ended: MissReason | None


NOTHING_ASKED = Delivery(0, None)


class Tier(Protocol):
    """A place where blocks lie."""

    name: TierName
    honours: Honours

    def match(self, hashes: Sequence[BlockHash], *, deadline_s: float | None = None) -> int:
        """How many leading blocks it holds, unexpired. A question: recency, TTL and counters stay as they are."""
        ...

    def read(
        self, hashes: Sequence[BlockHash], into: Sequence[memoryview], *, deadline_s: float | None = None
    ) -> Delivery:
        """Copy leading blocks into the buffers; how many arrived whole and verified, and what ended it.

        Refreshes recency and TTL of those; a fixed end stays where it is. The first block that is missing or wrong ends
        it, is counted by reason, and if it is wrong it is deleted. Buffers past the returned count hold garbage. Never
        raises for a fault of the tier. `deadline_s` bounds the call, in seconds from now; None: the tier's own bound.
        """
        ...

    def write(self, metas: Sequence[BlockMeta], payloads: Sequence[memoryview]) -> int:
        """Store blocks, in chain order; how many it now holds (an already held block counts, and is refreshed).

        A block that is held lives from now on as long as the longer one of both lifetimes says (`Lifetime.joined`).
        A block becomes visible only when it is whole. Makes room by evicting. Never raises for a fault of the tier.
        """
        ...

    def touch(self, hashes: Sequence[BlockHash]) -> None:
        """Refresh recency and TTL of those that it holds."""
        ...

    def lease(self, hashes: Sequence[BlockHash], for_s: float | None) -> int:
        """Promise not to drop those that it holds for `for_s` seconds (None: until `end_leases`); how many.

        Neither eviction nor TTL drops a leased block; `remove`, `clear` and a wrong checksum do. Of several leases the
        longest holds. A tier that does not honour leases returns 0.
        """
        ...

    def end_leases(self, hashes: Sequence[BlockHash]) -> int:
        """End the leases of those that it holds; how many had one."""
        ...

    def remove(self, hashes: Sequence[BlockHash], cause: RemovalCause) -> int:
        """Drop those that it holds; how many it dropped."""
        ...

    def clear(self, *, root: BlockHash | None = None, prefix: BlockHash | None = None) -> int:
        """Drop all blocks, or those of one root, or of those only `prefix` and what follows it; how many it dropped."""
        ...

    def sweep(self) -> float | None:
        """Drop what has expired; seconds until the next block expires, None when none will.

        Of many only so many in one call that nobody waits long for the tier's lock; zero: call again for the others,
        which nobody finds any more.
        """
        ...

    def drain_events(self) -> list[KvEvent]:
        """The events since the last call, in order."""
        ...

    def stats(self) -> TierStats:
        """Counters and fill."""
        ...

    def check(self) -> None:
        """Audit the books against each other.

        Raises:
            InvariantError: they disagree.
        """
        ...

    def close(self) -> None:
        """Give everything back. The tier cannot be used after it."""
        ...


class LocalTier(Tier, Protocol):
    """A tier of this process alone, which therefore knows what it holds: questions cost microseconds."""

    def find(self, name: BlockHash) -> BlockMeta | None:
        """The metadata under which a block is held; None when it is not."""
        ...

    def prolong(self, hashes: Sequence[BlockHash], lifetime: Lifetime) -> None:
        """As `touch`, and from now on each lives as long as the longer one of its own lifetime and this one says."""
        ...

    def ttl_left_s(self, hashes: Sequence[BlockHash]) -> dict[BlockHash, float | None]:
        """Of those that it holds: seconds until each expires if nobody uses it; None: never, or while it is in use."""
        ...

    def metas(self) -> list[BlockMeta]:
        """The metadata of all blocks."""
        ...

    def snapshot(self) -> list[BlockStored]:
        """All that can be read, as events."""
        ...


@runtime_checkable
class Lasting(Protocol):
    """A local tier whose leases outlive the process."""

    def leases(self) -> dict[BlockHash, float | None]:
        """The blocks under a lease, and for how many seconds more; None: until it is ended. O(blocks)."""
        ...


class SharedTier(Tier, Protocol):
    """A tier on a server that other workers use too: it may fail, and it changes behind our back."""

    def find(self, name: BlockHash) -> BlockMeta | None:
        """The metadata under which a block was last seen there; None: not known. Never asks the server."""
        ...

    def refresh(self, metas: Sequence[BlockMeta]) -> list[BlockHash] | None:
        """As `touch`, with at least these lifetimes; which ones it does not hold. None: the tier gave no answer."""
        ...

    def forget(self, *, root: BlockHash | None = None, prefix: BlockHash | None = None) -> list[BlockMeta]:
        """Believe no more what `clear` would drop, as another worker may drop it; what is still believed.

        Never asks the server, and tells no events: who drops the blocks does.
        """
        ...


class PromiseProgress(Protocol):
    """How far a promise is."""

    @property
    def made(self) -> int:
        """Leading blocks that can be read."""
        ...

    @property
    def found(self) -> int:
        """Of them, those that were there before."""
        ...

    @property
    def is_over(self) -> bool:
        """Whether no more will come."""
        ...


class PromiseWatch(Protocol):
    """Hears how far other workers are with what they make; see `kvstore.peer.watch.Watch`."""

    on_news: Callable[[], None]

    def begin(self, address: str, ticket: BlockHash, for_s: float) -> bool:
        """Hear of a promise, for so long at most; False: of too many already."""
        ...

    def progress(self, address: str, ticket: BlockHash) -> PromiseProgress | None:
        """What was last heard; None: nothing more will be."""
        ...

    def end(self, address: str, ticket: BlockHash) -> None:
        """Nobody waits for it any more."""
        ...


class HintedTier(Tier, Protocol):
    """A tier that others own and that is only read from. `match` answers from what it was told, and asks nobody."""

    @property
    def watch(self) -> PromiseWatch:
        """Hears of what its owners are making for us."""
        ...

    def find(self, name: BlockHash) -> BlockMeta | None:
        """The metadata under which a block was last read there; None: not known."""
        ...

    def hint(self, hashes: Sequence[BlockHash], address: str) -> None:
        """These blocks lie there now, with the owner at that address."""
        ...

    def forget(self) -> None:
        """Believe nothing any more of what it was told."""
        ...

    def bar(self, hashes: Sequence[BlockHash]) -> None:
        """What lies there under these names may be wrong: `match` and `read` end before it, for a while."""
        ...


def prolonged(meta: BlockMeta, lifetime: Lifetime) -> BlockMeta:
    """The same block with the longer one of its lifetime and this one; itself, if that is its own."""
    own = meta.lifetime
    joined = own.joined(lifetime)
    return meta if joined is own else replace(meta, ttl_s=joined.ttl_s, until=joined.until)


def arrived_as(meta: BlockMeta, lifetime: Lifetime, wall: float) -> BlockMeta:
    """A block that a tier delivered when the wall clock said `wall`, promised its reader's lifetime as well.

    A fixed end in its metadata that has passed was prolonged there by somebody else, so it says nothing any more.
    """
    is_past = meta.until is not None and meta.until <= wall
    return prolonged(replace(meta, until=None) if is_past else meta, lifetime)


def chain_metas(
    hashes: Iterable[BlockHash], *, before: BlockHash, root: BlockHash, ttl_s: float | None, until: float | None = None
) -> list[BlockMeta]:
    """Metadata of consecutive blocks, the first of which follows `before`."""
    metas = []
    for name in hashes:
        metas.append(BlockMeta(name, before, root, ttl_s, until=until))
        before = name
    return metas
