"""How far from the start of its prompt a block lies, found by climbing from parent to parent. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kvstore.blocks import BlockHash
from kvstore.tier import BlockMeta

MAX_STEPS = 5000  # for all blocks together: a few milliseconds


def positions(
    names: Iterable[BlockHash], find: Callable[[BlockHash], BlockMeta | None], *, max_steps: int = MAX_STEPS
) -> dict[BlockHash, int]:
    """How many blocks come before each, as far as all of them are held and the steps suffice. O(steps).

    Every block is climbed through once, since what was found for one is there for the next.
    """
    at: dict[BlockHash, int | None] = {}
    wanted = list(names)
    for wish in wanted:
        climbed: list[BlockHash] = []
        name: BlockHash | None = wish
        while name is not None and name not in at:
            meta = find(name)
            if meta is None or max_steps == 0:
                at[name] = None
                break
            max_steps -= 1
            climbed.append(name)
            name = meta.before
        depth = -1 if name is None else at[name]
        for below in reversed(climbed):
            depth = None if depth is None else depth + 1
            at[below] = depth
    return {name: depth for name in wanted if (depth := at[name]) is not None}
