"""What this router believes that each worker holds, and how much of that counts: the index as decisions see it.

Covers: bringing together the index, the books of workers without events, and credit. Does not cover: any of them
(`index`, `approximate`, `credit`). Where nobody is doubted, `match` is the index's and one test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from router.approximate import DEFAULT_TTL_S, Approximate, Placement, Room
from router.credit import Credits, discounted
from router.index import Overlap, PrefixIndex
from router.link import WorkerLink
from warmkv.v1 import common_pb2


class Beliefs:
    """One per router.

    Attributes:
        credits: of the workers. approximate: books of those that send no events.
    """

    def __init__(self, index: PrefixIndex, clock: Callable[[], float], *, ttl_s: float = DEFAULT_TTL_S) -> None:
        """Over an index; `ttl_s` as in `Approximate`."""
        self.credits = Credits()
        self.approximate = Approximate(index, clock, ttl_s=ttl_s)
        self._index = index

    # Questions

    def match(self, hashes: Sequence[bytes]) -> dict[str, Overlap]:
        """As `PrefixIndex.match`, the own blocks of doubted workers discounted."""
        overlaps = self._index.match(hashes)
        if not self.credits.below:
            return overlaps
        shared_run = self._index.shared_run(hashes)
        for worker, credit in self.credits.below.items():
            if worker in overlaps:
                overlaps[worker] = discounted(overlaps[worker], credit.factor, shared_run)
        return overlaps

    def holds(self, worker: str, block: bytes) -> bool:
        """Whether it is believed to hold this one block in a tier of its own, whatever its credit."""
        overlap = self._index.match([block]).get(worker)
        return overlap is not None and overlap.disk > 0

    @property
    def forgets(self) -> bool:
        """Whether blocks have been forgotten for want of memory, so that a held block may be unknown for that alone."""
        return self._index.evicted_blocks > 0

    # What is learnt

    def placed(
        self, link: WorkerLink, hashes: Sequence[bytes], *, reads: bool = True, stores: bool = True
    ) -> Placement | None:
        """A prompt goes to a worker; None: it will tell by events. `reads`, `stores`: whether cached blocks are used,
        and kept.
        """
        if link.name not in self.approximate:
            return None
        return Placement(
            self.approximate, link.name, hashes, reads=reads, stores=stores, note_rooms=lambda: self._note_rooms(link)
        )

    def synced(self, link: WorkerLink) -> None:
        """Its snapshot is complete."""
        self.credits.restored(link.name)
        if link.hello is not None and link.hello.kv_events_off:
            self.approximate.joined(link.name, link.hello.incarnation)
        else:
            self.approximate.forget(link.name)

    def lost(self, worker: str) -> None:
        """Its stream is down: the index has dropped it. What was sent there counts again if it comes back unchanged."""
        self.credits.restored(worker)

    def gone(self, worker: str) -> None:
        """It will not come back."""
        self.credits.restored(worker)
        self.approximate.forget(worker)

    def refuted(self, link: WorkerLink) -> None:
        """Most of what is believed of it is wrong: believe nothing, and have it say anew what it holds."""
        self.approximate.cleared(link.name)
        link.resync()

    def tick(self, links: Iterable[WorkerLink]) -> None:
        """Give up what has been believed long enough, by what workers report of themselves."""
        for link in links:
            if link.name in self.approximate:
                self._note_rooms(link)
        self.approximate.expire()

    def _note_rooms(self, link: WorkerLink) -> None:
        if link.hello is None or link.report is None:
            return
        size = max(1, link.hello.block_nbytes)
        rooms = {
            tier.tier: Room(tier.capacity_bytes // size, sum(tier.removals.values()))
            for tier in link.report.message.tiers
        }
        device, host = (rooms.get(tier, Room(0)) for tier in (common_pb2.TIER_DEVICE, common_pb2.TIER_HOST))
        self.approximate.reported(link.name, device, host)
