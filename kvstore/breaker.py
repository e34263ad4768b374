"""A circuit breaker: when to stop asking a server that does not answer, and when to try again.

Covers: the three states and their times. Does not cover: what counts as a failure; the tier says so.

Closed: everybody asks. `failures` in a row open it: nobody asks, an answer costs microseconds instead of a deadline.
After the cool-down it is half open: one caller a cool-down asks. If that succeeds it closes; if it fails the cool-down
doubles, up to its limit. A caller that is let through and never reports delays the next probe by one cool-down and
nothing else, so a lost report cannot wedge it. Callers who wait at the same time see the same trouble: of those who had
asked before the last failure was told, none adds to the count, so that one stall of a moment does not open it, however
many met it. (M. Nygard, "Release It!", 2007.)
"""

from __future__ import annotations

import threading

from kvstore.tier import Clock


class Breaker:
    """Thread-safe; on an injected clock."""

    def __init__(
        self, clock: Clock, *, failures: int = 3, cooldown_s: float = 1.0, max_cooldown_s: float = 5.0
    ) -> None:
        self._clock = clock
        self._limit = failures
        self._first_cooldown_s = cooldown_s
        self._max_cooldown_s = max_cooldown_s
        self._lock = threading.Lock()
        self._failures = 0.0  # in a row
        self._failed_at = float("-inf")
        self._cooldown_s = cooldown_s
        self._probe_at: float | None = None  # None: closed

    @property
    def is_closed(self) -> bool:
        """Whether everybody may ask."""
        with self._lock:
            return self._probe_at is None

    def admit(self) -> bool:
        """Whether this caller may ask now. While half open the first to come is let through, as the probe."""
        with self._lock:
            if self._probe_at is None:
                return True
            now = self._clock()
            if now < self._probe_at:
                return False
            self._probe_at = now + self._cooldown_s
            return True

    def succeeded(self) -> None:
        """The server answered."""
        with self._lock:
            self._failures = 0.0
            self._cooldown_s = self._first_cooldown_s
            self._probe_at = None

    def failed(self, *, asked_at: float | None = None, weight: float = 1.0) -> None:
        """The server did not answer, or not as a server should.

        Args:
            asked_at: when this caller was let through, on the clock; None: it was the only one.
            weight: less than one for a caller who gave the server less time than a failure takes.
        """
        with self._lock:
            now = self._clock()
            if asked_at is not None and asked_at < self._failed_at:
                return
            self._failed_at = now
            self._failures += weight
            if self._probe_at is not None:
                self._cooldown_s = min(self._cooldown_s * 2, self._max_cooldown_s)
            elif self._failures < self._limit:
                return
            self._probe_at = now + self._cooldown_s
