"""Chains of blocks as plain data: which blocks follow which, and how runs of them are told as events.

Pure functions. What a chain's names mean is in `blocks`; where its blocks lie is a tier's business.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

from kvstore.blocks import BlockHash, short
from kvstore.events import BlockStored, TierName


class Chained(Protocol):
    """A block that knows its place; `tier.BlockMeta` is one."""

    @property
    def hash(self) -> BlockHash:
        """Its name."""
        ...

    @property
    def parent(self) -> BlockHash:
        """The block before it, or the root for the first one."""
        ...

    @property
    def root(self) -> BlockHash:
        """The root of its chain."""
        ...


Link = tuple[bytes, bytes | None]  # a block and the block before it (None: it starts a chain)
Run = tuple[bytes | None, list[bytes]]  # the block before the first (None: it starts a chain), consecutive blocks


def consecutive_runs(links: Iterable[Link]) -> Iterator[Run]:
    """Cut a sequence of blocks wherever one does not follow the one before it. O(n)."""
    run: Run | None = None
    for name, parent in links:
        if run is not None and parent == run[1][-1]:
            run[1].append(name)
            continue
        if run is not None:
            yield run
        run = (parent, [name])
    if run is not None:
        yield run


def tree_runs(parents: Mapping[bytes, bytes | None]) -> Iterator[Run]:
    """All blocks of a forest as runs, a parent always before its children. O(n).

    Args:
        parents: block to the block before it. Blocks whose parent is None or is not a key begin a tree.
    """
    children: dict[bytes, list[bytes]] = defaultdict(list)
    starts: list[bytes] = []
    for name, parent in parents.items():
        if parent is not None and parent in parents:
            children[parent].append(name)
        else:
            starts.append(name)
    stack = starts[::-1]
    while stack:
        run = [stack.pop()]
        parent = parents[run[0]]
        while following := children.get(run[-1]):
            stack.extend(following[:0:-1])
            run.append(following[0])
        yield parent, run


def stored_events(tier: TierName, runs: Iterable[Run], ttl_s: float | None = None) -> list[BlockStored]:
    """Runs of full or short names as events, which carry short ones."""
    return [
        BlockStored(
            tier=tier,
            hashes=tuple(short(BlockHash(name)) for name in names),
            parent=None if parent is None else short(BlockHash(parent)),
            ttl_s=ttl_s,
        )
        for parent, names in runs
    ]


Member = TypeVar("Member", bound=Chained)


def prefixes_first(blocks: Sequence[Member]) -> Iterator[Member]:
    """The blocks in the same order, but that each comes after those of its prefix. O(n)."""
    left = {block.hash: block for block in blocks}
    for block in blocks:
        path: list[Member] = []
        above: Member | None = left.pop(block.hash, None)
        while above is not None:
            path.append(above)
            above = left.pop(above.parent, None)
        yield from reversed(path)


def parent_of(block: Chained) -> BlockHash | None:
    """The block before this one; None when it starts a chain (its parent is the root, which is no block)."""
    return None if block.parent == block.root else block.parent


def select(metas: Sequence[Chained], root: BlockHash | None, prefix: BlockHash | None) -> list[BlockHash]:
    """What `Tier.clear(root=..., prefix=...)` drops of the blocks that a tier holds. O(n).

    A follower of `prefix` counts when every block between the two is held (suffixes are evicted first, so they are).
    Blocks may be told several times, as by tiers that hold the same ones.
    """
    rooted = [meta for meta in metas if root is None or meta.root == root]
    if prefix is None:
        return [meta.hash for meta in rooted]
    children: dict[BlockHash, dict[BlockHash, None]] = defaultdict(dict)  # each once: else a walk doubles at each block
    for meta in rooted:
        children[meta.parent][meta.hash] = None
    chosen = [prefix] if any(meta.hash == prefix for meta in rooted) else []
    stack = [prefix]
    while stack:
        following = children.get(stack.pop(), {})
        chosen.extend(following)
        stack.extend(following)
    return chosen
