"""All peers of a worker as one tier: whom it asks for which block, and what it does when they do not deliver."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.blocks import BlockHash
from kvstore.errors import TierError
from kvstore.events import RemovalCause
from kvstore.peer.hints import BAR_S, Hints, Holder
from kvstore.peer.peers import PeersTier
from kvstore.tier import BlockMeta
from tests.kvstore.blocks_for_tests import ManualClock, buffers, chain, names, payload, payloads
from tests.kvstore.peer.peers_for_tests import CODEC, FLEET, PATIENT_S, Worker, wait_until, worker

CHAIN = chain(12)
NAMES = names(CHAIN)


@contextmanager
def peers(**settings: Any) -> Iterator[PeersTier]:
    tier = PeersTier(**{"codec": CODEC, "secret": FLEET, "timeout_s": PATIENT_S, **settings})
    try:
        yield tier
    finally:
        tier.close()


@pytest.fixture
def three() -> Iterator[list[Worker]]:
    with ExitStack() as stack:
        yield [stack.enter_context(worker()) for _ in range(3)]


def hold(of: Worker, metas: list[BlockMeta]) -> None:
    assert of.host.write(metas, payloads(metas)) == len(metas)


def at(of: Worker, blocks: int = len(CHAIN)) -> Holder:
    return Holder(of.server.address, blocks)


def read(tier: PeersTier, wanted: list[BlockHash] = NAMES) -> int:
    """How many came; their bytes are right."""
    into = buffers(len(wanted))
    count = tier.read(wanted, into).count
    assert [bytes(buffer) for buffer in into[:count]] == [bytes(payload(name)) for name in wanted[:count]]
    return count


def nobody() -> str:
    """An address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


# Hints.

_calls = st.one_of(
    st.tuples(st.just("learn"), st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 14)), max_size=3)),
    st.tuples(st.just("deny"), st.sampled_from("abc"), st.integers(0, 11), st.integers(0, 12)),
    st.tuples(st.just("pass"), st.integers(1, 12)),
    st.tuples(st.just("sweep")),
    st.tuples(st.just("forget")),
)


@given(st.lists(_calls, max_size=30))
def test_hints_are_those_of_a_plain_model(calls: list[tuple[Any, ...]]) -> None:
    clock = ManualClock()
    hints = Hints(clock, keep_s=20.0)
    model: dict[BlockHash, tuple[list[str], float]] = {}
    for call in calls:
        match call:
            case ("learn", said):
                holders = [Holder(address, blocks) for address, blocks in dict(said).items()]
                hints.learn(NAMES, holders)
                for place, name in enumerate(NAMES):
                    if who := [holder.address for holder in holders if holder.blocks > place]:
                        model[name] = (who, clock.now + 20.0)
            case ("deny", address, start, stop):
                hints.deny(NAMES[start:stop], address)
                for name in NAMES[start:stop]:
                    who, until = model.pop(name, ([], 0.0))
                    if left := [each for each in who if each != address]:
                        model[name] = (left, until)
            case ("pass", seconds):
                clock.now += seconds
            case ("sweep",):
                hints.sweep()
                model = {name: hint for name, hint in model.items() if hint[1] > clock.now}
                assert len(hints) == len(model)
            case _:
                hints.forget()
                model.clear()
        firsts = [model[name][0][0] if name in model and model[name][1] > clock.now else None for name in NAMES]
        assert [hints.first(name) for name in NAMES] == firsts
        assert hints.run(NAMES) == [*firsts, None].index(None)


def test_barred_blocks_are_asked_of_nobody_until_the_bar_ends_and_it_takes_no_more_than_its_room() -> None:
    clock = ManualClock()
    hints = Hints(clock, keep_s=10 * BAR_S, max_blocks=12)
    hints.learn(NAMES, [Holder("a", 12)])
    hints.bar(NAMES[4:6])
    hints.forget()
    hints.learn(NAMES, [Holder("b", 12)])
    assert (hints.run(NAMES), hints.run(NAMES[6:])) == (4, 6)
    assert [hints.first(name) for name in NAMES[3:7]] == ["b", None, None, "b"]
    clock.now += BAR_S - 1
    hints.sweep()
    assert hints.run(NAMES) == 4
    clock.now += 1
    assert hints.run(NAMES) == 12
    hints.bar(NAMES[:2])
    hints.sweep()
    assert list(hints._barred) == NAMES[:2]
    hints.bar(NAMES[2:] + names(chain(1, first_token=99)))
    assert (len(hints._barred), hints.run(NAMES[:2]), hints.run(NAMES)) == (12, 1, 1)


def test_the_hints_of_longest_ago_give_way() -> None:
    hints = Hints(ManualClock(), max_blocks=6)
    hints.learn(NAMES[:4], [Holder("a", 4)])
    hints.learn(NAMES[4:8], [Holder("b", 4)])
    hints.learn(NAMES[2:3], [Holder("c", 1)])  # renewed: the others are older now
    hints.learn(NAMES[8:9], [Holder("d", 1)])
    assert len(hints) == 6
    assert [hints.first(name) for name in NAMES[:9]] == [None, None, "c", None, *"bbbb", "d"]


# Reading.


@settings(max_examples=60, deadline=None)
@given(
    held=st.lists(st.integers(0, 12), min_size=3, max_size=3),
    said=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 12)), max_size=3, unique_by=lambda pair: pair[0]),
    start=st.integers(0, 11),
)
def test_every_block_that_one_of_those_named_holds_arrives(
    held: list[int], said: list[tuple[int, int]], start: int
) -> None:
    for each, depth in zip(_shared_workers(), held, strict=True):
        each.host.clear()
        hold(each, CHAIN[:depth])
    with peers() as tier:
        tier.learn(NAMES, [at(_shared_workers()[number], blocks) for number, blocks in said])
        hinted = max([blocks for _, blocks in said], default=0)
        there = max([min(blocks, held[number]) for number, blocks in said], default=0)
        assert tier.match(NAMES[start:]) == max(0, hinted - start)
        assert read(tier, NAMES[start:]) == max(0, there - start)
        assert tier.match(NAMES[start:]) >= max(0, there - start), "who delivers is believed"


_workers: list[Worker] = []


def _shared_workers() -> list[Worker]:
    if not _workers:
        _workers.extend(Worker() for _ in range(3))
    return _workers


@pytest.fixture(scope="module", autouse=True)
def _end_shared_workers() -> Iterator[None]:
    yield
    for each in _workers:
        each.server.close()
        each.host.close()
    _workers.clear()


def test_nobody_is_asked_for_what_nobody_was_named_for(three: list[Worker]) -> None:
    hold(three[0], CHAIN)
    with peers() as tier:
        assert (tier.match(NAMES), read(tier)) == (0, 0)
        tier.learn(NAMES, [at(three[0], 5)])
        assert (tier.match(NAMES), read(tier)) == (5, 5)
    assert three[0].counts("blocks") == 5
    assert three[1].counts("connections") == three[2].counts("connections") == 0


def test_blocks_in_the_middle_come_from_whoever_has_them(three: list[Worker]) -> None:
    hold(three[0], CHAIN[:4])
    hold(three[1], CHAIN[:8])
    with peers() as tier:
        tier.learn(NAMES, [at(three[0], 12), at(three[1], 8)])
        assert read(tier) == 8
        assert tier.stats().misses == {"absent": 1}
        assert (three[0].counts("blocks"), three[1].counts("blocks")) == (4, 4)
        assert tier.match(NAMES) == 8, "what both lack nobody seems to hold any more"


def test_a_wrong_hint_is_believed_once_and_again_when_it_is_given_again(three: list[Worker]) -> None:
    with peers() as tier:
        tier.learn(NAMES, [at(three[0])])
        assert (read(tier), tier.match(NAMES), read(tier)) == (0, 0, 0)
        assert tier.stats().misses == {"absent": 1}
        hold(three[0], CHAIN)
        tier.learn(NAMES, [at(three[0])])
        assert read(tier) == len(CHAIN)


def test_the_next_one_is_asked_when_a_peer_is_gone(three: list[Worker]) -> None:
    hold(three[1], CHAIN)
    with peers() as tier:
        tier.learn(NAMES, [Holder(nobody(), 12), at(three[1])])
        assert read(tier) == len(CHAIN)
        assert tier.stats().misses == {"error": 1}


def test_a_peer_that_says_nothing_costs_the_time_that_was_granted_and_no_more() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, peers() as tier:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        tier.learn(NAMES, [Holder(address, 12), Holder(nobody(), 12)])
        assert tier.read(NAMES, buffers(12), deadline_s=0.05).count == 0
        assert tier.stats().misses == {"deadline": 1}, "there was time for one"


def test_after_three_faults_a_peer_is_cut_off_and_the_tier_is_healthy_while_another_one_is(
    three: list[Worker],
) -> None:
    hold(three[0], CHAIN)
    dead = nobody()
    with peers(clock=ManualClock()) as tier:
        for _ in range(5):
            tier.learn(NAMES, [Holder(dead, 12)])
            assert read(tier) == 0
        stats = tier.stats()
        assert stats.misses == {"error": 3, "breaker": 2}
        assert not stats.healthy
        assert dead in stats.problem
        tier.learn(NAMES, [at(three[0])])
        assert read(tier) == 12
        assert tier.stats().healthy


def test_an_address_that_cannot_be_one_is_a_miss(three: list[Worker]) -> None:
    hold(three[0], CHAIN)
    with peers() as tier:
        tier.learn(NAMES, [Holder("no address", 12), at(three[0])])
        assert read(tier) == 12


def test_hints_end_after_a_while(three: list[Worker]) -> None:
    hold(three[0], CHAIN)
    clock = ManualClock()
    with peers(clock=clock) as tier:
        tier.learn(NAMES, [at(three[0])])
        clock.now += 29.0
        assert tier.match(NAMES) == 12
        clock.now += 2.0
        assert (tier.match(NAMES), read(tier)) == (0, 0)


def test_nothing_is_in_reach_while_it_is_held_and_holds_end_by_themselves(three: list[Worker]) -> None:
    hold(three[0], CHAIN)
    clock = ManualClock()
    with peers(clock=clock) as tier:
        tier.hold("a clear", 10.0)
        tier.hold("another", 5.0)
        tier.learn(NAMES, [at(three[0])])
        assert tier.match(NAMES) == 0
        tier.release("a clear")
        tier.release("nobody's")
        assert tier.match(NAMES) == 0
        clock.now += 5.0
        assert tier.match(NAMES) == 12
        tier.sweep()
        tier.hold("a third", 10.0)
        tier.release("a third")
        assert tier.match(NAMES) == 12
        tier.forget()
        assert tier.match(NAMES) == 0


def test_connections_are_few_and_end_when_nobody_needs_them(three: list[Worker]) -> None:
    clock = ManualClock()
    for each in three:
        hold(each, CHAIN)
    with peers(clock=clock, max_peers=2, idle_s=60.0) as tier:
        for each in (*three, three[0]):
            tier.learn(NAMES, [at(each)])
            assert read(tier) == 12
        assert tier.stats().hits == 48
        wait_for_open(three, [1, 0, 1])
        clock.now += 59.0
        tier.sweep()
        wait_for_open(three, [1, 0, 1])
        tier.learn(NAMES, [at(three[2])])
        assert read(tier) == 12
        clock.now += 59.0
        tier.sweep()
        wait_for_open(three, [0, 0, 1])
        assert tier.stats().hits == 60, "what closed peers counted is kept"


def wait_for_open(workers: list[Worker], wanted: list[int]) -> None:
    wait_until(lambda: [each.counts("open") for each in workers] == wanted)


def test_metadata_of_what_was_read_is_that_of_the_peer(three: list[Worker]) -> None:
    metas = chain(3, ttl_s=77.0)
    hold(three[0], metas)
    with peers() as tier:
        tier.learn(names(metas), [at(three[0], 3)])
        assert tier.find(metas[0].hash) is None
        assert read(tier, names(metas)) == 3
        assert [tier.find(meta.hash) for meta in metas] == metas


def test_nothing_is_written_or_dropped_elsewhere(three: list[Worker]) -> None:
    hold(three[0], CHAIN)
    with peers() as tier:
        tier.learn(NAMES, [at(three[0])])
        assert tier.write(CHAIN, payloads(CHAIN)) == tier.clear() == tier.remove(NAMES, RemovalCause.CLEARED) == 0
        assert tier.lease(NAMES, 5.0) == tier.end_leases(NAMES) == 0
        assert tier.drain_events() == []
        assert read(tier) == 12


def test_after_its_end_it_delivers_nothing(three: list[Worker]) -> None:
    hold(three[0], CHAIN)
    with peers() as tier:
        tier.close()
        tier.learn(NAMES, [at(three[0])])
        assert read(tier) == 0


def test_without_a_secret_there_are_no_peers() -> None:
    with pytest.raises(TierError, match="fleet secret"):
        PeersTier(codec=CODEC, secret="")
