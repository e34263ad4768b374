"""How long a link rests before it tries its worker again. Pure, on the caller's clock.

A worker that was there a moment ago is most likely being started again: it is tried several times a second, for a
minute. One that has been away for longer is tried once a second.
"""

from __future__ import annotations

import math

FIRST_S = 0.1
LIKELY_BACK_S = 60.0  # after which it is not expected any moment
_LONGEST_WHILE_LIKELY_S = 0.25
_LONGEST_S = 1.0


class Rest:
    """Of one link: doubled with every failure, up to a limit that depends on how long the worker has been away."""

    def __init__(self) -> None:
        self._pause_s = FIRST_S
        self._there_at = -math.inf

    def after_failure(self, now: float, *, was_there: bool) -> float:
        """Seconds, before jitter. `was_there`: whether the stream had been up until now."""
        if was_there:
            self._there_at, self._pause_s = now, FIRST_S
            return FIRST_S
        likely = now - self._there_at < LIKELY_BACK_S
        self._pause_s = min(self._pause_s * 2, _LONGEST_WHILE_LIKELY_S if likely else _LONGEST_S)
        return self._pause_s
