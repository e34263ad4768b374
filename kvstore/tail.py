"""The back of a prompt's prefix on its way to the device while its front is computed, as its owner sees it.

Blocks come in pieces, the last piece first, and each goes into device blocks when it has come. The front never waits:
it computes on, in chunks that end where something may have changed, and takes over the blocks that it has come up to.
What it has passed is loaded no more. So a tier that is slower than expected moves the meeting place back, and one that
falls silent, or lacks a block, costs nothing but what has been read in vain.

Covers: which blocks are held, how far the front should go, which piece is next. Does not cover: reads, putting blocks
into the device (`tails`), when it is worthwhile (`meeting`). For the engine's thread, except `next_piece`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from kvstore.acquisition import Wish
from kvstore.blocks import BlockHash
from kvstore.events import TierName
from kvstore.loading import Load
from kvstore.meeting import meeting
from kvstore.patience import DEFAULT_SLACK_S, Limit
from kvstore.source import Source
from kvstore.tier import BlockMeta, Clock

PATIENCE = 4.0  # a piece that takes so many times longer than predicted, and the slack, is expected no more


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast pieces come: blocks in each, milliseconds a block, and those that reads asked for before take."""

    piece: int
    block_ms: float
    queued_ms: float

    def load_ms(self, count: int) -> float:
        """Time until so many blocks have come."""
        return self.queued_ms + count * self.block_ms


class Tail:
    """Places `first` to `stop` of a prompt, from its back. `TieredStore` makes it; whoever computes the front owns it.

    Attributes:
        source, wish, metas: what is read, from where. first, stop: its places in the wish.
        floor: the front is on its way to this place, and what lies before it is of no use any more.
        current: the piece that is being read, or was the last one. finished: pieces that are to be put into the device.
        has_ended: no more pieces come. cancelled: nobody wants them.
    """

    def __init__(
        self,
        source: Source,
        wish: Wish,
        first: int,
        metas: Sequence[BlockMeta],
        pace: Pace,
        *,
        clock: Clock,
        give_back: Callable[[Sequence[int]], None],
    ) -> None:
        """Nothing has come. `give_back` releases device blocks."""
        self.source, self.wish, self.metas = source, wish, metas
        self.first, self.stop, self.floor = first, first + len(metas), first
        self.current: Load | None = None
        self.finished: deque[Load] = deque()
        self.has_ended = self.cancelled = False
        self._pace, self._clock, self._give_back = pace, clock, give_back
        self._lock = threading.Lock()
        self._asked = self._edge = self.stop  # where the piece ends that is read next; where those end that have come
        self._held: dict[int, int] = {}  # device blocks, by place
        self._copied: set[int] = set()  # places whose bytes have come and are on their way into the device

    # --- for the owner ---

    @property
    def block_ids(self) -> list[int]:
        """Device blocks that it references now, in the order of the prompt."""
        return [block_id for _, block_id in sorted(self._held.items())]

    @property
    def is_over(self) -> bool:
        """Whether there is nothing to take, and nothing will come."""
        return not (self._held or self._copied_ahead or self._is_coming)

    @property
    def expected(self) -> int:
        """Blocks that need not be computed, as it looks now."""
        there = len(self._held) + self._copied_ahead
        if not self._is_coming:
            return there
        return there + max(0, self._edge - self.floor - self._front_blocks(self.floor))

    def take(self, place: int) -> tuple[list[int], list[TierName]]:
        """The blocks that are there from `place` on, without a hole: the caller's from now on, and their tiers."""
        block_ids: list[int] = []
        while place + len(block_ids) in self._held:
            block_ids.append(self._held.pop(place + len(block_ids)))
        if block_ids:
            self.passed(place + len(block_ids))
        return block_ids, [self.source.name] * len(block_ids)

    def reach(self, place: int) -> int | None:
        """How many blocks the front should compute from `place` on before it looks again; None: as many as it likes.

        Up to what is there; before that, to where it will meet what comes, but not less than it computes while one
        piece comes: sooner nothing will have changed. What is being copied is there by the next look, as a rule: who
        has come up to it computes one block more, since nobody waits.
        """
        if not self._is_coming or self._edge <= place:
            near = min((each for each in (*self._held, *self._copied) if each >= place), default=None)
            return None if near is None else max(near - place, int(near in self._copied))
        ahead = self._edge - place
        return max(1, min(ahead, max(self._front_blocks(place), self._blocks_a_piece(place, ahead))))

    def passed(self, place: int) -> None:
        """The front is on its way to this place: what lies before it need not come."""
        self.floor = max(self.floor, place)

    def cancel(self) -> None:
        """Give all blocks back, and read no further piece. Again: nothing happens."""
        self.cancelled = True
        self._give_back(self.block_ids)
        self._held.clear()
        self._copied.clear()

    # --- for who reads ---

    def next_piece(self) -> Load | None:
        """The piece to read now; None: there is none. For the thread that reads."""
        with self._lock:
            stop = self._asked
            first = max(self.floor, stop - self._pace.piece)
            if self.cancelled or self.has_ended or first >= stop:
                return None
            metas = list(self.metas[first - self.first : stop - self.first])
            load = Load(self.source, metas, self.wish, first, None, [self._limit(len(metas))])
            load.started = self._clock()
            self._asked, self.current = first, load
            return load

    def add_piece(self, load: Load) -> None:
        """A piece was read. For the thread that reads."""
        with self._lock:
            self.finished.append(load)

    def has_come(self, load: Load) -> int:
        """What comes next lies before this piece; how many of its blocks the front has passed already."""
        self._edge = load.first
        return max(0, self.floor - load.first)

    def copied_from_now(self, places: Iterable[int]) -> None:
        """The blocks of these places are being copied to the device."""
        self._copied.update(places)

    def copied(self, places: Iterable[int]) -> None:
        """They have been."""
        self._copied.difference_update(places)

    def hold(self, block_ids: Mapping[int, int]) -> None:
        """These are there, by place, referenced for it."""
        self._held.update(block_ids)

    def discard(self) -> None:
        """What it reads was cleared: it is used nowhere, and written to no other tier any more."""
        with self._lock:
            self.cancel()
            loads = [*self.finished, *([] if self.current is None else [self.current])]
        for each in loads:
            with each.lock:
                each.discarded = True

    def is_late(self) -> bool:
        """Whether the piece that is being read should have come long ago."""
        load = self.current
        return load is not None and not self.has_ended and self._clock() >= load.started + load.limit_s

    def brings(self, names: set[BlockHash]) -> bool:
        """Whether one of these is in it."""
        return any(meta.hash in names for meta in self.metas)

    @property
    def _is_coming(self) -> bool:
        return not (self.has_ended or self.cancelled) and self.floor < self._edge

    @property
    def _copied_ahead(self) -> int:
        """Blocks that are being copied and that the front has not passed."""
        return sum(place >= self.floor for place in self._copied)

    def _front_blocks(self, place: int) -> int:
        """Blocks from `place` on that are computed until the others are there."""
        load = self.current
        waited_ms = 0.0 if load is None else max(0.0, 1e3 * (self._clock() - load.started))
        return meeting(
            max(0, self._edge - place),
            compute_ms=lambda count: self._compute_ms(place, count),
            load_ms=lambda count: max(0.0, self._pace.load_ms(count) - waited_ms),
        )

    def _blocks_a_piece(self, place: int, most: int) -> int:
        piece_ms = self._pace.piece * self._pace.block_ms
        return meeting(most, compute_ms=lambda count: self._compute_ms(place, count), load_ms=lambda _: piece_ms)

    def _compute_ms(self, place: int, count: int) -> float:
        return (self.wish.price(place, count) or 0.0) if count else 0.0

    def _limit(self, count: int) -> Limit:
        healthy_s = count * self._pace.block_ms / 1e3
        return Limit(count, PATIENCE * healthy_s + DEFAULT_SLACK_S, healthy_s)
