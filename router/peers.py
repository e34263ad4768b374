"""Who could give a worker blocks that it lacks: the workers that serve others, and how deep each holds a prompt.

Covers: choosing them for one decision. Does not cover: the price of reading from them (`cost`), what workers hold
(`index`). Pure; O(workers log workers), and nothing where nobody serves.

The index knows the host tier only together with the pool, and host RAM is what workers serve: as every block is written
through, it is deep enough, and where it is not the reader finds that out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from router.index import NO_OVERLAP, Overlap
from router.link import WorkerLink

MAX_HINTS = 3  # the first does, unless it is gone


class Holder(NamedTuple):
    """A worker, where it serves blocks, and how many leading blocks of the prompt it holds."""

    worker: str
    address: str
    blocks: int


class Holders:
    """Of one prompt, the deepest first."""

    def __init__(self, holders: Iterable[Holder] = ()) -> None:
        self._holders: Sequence[Holder] = sorted(holders, key=lambda holder: (-holder.blocks, holder.worker))

    def hints(self, worker: str, own_blocks: int) -> tuple[Holder, ...]:
        """Whom this worker should ask, who has so many leading blocks at hand itself."""
        deeper = [each for each in self._holders if each.blocks > own_blocks and each.worker != worker]
        return tuple(deeper[:MAX_HINTS])

    def depth(self, worker: str) -> int:
        """How many leading blocks some other worker holds."""
        return next((each.blocks for each in self._holders if each.worker != worker), 0)


def holders(links: Iterable[WorkerLink], overlaps: Mapping[str, Overlap]) -> Holders:
    """Of those `links`, which must be alive, that serve blocks and hold some of the prompt."""
    return Holders(
        Holder(link.name, link.hello.peer_address, overlaps[link.name].host)
        for link in links
        if link.hello is not None and link.hello.peer_address and overlaps.get(link.name, NO_OVERLAP).host
    )
