"""A store that waits for what another worker is making: over a real socket, with a maker that is slow, dies or lies."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from kvstore.acquisition import Promise
from kvstore.events import RemovalCause, TierName
from kvstore.peer.promises import Progress, PromiseBoard, PromiseState
from kvstore.peer.watch import parsed
from kvstore.promised import promise_of, waits_too_long
from kvstore.store import Acquisition
from tests.kvstore.blocks_for_tests import OTHER_ROOT, chain, names, payloads
from tests.kvstore.peer.peers_for_tests import Worker, reader, stranger, wait_until, worker
from tests.kvstore.test_store_peers import Rig

PEER, HOST = TierName.PEER, TierName.HOST
CHAIN = chain(6)
NAMES = names(CHAIN)
TICKET = NAMES[-1]
LONG_MS = 60_000.0


@pytest.fixture
def maker() -> Iterator[Worker]:
    with worker() as running:
        yield running


@pytest.fixture
def rig(maker: Worker) -> Iterator[Rig]:
    with running(Rig(maker, load_slack_s=1.0)) as made:
        yield made


@contextmanager
def running(made: Rig) -> Iterator[Rig]:
    yield made
    made.store.check()
    made.store.close()
    threads = [thread.name for thread in threading.enumerate() if thread.name == "peer-watch"]
    wait_until(lambda: not any(thread.name == "peer-watch" and thread.is_alive() for thread in threading.enumerate()))
    assert len(threads) <= 1, "one peer, one thread"


def make(maker: Worker, first: int, stop: int, *, found: int = 0) -> None:
    """The maker has computed these blocks."""
    maker.host.write(CHAIN[first:stop], payloads(CHAIN[first:stop]))
    maker.server.promises.made(TICKET, stop, found=found)


def promised(rig: Rig, *, address: str = "", ready_ms: float = LONG_MS, margin_ms: float = 0.0) -> None:
    told = promise_of(
        NAMES, address or rig.other.server.address, 6, ready_ms=ready_ms, margin_ms=margin_ms, now=rig.clock()
    )
    assert told is not None
    rig.store.expect(told)


def pump_until(rig: Rig, condition: Callable[[], object]) -> None:
    def pumped() -> object:
        rig.store.pump()
        return condition()

    wait_until(pumped)


def price(ms_a_block: float) -> Callable[[int, int], float]:
    return lambda first, count: ms_a_block * count


def test_blocks_come_chunk_by_chunk_while_they_are_made(rig: Rig, maker: Worker) -> None:
    promised(rig)
    acquisition = rig.start()
    assert not acquisition.done
    maker.server.promises.begin(TICKET)
    make(maker, 0, 2)
    pump_until(rig, lambda: acquisition.position == 2)
    assert not acquisition.done, "four more are on their way to be made"
    make(maker, 2, 5)
    pump_until(rig, lambda: acquisition.position == 5)
    make(maker, 5, 6)
    assert rig.end(acquisition) == [PEER] * 6
    assert acquisition.made_elsewhere == 6
    assert rig.get() == [TierName.DEVICE] * 6
    assert rig.host is not None
    assert rig.host.match(NAMES) == 6


def test_what_the_maker_had_before_is_a_hit_and_the_rest_is_not(rig: Rig, maker: Worker) -> None:
    promised(rig)
    acquisition = rig.start()
    maker.server.promises.begin(TICKET)
    make(maker, 0, 4, found=3)
    pump_until(rig, lambda: acquisition.position == 4)
    make(maker, 4, 6)
    assert rig.end(acquisition) == [PEER] * 6
    assert acquisition.made_elsewhere == 3


def test_what_lies_here_is_taken_first(rig: Rig, maker: Worker) -> None:
    assert rig.host is not None
    rig.host.write(CHAIN[:2], payloads(CHAIN[:2]))
    promised(rig)
    acquisition = rig.start()
    assert acquisition.position == 2
    maker.server.promises.begin(TICKET)
    make(maker, 0, 6)
    assert rig.end(acquisition) == [HOST, HOST, *[PEER] * 4]


def test_a_maker_that_ends_early_is_waited_for_no_more(rig: Rig, maker: Worker) -> None:
    promised(rig)
    acquisition = rig.start()
    maker.server.promises.begin(TICKET)
    make(maker, 0, 3)
    pump_until(rig, lambda: acquisition.position == 3)
    assert not acquisition.done
    maker.server.promises.end(TICKET)
    assert rig.end(acquisition) == [PEER] * 3


def test_a_maker_that_dies_is_a_miss(rig: Rig, maker: Worker) -> None:
    with stranger(maker.server.address) as way:
        promised(rig, address=way.address)
        acquisition = rig.start()
        maker.server.promises.begin(TICKET)
        make(maker, 0, 2)
        pump_until(rig, lambda: acquisition.position == 2)
        assert not acquisition.done
    assert rig.end(acquisition) == [PEER] * 2


def test_a_maker_that_nobody_reaches_is_a_miss_at_once(rig: Rig) -> None:
    promised(rig, address="127.0.0.1:1")
    assert rig.get() == []


def test_a_maker_that_lost_what_it_made_is_a_miss(rig: Rig, maker: Worker) -> None:
    promised(rig)
    acquisition = rig.start()
    maker.server.promises.begin(TICKET)
    maker.host.write(CHAIN[:2], payloads(CHAIN[:2]))
    maker.server.promises.made(TICKET, 5, found=0)  # three of them were evicted, or cleared, again
    assert rig.end(acquisition) == [PEER] * 2


def test_one_that_never_begins_is_waited_for_as_long_as_computing_takes(rig: Rig) -> None:
    promised(rig, ready_ms=30.0)
    started = time.monotonic()
    assert rig.get(compute_ms=price(20.0)) == []  # 120 ms, and the slack
    assert time.monotonic() - started > 0.12


def test_one_that_stalls_half_way_is_left_and_what_came_is_kept(maker: Worker) -> None:
    ahead_s = 0.0
    with running(Rig(maker, clock=lambda: time.monotonic() + ahead_s)) as rig:
        promised(rig, ready_ms=600_000.0)
        acquisition = rig.start(compute_ms=price(100_000.0))
        maker.server.promises.begin(TICKET)
        make(maker, 0, 4)
        pump_until(rig, lambda: acquisition.position == 4)
        ahead_s += 100.0  # the two that are missing would take 200 s here, and the slack is 10 s
        rig.store.pump()
        assert not acquisition.done
        ahead_s += 200.0
        assert rig.end(acquisition) == [PEER] * 4


def test_the_longest_wait_is_bounded_though_nobody_knows_what_computing_takes(rig: Rig, maker: Worker) -> None:
    promised(rig, ready_ms=10.0)
    maker.server.promises.begin(TICKET)
    assert rig.get(compute_ms=price(0.0)) == []  # not measured


def test_a_clear_ends_the_wait_and_nothing_comes_back(rig: Rig, maker: Worker) -> None:
    promised(rig)
    acquisition = rig.start()
    maker.server.promises.begin(TICKET)
    pump_until(rig, lambda: TierName.REDIS in acquisition.tried)  # a clear ends what is being read anyway
    rig.store.clear()
    make(maker, 0, 6)
    assert rig.end(acquisition) == []
    assert rig.get() == [], "the promise is forgotten, too"


def test_a_clear_at_the_maker_is_a_miss(rig: Rig, maker: Worker) -> None:
    promised(rig)
    acquisition = rig.start()
    maker.server.promises.begin(TICKET)
    make(maker, 0, 2)
    pump_until(rig, lambda: acquisition.position == 2)
    maker.host.remove(NAMES, RemovalCause.CLEARED)
    maker.server.promises.made(TICKET, 4, found=0)
    assert rig.end(acquisition) == [PEER] * 2


def test_one_that_is_cancelled_while_it_waits_holds_nothing(rig: Rig, maker: Worker) -> None:
    promised(rig)
    acquisition = rig.start()
    maker.server.promises.begin(TICKET)
    make(maker, 0, 3)
    pump_until(rig, lambda: acquisition.position == 3)
    acquisition.cancel()
    rig.store.pump()
    assert [block for block in range(rig.device.num_blocks) if rig.device.refs(block)] == []
    make(maker, 3, 6)
    assert rig.get() == [TierName.DEVICE] * 3, "nobody waits for an old promise"


def test_two_that_wait_for_one_promise_both_get_it(rig: Rig, maker: Worker) -> None:
    promised(rig)
    both: list[Acquisition] = [rig.start(), rig.start()]
    maker.server.promises.begin(TICKET)
    make(maker, 0, 6)
    ends = [rig.end(each) for each in both]
    assert [len(each) for each in ends] == [6, 6]


def test_a_chain_of_another_tenant_waits_for_nothing(rig: Rig) -> None:
    promised(rig)
    assert rig.get(metas=chain(6, root=OTHER_ROOT)) == []


def test_a_store_that_is_closed_gives_up(maker: Worker) -> None:
    rig = Rig(maker)
    promised(rig)
    acquisition = rig.start()
    rig.store.close()
    assert acquisition.done
    assert acquisition.block_ids == []


# --- the board and the wire ---


def test_the_board_tells_as_soon_as_something_changes(maker: Worker) -> None:
    with reader(maker.server.address) as peer:
        unknown = Progress(PromiseState.UNKNOWN, 0, 0)
        assert peer.progress([TICKET], [unknown], patience_s=0.0) == [unknown]
        heard: list[list[Progress]] = []
        thread = threading.Thread(target=lambda: heard.append(peer.progress([TICKET], [unknown], patience_s=1.0)))
        thread.start()
        maker.server.promises.begin(TICKET)
        thread.join()
        assert heard == [[Progress(PromiseState.UNDER_WAY, 0, 0)]]
        maker.server.promises.made(TICKET, 2, found=1)
        assert peer.progress([TICKET], heard[0], patience_s=1.0) == [Progress(PromiseState.UNDER_WAY, 2, 1)]


def test_two_jobs_that_make_one_chain_end_it_together() -> None:
    board = PromiseBoard()
    board.begin(TICKET)
    board.begin(TICKET)
    board.made(TICKET, 3, found=0)
    board.made(TICKET, 2, found=2)  # the other one is behind, and found what the first had made
    board.end(TICKET)
    assert board.wait([TICKET], [(0, 0)], 0) == [Progress(PromiseState.UNDER_WAY, 3, 0)]
    board.end(TICKET)
    assert board.wait([TICKET], [(0, 0)], 0) == [Progress(PromiseState.ENDED, 3, 0)]
    board.end(TICKET)
    board.made(TICKET, 4, found=0)
    assert board.wait([TICKET], [(0, 0)], 0) == [Progress(PromiseState.ENDED, 3, 0)]
    assert len(board) == 0


@pytest.mark.parametrize("answer", [None, [], [[3, 0, 0]], [[1, -1, 0]], [[1, 2]], [[0, 0, 0], [0, 0, 0]], ["x"]])
def test_an_answer_that_is_none_is_refused(answer: object) -> None:
    assert parsed(answer, 1) is None


def test_a_promise_of_nothing_is_none() -> None:
    good = {"ready_ms": 1.0, "margin_ms": 0.0, "now": 0.0}
    assert promise_of(NAMES, "h:1", 7, **good) is None
    assert promise_of(NAMES, "h:1", 0, **good) is None
    assert promise_of(NAMES, "", 6, **good) is None
    assert promise_of(NAMES, "h:1", 6, **good | {"ready_ms": -1.0}) is None
    assert promise_of(NAMES, "h:1", 6, **good) == Promise("h:1", TICKET, 6, 1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("silent_s", "pace_s", "left", "too_long"),
    [(0.9, 0.0, 4, False), (1.1, 0.0, 4, True), (0.0, 0.2, 4, False), (0.0, 0.3, 4, True)],
)
def test_waiting_ends_when_it_is_silent_or_slower_than_computing(
    silent_s: float, pace_s: float, left: int, *, too_long: bool
) -> None:
    assert waits_too_long(silent_s=silent_s, pace_s=pace_s, left=left, most_s=1.0) is too_long


def test_who_hears_that_a_promise_is_broken_waits_no_longer(rig: Rig, maker: Worker) -> None:
    promised(rig)
    acquisition = rig.start()
    rig.store.pump()
    assert not acquisition.done, "nobody has begun, and a minute would be waited for it"
    rig.store.promise_broken(maker.server.address, TICKET)
    assert rig.end(acquisition) == []
    assert rig.get() == [], "and who comes later does not begin to wait"


def test_what_was_told_before_a_promise_broke_is_still_read(rig: Rig, maker: Worker) -> None:
    promised(rig)
    acquisition = rig.start()
    maker.server.promises.begin(TICKET)
    make(maker, 0, 3)
    assert rig.peers is not None
    watch, address = rig.peers.watch, maker.server.address
    wait_until(lambda: (told := watch.progress(address, TICKET)) is not None and told.made == 3)
    rig.store.promise_broken(address, TICKET)
    assert rig.end(acquisition) == [PEER] * 3


def test_only_the_promise_that_is_named_is_broken(rig: Rig, maker: Worker) -> None:
    promised(rig)
    acquisition = rig.start()
    rig.store.promise_broken("127.0.0.1:1", TICKET)
    rig.store.promise_broken(maker.server.address, NAMES[0])
    rig.store.pump()
    assert not acquisition.done
    maker.server.promises.begin(TICKET)
    make(maker, 0, 6)
    assert rig.end(acquisition) == [PEER] * 6
