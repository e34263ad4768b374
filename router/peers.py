"""Who could give a worker blocks that it lacks: the workers that serve others, and how deep each holds a prompt.

Covers: choosing them for one decision. Does not cover: the price of reading from them (`cost`), what workers hold
(`index`). Pure; no more workers are asked than can be named.

The index knows the host tier only together with the pool, and host RAM is what workers serve: as every block is written
through, it is deep enough, and where it is not the reader finds that out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import NamedTuple

from router.index import Overlap
from router.link import WorkerLink

MAX_HINTS = 3  # the first does, unless it is gone


class Holder(NamedTuple):
    """A worker, where it serves blocks, and how many leading blocks of the prompt it holds."""

    worker: str
    address: str
    blocks: int


class Holders:
    """Of one prompt, the deepest first. They are looked for when first asked about: most decisions go to the worker
    that has the most, and where blocks never came from others their price is not asked for.
    """

    def __init__(self, find: Callable[[], Iterable[Holder]] = tuple) -> None:
        self._find = find

    @cached_property
    def _holders(self) -> Sequence[Holder]:
        return sorted(self._find(), key=lambda holder: (-holder.blocks, holder.worker))

    def hints(self, worker: str, own_blocks: int) -> tuple[Holder, ...]:
        """Whom this worker should ask, who has so many leading blocks at hand itself."""
        deeper = [each for each in self._holders if each.blocks > own_blocks and each.worker != worker]
        return tuple(deeper[:MAX_HINTS])

    def depth(self, worker: str) -> int:
        """How many leading blocks some other worker holds."""
        return next((each.blocks for each in self._holders if each.worker != worker), 0)


def serves(link: WorkerLink) -> bool:
    """Whether it gives its blocks to others, and nothing that it holds has yet to be cleared."""
    return link.hello is not None and bool(link.hello.peer_address) and not link.owes_clear


def holders(links: Iterable[WorkerLink], overlaps: Mapping[str, Overlap]) -> Iterable[Holder]:
    """Of those `links`, alive and the deepest first, that serve blocks: as many as any worker can be told of."""
    serving = (
        Holder(link.name, link.hello.peer_address, overlaps[link.name].host)
        for link in links
        if link.hello is not None and link.hello.peer_address
    )
    return islice(serving, MAX_HINTS)  # whoever is among them is told of those before it only
