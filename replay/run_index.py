"""The router's index and traffic memory over segments instead of blocks: the same answers for less work.

Covers: translating between a chain's blocks and its segments. Does not cover: anything that the router's own classes
do, which are used as they are: to them a segment is a block.

A cache may hold the beginning of a segment only: of the one that eviction is at, and of those that are just being
computed. These few are kept beside the index (`set_partial`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from kvstore.events import TierName
from replay.workload import Chain
from router.chain_tree import Runs
from router.index import Overlap, PrefixIndex
from router.traffic import Traffic

_NONE: Mapping[int, int] = {}
_LOCAL = (TierName.DEVICE, TierName.HOST, TierName.DISK)  # a worker's own tiers, in the order of `Overlap`


class RunIndex(PrefixIndex):
    """A `PrefixIndex` of segment keys that answers in blocks when it is asked about a `Chain`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(clock)
        self._partial: dict[str, dict[TierName, dict[int, int]]] = {}  # leading blocks by worker, tier and segment
        self._shared_partial: dict[int, int] = {}

    def set_partial(self, worker: str, tier: TierName, changes: Mapping[int, int]) -> None:
        """Leading blocks of segments that a tier holds in part; 0: it does so no more."""
        if tier is TierName.REDIS:
            known = self._shared_partial
        else:
            known = self._partial.setdefault(worker, {}).setdefault(tier, {})
        for segment, blocks in changes.items():
            if blocks:
                known[segment] = blocks
            else:
                known.pop(segment, None)

    def drop(self, worker: str) -> None:
        """As the index does."""
        self._partial.pop(worker, None)
        super().drop(worker)

    def placed(self, hashes: Sequence[bytes]) -> None:
        """As the index does."""
        super().placed(hashes.keys if isinstance(hashes, Chain) else hashes)

    def match(self, hashes: Sequence[bytes]) -> dict[str, Overlap]:
        """Leading blocks on every worker."""
        if not isinstance(hashes, Chain):
            return super().match(hashes)
        return {name: self._in_blocks(name, hashes, found) for name, found in super().match(hashes.keys).items()}

    def _in_blocks(self, worker: str, chain: Chain, found: Overlap) -> Overlap:
        """Behind the whole segments that a level has lies at most a part of one more, in any tier of that level."""
        by_tier, shared = self._partial.get(worker, {}), self._shared_partial
        if not (shared or any(by_tier.values())):
            device = chain.blocks(found.device)
            if found.device == found.shared:  # most workers, and a worker is asked about for every request
                return Overlap(device, device, device, device)
            return Overlap(device, *(chain.blocks(depth) for depth in found[1:]))
        segments, levels = chain.segments, (*[by_tier.get(tier, _NONE) for tier in _LOCAL], shared)
        deepest, runs = 0, []
        for level, depth in enumerate(found):
            whole = chain.blocks(depth)
            if depth < len(segments):
                segment = segments[depth]
                partial = 0
                for known in levels[: level + 1]:
                    if known and (blocks := known.get(segment, 0)) > partial:
                        partial = blocks
                whole += partial
            deepest = max(deepest, whole)
            runs.append(deepest)
        return Overlap(*runs)


class RunTraffic(Traffic):
    """A `Traffic` of segment keys that answers in blocks when it is asked about a `Chain`."""

    def arriving(self, hashes: Sequence[bytes]) -> dict[str, int]:
        """Leading blocks on their way to each worker."""
        depths = super().arriving(hashes)
        return {w: hashes.blocks(n) for w, n in depths.items()} if isinstance(hashes, Chain) else depths

    def sharers(self, hashes: Sequence[bytes]) -> Runs:
        """How many requests in flight share the leading blocks, as runs."""
        runs = super().sharers(hashes)
        return [(n, hashes.blocks(end)) for n, end in runs] if isinstance(hashes, Chain) else runs

    def _names(self, hashes: Sequence[bytes]) -> Sequence[bytes]:
        return hashes.keys if isinstance(hashes, Chain) else hashes

    def _depth(self, hashes: Sequence[bytes], blocks: int) -> int:
        """A segment that is cached in part is not counted as cached."""
        return hashes.whole_segments(blocks) if isinstance(hashes, Chain) else blocks

    def _rest(self, hashes: Sequence[bytes], depth: int) -> int:
        return len(hashes) - (hashes.blocks(depth) if isinstance(hashes, Chain) else depth)
