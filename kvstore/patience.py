"""How long a request waits for a load: at any moment it may be behind by one slack (50 ms by default), and no more.

A load is read in pieces, so that one sees it come: of `FIRST_PIECE_NBYTES`, then each twice the one before, up to
`PIECE_NBYTES`. So a large load that comes is known to come early, and not cut off for being late by a little of its own
size. The next piece is waited for until

    min(compute(all), max(predicted(pieces so far and the next), compute(pieces so far)) + slack)

from the start on, where `predicted` is the measured time of a healthy read, the queue before it included. Why:

- A tier that falls silent costs the slack: a healthy load would have taken the predicted time anyway. What has come by
  then is used; so the request is late by the slack, whichever of the two it is compared with.
- A load that still delivers goes on, however slow, while it keeps up with computing: what has come has saved the time
  that computing it would have taken. A tier that is ten times slower than predicted and still faster than computing is
  read to the end; one that is slower than computing is left when it is behind by the slack.
- Noise of reads is a few milliseconds, of a busy machine with two cores a few tens: less than the slack, which is not
  scaled by the variance that was seen, because then a tier that has been erratic would delay requests by more than it
  says. Where even healthy reads stutter longer, raise the slack (`store.load_slack`).
- Beyond the time of computing all of it no load is waited for; but `MIN_LIMIT_S` is always granted, as below it the
  scheduler's jitter decides.
- Of a tier that was never read nothing is predicted. The first try may take `FIRST_TRY_S`, once: connecting and a cold
  start are in it. It is measured then, whether it delivered or not.

A request has one slack for all tiers that it tries: what a load that came short has cost of it is missing for the next
one. While others may be asked after it, a load leaves a part of the slack to each: without any even a healthy one would
be left too soon.

The tier itself is told to end its read a little earlier (`told_s`), so that what it has by then is handed over in time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

DEFAULT_SLACK_S = 0.05
MIN_LIMIT_S = 0.02
FIRST_TRY_S = 0.2
MAX_LIMIT_S = 10.0  # while nobody knows what computing would take
FIRST_PIECE_NBYTES = 4 << 20
PIECE_NBYTES = 32 << 20  # some 10 ms at the speed of a local Redis: one round trip more for each costs a percent
KEPT_SHARE = 4  # of the slack each tier that may be asked later is left one in so many
_HAND_OVER_S = 0.01
_JITTER = 1.1  # a read that takes so much longer than predicted is a healthy one

Ms = Callable[[int], float | None]  # of so many leading blocks; None: not known


@dataclass(frozen=True, slots=True)
class Limit:
    """Until when the blocks up to `stop` are waited for, and when they are due; seconds from the start of the load."""

    stop: int
    seconds: float
    healthy_s: float

    @property
    def told_s(self) -> float:
        """When the tier is told to end its read: time to hand over what it has is left, but not before it is due."""
        left_s = self.seconds - min(_HAND_OVER_S, self.seconds / 4)
        return max(left_s, min(self.seconds, _JITTER * self.healthy_s))


def cap_s(compute_ms: float | None) -> float:
    """Longest that a load is waited for in all: as long as computing takes (None: not measured)."""
    return MAX_LIMIT_S if compute_ms is None else min(MAX_LIMIT_S, max(MIN_LIMIT_S, compute_ms / 1e3))


def slack_of(slack_s: float, late_s: float, later: int) -> float:
    """What a load may have of a request's slack of which so much is spent, while so many tiers may be asked later."""
    kept_s = slack_s / KEPT_SHARE
    return max(kept_s, slack_s - late_s - later * kept_s)


def limits(stops: list[int], *, load_ms: Ms, compute_ms: Ms, slack_s: float) -> list[Limit]:
    """The limit of each piece of a load that somebody waits for.

    Args:
        stops: where each piece ends, the last one being the number of blocks.
        load_ms, compute_ms: predicted times of leading blocks.
    """
    most, found, come = cap_s(compute_ms(stops[-1])), [], 0
    for stop in stops:
        expected = load_ms(stop)
        healthy_s = FIRST_TRY_S - slack_s if expected is None else expected / 1e3
        saved_s = (compute_ms(come) or 0.0) / 1e3 if come else 0.0
        found.append(Limit(stop, min(most, max(healthy_s, saved_s, 0.0) + slack_s), healthy_s))
        come = stop
    return found


def pieces(count: int, block_nbytes: int) -> list[int]:
    """Where the pieces of a load of `count` blocks end."""
    most = max(1, PIECE_NBYTES // block_nbytes)
    step, stops = min(most, max(1, FIRST_PIECE_NBYTES // block_nbytes)), [0]
    while stops[-1] < count:
        stops.append(min(count, stops[-1] + step))
        step = min(most, 2 * step)
    return stops[1:]
