"""What a worker makes for others: chains whose prefill goes on, how far each is, and who waits to hear of it.

Covers: the board that the engine writes and the peer server reads. Does not cover: the protocol (`wire`), how those who
wait decide whether to go on waiting (`kvstore.promised`).

A promise has the name of the last block that is promised, which names the whole chain. It is counted in leading blocks
that the host tier was given; whether they are still there is found out by who reads them. What has ended is remembered
for a while: who asks a moment too late shall not wait for something that will never begin.

Who waits for a chain asks about it again and again, until it has read what it wants or its own deadline has passed. So
a chain that has ended and was asked about just now is still to be read, and a maker that would end should stay.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from kvstore.blocks import BlockHash
from kvstore.tier import Clock

MAX_ENDED = 1024
# Whoever waits asks forty times a second (`watch`); after this much silence it waits no more, or is gone.
SILENCE_S = 0.5
# For a first question about a chain that has ended: its reader's job may be on its way, or queued there.
FIRST_QUESTION_S = 1.0
NOBODY_ASKED = float("-inf")


class PromiseState(IntEnum):
    """How a promise stands; the numbers go over the wire."""

    UNKNOWN = 0  # nobody has begun it here, yet
    UNDER_WAY = 1
    ENDED = 2  # no more will come


class Progress(NamedTuple):
    """How far a promise is.

    Attributes:
        made: leading blocks that can be read. found: of them, those that were there before it began.
    """

    state: PromiseState
    made: int
    found: int

    @property
    def is_over(self) -> bool:
        """Whether no more will come."""
        return self.state is PromiseState.ENDED


NOT_BEGUN = Progress(PromiseState.UNKNOWN, 0, 0)


@dataclass(slots=True)
class _Entry:
    """`makers`: jobs that make the same chain. `wanted_until`: after that nobody is thought to wait for it."""

    makers: int
    progress: Progress
    wanted_until: float = NOBODY_ASKED


class PromiseBoard:
    """Thread-safe; O(1) a call but for `wait`, which is O(tickets) each time that anything changes."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        """With nothing promised. `clock`: seconds."""
        self._clock = clock
        self._changed = threading.Condition()
        self._under_way: dict[BlockHash, _Entry] = {}
        self._ended: OrderedDict[BlockHash, _Entry] = OrderedDict()
        self._is_open = True

    def begin(self, ticket: BlockHash) -> None:
        """A job that makes this chain was taken in."""
        with self._changed:
            entry = self._under_way.get(ticket)
            if entry is None:
                self._ended.pop(ticket, None)
                self._under_way[ticket] = _Entry(1, Progress(PromiseState.UNDER_WAY, 0, 0))
            else:
                entry.makers += 1
            self._changed.notify_all()

    def made(self, ticket: BlockHash, blocks: int, *, found: int) -> None:
        """So many leading blocks can be read now; one that is not under way: nothing happens."""
        with self._changed:
            entry = self._under_way.get(ticket)
            if entry is None or (entry.progress.made and blocks <= entry.progress.made):
                return
            first_found = entry.progress.found if entry.progress.made else found
            entry.progress = Progress(PromiseState.UNDER_WAY, blocks, first_found)
            self._changed.notify_all()

    def end(self, ticket: BlockHash) -> None:
        """A job that made it has ended, well or not."""
        with self._changed:
            entry = self._under_way.get(ticket)
            if entry is None:
                return
            entry.makers -= 1
            if entry.makers:
                return
            del self._under_way[ticket]
            entry.progress = entry.progress._replace(state=PromiseState.ENDED)
            if entry.wanted_until == NOBODY_ASKED:
                entry.wanted_until = self._clock() + FIRST_QUESTION_S
            self._ended[ticket] = entry
            while len(self._ended) > MAX_ENDED:
                self._ended.popitem(last=False)
            self._changed.notify_all()

    def wait(self, tickets: Sequence[BlockHash], seen: Sequence[tuple[int, int]], timeout_s: float) -> list[Progress]:
        """How far each is, at once if one of them is not as it was seen (state, blocks made), else when that changes.

        After the timeout, or when the board is closed, as they are.
        """
        with self._changed:
            self._note_wanted(tickets, self._clock() + timeout_s + SILENCE_S)
            self._changed.wait_for(lambda: not self._is_open or self._is_news(tickets, seen), timeout_s)
            return [self._progress(ticket) for ticket in tickets]

    def is_owed(self) -> bool:
        """Whether blocks that were made for others are, or may be, still to be read. A question."""
        with self._changed:
            now = self._clock()
            ended = (entry for entry in self._ended.values() if entry.progress.made)
            return bool(self._under_way) or any(now < entry.wanted_until for entry in ended)

    def close(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self._is_open = False
            self._changed.notify_all()

    def __len__(self) -> int:
        """How many are under way."""
        with self._changed:
            return len(self._under_way)

    def _is_news(self, tickets: Sequence[BlockHash], seen: Sequence[tuple[int, int]]) -> bool:
        now = (self._progress(ticket) for ticket in tickets)
        return any((each.state, each.made) != before for each, before in zip(now, seen, strict=True))

    def _progress(self, ticket: BlockHash) -> Progress:
        entry = self._entry(ticket)
        return NOT_BEGUN if entry is None else entry.progress

    def _note_wanted(self, tickets: Sequence[BlockHash], until: float) -> None:
        for ticket in tickets:
            if (entry := self._entry(ticket)) is not None:
                entry.wanted_until = max(entry.wanted_until, until)

    def _entry(self, ticket: BlockHash) -> _Entry | None:
        return self._under_way.get(ticket) or self._ended.get(ticket)
