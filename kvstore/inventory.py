"""What a store holds, block by block, for operators."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvstore.blocks import BlockHash
from kvstore.chains import select
from kvstore.events import TierName
from kvstore.tier import BlockMeta


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


def page(
    held: Sequence[tuple[TierName, Sequence[BlockMeta]]],
    leased: frozenset[BlockHash],
    *,
    root: BlockHash | None,
    prefix: BlockHash | None,
    after: BlockHash | None,
    limit: int,
) -> list[HeldBlock]:
    """At most `limit` blocks in the order of their names, from the first one behind `after` on.

    O(n) with a small constant, since books are made of the page alone; with a prefix O(n) with a large one.

    Args:
        held: every tier, from fast to slow, and what it holds.
        leased: names under a lease.
        root, prefix: as `kvstore.chains.select`.
    """
    if prefix is not None:
        metas = {meta.hash: meta for _, blocks in held for meta in blocks}
        chosen = set(select(list(metas.values()), root, prefix))
        held = [(tier, [meta for meta in blocks if meta.hash in chosen]) for tier, blocks in held]
        root = None
    names = _first_names(held, root, b"" if after is None else after, limit)
    found = {name: _Where(None, []) for name in names}
    for tier, blocks in held:
        for meta in blocks:
            if (where := found.get(meta.hash)) is not None:
                where.meta = where.meta or meta
                where.tiers.append(tier)
    return [HeldBlock(where.meta, tuple(where.tiers), name in leased) for name, where in found.items() if where.meta]


def ttl_left_s(tiers: Sequence[Mapping[BlockHash, float | None]]) -> dict[BlockHash, float | None]:
    """The longest of what several tiers say of a block (None: it does not expire there)."""
    longest: dict[BlockHash, float | None] = {}
    for tier in tiers:
        for name, left in tier.items():
            other = longest.get(name, left)
            longest[name] = None if left is None or other is None else max(left, other)
    return longest


@dataclass(slots=True)
class _Where:
    meta: BlockMeta | None
    tiers: list[TierName]


def _first_names(
    held: Sequence[tuple[TierName, Sequence[BlockMeta]]], root: BlockHash | None, floor: bytes, limit: int
) -> list[BlockHash]:
    first: set[BlockHash] = set()
    for _, blocks in held:
        behind = [meta.hash for meta in blocks if meta.hash > floor and (root is None or meta.root == root)]
        first.update(heapq.nsmallest(limit, behind))
    return heapq.nsmallest(limit, first)
