"""Between the wire's cache commands and the plain ones. Pure.

Covers: `CacheCommand` and `CacheDone`, `Probe` and `Probed`, and the refusal of commands that make no sense. Does not
cover: the other messages (`wire`).
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.blocks import BlockHash
from kvstore.events import TierName
from kvstore.lifetime import Lifetime
from warmkv.v1 import common_pb2, worker_pb2
from workers.cache_commands import (
    MAX_BLOCKS,
    MAX_CHAIN,
    CacheAnswer,
    CacheCommand,
    Check,
    ListBlocks,
    Pin,
    Selection,
    Unpin,
    Warm,
)
from workers.protocol import CachedBlock
from workers.wire import TIERS

HASH_BYTES = 32
MAX_PROBED = 256
_PROBED_BITS = {TierName.DEVICE: 1, TierName.HOST: 2, TierName.DISK: 4}
_NAMES = {number: name for name, number in TIERS.items()}


class CommandRefused(Exception):
    """A command that makes no sense; the message says what to send instead."""


def command_from_wire(message: worker_pb2.CacheCommand) -> CacheCommand:
    """The engine's command.

    Raises:
        CommandRefused: a hash has another length than 32 bytes, a limit is out of range, or the kind is not known.
    """
    match message.WhichOneof("kind"):
        case "list":
            return _listing(message.list)
        case "warm":
            warm = message.warm
            root = _needed("chain_root", warm.chain_root)
            return Warm(_chain("hashes", warm.hashes, MAX_CHAIN), root, _lifetime(warm))
        case "pin":
            for_s = message.pin.for_ms / 1000 if message.pin.HasField("for_ms") else None
            return Pin(_selection(message.pin), for_s)
        case "unpin":
            return Unpin(_selection(message.unpin))
        case "check":
            return Check()
    raise CommandRefused("the command is of a kind that this worker does not know; run the same warmkv version on both")


def done_to_wire(command_id: int, answer: CacheAnswer, error: str) -> worker_pb2.CacheDone:
    """What came of a command."""
    return worker_pb2.CacheDone(
        command_id=command_id,
        error=error,
        blocks=[_block_to_wire(block) for block in answer.blocks],
        next=answer.next or b"",
        counts=[
            worker_pb2.CacheDone.Count(tier=TIERS[tier], blocks=blocks)
            for tier, blocks in answer.counts.items()
            if blocks
        ],
        started=answer.started,
        wrong=answer.wrong,
    )


def probe_from_wire(message: worker_pb2.Probe) -> list[BlockHash]:
    """The blocks that a router asks for.

    Raises:
        CommandRefused: they are no whole hashes, or more than MAX_PROBED.
    """
    return _chain("hashes", message.hashes, MAX_PROBED)


def probed_to_wire(probe_id: int, tiers: Sequence[Sequence[TierName]]) -> worker_pb2.Probed:
    """Where the blocks lie, one byte each."""
    return worker_pb2.Probed(
        probe_id=probe_id, tiers=bytes(sum(_PROBED_BITS.get(tier, 0) for tier in held) for held in tiers)
    )


def _lifetime(message: worker_pb2.CacheCommand.Warm) -> Lifetime | None:
    if message.HasField("expires_at"):
        return Lifetime(message.ttl_ms / 1000, float(message.expires_at))
    return Lifetime(message.ttl_ms / 1000) if message.HasField("ttl_ms") else None


def _listing(message: worker_pb2.CacheCommand.List) -> ListBlocks:
    if not 1 <= message.limit <= MAX_BLOCKS:
        raise CommandRefused(f"limit is {message.limit}; send 1 to {MAX_BLOCKS}")
    if message.tier not in (common_pb2.TIER_UNSPECIFIED, *_NAMES):
        raise CommandRefused(f"tier {message.tier} is not known here; run the same warmkv version on both")
    return ListBlocks(
        root=_optional("chain_root", message.chain_root),
        prefix=_optional("prefix_hash", message.prefix_hash),
        tier=_NAMES.get(message.tier),
        after=_optional("after", message.after),
        limit=message.limit,
    )


def _selection(message: worker_pb2.CacheCommand.Pin | worker_pb2.CacheCommand.Unpin) -> Selection:
    hashes = _chain("hashes", message.hashes, MAX_BLOCKS)
    root = _optional("chain_root", message.chain_root)
    if not hashes and root is None:
        raise CommandRefused("neither hashes nor a chain_root are given; send one of them")
    return Selection(hashes, root, _optional("after", message.after))


def _chain(field: str, joined: bytes, most: int) -> list[BlockHash]:
    if len(joined) % HASH_BYTES or len(joined) > most * HASH_BYTES:
        raise CommandRefused(f"{field} has {len(joined)} bytes; send {HASH_BYTES} for each of at most {most} hashes")
    return [BlockHash(joined[at : at + HASH_BYTES]) for at in range(0, len(joined), HASH_BYTES)]


def _optional(field: str, value: bytes) -> BlockHash | None:
    return _needed(field, value) if value else None


def _needed(field: str, value: bytes) -> BlockHash:
    if len(value) != HASH_BYTES:
        raise CommandRefused(f"{field} has {len(value)} bytes; send {HASH_BYTES}")
    return BlockHash(value)


def _block_to_wire(block: CachedBlock) -> worker_pb2.CacheDone.Block:
    message = worker_pb2.CacheDone.Block(
        hash=block.hash,
        parent=block.parent or b"",
        chain_root=block.root,
        tiers=[TIERS[tier] for tier in sorted(block.tiers, key=_speed)],
        leased=block.leased,
        priority=block.priority,
        position=block.position,
    )
    if block.ttl_s is not None:
        message.ttl_ms = round(block.ttl_s * 1000)
    if block.ttl_left_s is not None:
        message.ttl_left_ms = max(0, round(block.ttl_left_s * 1000))
    return message


def _speed(tier: TierName) -> int:
    return int(TIERS[tier])  # the contract numbers tiers from fast to slow
