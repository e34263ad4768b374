"""A prompt's prefix on its way to the device, as its owner sees it, and the plan that says where it comes from.

Covers: what a request may read, what it got. Does not cover: how blocks are brought (`promotion`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore.blocks import BlockHash
from kvstore.events import TierName
from kvstore.lifetime import FOR_EVER, Lifetime

if TYPE_CHECKING:
    from kvstore.tail import Tail

ComputeMs = Callable[[int, int], float]  # (first block, number of blocks) -> predicted milliseconds to compute them


LEAST_PROMISE_S = 0.25  # for a message to the maker, and a first contact with it
MAX_PROMISE_S = 120.0


@dataclass(frozen=True, slots=True)
class ReadTiers:
    """Which tiers a request may read from (directive no_read: none; the fleet record may forbid the shared one).

    `peer`: blocks of other workers, which are no shared tier.
    """

    device: bool = True
    host: bool = True
    disk: bool = True
    shared: bool = True
    peer: bool = True

    def allows(self, tier: TierName) -> bool:
        """Whether it may read from this tier."""
        allowed = {
            TierName.DEVICE: self.device,
            TierName.HOST: self.host,
            TierName.DISK: self.disk,
            TierName.PEER: self.peer,
        }
        return allowed.get(tier, self.shared)


@dataclass(frozen=True, slots=True)
class Wish:
    """What is wanted of the store.

    Attributes:
        hashes: the prefix, from its first block. reads: the tiers that may be read.
        compute_ms: what computing would cost instead. A result that is not positive and finite says: not measured.
        root: of the chain; None: the caller does not know. lifetime: what blocks that are read get at least.
        from_both_ends: whether what is not near may come from its back while the caller computes its front.
    """

    hashes: Sequence[BlockHash]
    reads: ReadTiers
    compute_ms: ComputeMs
    root: BlockHash | None = None
    lifetime: Lifetime = FOR_EVER
    from_both_ends: bool = False

    def price(self, first: int, count: int) -> float | None:
        """Milliseconds to compute `count` blocks from block `first` on; None: nothing has been measured yet."""
        ms = self.compute_ms(first, count)
        return ms if 0 < ms < float("inf") else None


@dataclass(frozen=True, slots=True)
class Promise:
    """Another worker is making the leading blocks of a prompt now, for who wants them here.

    Attributes:
        address: where it serves them. ticket: the hash of the last one, by which it is asked how far it is.
        blocks: how many. ready_ms: after how long all of them should be made, from `learnt_at` on.
        margin_ms: what it is worth not to compute them here, besides the time that takes.
        learnt_at: on the store's clock.
    """

    address: str
    ticket: BlockHash
    blocks: int
    ready_ms: float
    margin_ms: float
    learnt_at: float

    @property
    def longest_s(self) -> float:
        """After so long it is waited for no more, whatever has come."""
        return min(MAX_PROMISE_S, LEAST_PROMISE_S + (2 * self.ready_ms + self.margin_ms) / 1e3)


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """Consecutive blocks that would be treated alike.

    Attributes:
        tier: where they lie; None: nowhere that is known.
        first, count: positions in the prefix.
        load_ms: predicted time to read them, what is already queued included; None: not measured yet.
        compute_ms: predicted time to compute them; None: not measured yet.
        load: the choice.
    """

    tier: TierName | None
    first: int
    count: int
    load_ms: float | None
    compute_ms: float | None
    load: bool


class Acquisition:
    """Blocks of a prompt's prefix on their way to the device. Owned by the engine's thread.

    Until `done`, the sequence waits while others run. Then `block_ids` and `fates` hold the contiguous prefix that
    arrived whole: one device block, referenced for the caller, and the tier it came from, for each block. A load that
    failed only makes it shorter. `tail`: what follows comes from its back meanwhile; None: it does not.
    """

    def __init__(self, wish: Wish, give_back: Callable[[Sequence[int]], None]) -> None:
        """Nothing has arrived yet. `give_back` releases device blocks of a cancelled acquisition."""
        self.wish = wish
        self.block_ids: list[int] = []
        self.fates: list[TierName] = []
        self.done = False
        self.load_ms = 0.0
        self.started = 0.0
        self.cancelled = False
        self.looked = False  # one device miss is counted for an acquisition, where the first look-up ended
        self.limits: list[tuple[int, float]] = []  # of the load that it waits for: blocks of that, until when
        self.slack_s = 0.0  # that is in these limits
        self.late_s = 0.0  # slack that loads have cost it which came short
        self.is_paused = False  # host holds more of it, which the next steps copy
        self.is_landing = False  # blocks of it are being copied from host
        self.is_cut = False  # what it waited for was cleared meanwhile: it takes no more from slow tiers
        self.tried: dict[TierName, int] = {}  # position at which a tier came up short
        self.arrived: dict[BlockHash, TierName] = {}  # loaded by somebody else that this one waited for
        self.promised_from: int | None = None  # blocks of peers from here on were made for this request alone
        self.tail: Tail | None = None
        self._give_back = give_back

    def cancel(self) -> None:
        """Give all blocks back; bytes still on their way are thrown away when they arrive. Again: nothing happens."""
        self.cancelled = self.done = True
        if self.tail is not None:
            self.tail.cancel()
        self._give_back(self.block_ids)
        self.block_ids, self.fates = [], []

    def give_up_at(self, come: int) -> float:
        """When it has waited long enough, on the clock, for a load of which so many blocks have come."""
        return next((until for stop, until in self.limits if stop > come), float("inf"))

    def came_short(self, come: int, now: float) -> None:
        """The load that it waited for brought no more than so many blocks: what that cost is missing for the next."""
        self.late_s += max(0.0, now - (self.give_up_at(come) - self.slack_s))

    @property
    def position(self) -> int:
        """How many blocks have come."""
        return len(self.block_ids)

    @property
    def made_elsewhere(self) -> int:
        """Of the blocks that have come, those that another worker computed for this very request: they are no hits."""
        if self.promised_from is None:
            return 0
        return sum(tier is TierName.PEER for tier in self.fates[self.promised_from :])

    @property
    def rest(self) -> Sequence[BlockHash]:
        """What has not come yet."""
        return self.wish.hashes[self.position :]

    def take(self, block_ids: Sequence[int], fates: Sequence[TierName]) -> None:
        """The next blocks have come."""
        self.block_ids += block_ids
        self.fates += fates
