"""How long a block lives: a time after its last use, a fixed end, or both. Pure.

A block lives until the later one of `last use + ttl_s` and `until`. Of several lifetimes that requests name for one
block, the longer one holds in each part: it lives as long as its longest lease, and no request shortens what another
one was promised.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Lifetime(NamedTuple):
    """What a request asks for its blocks.

    A named tuple, because one is made for every block that is used, and a frozen dataclass takes thrice as long.

    Attributes:
        ttl_s: seconds after the last use; zero: a use renews nothing; None: until it is evicted.
        until: seconds since the epoch before which it does not end; None: it has no fixed end.
        is_default: nobody named it, it is the store's own. It leaves blocks with a fixed end as they are.
    """

    ttl_s: float | None
    until: float | None = None
    is_default: bool = False

    def joined(self, other: Lifetime) -> Lifetime:
        """What a block of this lifetime has when it is also promised the other one; itself, if that adds nothing."""
        if self.ttl_s is None or (other.is_default and self.until is not None):
            return self
        if other.ttl_s is None:
            return FOR_EVER
        is_later = other.until is not None and (self.until is None or other.until > self.until)
        if not is_later and other.ttl_s <= self.ttl_s:
            return self
        return Lifetime(max(self.ttl_s, other.ttl_s), other.until if is_later else self.until)

    def outlives(self, other: Lifetime) -> bool:
        """Whether a block of the other lifetime lives longer if it is promised this one as well."""
        return other.joined(self) is not other

    def left_s(self, wall: float) -> float | None:
        """Seconds that a block lives that is used when the wall clock says `wall`; None: until it is evicted."""
        if self.ttl_s is None or self.until is None:
            return self.ttl_s
        return max(self.ttl_s, self.until - wall)

    def told_s(self, wall: float) -> float | None:
        """Seconds to tell others of a block that has just been seen: as `left_s`, but None where nothing is left.

        Somebody else prolonged it then, and nobody here knows by how much.
        """
        return self.left_s(wall) or None


FOR_EVER = Lifetime(None)


def shortest(times_s: Iterable[float | None]) -> float | None:
    """The least of several times, of which None is endless."""
    return min((time for time in times_s if time is not None), default=None)
