"""A hundred thousand random operations with cancels, failures and stalls: afterwards nothing is held by anybody.

Seeded, so that a failure can be run again. The oracle is that a block's bytes follow from its name; what is counted at
the end are references of device blocks, pins of host and disk slots, loads, queued writes, memory of loads and threads.
"""

from __future__ import annotations

import random
import threading
import time

import torch

from kvstore.device import DeviceTier
from kvstore.errors import MissReason
from kvstore.events import RemovalCause, TierName
from kvstore.host.tier import HostTier
from kvstore.loading import IDLE_BUFFERS
from kvstore.store import Acquisition, ReadTiers, TieredStore
from kvstore.tier import BlockMeta
from tests.kvstore.blocks_for_tests import LAYOUT, OTHER_ROOT, ROOT, ManualClock, chain, names, payload
from tests.kvstore.fake_tier import FakeSharedTier

torch.set_num_threads(1)
OPERATIONS = 100_000
MAX_HELD = 6  # acquisitions and allocations that are out at once


class Disk(HostTier):
    """A local tier below host, without a disk."""

    name = TierName.DISK


class Churn:
    """What a worker does to its store, at random."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.clock = ManualClock()
        nbytes = LAYOUT.block_nbytes
        self.shared = FakeSharedTier(self.clock)
        self.device = DeviceTier(LAYOUT, 64 * nbytes, clock=self.clock)
        self.host = HostTier(LAYOUT, 72 * nbytes, clock=self.clock)
        self.disk = Disk(LAYOUT, 96 * nbytes, clock=self.clock)
        self.store = TieredStore(
            LAYOUT, self.device, self.host, self.shared, disk=self.disk, clock=self.clock, default_ttl_s=60.0
        )
        self.chains = [chain(self.random.randint(2, 9), first_token=100 * n) for n in range(24)]
        self.acquired: list[tuple[Acquisition, list[BlockMeta]]] = []
        self.held: list[list[int]] = []
        self.cancelled = self.delivered = 0
        operations = {
            self.acquire: 24,
            self.cancel: 10,
            self.finish: 20,
            self.compute: 16,
            self.release: 24,
            self.prefetch: 4,
            self.pump: 20,
            self.pass_time: 3,
            self.lease: 1,
            self.clear: 1,
            self.disown: 1,
            self.lose: 2,
            self.misbehave: 2,
            self.touch_shared: 2,
        }
        self.operations, self.weights = list(operations), list(operations.values())

    def run(self, count: int) -> None:
        for number, operation in enumerate(self.random.choices(self.operations, self.weights, k=count)):
            operation()
            if number % 5000 == 0:
                self.store.check()

    def some(self) -> list[BlockMeta]:
        metas = self.random.choice(self.chains)
        return metas[: self.random.randint(1, len(metas))]

    def acquire(self) -> None:
        metas = self.some()
        reads = ReadTiers() if self.random.random() < 0.8 else ReadTiers(*self.random.choices((True, False), k=4))
        price = self.random.choice((0.0, 0.5, 30.0, 1e6))
        if len(self.acquired) < MAX_HELD:
            acquisition = self.store.acquire(
                names(metas), reads=reads, compute_ms=lambda first, count: price * count, root=ROOT
            )
            self.acquired.append((acquisition, metas))

    def cancel(self) -> None:
        if self.acquired:
            acquisition, _ = self.acquired.pop(self.random.randrange(len(self.acquired)))
            self.cancelled += not acquisition.done
            acquisition.cancel()

    def finish(self) -> None:
        for entry in [entry for entry in self.acquired if entry[0].done][:2]:
            acquisition, metas = entry
            self.acquired.remove(entry)
            found = self.device.payloads(acquisition.block_ids)
            assert [bytes(b) for b in found] == [bytes(payload(meta.hash)) for meta in metas[: len(found)]]
            self.delivered += len(found)
            self.held.append(acquisition.block_ids)

    def compute(self) -> None:
        metas = self.some()
        block_ids = self.store.allocate(len(metas)) if len(self.held) < MAX_HELD else None
        if block_ids is not None:
            self.held.append(block_ids)
            self.device.inject(block_ids, [payload(meta.hash) for meta in metas])
            self.store.commit(block_ids, metas)

    def release(self) -> None:
        if self.held:
            self.store.release(self.held.pop(self.random.randrange(len(self.held))))

    def prefetch(self) -> None:
        self.store.prefetch(names(self.some()), root=ROOT)

    def pump(self) -> None:
        self.store.pump()
        self.store.drain_events()

    def pass_time(self) -> None:
        self.clock.now += self.random.choice((0.001, 0.06, 0.5, 5.0))

    def lease(self) -> None:
        names_ = names(self.some())
        if self.random.random() < 0.5:
            self.store.lease(names_, 5.0)
        else:
            self.store.end_leases(names_)

    def clear(self) -> None:
        scopes = [{"prefix": self.some()[-1].hash}] * 20 + [{"root": OTHER_ROOT}, {"root": ROOT}]
        scope = self.random.choice(scopes)
        self.shared.reads_open.set()  # else the next lines would wait for what they hold back
        self.shared.writes_open.set()
        self.store.clear(**scope, shared=self.random.random() < 0.5)

    def disown(self) -> None:
        self.store.disown(names(self.some()[-2:]))

    def lose(self) -> None:
        tier = self.random.choice((self.device, self.host, self.disk))
        if tier is self.device:
            self.shared.lose(names(self.some()))
        else:
            tier.remove(names(self.some()), RemovalCause.EVICTED)

    def misbehave(self) -> None:
        shared, kind = self.shared, self.random.randrange(6)
        shared.raises = RuntimeError("broken") if kind == 0 and self.random.random() < 0.1 else None
        shared.read_limit = self.random.randint(0, 3) if kind == 1 else None
        shared.ends = self.random.choice(list(MissReason))
        shared.healthy = kind != 2
        for gate in (shared.reads_open, shared.writes_open):
            gate.clear() if kind == 3 else gate.set()

    def touch_shared(self) -> None:
        metas = self.some()
        if self.shared.writes_open.is_set() and self.shared.raises is None:
            self.shared.write(metas, [payload(meta.hash) for meta in metas])

    def settle(self) -> None:
        """The world is well again, everybody ends."""
        self.shared.raises, self.shared.read_limit, self.shared.healthy = None, None, True
        self.shared.reads_open.set()
        self.shared.writes_open.set()
        for acquisition, _ in self.acquired:
            acquisition.cancel()
        for block_ids in self.held:
            self.store.release(block_ids)
        sources = self.store._promoter.sources.values()
        for _ in range(1000):
            self.store.pump()
            is_flushed = self.store.flush(60)
            if is_flushed and not self.store._promoter.metas() and not any(each.absent.barred for each in sources):
                return
            time.sleep(0.05)


def test_nothing_is_held_after_a_hundred_thousand_random_operations() -> None:
    threads, churn = threading.active_count(), Churn(seed=20)
    churn.run(OPERATIONS)
    churn.settle()
    store = churn.store
    assert churn.cancelled > 100
    assert churn.delivered > 10_000
    assert [block for block in range(churn.device.num_blocks) if churn.device.refs(block)] == []
    assert churn.device.available == churn.device.num_blocks
    assert (churn.host.pins, churn.disk.pins) == (0, 0)
    assert store._promoter.metas() == []
    for source in store._promoter.sources.values():
        assert (source.pending_blocks, source.stuck, source.absent.barred) == (0, 0, set())
    assert len(store._promoter._loader._buffers._idle) <= IDLE_BUFFERS
    for lane in store._lanes.values():
        assert lane._writer.metas() == []
    store.check()
    store.close()
    assert threading.active_count() <= threads + 8  # idle I/O threads of two slow tiers end with their pool
