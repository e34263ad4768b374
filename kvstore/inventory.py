"""What a store holds, block by block, for operators."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from kvstore.blocks import BlockHash
from kvstore.chains import select
from kvstore.events import TierName
from kvstore.tier import BlockMeta, Clock

LISTING_S = 30.0  # how long pages of one listing tell of names that were gathered for its first


class Holder(Protocol):
    """What is asked of a tier."""

    name: TierName

    def find(self, name: BlockHash) -> BlockMeta | None:
        """The metadata under which a block is held; None when it is not."""
        ...

    def metas(self) -> list[BlockMeta]:
        """The metadata of all blocks."""
        ...


@dataclass(frozen=True, slots=True)
class HeldBlock:
    """One block and where it lies.

    Attributes:
        meta: as the fastest of its tiers knows it. tiers: from fast to slow. leased: whether it must not be dropped.
        ttl_left_s: seconds until the last one of this worker's own tiers drops it, if nobody uses it; None: never, or
        not while it is in use.
    """

    meta: BlockMeta
    tiers: tuple[TierName, ...]
    leased: bool
    ttl_left_s: float | None = None


class _Names:
    """Names in order, each once. O(n) to make; sorted as far as somebody reads, in parts by their first byte."""

    def __init__(self, names: Iterable[BlockHash]) -> None:
        self._parts: list[list[BlockHash]] = [[] for _ in range(256)]
        self._is_sorted = bytearray(256)
        for name in names:
            self._parts[name[0]].append(name)

    def behind(self, after: BlockHash | None) -> Iterator[BlockHash]:
        """Those greater than `after`."""
        first = 0 if after is None else after[0]
        for number in range(first, 256):
            if not self._is_sorted[number]:
                self._parts[number] = sorted(set(self._parts[number]))
                self._is_sorted[number] = True
            part = self._parts[number]
            start = bisect_right(part, after) if after is not None and number == first else 0
            yield from islice(part, start, None)


@dataclass(frozen=True, slots=True)
class _Listing:
    """Names, what they were chosen by and when, and the last one that was told."""

    names: _Names
    root: BlockHash | None
    prefix: BlockHash | None
    taken_at: float
    told: BlockHash | None


class Inventory:
    """Pages of what tiers hold. Owned by one thread.

    Names are gathered for the first page of a listing, O(n); a page that goes on where the last one
    ended costs O(page). It tells of no block that has gone since, and may leave out those that came.
    """

    def __init__(self, tiers: Sequence[Holder], clock: Clock) -> None:
        """Of these tiers, from fast to slow."""
        self._tiers = tuple(tiers)
        self._clock = clock
        self._last: _Listing | None = None

    def page(
        self,
        leased: frozenset[BlockHash],
        *,
        root: BlockHash | None,
        prefix: BlockHash | None,
        after: BlockHash | None,
        limit: int,
    ) -> list[HeldBlock]:
        """At most `limit` blocks in the order of their names, from the first one behind `after` on.

        Args:
            leased: names under a lease.
            root, prefix: as `kvstore.chains.select`.
            after: None: from the first one on, as it is now.
            limit: of blocks.
        """
        names, taken_at = self._names(root, prefix, after)
        blocks: list[HeldBlock] = []
        for name in names.behind(after):
            if len(blocks) == limit:
                self._last = _Listing(names, root, prefix, taken_at, blocks[-1].meta.hash if blocks else after)
                return blocks
            if (block := self._find(name, leased)) is not None:
                blocks.append(block)
        self._last = None
        return blocks

    def sweep(self) -> None:
        """Forget the names of a listing that nobody goes on with. O(1)."""
        if self._last is not None and self._clock() - self._last.taken_at >= LISTING_S:
            self._last = None

    def _names(self, root: BlockHash | None, prefix: BlockHash | None, after: BlockHash | None) -> tuple[_Names, float]:
        """The names, and when they were gathered: those of the last page, if this one goes on with it."""
        last, now = self._last, self._clock()
        goes_on = last is not None and (last.root, last.prefix, last.told) == (root, prefix, after)
        if last is not None and after is not None and goes_on and now - last.taken_at < LISTING_S:
            return last.names, last.taken_at
        metas = [meta for tier in self._tiers for meta in tier.metas()]
        if prefix is not None:
            metas = list({meta.hash: meta for meta in metas}.values())
            return _Names(select(metas, root, prefix)), now
        return _Names(meta.hash for meta in metas if root is None or meta.root == root), now

    def _find(self, name: BlockHash, leased: frozenset[BlockHash]) -> HeldBlock | None:
        found = [(meta, tier.name) for tier in self._tiers if (meta := tier.find(name)) is not None]
        return HeldBlock(found[0][0], tuple(tier for _, tier in found), name in leased) if found else None


def ttl_left_s(tiers: Sequence[Mapping[BlockHash, float | None]]) -> dict[BlockHash, float | None]:
    """The longest of what several tiers say of a block (None: it does not expire there)."""
    longest: dict[BlockHash, float | None] = {}
    for tier in tiers:
        for name, left in tier.items():
            other = longest.get(name, left)
            longest[name] = None if left is None or other is None else max(left, other)
    return longest
