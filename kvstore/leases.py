"""Retention leases: blocks that must not be dropped for a time, wherever they lie.

A lease forbids dropping, not demotion: the promise is kept by the lowest local tier that holds the block, and moves
down when the block arrives there. Tiers may lose a block all the same (a wrong checksum, a failed disk): then another
one that holds it promises, and it is sent down again. Owned by the engine's thread.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice

from kvstore.blocks import BlockHash
from kvstore.events import TierName
from kvstore.tier import Clock, Lasting, LocalTier

logger = logging.getLogger(__name__)

SETTLE_S = 1.0  # how often each lease is looked at
SETTLE_NAMES = 256  # leases that are looked at in one call, which is one step of the engine
FOR_EVER = float("inf")

Send = Callable[[BlockHash], bool]


def _never(name: BlockHash) -> bool:
    """Nothing can be sent down: there is one tier."""
    return False


class Leases:
    """Which tier keeps which promise. O(1) a lease, once in SETTLE_S."""

    def __init__(self, tiers: Sequence[LocalTier], clock: Clock, *, send: Send = _never) -> None:
        """What outlived an earlier process is leased.

        Args:
            tiers: from fast to slow; those that do not honour leases promise nothing.
            clock: seconds.
            send: bring a block to the slowest tier; whether it is there or on its way.
        """
        self._tiers = [tier for tier in reversed(tiers) if tier.honours.lease]
        self._clock = clock
        self._send = send
        self._until: OrderedDict[BlockHash, float] = OrderedDict()  # when each lease ends; looked at longest ago first
        self._keepers: dict[BlockHash, LocalTier] = {}  # who promises; not those that nobody holds now
        self._left = 0  # leases to look at in this round
        self._next_round = 0.0
        for tier in tiers:
            if tier.honours.lease and isinstance(tier, Lasting):
                self._take_over(tier, tier.leases())

    def lease(self, hashes: Sequence[BlockHash], for_s: float | None) -> dict[TierName, int]:
        """Keep these for so long (None: until `end`); how many each tier promised to keep.

        One that no tier holds yet, but that is on its way down, is not counted, and promised when it arrives.
        """
        if not self._tiers:
            return {}
        until = FOR_EVER if for_s is None else self._clock() + for_s
        names = list(dict.fromkeys(hashes))
        coming = {name for name in names if self._send(name)}
        for name in names:
            self._until[name] = max(until, self._until.get(name, until))
        counts = self._place(names)
        for name in names:
            if name not in self._keepers and name not in coming:
                del self._until[name]
        return dict(counts)

    def end(self, hashes: Sequence[BlockHash]) -> dict[TierName, int]:
        """End the leases of these; how many had one, by tier."""
        for name in hashes:
            self._forget(name)
        ended = {tier.name: tier.end_leases(hashes) for tier in self._tiers}
        return {name: count for name, count in ended.items() if count}

    def names(self) -> frozenset[BlockHash]:
        """Blocks under a lease."""
        now = self._clock()
        return frozenset(name for name in self._keepers if self._until[name] > now)

    def queued(self, name: BlockHash) -> None:
        """A block is on its way to the slowest tier, which therefore does not hold it, nor a promise."""
        if self._tiers and self._keepers.get(name) is self._tiers[0]:
            del self._keepers[name]

    def settle(self) -> None:
        """Forget what is over, and place promises where their blocks are now: some of them, each once a second."""
        now = self._clock()
        if self._left == 0 and now >= self._next_round:
            self._left, self._next_round = len(self._until), now + SETTLE_S
        names = list(islice(self._until, min(self._left, SETTLE_NAMES)))
        self._left = max(0, self._left - SETTLE_NAMES) if names else 0
        for name in names:
            self._until.move_to_end(name)
            if self._until[name] <= now:
                self._forget(name)
        loose = [name for name in names if name in self._until and not self._is_settled(name)]
        if loose:
            self._place(loose)
            for name in loose:
                if self._keepers.get(name) is not self._tiers[0]:
                    self._send(name)

    def _take_over(self, keeper: LocalTier, leases: Mapping[BlockHash, float | None]) -> None:
        now = self._clock()
        for name, for_s in leases.items():
            self._until[name] = FOR_EVER if for_s is None else now + for_s
            self._keepers[name] = keeper

    def _is_settled(self, name: BlockHash) -> bool:
        lowest = self._tiers[0]
        return self._keepers.get(name) is lowest and lowest.find(name) is not None

    def _place(self, names: Sequence[BlockHash]) -> Counter[TierName]:
        """Have each promised by the lowest tier that holds it; how many each promised."""
        counts: Counter[TierName] = Counter()
        for tier in self._tiers:
            try:
                kept = self._promise(tier, [name for name in names if tier.find(name) is not None])
            except Exception:  # this is the engine's thread: a tier's defect must not end the worker
                logger.exception("a tier promised nothing by a defect; report this", extra={"tier": tier.name})
                kept = set()
            counts[tier.name] += len(kept)
            self._moved(tier, kept)
            names = [name for name in names if name not in kept]
        for name in names:
            self._keepers.pop(name, None)
        return +counts

    def _promise(self, tier: LocalTier, names: Iterable[BlockHash]) -> set[BlockHash]:
        """Which of these the tier now promises to keep. One call for all that end at one time."""
        together: defaultdict[float, list[BlockHash]] = defaultdict(list)
        for name in names:
            together[self._until[name]].append(name)
        kept: set[BlockHash] = set()
        for until, group in together.items():
            for_s = None if until == FOR_EVER else until - self._clock()
            if tier.lease(group, for_s) == len(group):
                kept.update(group)
            else:  # another thread dropped one meanwhile
                kept.update(name for name in group if tier.lease([name], for_s))
        return kept

    def _moved(self, keeper: LocalTier, names: Iterable[BlockHash]) -> None:
        """This tier promises now: those above need not any more."""
        came = [name for name in names if self._keepers.get(name) is not keeper]
        self._keepers.update(dict.fromkeys(came, keeper))
        for tier in self._tiers[self._tiers.index(keeper) + 1 :] if came else []:
            tier.end_leases(came)

    def _forget(self, name: BlockHash) -> None:
        self._until.pop(name, None)
        self._keepers.pop(name, None)
