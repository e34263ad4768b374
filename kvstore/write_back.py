"""Write-back: blocks go to a slow tier when host evicts them, and what is left when the store is closed.

Covers: which evicted blocks a lane gets, and the order at the end. Does not cover: the copy that eviction leaves behind
(`host.leaving`), writing (`lane`). For the engine's thread; host asks `is_wanted` in any.

A copy waits in host until the engine's next step, and then in the lane's queue; each is bounded, and what finds no room
is lost for lower tiers, and counted. A process that is killed loses what it had not evicted yet.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from kvstore.admission import Admission
from kvstore.blocks import BlockHash
from kvstore.chains import prefixes_first
from kvstore.host.tier import HostTier
from kvstore.lane import Lane
from kvstore.tier import BlockMeta

ROOM_WAIT_S = 0.01  # at the end, before another lane is looked at


class WriteBack:
    """The lanes whose rule asks at eviction."""

    def __init__(self, host: HostTier, lanes: Sequence[tuple[Lane, Admission]], *, max_kept: int) -> None:
        """From now on host keeps what it evicts for these lanes, `max_kept` blocks at most."""
        self._host = host
        self._lanes = lanes
        host.keep_evicted(max_kept, self.is_wanted)

    def is_wanted(self, name: BlockHash) -> bool:
        """Whether a lower tier lacks this block, as far as is known. Any thread may ask."""
        return any(lane.known.find(name) is None for lane, _ in self._lanes)

    def pump(self) -> None:
        """Queue what host has evicted since the last call."""
        for evicted in self._host.take_evicted():
            if self._host.holds(evicted.meta.hash):
                continue  # it has come back, and will be evicted again
            for lane, rule in self._lanes:
                if rule.admits(evicted.meta.hash):
                    lane.write_evicted(evicted.meta, evicted.payload)

    def finish(self, until: float) -> None:
        """Queue what was never evicted, the chains used last first and prefixes before suffixes, as lanes have room.

        Until that time of `time.monotonic`.
        """
        self.pump()
        metas = list(prefixes_first(self._host.latest_first()))
        left: list[tuple[Lane, deque[BlockMeta]]] = [(lane, deque(metas)) for lane, _ in self._lanes]
        while left and time.monotonic() < until:
            for lane, waiting in left:
                lane.write_as_room_is(waiting)
            left = [(lane, waiting) for lane, waiting in left if waiting]
            if left:
                left[0][0].await_room(ROOM_WAIT_S)
