"""How long an acquisition waits for a promise: on a clock that is set, with a maker that says what a test wants."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from kvstore.acquisition import Acquisition, ReadTiers, Wish
from kvstore.blocks import BlockHash
from kvstore.events import TierName
from kvstore.peer.promises import Progress, PromiseState
from kvstore.promised import MAX_PROMISES, Promised, promise_of
from tests.kvstore.blocks_for_tests import ManualClock, chain, names

NAMES = names(chain(6))
BLOCK_MS = 1000.0  # to compute one here


class Maker:
    """A tier of one other worker, and what it says of itself."""

    def __init__(self) -> None:
        self.watch = self
        self.on_news: Callable[[], None] = lambda: None
        self.says: Progress | None = Progress(PromiseState.UNDER_WAY, 0, 0)
        self.hinted: list[BlockHash] = []
        self.watched: set[BlockHash] = set()

    def begin(self, address: str, ticket: BlockHash, for_s: float) -> bool:
        self.watched.add(ticket)
        return True

    def progress(self, address: str, ticket: BlockHash) -> Progress | None:
        return self.says if ticket in self.watched else None

    def end(self, address: str, ticket: BlockHash) -> None:
        self.watched.discard(ticket)

    def hint(self, hashes: Sequence[BlockHash], address: str) -> None:
        self.hinted += hashes


class Rig:
    def __init__(self, *, ready_ms: float = 5000.0, margin_ms: float = 0.0, block_ms: float = BLOCK_MS) -> None:
        self.clock, self.maker = ManualClock(), Maker()
        self.promised = Promised(self.maker, clock=self.clock, slack_s=0.05, on_news=lambda: None)  # type: ignore[arg-type]
        promise = promise_of(NAMES, "m:1", 6, ready_ms=ready_ms, margin_ms=margin_ms, now=self.clock())
        assert promise is not None
        self.promised.learn(promise)
        self.acquisition = Acquisition(Wish(NAMES, ReadTiers(), lambda _, count: block_ms * count), lambda _: None)
        self.acquisition.started = self.clock()
        self.promised.begin(self.acquisition)
        self.began = self.clock()

    def waits(self) -> bool:
        return self.promised.holds(self.acquisition)

    def made(self, blocks: int) -> None:
        """The maker says so, and they are loaded at once."""
        self.maker.says = Progress(PromiseState.UNDER_WAY, blocks, 0)
        assert self.promised.due() == [self.acquisition]
        more = blocks - self.acquisition.position
        self.acquisition.take(list(range(more)), [TierName.PEER] * more)
        assert self.waits() is (blocks < 6)

    def gives_up_after(self) -> float:
        """Seconds from now until it waits no more."""
        started = self.clock()
        while not self.promised.due():
            self.clock.now += 0.01
            assert self.clock() - started < 1000
        assert not self.waits()
        assert not self.promised
        assert not self.maker.watched
        return self.clock() - started


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 6.05),  # computing all would take six seconds
        ({"margin_ms": 2000.0}, 8.05),  # and cost others two
        ({"ready_ms": 9000.0}, 9.05),  # the plan itself is later than computing, and was preferred
        ({"block_ms": 0.0}, 10.25),  # nobody knows what computing takes: twice the plan
        ({"ready_ms": 100.0}, 0.45),  # whatever computing takes, not much longer than twice the plan
    ],
)
def test_without_any_news_it_waits_as_long_as_computing_is_worth(settings: dict[str, float], expected: float) -> None:
    rig = Rig(**settings)
    assert rig.waits()
    assert rig.gives_up_after() == pytest.approx(expected, abs=0.03)


def test_the_less_is_missing_the_less_it_waits_for_it() -> None:
    rig = Rig(ready_ms=6000.0)
    assert rig.waits()
    rig.clock.now += 1.0
    rig.made(1)
    rig.clock.now += 4.0
    rig.made(5)
    assert rig.gives_up_after() == pytest.approx(1.05, abs=0.03), "one block is computed in a second"


def test_what_comes_slower_than_it_is_computed_is_left() -> None:
    rig = Rig(ready_ms=6000.0)
    assert rig.waits()
    rig.clock.now += 0.5
    rig.made(1)
    rig.clock.now += 1.5
    rig.maker.says = Progress(PromiseState.UNDER_WAY, 2, 0)
    assert rig.promised.due() == [rig.acquisition]
    rig.acquisition.take([1], [TierName.PEER])
    assert rig.waits()
    assert rig.gives_up_after() == pytest.approx(0.0, abs=0.03), "four more would take six seconds, and four here"


def test_who_waits_is_told_of_each_piece_once_and_hints_what_is_new() -> None:
    rig = Rig()
    assert rig.waits()
    rig.made(2)
    assert rig.promised.due() == []
    rig.made(6)
    assert rig.maker.hinted == NAMES
    assert not rig.promised


def test_a_job_that_never_acquires_is_forgotten() -> None:
    clock, maker = ManualClock(), Maker()
    promised = Promised(maker, clock=clock, slack_s=0.05, on_news=lambda: None)  # type: ignore[arg-type]
    for n in range(MAX_PROMISES + 10):
        promise = promise_of(names(chain(1, first_token=n)), "m:1", 1, ready_ms=1.0, margin_ms=0.0, now=clock())
        assert promise is not None
        promised.learn(promise)
    assert len(maker.watched) == MAX_PROMISES


def test_a_promise_whose_time_is_over_is_not_taken_up() -> None:
    rig = Rig(ready_ms=100.0)
    rig.promised.close()
    later = Rig(ready_ms=100.0)
    later.clock.now += 5.0
    late = Acquisition(later.acquisition.wish, lambda _: None)
    late.started = later.clock()
    later.promised.begin(late)
    assert not later.promised.holds(late)
