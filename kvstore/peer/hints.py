"""Which peers seem to hold a block: what the router said with its jobs, for a short while.

Pure, on an injected clock. One entry a block, in the order of their hints, so that the oldest stand first: whatever is
too old or too much goes from there. O(1) a block.

Blocks that turned out to be wrong are barred: peers may have read them from here, and nobody asks for them for a while,
whatever the router says.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

from kvstore.blocks import BlockHash
from kvstore.tier import Clock

KEEP_S = 30.0
MAX_BLOCKS = 1 << 16
BAR_S = 3600.0  # peers drop what they hold by their own rules, of which we do not hear


class Holder(NamedTuple):
    """A peer and how many leading blocks of a prompt it seems to hold."""

    address: str
    blocks: int


class _Hint(NamedTuple):
    addresses: tuple[str, ...]  # whom to ask, in this order; never empty
    until: float


class Hints:
    """Not thread-safe. A new hint for a block replaces the old one: it is what the router thinks now."""

    def __init__(self, clock: Clock, *, keep_s: float = KEEP_S, max_blocks: int = MAX_BLOCKS) -> None:
        """Know nothing yet.

        Args:
            clock: seconds. keep_s: how long a hint is believed. max_blocks: those hinted at longest ago are forgotten.
        """
        self._clock = clock
        self._keep_s = keep_s
        self._max_blocks = max_blocks
        self._hints: OrderedDict[BlockHash, _Hint] = OrderedDict()
        self._barred: OrderedDict[BlockHash, float] = OrderedDict()  # until when; all equally long

    def __len__(self) -> int:
        """Blocks of which something is known, perhaps too old."""
        return len(self._hints)

    def learn(self, hashes: Sequence[BlockHash], holders: Sequence[Holder]) -> None:
        """The leading blocks of `hashes` seem to be held by these, whom to ask in that order."""
        until = self._clock() + self._keep_s
        start = 0
        for depth in sorted({holder.blocks for holder in holders if holder.blocks > 0}):
            hint = _Hint(tuple(holder.address for holder in holders if holder.blocks >= depth), until)
            for name in hashes[start:depth]:
                self._hints[name] = hint
                self._hints.move_to_end(name)
            start = depth
        while len(self._hints) > self._max_blocks:
            self._hints.popitem(last=False)

    def bar(self, hashes: Sequence[BlockHash]) -> None:
        """Ask nobody for these for `BAR_S`, whatever is hinted; at most `max_blocks`, those barred last."""
        until = self._clock() + BAR_S
        for name in hashes:
            self._barred[name] = until
            self._barred.move_to_end(name)
        while len(self._barred) > self._max_blocks:
            self._barred.popitem(last=False)

    def first(self, name: BlockHash) -> str | None:
        """Whom to ask for a block; None: nobody is known, or it is barred."""
        now, hint = self._clock(), self._hints.get(name)
        return hint.addresses[0] if hint is not None and hint.until > now and not self._is_barred(name, now) else None

    def run(self, hashes: Sequence[BlockHash]) -> int:
        """How many leading blocks somebody seems to hold."""
        now, hints = self._clock(), self._hints
        for count, name in enumerate(hashes):
            hint = hints.get(name)
            if hint is None or hint.until <= now or self._is_barred(name, now):
                return count
        return len(hashes)

    def deny(self, hashes: Sequence[BlockHash], address: str) -> None:
        """This peer did not deliver them: do not ask it for them again until the next hint."""
        for name in hashes:
            hint = self._hints.get(name)
            if hint is None or address not in hint.addresses:
                continue
            if others := tuple(other for other in hint.addresses if other != address):
                self._hints[name] = hint._replace(addresses=others)
            else:
                del self._hints[name]

    def sweep(self) -> None:
        """Forget what is too old."""
        now = self._clock()
        for name in list(takewhile(lambda name: self._hints[name].until <= now, self._hints)):
            del self._hints[name]
        for name in list(takewhile(lambda name: self._barred[name] <= now, self._barred)):
            del self._barred[name]

    def forget(self) -> None:
        """Know nothing any more; what is barred stays so."""
        self._hints.clear()

    def _is_barred(self, name: BlockHash, now: float) -> bool:
        return self._barred.get(name, now) > now
