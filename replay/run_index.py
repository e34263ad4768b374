"""The router's index and traffic memory over segments instead of blocks: the same answers for less work.

Covers: translating between a chain's blocks and its segments. Does not cover: anything that the router's own classes
do, which are used as they are: to them a segment is a block.

A cache may hold the beginning of a segment only. As eviction takes the least recently used block and a prompt's last
blocks go first, that is true of at most one segment a worker, so it is kept beside the index (`set_partial`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from replay.workload import Chain
from router.chain_tree import Runs
from router.index import Overlap, PrefixIndex
from router.traffic import Traffic


class Partial(NamedTuple):
    """A segment of which a worker's pool holds only so many leading blocks."""

    segment: int
    blocks: int


class RunIndex(PrefixIndex):
    """A `PrefixIndex` of segment keys that answers in blocks when it is asked about a `Chain`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(clock)
        self._partial: dict[str, Partial] = {}

    def set_partial(self, worker: str, partial: Partial | None) -> None:
        """What the worker's pool holds a part of."""
        if partial is None:
            self._partial.pop(worker, None)
        else:
            self._partial[worker] = partial

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
        device = self._device_blocks(worker, chain, found.device)
        if found.device == found.shared:  # most workers, and a worker is asked about for every request
            return Overlap(device, device, device, device)
        return Overlap(device, *(max(device, chain.blocks(depth)) for depth in found[1:]))

    def _device_blocks(self, worker: str, chain: Chain, leading: int) -> int:
        partial = self._partial.get(worker)
        if partial is None or leading == len(chain.segments) or chain.segments[leading] != partial.segment:
            return chain.blocks(leading)
        return chain.blocks(leading) + partial.blocks


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
