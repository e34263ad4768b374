"""Copies from host to device are spread over steps: a long prefix must not keep all other sequences waiting."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.acquisition import Acquisition, ReadTiers
from kvstore.device import DeviceTier
from kvstore.events import RemovalCause, TierName
from kvstore.host.tier import HostTier
from kvstore.store import TieredStore
from kvstore.tier import BlockMeta
from tests.kvstore.blocks_for_tests import LAYOUT, ManualClock, chain, names, payload, payloads
from tests.kvstore.fake_tier import FakeSharedTier

torch.set_num_threads(1)
DEVICE, HOST, REDIS = TierName.DEVICE, TierName.HOST, TierName.REDIS
NBYTES = LAYOUT.block_nbytes
METAS = chain(7)


class Rig:
    """A store that copies two blocks a step."""

    def __init__(self, step_bytes: int = 2 * NBYTES) -> None:
        self.clock = ManualClock()
        self.device = DeviceTier(LAYOUT, 20 * NBYTES, clock=self.clock, poison=True)
        self.host = HostTier(LAYOUT, 20 * NBYTES, clock=self.clock)
        self.shared = FakeSharedTier(self.clock)
        self.store = TieredStore(
            LAYOUT,
            self.device,
            self.host,
            self.shared,
            clock=self.clock,
            default_ttl_s=None,
            host_step_bytes=step_bytes,
        )

    def acquire(self, metas: list[BlockMeta]) -> Acquisition:
        return self.store.acquire(
            names(metas), reads=ReadTiers(), compute_ms=lambda first, count: 1e9, root=metas[0].root
        )

    def finish(self, acquisition: Acquisition) -> Acquisition:
        while not acquisition.done:
            self.store.wait(60)
            self.store.pump()
        return acquisition

    def holds(self, acquisition: Acquisition, metas: list[BlockMeta]) -> bool:
        found = [bytes(view) for view in self.device.payloads(acquisition.block_ids)]
        return found == [bytes(payload(name)) for name in names(metas)]


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.store.check()
    made.store.close()


def test_so_many_blocks_come_with_each_step_and_the_sequence_waits_for_the_last(rig: Rig) -> None:
    rig.host.write(METAS, payloads(METAS))
    acquisition = rig.acquire(METAS)
    came = [(len(acquisition.block_ids), acquisition.done)]
    while not acquisition.done:
        rig.store.pump()
        came.append((len(acquisition.block_ids), acquisition.done))
    assert came == [(2, False), (4, False), (6, False), (7, True)]
    assert acquisition.fates == [HOST] * 7
    assert rig.holds(acquisition, METAS)


def test_all_sequences_together_get_so_many_blocks_a_step_and_the_first_goes_first(rig: Rig) -> None:
    other = chain(5, first_token=50)
    for metas in (METAS, other):
        rig.host.write(metas, payloads(metas))
    first, second = rig.acquire(METAS), rig.acquire(other)
    copied = 2
    while not (first.done and second.done):
        before = len(first.block_ids) + len(second.block_ids)
        assert before == copied
        rig.store.pump()
        copied = min(before + 2, 12)
        assert first.done or not second.block_ids
    assert rig.holds(first, METAS)
    assert rig.holds(second, other)


def test_nobody_sleeps_while_the_next_step_has_something_to_copy(rig: Rig) -> None:
    rig.host.write(METAS, payloads(METAS))
    acquisition = rig.acquire(METAS)
    started = time.monotonic()
    rig.finish(acquisition)
    assert time.monotonic() - started < 50, "one sleep is 60 s"


def test_less_than_a_block_a_step_is_a_block_a_step() -> None:
    rig = Rig(step_bytes=1)
    rig.host.write(METAS, payloads(METAS))
    assert rig.holds(rig.finish(rig.acquire(METAS)), METAS)
    rig.store.close()


def test_a_sequence_that_is_given_up_between_two_steps_copies_nothing_more(rig: Rig) -> None:
    rig.host.write(METAS, payloads(METAS))
    acquisition = rig.acquire(METAS)
    acquisition.cancel()
    hits = rig.host.stats().hits
    rig.store.pump()
    assert (rig.host.stats().hits, acquisition.block_ids) == (hits, [])
    assert rig.device.available == rig.device.num_blocks


def test_what_leaves_host_between_two_steps_comes_from_below(rig: Rig) -> None:
    rig.host.write(METAS, payloads(METAS))
    rig.shared.write(METAS, payloads(METAS))
    acquisition = rig.acquire(METAS)
    rig.host.remove(names(METAS[3:]), RemovalCause.EVICTED)
    rig.finish(acquisition)
    assert acquisition.fates == [HOST] * 3 + [REDIS] * 4
    assert rig.holds(acquisition, METAS)


def test_what_is_cleared_between_two_steps_does_not_come(rig: Rig) -> None:
    rig.host.write(METAS, payloads(METAS))
    acquisition = rig.acquire(METAS)
    rig.store.clear()
    rig.finish(acquisition)
    assert len(acquisition.block_ids) == 2


def test_a_store_that_is_closed_lets_those_go_that_were_not_done(rig: Rig) -> None:
    rig.host.write(METAS, payloads(METAS))
    acquisition = rig.acquire(METAS)
    rig.store._promoter.close()
    assert acquisition.done
    assert rig.holds(acquisition, METAS[: len(acquisition.block_ids)])


@settings(max_examples=60, deadline=None)
@given(
    near=st.lists(st.sets(st.sampled_from([DEVICE, HOST, REDIS]), min_size=1), min_size=1, max_size=7),
    step=st.integers(1, 4),
)
def test_the_same_blocks_come_in_many_steps_as_in_one(near: list[set[TierName]], step: int) -> None:
    metas = METAS[: len(near)]
    come = []
    for step_bytes in (step * NBYTES, 1 << 30):
        rig = Rig(step_bytes)
        for meta, tiers in zip(metas, near, strict=True):
            for name, tier in ((DEVICE, rig.device), (HOST, rig.host), (REDIS, rig.shared)):
                if name in tiers:
                    tier.write([meta], payloads([meta]))
        acquisition = rig.finish(rig.acquire(metas))
        assert rig.holds(acquisition, metas)
        come.append(acquisition.fates)
        rig.store.release(acquisition.block_ids)
        rig.store.check()
        rig.store.close()
    assert come[0] == come[1]
