"""How the parts of a store are connected: a rule and a lane for each tier that is written to, a source for each read.

Covers: which parts there are and how long their queues may be. Does not cover: what the parts do (`lane`, `source`),
the store over them (`store`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from kvstore.admission import Admission, Always, Moment
from kvstore.blocks import BlockHash
from kvstore.events import TierName
from kvstore.host.tier import HostTier
from kvstore.known import KnownLocal, KnownShared
from kvstore.lane import Lane, NearTiers, Refreshing, nobody
from kvstore.loading import FindMeta
from kvstore.source import Source
from kvstore.spill import Writable
from kvstore.tier import Clock, HintedTier, LocalTier, SharedTier


class SlowTier(NamedTuple):
    """A tier with a lane: itself, how it is written, what is known of it, and who hears what is on its way to it."""

    tier: LocalTier | SharedTier
    writable: Writable
    known: KnownLocal | KnownShared
    on_queued: Callable[[BlockHash], None]


def rules_of(
    host: HostTier | None,
    disk: LocalTier | None,
    shared: SharedTier | None,
    admission: Admission | None,
    shared_admission: Admission | None,
) -> dict[TierName, Admission]:
    """Which blocks are written to each slow tier.

    Raises:
        ValueError: a rule is to be asked when host evicts a block, and there is no host tier.
    """
    to_disk = admission or Always()
    rules = {} if disk is None else {disk.name: to_disk}
    if shared is not None:
        rules[shared.name] = shared_admission or to_disk
    if host is None and any(rule.moment is Moment.EVICTION for rule in rules.values()):
        raise ValueError(
            "the admission `on_eviction` writes what the host tier evicts, and there is none; give it bytes, or "
            "choose always or second_hit"
        )
    return rules


def slow_tiers(
    disk: LocalTier | None,
    shared: SharedTier | None,
    *,
    entries: int,
    on_queued: Callable[[BlockHash], None],
    clock: Clock,
    wall_clock: Clock,
) -> list[SlowTier]:
    """The tiers that are written to behind the engine's back, the nearer one first.

    Args:
        disk, shared: they; None: without. entries: blocks of the shared tier to remember.
        on_queued: hears of blocks that are on their way to disk.
        clock: seconds. wall_clock: seconds since the epoch.
    """
    slow: list[SlowTier] = []
    if disk is not None:
        slow.append(SlowTier(disk, Refreshing(disk), KnownLocal(disk), on_queued))
    if shared is not None:
        known = KnownShared(shared, entries, clock=clock, wall_clock=wall_clock)
        slow.append(SlowTier(shared, shared, known, nobody))
    return slow


def lanes_of(
    slow: Sequence[SlowTier],
    rules: Mapping[TierName, Admission],
    near: NearTiers,
    *,
    kept: int,
    entries: int,
    clock: Clock,
    wall_clock: Clock,
) -> dict[TierName, Lane]:
    """A lane down to each slow tier.

    Args:
        slow: the tiers. rules: of each. near: where their blocks come from.
        kept: blocks that wait for each at most; of host's slots no more than half between them, unless they are written
            when host evicts them.
        entries: last refreshes of each to remember.
        clock: seconds. wall_clock: seconds since the epoch.
    """
    host = near.host
    queued = kept if host is None else min(kept, max(1, host.num_slots // (2 * max(1, len(slow)))))
    return {
        tier.name: Lane(
            writable,
            known,
            near,
            clock=clock,
            wall_clock=wall_clock,
            max_queued=kept if rules[tier.name].moment is Moment.EVICTION else queued,
            entries=entries,
            moment=rules[tier.name].moment,
            on_queued=on_queued,
        )
        for tier, writable, known, on_queued in slow
    }


def sources_of(
    slow: Sequence[SlowTier], peers: HintedTier | None, block_nbytes: int, clock: Clock
) -> list[tuple[Source, FindMeta]]:
    """What is read by threads, and what tells under which metadata a block is stored there."""
    sources: list[tuple[Source, FindMeta]] = [
        (Source(tier, block_nbytes, clock=clock, believed=_believed(known)), known.find) for tier, _, known, _ in slow
    ]
    if peers is not None:
        sources.append((Source(peers, block_nbytes, clock=clock, believed=None), peers.find))
    return sources


def _believed(known: KnownLocal | KnownShared) -> Callable[[BlockHash], bool] | None:
    return known.holds if isinstance(known, KnownShared) else None
