"""What workers that send no K/V events are believed to hold: this router's own decisions, aged and corrected.

Covers: one LRU a tier and worker of the blocks that were sent there, how long they are believed, learning from what
answers say was reused, and the events that tell the index. Does not cover: prompts on their way (`traffic`), matching
(`index`): the index answers for these workers as for any other. Pure and synchronous, on an injected clock.

A block is believed from the first token of a prompt that has it until one of these:

- `ttl_s` have passed since it was last sent there (ten minutes until answers show that it lives longer; peers take two,
  for they know no worker's room: `bench.beliefs` finds 0.01 to 0.05 less with that) and the worker has reported
  removals from the tier since: while that count stands still, nothing has gone, however old;
- more recent blocks fill the tier: as many as the worker reports room for, or fewer where that was learnt;
- an answer reuses less than was believed. The first missing block was evicted, and a worker evicts in the order of use:
  whatever was used no later than that block is gone as well. How many were used since is what this router may count on:
  the rest of the room is used by others (other routers, answers), and the limit is set to that number.

When an answer reuses a block that was given up, the reason for giving it up was wrong: the limit grows by the blocks
that were there, or the time doubles, up to `LONGEST_TTL_S`.

Each router knows only what it sent itself. Blocks of answers are not believed before a prompt repeats them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from kvstore.chains import tree_runs
from kvstore.events import BlockRemoved, BlockStored, KvEvent, RemovalCause, TierName
from router.index import PrefixIndex

DEFAULT_TTL_S = 600.0
LONGEST_TTL_S = 3600.0


class _GivenUp(Enum):
    TIME = auto()
    ROOM = auto()


class _Level:
    """One tier of one worker: which blocks, the least recently used first, and when each was used."""

    def __init__(self, tier: TierName, ttl_s: float) -> None:
        self.tier = tier
        self.capacity = 0
        self.limit: int | None = None  # learnt; None: nothing speaks against the capacity
        self._least_ttl_s = self.ttl_s = ttl_s
        self._removals = 0
        self._removed_at = float("-inf")
        self._used: OrderedDict[bytes, tuple[float, bytes | None]] = OrderedDict()  # when, and the block before it
        # Why blocks are not believed any more; one that is sent again stays here until its answer is known.
        self._given_up: OrderedDict[bytes, _GivenUp] = OrderedDict()

    def __len__(self) -> int:
        return len(self._used)

    @property
    def room(self) -> int:
        """Blocks that are believed at most."""
        return self.capacity if self.limit is None else min(self.limit, self.capacity)

    def used_at(self, hashes: Sequence[bytes]) -> list[float]:
        """When each of the leading believed blocks was last used; ends before the first that is not believed."""
        times = []
        for block in hashes:
            entry = self._used.get(block)
            if entry is None:
                break
            times.append(entry[0])
        return times

    def reported(self, capacity: int, removals: int, now: float) -> None:
        """What the worker says: blocks that fit, and how many were removed since it started."""
        self.capacity = capacity
        if removals != self._removals:
            self._removals, self._removed_at = removals, now

    def use(self, hashes: Sequence[bytes], now: float) -> Iterator[KvEvent]:
        """A chain is there now; the events that say so, and which blocks had to go for it."""
        kept = hashes[: self.capacity]
        yield from self._stored(kept)
        for at in range(len(kept) - 1, -1, -1):  # last first: a worker evicts the tail of a chain before its head
            block = kept[at]
            self._used[block] = (now, kept[at - 1] if at else None)
            self._used.move_to_end(block)
        room = max(len(kept), self.room)  # it has just been there, whatever others use
        yield from self._give_up(len(self._used) - room, _GivenUp.ROOM, RemovalCause.EVICTED)

    def expire(self, now: float) -> Iterator[KvEvent]:
        """Blocks whose time is over."""
        late = 0
        for at, _ in self._used.values():
            if at + self.ttl_s > now or at > self._removed_at:
                break
            late += 1
        yield from self._give_up(late, _GivenUp.TIME, RemovalCause.EXPIRED)

    def refuted(self, used_at: float, missing: int, now: float) -> Iterator[KvEvent]:
        """A block that was last used then was not there: nor are those that were used no later.

        `missing`: blocks of its prompt from there on; they have been used again since.
        """
        gone = 0
        for at, _ in self._used.values():
            if at > used_at:
                break
            gone += 1
        self.ttl_s = max(self._least_ttl_s, min(self.ttl_s, now - used_at))
        self.limit = max(1, len(self._used) - gone - missing)
        yield from self._give_up(gone, _GivenUp.ROOM, RemovalCause.ABSENT)

    def surprised(self, hashes: Sequence[bytes]) -> None:
        """These were there, and not believed: learn from those that had been given up."""
        causes = [cause for block in hashes if (cause := self._given_up.pop(block, None)) is not None]
        if _GivenUp.TIME in causes:
            self.ttl_s = min(LONGEST_TTL_S, 2 * self.ttl_s)
        if self.limit is not None:
            self.limit = min(self.capacity, self.limit + causes.count(_GivenUp.ROOM))

    def forget(self, block: bytes) -> bool:
        """It is known not to be there; whether it was believed."""
        return self._used.pop(block, None) is not None

    def clear(self) -> list[KvEvent]:
        """Believe nothing; the event that says so."""
        gone = tuple(self._used)
        self._used.clear()
        self._given_up.clear()
        return [BlockRemoved(self.tier, gone, RemovalCause.CLEARED)] if gone else []

    def all(self) -> Iterator[BlockStored]:
        """What is believed, as a snapshot would tell it."""
        for parent, names in tree_runs({block: before for block, (_, before) in self._used.items()}):
            yield BlockStored(self.tier, tuple(names), parent)

    def _stored(self, hashes: Sequence[bytes]) -> Iterator[BlockStored]:
        start: int | None = None
        for at, block in enumerate(hashes):
            if block not in self._used:
                start = at if start is None else start
            elif start is not None:
                yield BlockStored(self.tier, tuple(hashes[start:at]), hashes[start - 1] if start else None)
                start = None
        if start is not None:
            yield BlockStored(self.tier, tuple(hashes[start:]), hashes[start - 1] if start else None)

    def _give_up(self, count: int, why: _GivenUp, cause: RemovalCause) -> Iterator[BlockRemoved]:
        if count <= 0:
            return
        gone = [self._used.popitem(last=False)[0] for _ in range(count)]
        self._given_up.update(dict.fromkeys(gone, why))
        while len(self._given_up) > self.capacity:
            self._given_up.popitem(last=False)
        yield BlockRemoved(self.tier, tuple(gone), cause)


class Room(NamedTuple):
    """What a worker reports of a tier: the blocks that fit, and how many were removed since it started."""

    blocks: int
    removals: int = 0


@dataclass(slots=True)
class _Worker:
    incarnation: int
    levels: tuple[_Level, _Level]  # device, host


class Placement:
    """One prompt on its way to a worker without events; tell it what became of it."""

    def __init__(
        self,
        books: Approximate,
        worker: str,
        hashes: Sequence[bytes],
        *,
        reads: bool,
        stores: bool,
        note_rooms: Callable[[], None] | None = None,
    ) -> None:
        """`note_rooms` tells the books what the worker reports: a prompt may be sent before its first report."""
        self._books, self._worker, self._note_rooms = books, worker, note_rooms
        self._hashes, self._reads, self._stores = hashes, reads, stores
        self._believed = books.used_at(worker, hashes)

    def computed(self) -> None:
        """A token came, so all of the prompt is there; only the first one says something new."""
        if self._stores:
            self._stores = False
            if self._note_rooms is not None:
                self._note_rooms()
            self._books.used(self._worker, self._hashes)

    def ended(self, fates: Mapping[str, int], block_size: int) -> None:
        """What its worker says was reused, in tokens by tier; empty: it did not say."""
        if not self._reads or not sum(fates.values()):
            return
        found = 0
        for number, tier in enumerate((TierName.DEVICE, TierName.HOST)):
            found += fates.get(tier, 0)
            # The last token is always computed, so that a block that was found may lack one.
            self._books.learn(self._worker, number, self._hashes, self._believed[number], -(-found // block_size))


class Approximate:
    """The books of all workers without events. One per router."""

    def __init__(self, index: PrefixIndex, clock: Callable[[], float], *, ttl_s: float = DEFAULT_TTL_S) -> None:
        """Tells `index`; `ttl_s`: how long a block is believed at first, and at least."""
        self._index, self._clock, self._ttl_s = index, clock, ttl_s
        self._workers: dict[str, _Worker] = {}

    def __contains__(self, worker: str) -> bool:
        """Whether it is one of them."""
        return worker in self._workers

    def joined(self, worker: str, incarnation: int) -> None:
        """A worker without events is connected. One that has not been restarted holds what was sent to it before."""
        known = self._workers.get(worker)
        if known is None or known.incarnation != incarnation:
            levels = (_Level(TierName.DEVICE, self._ttl_s), _Level(TierName.HOST, self._ttl_s))
            self._workers[worker] = _Worker(incarnation, levels)
            return
        for level in known.levels:
            self._tell(worker, known, level.all())

    def forget(self, worker: str) -> None:
        """It sends events now, or is gone for good."""
        self._workers.pop(worker, None)

    def cleared(self, worker: str) -> None:
        """It holds nothing of what was sent there, or what is believed was wrong."""
        if known := self._workers.get(worker):
            for level in known.levels:
                self._tell(worker, known, level.clear())

    def reported(self, worker: str, device: Room, host: Room) -> None:
        """What it reports of its tiers."""
        if known := self._workers.get(worker):
            for level, room in zip(known.levels, (device, host), strict=True):
                level.reported(room.blocks, room.removals, self._clock())

    def used_at(self, worker: str, hashes: Sequence[bytes]) -> list[list[float]]:
        """By tier, when each leading believed block was last used. A question."""
        known = self._workers.get(worker)
        return [level.used_at(hashes) for level in known.levels] if known else [[], []]

    def used(self, worker: str, hashes: Sequence[bytes]) -> None:
        """All of a prompt is there now."""
        if known := self._workers.get(worker):
            for level in known.levels:
                self._tell(worker, known, level.use(hashes, self._clock()))

    def learn(self, worker: str, number: int, hashes: Sequence[bytes], believed: Sequence[float], found: int) -> None:
        """Of a prompt the leading `believed` blocks were thought in tier `number` or a faster one, and `found` were."""
        if (known := self._workers.get(worker)) is None:
            return
        level = known.levels[number]
        if found < len(believed):
            self._tell(worker, known, level.refuted(believed[found], len(hashes) - found, self._clock()))
        else:
            level.surprised(hashes[len(believed) : found])

    def located(self, worker: str, block: bytes, tiers: Collection[TierName]) -> None:
        """A probe says where a block lies."""
        if (known := self._workers.get(worker)) is None:
            return
        for level in known.levels:
            if level.tier in tiers:
                level.surprised([block])
            elif level.forget(block):
                self._tell(worker, known, [BlockRemoved(level.tier, (block,), RemovalCause.ABSENT)])

    def expire(self) -> None:
        """Give up what has been believed long enough. O(blocks given up + workers)."""
        now = self._clock()
        for worker, known in self._workers.items():
            for level in known.levels:
                self._tell(worker, known, level.expire(now))

    def _tell(self, worker: str, known: _Worker, events: Iterable[KvEvent]) -> None:
        if told := list(events):
            self._index.apply(worker, known.incarnation, told)
