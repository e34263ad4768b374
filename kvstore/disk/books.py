"""The disk tier's books: which slot holds which block, who uses it, what was counted, what the log must be told.

Covers: names, slots, eviction, leases, events, counters. Does not cover: bytes, files, locks: whoever calls it holds
the tier's lock. All is O(1) a block, but for expiry, which is O(log n), and `check`.

A slot is being written (`_writing`), holds a block (`entries`), or has lost its block while somebody is still at it
(`_zombies`: the last one gives it back); all others are free.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from math import inf
from operator import itemgetter

from kvstore.blocks import BlockHash, short
from kvstore.chains import consecutive_runs, stored_events
from kvstore.disk.entries import Entry, FreeSlots, by_use, end_of
from kvstore.disk.journal import Journal
from kvstore.disk.log import INDEX, SEQUENCE, Found
from kvstore.disk.restored import Restored
from kvstore.errors import InvariantError, MissReason
from kvstore.events import BlockRemoved, KvEvent, RemovalCause, TierName
from kvstore.eviction.entries import EXPIRED_AT_ONCE
from kvstore.eviction.policies import Eviction, hint_of, make_eviction
from kvstore.eviction.tail import DEFAULT_SPARE_BLOCKS, SpareBlocks
from kvstore.lifetime import Lifetime
from kvstore.tier import BlockMeta, Clock, prolonged


class DiskBooks:
    """Books of `num_slots` slots.

    Attributes:
        entries: blocks that are held and loaded, expired or not. journal: what the log must be told.
        events, hits, stores, misses, removals, failures: as in `TierStats`.
    """

    def __init__(
        self,
        num_slots: int,
        *,
        clock: Clock,
        wall_clock: Clock,
        eviction: str,
        shares: Mapping[Hashable, int] | None = None,
        spare_blocks: SpareBlocks = DEFAULT_SPARE_BLOCKS,
    ) -> None:
        """Books of empty slots; `shares` in slots.

        Raises:
            ValueError: there is no eviction policy of that name, or the shares do not fit.
        """
        self.num_slots = num_slots
        self.entries: dict[BlockHash, Entry] = {}
        self.events: list[KvEvent] = []
        self.hits = self.stores = 0
        self.misses: Counter[str] = Counter()
        self.removals: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.journal = Journal(clock, wall_clock)
        self._clock = clock
        self._wall_clock = wall_clock
        self._past: float | None = None  # the time that `_now` tells while a past is restored
        self._eviction: Eviction[BlockHash] = make_eviction(
            eviction, self._now, num_slots, wall_clock=self._wall_now, shares=shares, spare_blocks=spare_blocks
        )
        self._writing: set[Entry] = set()
        self._zombies: set[Entry] = set()
        self._free = FreeSlots(num_slots)
        self._sequence = 0
        self._uses = 0
        self._restored = Restored([], clock=0.0, wall=0.0)  # those that are not loaded yet
        self._restored_uses = 0  # uses up to here are of an earlier process; zero: all are loaded

    @property
    def used_slots(self) -> int:
        """Slots that are not free."""
        return self.num_slots - len(self._free)

    @property
    def free_slots(self) -> int:
        """Slots that are free."""
        return len(self._free)

    @property
    def coming(self) -> set[Entry]:
        """Slots that are reserved and not published yet. A copy."""
        return set(self._writing)

    @property
    def is_loading(self) -> bool:
        """Whether eviction does not know all restored blocks yet."""
        return len(self._restored) > 0

    @property
    def blocks(self) -> int:
        """Blocks that are held, expired or not."""
        return len(self.entries) + len(self._restored)

    @property
    def leased(self) -> int:
        """Blocks under a lease. O(blocks that are not loaded yet)."""
        return self._eviction.leased + self._restored.leased(self._clock())

    def live(self, name: BlockHash) -> bool:
        """Whether the block can be read now."""
        if name in self.entries:
            return not self._eviction.expired(name)
        return self._restored.live(name, self._clock())

    def entry(self, name: BlockHash) -> Entry | None:
        """The slot that holds the block, expired or not; None: none does."""
        return self._load(name) if name in self._restored else self.entries.get(name)

    def leading(self, hashes: Sequence[BlockHash]) -> int:
        """How many leading blocks can be read now."""
        for count, name in enumerate(hashes):
            if not self.live(name):
                return count
        return len(hashes)

    def why_missing(self, name: BlockHash) -> MissReason:
        """Why a block that is not live cannot be read."""
        held = name in self.entries or name in self._restored
        return MissReason.EXPIRED if held else MissReason.ABSENT

    def pin(self, hashes: Sequence[BlockHash]) -> list[Entry]:
        """Keep held blocks for a reader."""
        entries = [entry for name in hashes if (entry := self.entry(name)) is not None]
        for entry in entries:
            self._hold(entry)
        return entries

    def unpin(self, entries: Sequence[Entry]) -> None:
        """Undo a pin of each, last first: that is a use, and the tail of a chain must be the oldest."""
        for entry in reversed(entries):
            entry.pins -= 1
            if entry.removed:
                self._give_back(entry)
            else:
                self._eviction.unpin(entry.meta.hash)
                self._used(entry)

    def logged(self) -> list[Entry]:
        """Slots whose store the log knows of, and no removal."""
        coming = [entry for entry in self._writing if entry.announced and not entry.removed]
        return list(self.entries.values()) + coming

    def held_slots(self) -> list[int]:
        """Slots that hold blocks, expired or not, and those of which the log knows already. O(blocks)."""
        return self._restored.slots() + [entry.index for entry in self.logged()]

    def look(self, first: int, count: int) -> list[Entry]:
        """Keep so many slots that hold a block for an audit. It is no use."""
        entries = list(islice(self.entries.values(), first, first + count))
        for entry in entries:
            entry.pins += 1
            entry.views += 1
        return entries

    def look_away(self, entries: Iterable[Entry]) -> None:
        """The audit has ended."""
        for entry in entries:
            entry.pins -= 1
            entry.views -= 1
            if entry.removed:
                self._give_back(entry)

    def use(self, hashes: Sequence[BlockHash]) -> None:
        """Blocks of a chain were used; last first, so that its tail is evicted before its head."""
        for entry in self._living(reversed(hashes)):
            self._eviction.use(entry.meta.hash)
            self._used(entry)

    def prolong(self, hashes: Sequence[BlockHash], lifetime: Lifetime) -> None:
        """As `use`, and from now on each lives as long as the longer one of its own lifetime and this one says."""
        for entry in self._living(reversed(hashes)):
            self._prolong(entry, lifetime)

    def ttl_left_s(self, name: BlockHash) -> float | None:
        """Seconds until a held block expires; None: never, or while it is in use."""
        if name in self.entries:
            return self._eviction.remaining_s(name)
        return self._restored.ttl_left_s(name, self._clock())

    def lease(self, hashes: Sequence[BlockHash], for_s: float | None) -> int:
        """As `Tier.lease`."""
        now, count = self._now(), 0
        for entry in self._living(hashes):
            if not self._eviction.lease(entry.meta.hash, None if for_s is None else now + for_s):
                continue
            count += 1
            if entry.lease is None or end_of(now, for_s) > end_of(*entry.lease):
                entry.lease = now, for_s
                self.journal.leased(entry)
        return count

    def end_leases(self, hashes: Sequence[BlockHash]) -> int:
        """As `Tier.end_leases`."""
        held = [entry for name in hashes if (entry := self.entry(name)) is not None]
        ended = [entry for entry in held if self._eviction.end_lease(entry.meta.hash)]
        for entry in ended:
            entry.lease = None
        self.journal.released(ended)
        return len(ended)

    def leases(self) -> dict[BlockHash, float | None]:
        """Blocks under a lease, and for how many seconds more; None: until it is ended. O(blocks)."""
        now = self._now()
        ends = self._restored.lease_ends()
        ends |= {name: end_of(*entry.lease) for name, entry in self.entries.items() if entry.lease is not None}
        return {name: None if end == inf else end - now for name, end in ends.items() if end > now}

    def reserve(self, metas: Sequence[BlockMeta]) -> tuple[list[Entry], list[tuple[int, Entry]], int]:
        """Pin what is held and reserve slots for the rest: (held, [(number in the batch, reserved)], how many)."""
        held: list[Entry] = []
        fresh: list[tuple[int, Entry]] = []
        for number, meta in enumerate(metas):
            known = self.entry(meta.hash)
            if known is not None:
                self._prolong(known, meta.lifetime)
                self._hold(known)
                held.append(known)
                continue
            index = self._take_slot(meta.root)
            if index is None:
                self.failures["full"] += 1
                return held, fresh, number
            self._sequence += 1
            coming = Entry(index, meta, self._sequence, self._now(), pins=1)
            self._writing.add(coming)
            fresh.append((number, coming))
        return held, fresh, len(metas)

    def announce(self, entries: Sequence[Entry]) -> None:
        """Slots are filled: make the records without which they do not count. Tail first, as `publish` uses them."""
        for entry in reversed(entries):
            entry.used = self._now()
            if not entry.removed:
                entry.announced = True
                self.journal.stored(entry)

    def withdraw(self, entries: Sequence[Entry]) -> None:
        """Slots are being filled, and what is in them shall not be found, nor come back should the process end now."""
        fresh = [entry for entry in entries if not entry.removed]
        for entry in fresh:
            entry.removed = True
        self.journal.removed([entry for entry in fresh if entry.announced])

    def publish(self, entries: Sequence[Entry]) -> None:
        """The log knows those that were announced: let them be found. Free the slots of all others."""
        published = []
        for entry in reversed(entries):
            self._writing.discard(entry)
            entry.pins -= 1
            if entry.removed or not entry.announced or self.entry(entry.meta.hash):  # cleared, failed, or too late
                self.withdraw([entry])
                self._free.give(entry.index)
                continue
            self._hold_block(entry)
            self._uses += 1
            entry.order, entry.used = self._uses, self._now()
            published.append(entry.meta.link)
        self.stores += len(published)
        self.events += stored_events(TierName.DISK, consecutive_runs(reversed(published)))

    def take_out(self, hashes: Iterable[BlockHash], cause: RemovalCause) -> list[Entry]:
        """Drop those that are held, and those that are being written. Give the slots back by `unpin`."""
        chosen = dict.fromkeys(hashes)
        self.withdraw([coming for coming in self._writing if coming.meta.hash in chosen])
        gone = [entry for name in chosen if (entry := self.entry(name)) is not None]
        for entry in gone:
            entry.pins += 1
            self._eviction.remove(entry.meta.hash)
        self._forget(gone, cause)
        return gone

    def metas(self, *, coming: bool) -> list[BlockMeta]:
        """Of all blocks that are held; with `coming`, also of those that are being written."""
        writing = [entry.meta for entry in self._writing] if coming else []
        return self._restored.metas() + [entry.meta for entry in self.entries.values()] + writing

    def expire(self) -> float | None:
        """Drop what has expired, not too much at once; seconds until the next block expires, None when none will."""
        expired = [self.entries[name] for name in self._eviction.pop_expired(EXPIRED_AT_ONCE)]
        self._forget(expired, RemovalCause.EXPIRED)
        return self._eviction.next_expiry_s()

    def restore(self, found: Sequence[Found]) -> None:
        """Hold what a file was found to hold, least recently used first. Only for new books.

        The blocks can be found at once; `load` does the rest.
        """
        self._restored = Restored(found, clock=self._clock(), wall=self._wall_clock())
        self._uses = self._restored_uses = len(found)
        self._free.take_all(set(map(itemgetter(INDEX), found)))
        self._sequence = max(map(itemgetter(SEQUENCE), found), default=0)

    def load(self, count: int) -> bool:
        """Tell eviction of at most `count` restored blocks more; whether some are left.

        Eviction takes every block that it is told of for the latest, at the time of its last use: so the oldest go
        first, and when all are there, those that were used meanwhile are used again.
        """
        for name in self._restored.first(count):
            self._load(name)
        if self.is_loading or not self._restored_uses:
            return self.is_loading
        again = [entry for entry in self.entries.values() if entry.order > self._restored_uses]
        self._restored_uses = 0
        for entry in sorted(again, key=by_use):
            self._past = entry.used
            self._eviction.use(entry.meta.hash)
        self._past = None
        return False

    def check(self) -> None:
        """Audit the books. O(slots).

        Raises:
            InvariantError: they disagree.
        """
        self._eviction.check()
        kinds = (self.entries.values(), self._writing, self._zombies)
        used = [entry.index for kind in kinds for entry in kind]
        self._free.check(used)
        if set(self._eviction) != set(self.entries):
            raise InvariantError("names and eviction differ")
        for name, entry in self.entries.items():
            if entry.meta.hash != name or entry.removed or self._eviction.pins(name) != entry.pins - entry.views:
                raise InvariantError(f"slot {entry.index} is known under another name or with other pins")
            if self._eviction.is_leased(name) and entry.lease is None:
                raise InvariantError(f"the lease of slot {entry.index} is not written down")
        if any(not entry.removed or entry.pins < 1 for entry in self._zombies):
            raise InvariantError("a removed slot without readers was not given back")

    def _now(self) -> float:
        return self._clock() if self._past is None else self._past

    def _wall_now(self) -> float:
        """What the wall clock said at the time that `_now` tells, by the rates of both clocks since."""
        wall = self._wall_clock()
        return wall if self._past is None else wall - (self._clock() - self._past)

    def _living(self, names: Iterable[BlockHash]) -> Iterator[Entry]:
        """The slots of those blocks that can be read now."""
        for name in names:
            if self.live(name) and (entry := self.entry(name)) is not None:
                yield entry

    def _load(self, name: BlockHash) -> Entry | None:
        """Tell eviction of a restored block, as if it were the time of its last use."""
        entry = self._restored.take(name)
        if entry is None:
            return None
        self._past = entry.used
        self._hold_block(entry)
        if entry.lease is not None:
            promised, for_s = entry.lease
            self._eviction.lease(name, None if for_s is None else promised + for_s)
        self._past = None
        return entry

    def _hold_block(self, entry: Entry) -> None:
        meta = entry.meta
        self.entries[meta.hash] = entry
        self._eviction.add(meta.hash, meta.ttl_s, until=meta.until, hint=hint_of(meta))

    def _hold(self, entry: Entry) -> None:
        entry.pins += 1
        self._eviction.pin(entry.meta.hash)

    def _used(self, entry: Entry) -> None:
        self._uses += 1
        entry.order, entry.used = self._uses, self._now()
        self.journal.used(entry)

    def _prolong(self, entry: Entry, lifetime: Lifetime) -> None:
        self._eviction.prolong(entry.meta.hash, lifetime)
        meta = prolonged(entry.meta, lifetime)
        if meta is not entry.meta:
            entry.meta = meta
            self.journal.prolonged(entry)
        self._used(entry)

    def _take_slot(self, root: BlockHash) -> int | None:
        """A free slot for a block of that root, made by eviction if need be; None: no block may go for it."""
        if not self._free:
            self.load(
                len(self._restored)
            )  # eviction must know all of them; the tier has seen to it in nearly all cases
        while not self._free and self._eviction.next_expiry_s() == 0.0:  # not all may have been dropped yet
            self.expire()
        while not self._free and (victim := self._eviction.victim(root=root)) is not None:
            self._eviction.remove(victim)
            self._forget([self.entries[victim]], RemovalCause.EVICTED)
        return self._free.take()

    def _forget(self, entries: Sequence[Entry], cause: RemovalCause) -> None:
        """Drop blocks that eviction does not hold any more; slots are free now, or when nobody is at them."""
        if not entries:
            return
        for entry in entries:
            del self.entries[entry.meta.hash]
            entry.removed = True
            if entry.pins == 0:
                self._free.give(entry.index)
            else:
                self._zombies.add(entry)
        self.journal.removed(entries)
        self.removals[cause] += len(entries)
        self.events.append(BlockRemoved(TierName.DISK, tuple(short(e.meta.hash) for e in entries), cause))

    def _give_back(self, entry: Entry) -> None:
        if entry.pins == 0:
            self._zombies.discard(entry)
            self._free.give(entry.index)
