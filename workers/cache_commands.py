"""What operators ask of a worker's blocks, and how an engine does it between two steps.

Covers: the commands as plain data, their bounds, carrying one out. Does not cover: the wire (`cache_wire`), turns
(`engine_thread`), what an operator's order means for a fleet (the router).

Every command takes or gives at most `MAX_BLOCKS` blocks, and steps go on between commands; `Warm` takes a whole chain,
of which it only starts the reads, and `Check` alone looks at everything. A tenant's blocks are pinned piece by piece:
whoever asks repeats the command behind `CacheAnswer.next` until there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvstore.blocks import BlockHash
from kvstore.errors import InvariantError
from kvstore.events import TierName
from kvstore.lifetime import Lifetime
from workers.protocol import CachedBlock, Engine

MAX_BLOCKS = 1000
MAX_CHAIN = 16_384  # of one prompt: its hashes fill half of the 1 MiB that a message may have


@dataclass(frozen=True, slots=True)
class ListBlocks:
    """Which blocks are there; the arguments of `Cache.list_blocks`. `tier`: only those that it holds; None: any."""

    root: BlockHash | None
    prefix: BlockHash | None
    tier: TierName | None
    after: BlockHash | None
    limit: int


@dataclass(frozen=True, slots=True)
class Warm:
    """Bring a chain up; the arguments of `Engine.prefetch`."""

    hashes: Sequence[BlockHash]
    root: BlockHash
    lifetime: Lifetime | None


@dataclass(frozen=True, slots=True)
class Selection:
    """Some blocks: those named, or with none named the first `MAX_BLOCKS` of `root` behind `after`."""

    hashes: Sequence[BlockHash]
    root: BlockHash | None
    after: BlockHash | None


@dataclass(frozen=True, slots=True)
class Pin:
    """Keep blocks for `for_s` seconds; None: until `Unpin`."""

    blocks: Selection
    for_s: float | None


@dataclass(frozen=True, slots=True)
class Unpin:
    """Keep blocks no longer."""

    blocks: Selection


@dataclass(frozen=True, slots=True)
class Check:
    """Audit the store."""


CacheCommand = ListBlocks | Warm | Pin | Unpin | Check


@dataclass(frozen=True, slots=True)
class CacheAnswer:
    """What came of a command; fields that it does not fill stay empty.

    Attributes:
        blocks: of ListBlocks. next: there may be more behind this hash; None: that was all.
        counts: of Pin and Unpin, blocks by tier. started: of Warm, blocks on their way.
        wrong: of Check, what is wrong with the store; empty: nothing.
    """

    blocks: Sequence[CachedBlock] = ()
    next: BlockHash | None = None
    counts: dict[TierName, int] = field(default_factory=dict)
    started: int = 0
    wrong: str = ""


def carry_out(engine: Engine, command: CacheCommand) -> CacheAnswer:
    """Do it. On the engine's thread.

    Raises:
        StoreError: the store could not.
    """
    match command:
        case ListBlocks():
            return _listed(engine, command)
        case Warm(hashes, root, lifetime):
            return CacheAnswer(started=engine.cache.prefetch(hashes, root=root, lifetime=lifetime))
        case Pin(blocks, for_s):
            hashes, following = _selected(engine, blocks)
            return CacheAnswer(counts=engine.cache.lease(hashes, for_s), next=following)
        case Unpin(blocks):
            hashes, following = _selected(engine, blocks)
            return CacheAnswer(counts=engine.cache.end_leases(hashes), next=following)
        case Check():
            return CacheAnswer(wrong=_audited(engine))


def _listed(engine: Engine, command: ListBlocks) -> CacheAnswer:
    seen = engine.cache.list_blocks(root=command.root, prefix=command.prefix, after=command.after, limit=command.limit)
    wanted = [block for block in seen if command.tier is None or command.tier in block.tiers]
    return CacheAnswer(blocks=wanted, next=_following(seen, command.limit))


def _selected(engine: Engine, blocks: Selection) -> tuple[Sequence[BlockHash], BlockHash | None]:
    if blocks.hashes:
        return blocks.hashes, None
    page = engine.cache.list_blocks(root=blocks.root, prefix=None, after=blocks.after, limit=MAX_BLOCKS)
    return [block.hash for block in page], _following(page, MAX_BLOCKS)


def _following(page: Sequence[CachedBlock], limit: int) -> BlockHash | None:
    return page[-1].hash if len(page) == limit else None


def _audited(engine: Engine) -> str:
    try:
        engine.cache.check()
    except InvariantError as error:
        return f"{error}"
    return ""
