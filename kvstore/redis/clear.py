"""Which blocks a clear takes, on a server that may have dropped any of their ancestors. Pure.

Covers: choosing by the headers that are there and by what a worker remembers. Does not cover: asking, dropping
(`redis`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kvstore.blocks import BlockHash
from kvstore.codec import Header
from kvstore.tier import BlockMeta, select


def choose(
    headers: Mapping[BlockHash, Header | None],
    remembered: Iterable[BlockMeta],
    root: BlockHash | None,
    prefix: BlockHash | None,
) -> list[BlockHash]:
    """The blocks of `headers` that a clear of this scope drops. O(n).

    A root takes all blocks whose headers name it, and all whose headers cannot be read, since they may name it.

    A prefix takes that block and all that follow it, as far as headers and memory tell who follows whom. A block whose
    ancestors the server has evicted and nobody remembers may follow the prefix or not: it goes too if it is of the
    prefix's root, because a clear must not leave what it promised to take, and a block too many costs a computation.
    Where the prefix's root is not known (neither it nor a follower of it is there or remembered), such blocks stay.

    Args:
        headers: of all blocks on the server; None: cannot be read.
        remembered: blocks that may have gone, for their places in their chains.
    """
    held = {name: header.meta for name, header in headers.items() if header is not None}
    known = {meta.hash: meta for meta in remembered} | held
    chosen = dict.fromkeys(select(list(known.values()), root, prefix))
    if prefix is None:
        chosen.update(dict.fromkeys(name for name, header in headers.items() if header is None))
    else:
        roots = {known[name].root for name in chosen}
        chosen.update(dict.fromkeys(name for name in _orphans(known) if known[name].root in roots))
    return [name for name in chosen if name in headers]


def _orphans(known: Mapping[BlockHash, BlockMeta]) -> list[BlockHash]:
    """Blocks from which the way up to the root is broken. Each block is passed once."""
    is_rooted: dict[BlockHash, bool] = {}
    for name in known:
        path: list[BlockHash] = []
        at: BlockHash | None = name
        while at is not None and at in known and at not in is_rooted:
            is_rooted[at] = False  # a header can lie; so a ring of blocks ends here, and counts as broken
            path.append(at)
            at = known[at].before
        answer = at is None or is_rooted.get(at, False)
        is_rooted.update(dict.fromkeys(path, answer))
    return [name for name, rooted in is_rooted.items() if not rooted]
