"""Cache commands and their answers, over the wire and back; what makes no sense is refused."""

from __future__ import annotations

import pytest

from kvstore.blocks import BlockHash
from kvstore.events import TierName
from kvstore.lifetime import Lifetime
from warmkv.v1 import common_pb2, worker_pb2
from workers.cache_commands import MAX_BLOCKS, MAX_CHAIN, CacheAnswer, Check, ListBlocks, Pin, Selection, Unpin, Warm
from workers.cache_wire import CommandRefused, command_from_wire, done_to_wire
from workers.protocol import CachedBlock

Command = worker_pb2.CacheCommand
A, B, ROOT = (BlockHash(letter * 32) for letter in (b"a", b"b", b"r"))


@pytest.mark.parametrize(
    ("message", "command"),
    [
        (Command(list=Command.List(limit=5)), ListBlocks(None, None, None, None, 5)),
        (
            Command(list=Command.List(chain_root=ROOT, prefix_hash=A, tier=common_pb2.TIER_DISK, after=B, limit=1000)),
            ListBlocks(ROOT, A, TierName.DISK, B, 1000),
        ),
        (Command(warm=Command.Warm(chain_root=ROOT, hashes=A + B)), Warm([A, B], ROOT, None)),
        (Command(warm=Command.Warm(chain_root=ROOT, hashes=A, ttl_ms=2500)), Warm([A], ROOT, Lifetime(2.5))),
        (
            Command(warm=Command.Warm(chain_root=ROOT, hashes=A, expires_at=1_900_000_000)),
            Warm([A], ROOT, Lifetime(0.0, 1_900_000_000.0)),
        ),
        (Command(pin=Command.Pin(hashes=A)), Pin(Selection([A], None, None), None)),
        (Command(pin=Command.Pin(chain_root=ROOT, after=A, for_ms=1500)), Pin(Selection([], ROOT, A), 1.5)),
        (Command(unpin=Command.Unpin(hashes=A + B)), Unpin(Selection([A, B], None, None))),
        (Command(check=Command.Check()), Check()),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_command_arrives_as_it_was_meant(message: worker_pb2.CacheCommand, command: object) -> None:
    assert command_from_wire(message) == command


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (Command(), "kind"),
        (Command(list=Command.List()), "limit is 0"),
        (Command(list=Command.List(limit=MAX_BLOCKS + 1)), "limit is 1001"),
        (Command(list=Command.List(limit=1, chain_root=b"short")), "chain_root has 5 bytes"),
        (Command(list=Command.List(limit=1, prefix_hash=b"x" * 16)), "prefix_hash has 16 bytes"),
        (Command(list=Command.List(limit=1, after=b"x" * 33)), "after has 33 bytes"),
        (Command(list=Command.List(limit=1, tier=77)), "tier 77"),  # type: ignore[arg-type]
        (Command(warm=Command.Warm(hashes=A)), "chain_root has 0 bytes"),
        (Command(warm=Command.Warm(chain_root=ROOT, hashes=A * (MAX_CHAIN + 1))), "at most 16384"),
        (Command(pin=Command.Pin()), "neither hashes nor a chain_root"),
        (Command(pin=Command.Pin(hashes=A + b"x")), "hashes has 33 bytes"),
        (Command(unpin=Command.Unpin(hashes=A * (MAX_BLOCKS + 1))), "at most 1000"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_a_command_that_makes_no_sense_is_refused_with_what_to_send(
    message: worker_pb2.CacheCommand, said: str
) -> None:
    with pytest.raises(CommandRefused, match=said):
        command_from_wire(message)


def test_an_answer_arrives_with_all_that_is_known_of_a_block() -> None:
    block = CachedBlock(
        B, A, ROOT, (TierName.REDIS, TierName.HOST), ttl_s=60.0, ttl_left_s=-1.0, leased=True, priority=9, position=3
    )
    bare = CachedBlock(A, None, BlockHash(b""), (TierName.DEVICE,))
    counts = {TierName.HOST: 3, TierName.DISK: 0}
    done = done_to_wire(4, CacheAnswer([block, bare], next=B, counts=counts, started=2, wrong="it"), "")
    first, second = done.blocks
    assert (done.command_id, done.error, done.next, done.started, done.wrong) == (4, "", B, 2, "it")
    assert (first.hash, first.parent, first.chain_root, first.leased, first.priority) == (B, A, ROOT, True, 9)
    assert list(first.tiers) == [common_pb2.TIER_HOST, common_pb2.TIER_REDIS], "from fast to slow"
    assert (first.ttl_ms, first.ttl_left_ms) == (60_000, 0)
    assert (second.parent, second.chain_root) == (b"", b"")
    assert (first.position, second.HasField("position")) == (3, False)
    assert not second.HasField("ttl_ms")
    assert not second.HasField("ttl_left_ms")
    assert list(done.counts) == [worker_pb2.CacheDone.Count(tier=common_pb2.TIER_HOST, blocks=3)]


def test_the_longest_answer_stays_below_the_bound_of_a_message() -> None:
    block = CachedBlock(
        A, B, ROOT, tuple(TierName), ttl_s=9e7, ttl_left_s=9e7, leased=True, priority=100, position=1 << 30
    )
    assert done_to_wire(1 << 40, CacheAnswer([block] * MAX_BLOCKS, next=A), "").ByteSize() < 1 << 20
