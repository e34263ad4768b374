"""The store with other workers as a source: what comes from them, under which name, and what is never asked."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch

from kvstore.device import DeviceTier
from kvstore.events import BlockStored, RemovalCause, TierName
from kvstore.host.tier import HostTier
from kvstore.peer.hints import Holder
from kvstore.peer.peers import PeersTier
from kvstore.peer.server import PeerServer
from kvstore.store import Acquisition, ReadTiers, TieredStore
from kvstore.tier import BlockMeta, Clock
from tests.kvstore.blocks_for_tests import LAYOUT, OTHER_ROOT, ROOT, chain, names, payload, payloads
from tests.kvstore.fake_tier import FakeSharedTier
from tests.kvstore.peer.peers_for_tests import CODEC, FLEET, PATIENT_S, Worker, reader, stranger, worker

torch.set_num_threads(1)
DEVICE, HOST, REDIS, PEER = TierName.DEVICE, TierName.HOST, TierName.REDIS, TierName.PEER
CHAIN = chain(6)
NAMES = names(CHAIN)


def slow_compute(first: int, count: int) -> float:
    return 1e9


class Rig:
    """A worker that reads, with a shared tier besides; and another one that serves."""

    def __init__(
        self,
        other: Worker,
        *,
        host_slots: int = 16,
        timeout_s: float = PATIENT_S,
        clock: Clock = time.monotonic,
        load_slack_s: float = 10.0,
    ) -> None:
        self.other = other
        self.clock = clock
        nbytes = LAYOUT.block_nbytes
        self.device = DeviceTier(LAYOUT, 32 * nbytes, clock=self.clock, poison=True)
        self.host = HostTier(LAYOUT, host_slots * nbytes, clock=self.clock) if host_slots else None
        self.shared = FakeSharedTier(self.clock)
        self.peers = PeersTier(codec=CODEC, secret=FLEET, timeout_s=timeout_s, clock=self.clock)
        self.store = TieredStore(
            LAYOUT,
            self.device,
            self.host,
            self.shared,
            peers=self.peers,
            clock=self.clock,
            default_ttl_s=100.0,
            load_slack_s=load_slack_s,
        )

    def hint(self, blocks: int = len(CHAIN), address: str = "") -> None:
        self.peers.learn(NAMES, [Holder(address or self.other.server.address, blocks)])

    def start(self, metas: list[BlockMeta] = CHAIN, **options: object) -> Acquisition:
        arguments = {"reads": ReadTiers(), "compute_ms": slow_compute, "root": ROOT} | options
        return self.store.acquire(names(metas), **arguments)  # type: ignore[arg-type]

    def end(self, acquisition: Acquisition) -> list[TierName]:
        """Wait for it; its bytes are right; what came from where."""
        while not acquisition.done:
            self.store.wait(30)
            self.store.pump()
        found = [bytes(view) for view in self.device.payloads(acquisition.block_ids)]
        assert found == [bytes(payload(name)) for name in acquisition.wish.hashes[: len(found)]]
        self.store.release(acquisition.block_ids)
        return acquisition.fates

    def get(self, **options: object) -> list[TierName]:
        return self.end(self.start(**options))


@pytest.fixture
def other() -> Iterator[Worker]:
    with worker() as running:
        running.host.write(CHAIN, payloads(CHAIN))
        yield running


@pytest.fixture
def rig(other: Worker) -> Iterator[Rig]:
    made = Rig(other)
    yield made
    made.store.check()
    made.store.close()


def test_what_a_peer_holds_comes_from_it_once_and_lies_here_afterwards(rig: Rig) -> None:
    rig.hint()
    assert rig.get() == [PEER] * 6
    assert rig.host is not None
    assert rig.host.match(NAMES) == 6
    told = [event for event in rig.store.drain_events() if isinstance(event, BlockStored)]
    assert {event.tier for event in told} >= {DEVICE, HOST}
    assert rig.get() == [DEVICE] * 6
    rig.device.remove(NAMES, RemovalCause.EVICTED)
    assert rig.get() == [HOST] * 6
    stats = rig.store.stats()[PEER]
    assert (stats.hits, stats.loads, stats.stores) == (6, 1, 0)
    assert rig.store.read_ms()[PEER] != (0.0, 0.0)


def test_without_a_hint_no_peer_is_asked(rig: Rig) -> None:
    assert rig.get() == []
    rig.peers.learn(names(chain(6, first_token=9)), [Holder(rig.other.server.address, 6)])
    assert rig.get() == []
    assert rig.other.counts("connections") == 0


def test_a_request_that_may_not_read_peers_does_not(rig: Rig) -> None:
    rig.hint()
    assert rig.get(reads=ReadTiers(peer=False)) == []
    assert rig.get(reads=ReadTiers(shared=False)) == [PEER] * 6, "the shared tier's switch is another one"


def test_a_peer_is_left_alone_where_computing_is_sooner(rig: Rig) -> None:
    rig.hint()
    assert rig.get() == [PEER] * 6
    rig.store.clear()
    rig.hint()
    plan = rig.store.plan(NAMES, reads=ReadTiers(), compute_ms=slow_compute)
    assert [(run.tier, run.count, run.load) for run in plan] == [(PEER, 6, True)]
    assert rig.get(compute_ms=lambda first, count: 1e-9) == []


def test_what_is_at_hand_is_not_read_from_a_peer(rig: Rig) -> None:
    rig.hint(4)
    assert rig.get() == [PEER] * 4
    rig.hint()
    assert rig.get() == [DEVICE] * 4 + [PEER] * 2
    assert rig.other.counts("blocks") == 6


def test_where_the_peer_ends_the_shared_tier_goes_on(rig: Rig) -> None:
    rig.shared.write(CHAIN, payloads(CHAIN))
    rig.other.host.remove(NAMES[3:], RemovalCause.EVICTED)
    rig.hint()
    assert rig.get() == [PEER] * 3 + [REDIS] * 3


def test_a_peer_that_died_is_a_miss_and_the_shared_tier_delivers(rig: Rig, other: Worker) -> None:
    rig.shared.write(CHAIN, payloads(CHAIN))
    rig.hint()
    other.server.close()
    assert rig.get() == [REDIS] * 6


def test_a_peer_that_lies_delivers_nothing_wrong(other: Worker) -> None:
    with stranger(other.server.address) as liar:
        liar.change = lambda at, data: data[:200] + bytes(byte ^ 1 for byte in data[200:])  # no greeting is so long
        rig = Rig(other, timeout_s=1.0)
        rig.hint(address=liar.address)
        assert rig.get() == []
        assert sum(rig.store.stats()[PEER].misses.values()) == 1
        rig.store.close()


def test_two_requests_for_the_same_blocks_read_them_once(rig: Rig) -> None:
    rig.hint()
    first, second = rig.start(), rig.start()
    assert rig.end(first) == rig.end(second) == [PEER] * 6
    assert rig.other.counts("blocks") == 6


def test_a_prefetch_brings_a_peers_blocks_and_their_fate_is_told_once(rig: Rig) -> None:
    rig.hint()
    wanted = 4  # a quarter of the host tier
    assert rig.store.prefetch(NAMES, root=ROOT) == wanted
    assert rig.host is not None
    while rig.host.match(NAMES) < wanted:
        rig.store.wait(30)
        rig.store.pump()
    rig.store.pump()
    rig.peers.forget()
    assert rig.get() == [PEER] * wanted
    rig.device.remove(NAMES, RemovalCause.EVICTED)
    assert rig.get() == [HOST] * wanted


def test_without_a_host_tier_a_peers_blocks_go_to_the_device(other: Worker) -> None:
    rig = Rig(other, host_slots=0)
    rig.hint()
    assert rig.get() == [PEER] * 6
    assert rig.get() == [DEVICE] * 6
    rig.store.close()


def test_a_clear_believes_no_hint_any_more(rig: Rig) -> None:
    rig.hint()
    rig.store.clear(root=OTHER_ROOT)
    assert rig.get() == []


def test_disowned_blocks_come_back_from_no_peer_that_read_them_meanwhile_and_none_gets_them(rig: Rig) -> None:
    rig.hint()
    assert rig.get() == [PEER] * 6
    assert rig.host is not None
    server = PeerServer(rig.host, codec=CODEC, secret=FLEET)
    with closing(server), reader(server.address) as neighbour:
        assert neighbour.match(NAMES) == 6
        rig.store.disown(NAMES[2:4])
        assert rig.get() == [DEVICE] * 2
        rig.hint()
        assert rig.get() == [DEVICE] * 2, "whatever the router says with the next job"
        buffers = [memoryview(bytearray(LAYOUT.block_nbytes)) for _ in NAMES]
        assert neighbour.read(NAMES, buffers).count == 2
        assert [neighbour.match([name]) for name in NAMES[2:]] == [0] * 4
    rig.store.clear()
    rig.hint()
    assert rig.get() == [PEER] * 2


def test_what_is_on_its_way_when_it_is_cleared_goes_nowhere(rig: Rig, other: Worker) -> None:
    with stranger(other.server.address) as slow:
        rig.hint(address=slow.address)
        acquisition = rig.start()
        rig.store.clear(root=ROOT)
        assert rig.end(acquisition) == []
    assert rig.host is not None
    assert rig.host.match(NAMES) == 0


def test_blocks_of_a_peer_are_written_down_when_they_are_used_again(rig: Rig) -> None:
    rig.hint()
    assert [rig.get(), rig.get()] == [[PEER] * 6, [DEVICE] * 6]
    for _ in range(3):  # asked for there, found missing, written
        rig.store.pump()
        assert rig.store.flush(30)
    assert set(rig.shared.held()) == set(NAMES)
