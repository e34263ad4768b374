"""Who is connected to a peer server, and who has to go when there are too many.

Covers: two budgets, one of callers that have yet to prove themselves and one of those that have; whose place is given
to a newcomer. Does not cover: sockets' bytes (`wire`), answers (`server`).

Whoever has not the secret takes no place from one who has: strangers only drive out strangers, the one that has been
silent for longest first. Of those who have it nobody is refused while another one merely waits: the one that has asked
nothing for longest is hung up on, and comes back when it has a question.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from kvstore.peer.wire import Channel


class Callers:
    """Thread-safe. A caller goes `add`, `prove`, then `wait` and `wake` in turn, and `remove` at the end."""

    def __init__(self, *, max_proven: int, max_unproven: int, patience_s: float) -> None:
        """Nobody is there yet. `patience_s`: how long one that has proven itself waits for a place."""
        self._max_proven = max_proven
        self._max_unproven = max_unproven
        self._patience_s = patience_s
        self._lock = threading.Condition()
        self._threads: dict[Channel, threading.Thread] = {}
        self._unproven: OrderedDict[Channel, None] = OrderedDict()  # who came first, first
        self._waiting: OrderedDict[Channel, None] = OrderedDict()  # who asked last longest ago, first
        self._displaced: set[Channel] = set()  # hung up on; their threads have yet to end
        self._is_open = True

    def __len__(self) -> int:
        """Connections now, those that have been hung up on and not yet ended included."""
        with self._lock:
            return len(self._threads)

    def add(self, channel: Channel, thread: threading.Thread) -> bool:
        """A stranger. False: no place, close it."""
        with self._lock:
            if not self._is_open or len(self._displaced) >= self._max_unproven:
                return False  # those that were hung up on hold threads, too
            if len(self._unproven) >= self._max_unproven:
                self._displace(self._unproven)
            self._threads[channel] = thread
            self._unproven[channel] = None
            return True

    def prove(self, channel: Channel) -> bool:
        """It has our secret. False: its place was taken, or none is free; close it."""
        with self._lock:
            self._lock.wait_for(lambda: channel in self._displaced or self._has_place(), self._patience_s)
            if channel in self._displaced or not self._has_place():
                return False
            if self._proven() >= self._max_proven:
                self._displace(self._waiting)
            del self._unproven[channel]
            return True

    def wait(self, channel: Channel) -> None:
        """It has its answer; the next question may come or not."""
        with self._lock:
            if channel not in self._displaced:
                self._waiting[channel] = None
                self._lock.notify_all()

    def wake(self, channel: Channel) -> bool:
        """It asks. False: its place was taken meanwhile."""
        with self._lock:
            self._waiting.pop(channel, None)
            return channel not in self._displaced

    def is_displaced(self, channel: Channel) -> bool:
        """Whether its place was given away."""
        with self._lock:
            return channel in self._displaced

    def remove(self, channel: Channel) -> None:
        """It has ended."""
        with self._lock:
            del self._threads[channel]
            self._unproven.pop(channel, None)
            self._waiting.pop(channel, None)
            self._displaced.discard(channel)
            self._lock.notify_all()

    def close(self) -> dict[Channel, threading.Thread]:
        """Let nobody in any more; who is there."""
        with self._lock:
            self._is_open = False
            return dict(self._threads)

    def _proven(self) -> int:
        return len(self._threads) - len(self._unproven) - len(self._displaced)

    def _has_place(self) -> bool:
        return bool(self._waiting) or self._proven() < self._max_proven

    def _displace(self, queue: OrderedDict[Channel, None]) -> None:
        channel, _ = queue.popitem(last=False)
        self._displaced.add(channel)
        channel.hang_up()
