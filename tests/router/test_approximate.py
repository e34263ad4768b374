"""Workers that send no events: what is believed of them, against naive models and simulated caches."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.events import TierName
from router.approximate import LONGEST_TTL_S, Approximate, Placement, Room
from router.index import NO_OVERLAP, Overlap, PrefixIndex

SIZE = 16


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def chain(name: int, blocks: int) -> list[bytes]:
    return [name.to_bytes(8, "little") + at.to_bytes(8, "little") for at in range(blocks)]


class Rig:
    def __init__(self, device: int = 100, host: int = 0, ttl_s: float = 120.0) -> None:
        self.clock = Clock()
        self.index = PrefixIndex(self.clock)
        self.books = Approximate(self.index, self.clock, ttl_s=ttl_s)
        self.join(1)
        self.rooms = device, host
        self.removals = 0
        self.report()

    def report(self, removals: int = 0) -> None:
        """The worker says how many more blocks have left its tiers."""
        self.removals += removals
        self.books.reported("w", *(Room(blocks, self.removals) for blocks in self.rooms))

    def join(self, incarnation: int) -> None:
        """As the link does: an empty snapshot."""
        self.index.join("w", incarnation)
        self.index.begin_snapshot("w", incarnation)
        self.index.end_snapshot("w", incarnation)
        self.books.joined("w", incarnation)

    def send(self, hashes: Sequence[bytes], device: int = 0, host: int = 0) -> None:
        """A whole request, of which so many blocks were reused."""
        placement = Placement(self.books, "w", hashes, reads=True, stores=True)
        placement.computed()
        computed = (len(hashes) - device - host) * SIZE
        placement.ended({"device": device * SIZE, "host": host * SIZE, "computed": computed}, SIZE)
        self.clock.now += 1.0
        self.index.check()

    def believed(self, hashes: Sequence[bytes]) -> Overlap:
        self.books.expire()
        return self.index.match(hashes).get("w", NO_OVERLAP)


def test_a_prompt_is_believed_from_its_first_token_on() -> None:
    rig = Rig()
    placement = Placement(rig.books, "w", chain(1, 5), reads=True, stores=True)
    assert rig.believed(chain(1, 5)).device == 0
    placement.computed()
    assert rig.believed(chain(1, 8)) == Overlap(5, 5, 5, 5)


def test_what_is_not_to_be_kept_is_not_believed() -> None:
    rig = Rig()
    placement = Placement(rig.books, "w", chain(1, 5), reads=True, stores=False)
    placement.computed()
    placement.ended({"computed": 80}, SIZE)
    assert rig.believed(chain(1, 5)).device == 0


def test_time_ends_a_belief_and_use_prolongs_it() -> None:
    rig = Rig(ttl_s=60.0)
    rig.send(chain(1, 5))
    rig.send(chain(2, 5))
    rig.clock.now += 40
    rig.send(chain(1, 3), device=3)
    rig.report(removals=1)
    rig.clock.now += 30
    assert rig.believed(chain(1, 5)).device == 3
    assert rig.believed(chain(2, 5)).device == 0
    assert rig.index.gone(chain(2, 5)[0]) == "expired"


def test_while_a_worker_reports_no_removal_nothing_has_gone_however_old() -> None:
    rig = Rig(ttl_s=60.0)
    rig.report(removals=7)
    rig.clock.now += 1
    rig.send(chain(1, 5))
    rig.clock.now += 1000
    assert rig.believed(chain(1, 5)).device == 5
    rig.report(removals=1)
    assert rig.believed(chain(1, 5)).device == 0


def test_a_tier_is_believed_to_hold_no_more_than_it_has_room_for_and_the_head_of_a_chain_stays_longest() -> None:
    rig = Rig(device=10)
    rig.send(chain(1, 8))
    rig.send(chain(2, 5))
    assert rig.believed(chain(1, 8)).device == 5
    assert rig.believed(chain(2, 5)).device == 5
    rig.send(chain(3, 30))
    assert rig.believed(chain(3, 30)).device == 10


def test_a_worker_that_has_not_reported_its_room_is_believed_to_hold_nothing() -> None:
    rig = Rig(device=0)
    rig.send(chain(1, 8))
    assert rig.believed(chain(1, 8)).device == 0


def test_host_keeps_what_the_device_has_no_room_for() -> None:
    rig = Rig(device=6, host=20)
    rig.send(chain(1, 6))
    rig.send(chain(2, 6))
    assert rig.believed(chain(1, 6)) == Overlap(0, 6, 6, 6)
    assert rig.believed(chain(2, 6)) == Overlap(6, 6, 6, 6)


def test_an_answer_that_reused_less_refutes_all_that_was_used_no_later() -> None:
    rig = Rig()
    for name in range(5):
        rig.send(chain(name, 10))
    rig.send(chain(2, 10), device=4)  # its last six blocks were evicted: so was what is older
    assert rig.believed(chain(0, 10)).device == 0
    assert rig.believed(chain(1, 10)).device == 0
    assert rig.believed(chain(2, 10)).device == 10  # it has just been computed again
    assert [rig.believed(chain(name, 10)).device for name in (3, 4)] == [10, 10]


def test_the_room_that_others_use_is_learnt_and_unlearnt() -> None:
    rig = Rig(device=100)
    for name in range(6):
        rig.send(chain(name, 10))
    rig.send(chain(0, 10), device=0)  # fifty blocks were used since the first one: more than that is not kept
    for name in range(10, 20):
        rig.send(chain(name, 10))
    held = sum(rig.believed(chain(name, 10)).device for name in range(20))
    assert held == 50
    rig.send(chain(11, 10), device=10)  # given up for room, and there all the same
    assert sum(rig.believed(chain(name, 10)).device for name in range(20)) == 50
    rig.send(chain(30, 10))
    assert sum(rig.believed(chain(name, 10)).device for name in (*range(20), 30)) == 60


def test_a_block_that_outlived_its_time_doubles_the_time() -> None:
    rig = Rig(ttl_s=60.0)
    rig.send(chain(1, 5))
    rig.clock.now += 100
    rig.report(removals=1)
    assert rig.believed(chain(1, 5)).device == 0
    rig.send(chain(1, 5), device=5)
    rig.clock.now += 100
    rig.report(removals=1)
    assert rig.believed(chain(1, 5)).device == 5
    rig.clock.now += 100
    assert rig.believed(chain(1, 5)).device == 0
    for _ in range(20):
        rig.clock.now += 5000
        rig.report(removals=1)
        rig.books.expire()
        rig.send(chain(1, 5), device=5)
    rig.clock.now += LONGEST_TTL_S + 2
    rig.report(removals=1)
    assert rig.believed(chain(1, 5)).device == 0


def test_reusing_what_was_never_sent_teaches_nothing() -> None:
    rig = Rig(ttl_s=60.0)
    rig.send(chain(1, 5), device=5)  # another router sent it
    rig.clock.now += 61
    rig.report(removals=1)
    assert rig.believed(chain(1, 5)).device == 0


def test_a_request_that_may_not_read_or_does_not_say_refutes_nothing() -> None:
    rig = Rig()
    rig.send(chain(1, 5))
    for reads, fates in ((False, {"computed": 80}), (True, {})):
        placement = Placement(rig.books, "w", chain(1, 5), reads=reads, stores=True)
        placement.ended(fates, SIZE)
    assert rig.believed(chain(1, 5)).device == 5


def test_a_full_hit_lacks_the_token_that_is_always_computed() -> None:
    rig = Rig()
    rig.send(chain(1, 5))
    placement = Placement(rig.books, "w", chain(1, 5), reads=True, stores=True)
    placement.ended({"device": 79, "computed": 1}, SIZE)
    rig.send(chain(2, 5))
    assert rig.believed(chain(1, 5)).device == 5


def test_a_broken_stream_keeps_the_books_and_a_restart_does_not() -> None:
    rig = Rig()
    rig.send(chain(1, 5))
    rig.send(chain(1, 9)[5:])
    rig.index.drop("w")
    assert rig.believed(chain(1, 5)) == NO_OVERLAP
    rig.join(1)
    assert rig.believed(chain(1, 9)).device == 9
    rig.join(2)
    assert rig.believed(chain(1, 5)).device == 0
    rig.index.check()


def test_a_clear_forgets_and_a_worker_that_sends_events_again_is_none_of_these() -> None:
    rig = Rig()
    rig.send(chain(1, 5))
    rig.books.cleared("w")
    assert rig.believed(chain(1, 5)).device == 0
    assert rig.index.gone(chain(1, 5)[0]) == "cleared"
    assert "w" in rig.books
    rig.books.forget("w")
    assert "w" not in rig.books


def test_a_probe_corrects_a_belief() -> None:
    rig = Rig()
    rig.send(chain(1, 5))
    rig.books.located("w", chain(1, 5)[3], ())
    assert rig.believed(chain(1, 5)).device == 3
    rig.books.located("w", chain(1, 5)[1], {TierName.DEVICE})
    assert rig.believed(chain(1, 5)).device == 3


class LruCache:
    """The oracle: a worker's device, the tail of a chain first out."""

    def __init__(self, room: int) -> None:
        self.room, self.blocks = room, OrderedDict[bytes, None]()

    def run(self, hashes: Sequence[bytes]) -> int:
        found = 0
        while found < len(hashes) and hashes[found] in self.blocks:
            found += 1
        return found

    def take(self, hashes: Sequence[bytes]) -> int:
        found = self.run(hashes)
        for block in reversed(hashes[: self.room]):
            self.blocks[block] = None
            self.blocks.move_to_end(block)
        while len(self.blocks) > self.room:
            self.blocks.popitem(last=False)
        return found


prompts = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 12)), max_size=30)


@given(prompts, st.integers(12, 60))
def test_one_router_alone_is_exact_within_the_time(sent: list[tuple[int, int]], room: int) -> None:
    rig, worker = Rig(device=room, ttl_s=1e6), LruCache(room)
    for name, length in sent:
        hashes = chain(name, length)
        assert rig.believed(hashes).device == worker.run(hashes)
        rig.send(hashes, device=worker.take(hashes))


@given(prompts, st.lists(st.integers(0, 1), min_size=30, max_size=30), st.integers(12, 40))
def test_with_another_router_never_more_is_believed_than_there_is_room_for(
    sent: list[tuple[int, int]], routers: list[int], room: int
) -> None:
    rig, worker = Rig(device=room, ttl_s=1e6), LruCache(room)
    for (name, length), router in zip(sent, routers, strict=False):
        hashes = chain(name + 100 * router, length)
        found = worker.take(hashes)
        if router == 0:
            rig.send(hashes, device=found)
            assert rig.believed(hashes).device == length
        assert sum(rig.index.match([block])["w"].device for n in range(10) for block in chain(n, 12)) <= room


@pytest.mark.parametrize("host", [0, 30])
def test_what_index_and_books_believe_is_the_same(host: int) -> None:
    rig = Rig(device=12, host=host)
    for step in range(60):
        rig.send(chain(step * 7 % 5, 1 + step % 9), device=step % 2)
        for name in range(5):
            times = rig.books.used_at("w", chain(name, 9))
            assert rig.believed(chain(name, 9)).device == len(times[0])
            assert rig.believed(chain(name, 9)).host == max(map(len, times))
