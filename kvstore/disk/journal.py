"""What the disk tier's log must be told: records of the changes of its books, in order.

Uses are coalesced: of many uses of a block between two calls of `take` only the last one is told, after all else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from kvstore.disk.entries import Entry, by_use
from kvstore.disk.log import Kind, Record
from kvstore.tier import Clock


class Journal:
    """Records that no log knows yet. Times in them are seconds since the epoch."""

    def __init__(self, clock: Clock, wall_clock: Clock) -> None:
        """Nothing has changed yet."""
        self._clock = clock
        self._wall_clock = wall_clock
        self._records: list[Record] = []
        self._uses: dict[Entry, None] = {}  # oldest first

    def stored(self, entry: Entry) -> None:
        """A slot holds a block."""
        self._records.append(self._stored(entry))

    def removed(self, entries: Sequence[Entry]) -> None:
        """Slots hold no blocks any more."""
        for entry in entries:
            self._uses.pop(entry, None)
        if entries:
            self._records.append((Kind.REMOVED, [entry.index for entry in entries]))

    def used(self, entry: Entry) -> None:
        """A block was used."""
        self._uses.pop(entry, None)
        self._uses[entry] = None

    def prolonged(self, entry: Entry) -> None:
        """A block has a longer lifetime."""
        self._records.append((Kind.PROLONGED, entry.index, entry.meta.ttl_s, entry.meta.until))

    def leased(self, entry: Entry) -> None:
        """A block has a longer lease, from now on."""
        for_s = None if entry.lease is None else entry.lease[1]
        self._records.append((Kind.LEASED, entry.index, self._wall_clock(), for_s))

    def released(self, entries: Sequence[Entry]) -> None:
        """Leases were ended."""
        if entries:
            self._records.append((Kind.RELEASED, [entry.index for entry in entries]))

    def take(self) -> list[Record]:
        """All records since the last call."""
        records, self._records = self._records, []
        if self._uses:
            uses: list[int | float] = []
            for entry in self._uses:
                uses += (entry.index, self._wall(entry.used))
            records.append((Kind.USED, uses))
            self._uses.clear()
        return records

    def all(self, entries: Iterable[Entry]) -> Iterator[Record]:
        """Records that say the same of these slots as all of them so far."""
        for entry in sorted(entries, key=by_use):
            yield self._stored(entry)
            lease = entry.lease  # once: it may be ended meanwhile
            if lease is not None:
                yield Kind.LEASED, entry.index, self._wall(lease[0]), lease[1]

    def _stored(self, entry: Entry) -> Record:
        meta = entry.meta
        place = (Kind.STORED, entry.index, entry.sequence, meta.hash, meta.parent, meta.root)
        return *place, meta.ttl_s, meta.until, meta.priority, meta.turn, self._wall(entry.used)

    def _wall(self, time: float) -> float:
        """A time of the tier's clock in seconds since the epoch."""
        return self._wall_clock() - (self._clock() - time)
