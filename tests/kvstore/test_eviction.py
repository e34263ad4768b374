"""LRU with a sliding TTL, held against a list that is searched from the front."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.errors import InvariantError
from kvstore.eviction import LRU
from tests.kvstore.blocks_for_tests import ManualClock

KEYS = st.integers(0, 3)
TTLS = st.sampled_from([None, 1.0, 2.5])


@dataclass(slots=True)
class _Naive:
    ttl_s: float | None
    used: float
    pins: int = 0


class LRUMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock(0.0)
        self.lru: LRU[int] = LRU(self.clock)
        self.model: dict[int, _Naive] = {}  # in order of use

    def renew(self, key: int) -> None:
        entry = self.model.pop(key)
        entry.used = self.clock.now
        self.model[key] = entry

    def due(self) -> set[int]:
        return {
            key
            for key, entry in self.model.items()
            if entry.pins == 0 and entry.ttl_s is not None and entry.used + entry.ttl_s <= self.clock.now
        }

    @rule(key=KEYS, ttl_s=TTLS)
    def add(self, key: int, ttl_s: float | None) -> None:
        if key in self.model:
            with pytest.raises(InvariantError):
                self.lru.add(key, ttl_s)
            return
        self.lru.add(key, ttl_s)
        self.model[key] = _Naive(ttl_s, self.clock.now)

    @rule(key=KEYS, ttl_s=TTLS)
    def prolong(self, key: int, ttl_s: float | None) -> None:
        if key in self.model:
            self.lru.prolong(key, ttl_s)
            own = self.model[key].ttl_s
            self.model[key].ttl_s = None if own is None or ttl_s is None else max(own, ttl_s)
            if self.model[key].pins == 0:
                self.renew(key)

    @rule(key=KEYS)
    def use(self, key: int) -> None:
        if key in self.model:
            self.lru.use(key)
            if self.model[key].pins == 0:
                self.renew(key)

    @rule(key=KEYS)
    def pin(self, key: int) -> None:
        if key in self.model:
            self.lru.pin(key)
            self.model[key].pins += 1

    @rule(key=KEYS)
    def unpin(self, key: int) -> None:
        if key not in self.model:
            return
        if self.model[key].pins == 0:
            with pytest.raises(InvariantError):
                self.lru.unpin(key)
            return
        self.lru.unpin(key)
        self.model[key].pins -= 1
        if self.model[key].pins == 0:
            self.renew(key)

    @rule(key=KEYS)
    def remove(self, key: int) -> None:
        if key in self.model:
            self.lru.remove(key)
            del self.model[key]

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def expire(self) -> None:
        due = self.due()
        assert set(self.lru.pop_expired()) == due
        for key in due:
            del self.model[key]

    @invariant()
    def agrees(self) -> None:
        self.lru.check()
        assert set(self.lru) == set(self.model)
        assert {key for key in self.lru if self.lru.expired(key)} == self.due()
        assert list(self.lru.oldest_first()) == [key for key, entry in self.model.items() if entry.pins == 0]
        waits = [
            max(0.0, entry.used + entry.ttl_s - self.clock.now)
            for entry in self.model.values()
            if entry.ttl_s is not None and entry.pins == 0
        ]
        assert self.lru.next_expiry_s() == min(waits, default=None)


LRUMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestLRUAgainstAList = LRUMachine.TestCase


def test_many_uses_do_not_grow_the_heap() -> None:
    clock = ManualClock()
    lru: LRU[int] = LRU(clock)
    lru.add(1, 5.0)
    for _ in range(1000):
        clock.now += 0.001
        lru.use(1)
    assert len(lru._heap) == 1


def test_removed_entries_leave_the_heap_before_they_outnumber_the_rest() -> None:
    lru: LRU[int] = LRU(ManualClock())
    for key in range(5000):
        lru.add(key, 1000.0)
        lru.remove(key)
    assert len(lru._heap) < 200


def test_a_used_chain_loses_its_tail_first() -> None:
    lru: LRU[int] = LRU(ManualClock())
    for key in (0, 1, 2, 9):
        lru.add(key, None)
    for key in reversed((0, 1, 2)):
        lru.use(key)
    assert list(lru.oldest_first()) == [9, 2, 1, 0]
