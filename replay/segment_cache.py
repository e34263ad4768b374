"""A tier as a least recently used cache of segments: some in use, some held in part, all with a lifetime.

Covers: what is held, what is in use, room for blocks without a name, what goes for lack of room or by its TTL, and what
changed since one last asked. Does not cover: time (callers pass it), which request uses what (`sequences`).

Exact to the block where chains are used from their first block on: what is in use stays, what is not goes in order of
its last use, and a segment's last blocks go first. So of a segment a leading part is held, and of a chain mostly, too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from kvstore.errors import InvariantError
from kvstore.events import TierName
from replay.engine import CacheChange
from replay.workload import Chain

_FOREVER = float("inf")


class SegmentCache:
    """One tier. Segments beyond `lengths` are nobody's prompt (answers): they take room, and nobody is told of them.

    Attributes:
        used: blocks of segments. reserved: blocks without a name.
    """

    def __init__(
        self,
        tier: TierName,
        capacity: int,
        lengths: Sequence[int],
        *,
        ttl_s: float | None = None,
        evicting: Callable[[int, int], None] | None = None,
    ) -> None:
        """Hold nothing.

        Args:
            capacity: blocks. lengths: blocks of each segment of the workload. ttl_s: from the last use; None: for ever.
            evicting: is told (segment, blocks) when the first of its blocks go for lack of room.
        """
        self.tier = tier
        self.used = self.reserved = 0
        self._capacity = capacity
        self._lengths = lengths
        self._ttl_s = ttl_s
        self._evicting = evicting
        self._held: dict[int, int] = {}
        self._users: dict[int, int] = {}
        self._in_use = 0  # blocks of segments with a user
        self._idle: OrderedDict[int, float] = OrderedDict()  # segments without: when last used; least recently first
        self._told: dict[int, int] = {}  # blocks as they were told
        self._changed: set[int] = set()

    @property
    def available(self) -> int:
        """Blocks that can be had, by eviction if need be."""
        return self._capacity - self.reserved - self._in_use

    def held(self, segment: int) -> int:
        """Leading blocks of a segment."""
        return self._held.get(segment, 0)

    def leading(self, chain: Chain) -> int:
        """Blocks of a chain that are held from its start on."""
        held, start = self._held, 0
        for segment, end in zip(chain.segments, chain.ends, strict=True):
            there = held.get(segment, 0)
            if there < end - start:
                return start + there
            start = end
        return start

    def run(self, chain: Chain, first: int) -> int:
        """The end of the run of held blocks that begins with block `first` of a chain; `first`: there is none."""
        at = chain.whole_segments(first)
        start = chain.blocks(at)
        for segment, end in zip(chain.segments[at:], chain.ends[at:], strict=True):
            there = self._held.get(segment, 0)
            if there < end - start:
                return max(first, start + there)
            start = end
        return max(first, start)

    # Use

    def pin(self, segment: int) -> None:
        """One more user."""
        users = self._users.get(segment, 0)
        self._users[segment] = users + 1
        if not users:
            self._in_use += self._held.get(segment, 0)
            self._idle.pop(segment, None)

    def unpin(self, segments: Sequence[int], now: float) -> None:
        """One user fewer of each; given in chain order, the last one will be the first to go."""
        users, held, idle = self._users, self._held, self._idle
        for segment in reversed(segments):
            left = users[segment] - 1
            if left:
                users[segment] = left
                continue
            del users[segment]
            blocks = held.get(segment, 0)
            if blocks:
                self._in_use -= blocks
                idle[segment] = now

    def touch(self, segments: Sequence[int], now: float) -> None:
        """Those that are held were used."""
        idle = self._idle
        for segment in reversed(segments):
            if segment in idle:
                idle[segment] = now
                idle.move_to_end(segment)

    # Room

    def reserve(self, count: int) -> bool:
        """Take blocks without a name, evicting as needed; all or none."""
        if count > self.available:
            return False
        self._make_room(count)
        self.reserved += count
        return True

    def free(self, count: int) -> None:
        """Give blocks without a name back."""
        self.reserved -= count

    def name(self, segment: int, blocks: int) -> int:
        """A segment in use has that many leading blocks now: how many reserved ones became named."""
        fresh = blocks - self._held.get(segment, 0)
        if fresh <= 0:
            return 0
        self._held[segment] = blocks
        self.reserved -= fresh
        self.used += fresh
        self._in_use += fresh
        self._note(segment)
        return fresh

    def put(self, segment: int, blocks: int, now: float) -> bool:
        """Hold at least these leading blocks, as the last ones used; whether any are new. Only without users."""
        there = self._held.get(segment, 0)
        self._idle[segment] = now
        self._idle.move_to_end(segment)
        if blocks <= there:
            return False
        self._held[segment] = blocks
        self.used += blocks - there
        self._note(segment)
        self._make_room(0)
        return True

    def expire(self, now: float) -> None:
        """Drop what was not used for the TTL."""
        if self._ttl_s is None:
            return
        idle, long_ago = self._idle, now - self._ttl_s
        while idle:
            segment = next(iter(idle))
            if idle[segment] > long_ago:
                return
            self._lose(segment, self._held[segment])

    def clear(self) -> None:
        """Hold nothing, without a word: its worker died."""
        self.used = self.reserved = self._in_use = 0
        for part in (self._held, self._users, self._idle, self._told, self._changed):
            part.clear()

    # What changed

    def changes(self) -> CacheChange | None:
        """What changed since the last call; None: nothing."""
        if not self._changed:
            return None
        stored, removed, partial = [], [], {}
        for segment in sorted(self._changed):
            length, now, before = self._lengths[segment], self._held.get(segment, 0), self._told.get(segment, 0)
            if now == before:
                continue
            if now == length:
                stored.append(segment)
            elif before == length:
                removed.append(segment)
            if 0 < now < length:
                partial[segment] = now
            elif 0 < before < length:
                partial[segment] = 0
            self._remember(segment, now)
        self._changed.clear()
        return CacheChange(self.tier, stored, removed, partial) if stored or removed or partial else None

    def all(self) -> CacheChange:
        """Everything that was told and is held, as a change from nothing."""
        whole = [segment for segment, blocks in self._told.items() if blocks == self._lengths[segment]]
        partial = {segment: blocks for segment, blocks in self._told.items() if blocks < self._lengths[segment]}
        return CacheChange(self.tier, sorted(whole), (), partial)

    def check(self) -> None:
        """Raises InvariantError when the books are wrong. O(everything)."""
        held, users = self._held, self._users
        _expect(self.used == sum(held.values()), "used blocks are not those of the segments")
        _expect(self._in_use == sum(held.get(s, 0) for s in users), "blocks in use are not those of segments in use")
        _expect(self.used + self.reserved <= self._capacity, "more blocks than there are")
        _expect(self.reserved >= 0, "fewer than no blocks without a name")
        _expect(set(self._idle) == {s for s in held if s not in users}, "idle segments are not those without users")
        _expect(all(held.values()), "an empty segment is held")

    # Inside

    def _make_room(self, count: int) -> None:
        over = self.used + self.reserved + count - self._capacity
        while over > 0:
            segment = next(iter(self._idle))
            blocks = self._held[segment]
            if self._evicting is not None:
                self._evicting(segment, blocks)
            going = min(blocks, over)
            self._lose(segment, going)
            over -= going

    def _lose(self, segment: int, blocks: int) -> None:
        left = self._held[segment] - blocks
        self.used -= blocks
        if left:
            self._held[segment] = left
        else:
            del self._held[segment]
            del self._idle[segment]
        self._note(segment)

    def _note(self, segment: int) -> None:
        if segment < len(self._lengths):
            self._changed.add(segment)

    def _remember(self, segment: int, blocks: int) -> None:
        if blocks:
            self._told[segment] = blocks
        else:
            self._told.pop(segment, None)


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise InvariantError(f"simulated tier: {message}; please report this with the workload")
