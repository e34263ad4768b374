"""What may go, whatever the policy, held against plain dicts that are searched from the front."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.errors import InvariantError
from kvstore.eviction.order import Ranking
from kvstore.eviction.policies import LRU, POLICIES, Eviction, Hint, make_eviction
from kvstore.lifetime import Lifetime
from tests.kvstore.blocks_for_tests import ManualClock

KEYS = st.integers(0, 5)
PARENT = {0: None, 1: 0, 2: 1, 3: 1, 4: None, 5: 4}  # two trees: 0-1-{2,3} and 4-5
TTLS = st.sampled_from([None, 0.0, 1.0, 2.5])
BY_WALL = float(1 << 20)  # when the clock says zero; with halves of seconds all sums are exact
ENDS = st.sampled_from([None, None, -1.0, 1.5, 4.0, 9.0])  # of lifetimes, from then on


@dataclass(slots=True)
class _Naive:
    ttl_s: float | None
    used: float
    until: float = float("-inf")  # on the wall clock
    fixed: float = float("-inf")  # the same on the clock, as it was at the last use
    pins: int = 0
    leased_until: float = float("-inf")

    def dies(self, now: float) -> float:
        if self.pins or self.ttl_s is None:
            return float("inf")
        return max(self.used + self.ttl_s, self.fixed, self.leased_until if self.leased_until > now else 0.0)


class EvictionMachine(RuleBasedStateMachine):
    """Subclasses name the policy; `lru` also knows the exact victim."""

    policy = "lru"

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock(0.0)
        self.wall = ManualClock(BY_WALL)
        self.eviction: Eviction[int] = make_eviction(self.policy, self.clock, 4, wall_clock=self.wall)
        self.model: dict[int, _Naive] = {}  # in order of use

    def renew(self, key: int) -> None:
        entry = self.model.pop(key)
        entry.used = self.clock.now
        entry.fixed = self.clock.now + (entry.until - self.wall.now)
        self.model[key] = entry

    def leased(self, key: int) -> bool:
        return self.model[key].leased_until > self.clock.now

    def held_back(self, key: int) -> bool:
        """It, or what continues it, is pinned or leased."""
        if self.model[key].pins or self.leased(key):
            return True
        return any(self.held_back(child) for child in self.model if PARENT[child] == key)

    def candidates(self) -> list[int]:
        parents = {PARENT[key] for key in self.model}
        return [key for key in self.model if not self.held_back(key) and key not in parents]

    def due(self) -> set[int]:
        return {key for key, entry in self.model.items() if entry.dies(self.clock.now) <= self.clock.now}

    @rule(key=KEYS, ttl_s=TTLS, end=ENDS, priority=st.sampled_from([0, 50, 100]), turn=st.sampled_from([None, 1, 2]))
    def add(self, key: int, ttl_s: float | None, end: float | None, priority: int, turn: int | None) -> None:
        until = None if end is None else BY_WALL + end
        hint = Hint(name=key, parent=PARENT[key], root=key >= 4, priority=priority, turn=turn)
        if key in self.model:
            with pytest.raises(InvariantError):
                self.eviction.add(key, ttl_s, until=until, hint=hint)
            return
        self.eviction.add(key, ttl_s, until=until, hint=hint)
        self.model[key] = _Naive(ttl_s, self.clock.now, float("-inf") if until is None else until)
        self.renew(key)

    @rule(key=KEYS, ttl_s=TTLS, end=ENDS, is_default=st.booleans())
    def prolong(self, key: int, ttl_s: float | None, end: float | None, is_default: bool) -> None:
        if key in self.model:
            until = None if end is None else BY_WALL + end
            self.eviction.prolong(key, Lifetime(ttl_s, until, is_default))
            entry = self.model[key]
            if not (is_default and entry.ttl_s is not None and entry.until > float("-inf")):
                entry.ttl_s = None if entry.ttl_s is None or ttl_s is None else max(entry.ttl_s, ttl_s)
                entry.until = max(entry.until, float("-inf") if until is None else until)
            if self.model[key].pins == 0:
                self.renew(key)

    @rule(key=KEYS)
    def use(self, key: int) -> None:
        if key in self.model:
            self.eviction.use(key)
            if self.model[key].pins == 0:
                self.renew(key)

    @rule(key=KEYS)
    def pin(self, key: int) -> None:
        if key in self.model:
            self.eviction.pin(key)
            self.model[key].pins += 1

    @rule(key=KEYS)
    def unpin(self, key: int) -> None:
        if key not in self.model:
            return
        if self.model[key].pins == 0:
            with pytest.raises(InvariantError):
                self.eviction.unpin(key)
            return
        self.eviction.unpin(key)
        self.model[key].pins -= 1
        if self.model[key].pins == 0:
            self.renew(key)

    @rule(key=KEYS, for_s=st.sampled_from([None, -1.0, 0.0, 0.7, 2.0, 6.0]))
    def lease(self, key: int, for_s: float | None) -> None:
        if key in self.model:
            until = None if for_s is None else self.clock.now + for_s
            entry = self.model[key]
            entry.leased_until = max(entry.leased_until, float("inf") if until is None else until)
            assert self.eviction.lease(key, until) == self.leased(key)

    @rule(key=KEYS)
    def end_lease(self, key: int) -> None:
        if key in self.model:
            assert self.eviction.end_lease(key) == self.leased(key)
            self.model[key].leased_until = float("-inf")

    @rule(key=KEYS)
    def remove(self, key: int) -> None:
        if key in self.model:
            self.eviction.remove(key)
            del self.model[key]

    @rule(kept=st.sets(KEYS, max_size=2))
    def evict(self, kept: set[int]) -> None:
        allowed = [key for key in self.candidates() if key not in kept]
        victim = self.eviction.victim(kept)
        assert (victim is None) == (not allowed)
        if victim is not None:
            assert victim in allowed
            if self.policy == "lru":
                assert victim == allowed[0]
            self.eviction.remove(victim)
            del self.model[victim]

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds
        self.wall.now += seconds

    @rule(seconds=st.sampled_from([-2.0, 4.0]))
    def set_the_wall_clock(self, seconds: float) -> None:
        self.wall.now += seconds

    @rule()
    def expire(self) -> None:
        due = self.due()
        assert set(self.eviction.pop_expired()) == due
        for key in due:
            del self.model[key]

    @invariant()
    def agrees(self) -> None:
        self.eviction.check()
        assert set(self.eviction) == set(self.model)
        assert len(self.eviction) == len(self.model)
        assert {key for key in self.eviction if self.eviction.expired(key)} == self.due()
        assert {key for key in self.eviction if self.eviction.is_leased(key)} == set(filter(self.leased, self.model))
        assert self.eviction.leased == sum(map(self.leased, self.model))
        free = [key for key in self.model if not self.held_back(key)]
        assert list(self.eviction.oldest_first()) == free
        assert self.eviction.evictable == len(free)
        self.agrees_on_expiry()

    def agrees_on_expiry(self) -> None:
        dies = {key: entry.dies(self.clock.now) for key, entry in self.model.items()}
        for key, time in dies.items():
            assert self.eviction.remaining_s(key) == (None if time == float("inf") else time - self.clock.now)
        first = min(dies.values(), default=float("inf"))
        assert self.eviction.next_expiry_s() == (None if first == float("inf") else max(0.0, first - self.clock.now))


def machine(name: str) -> type:
    kind = type(f"Machine_{name}", (EvictionMachine,), {"policy": name})
    kind.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
    return kind.TestCase


for _name in POLICIES:
    globals()[f"Test_{_name}"] = machine(_name)
del _name


@pytest.fixture(params=POLICIES)
def eviction(request: pytest.FixtureRequest) -> Eviction[int]:
    return make_eviction(request.param, ManualClock(), 100)


def evict_all(eviction: Eviction[int]) -> list[int]:
    order = []
    while (victim := eviction.victim()) is not None:
        eviction.remove(victim)
        order.append(victim)
    return order


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown eviction policy 'mru'; choose one of .*lru"):
        make_eviction("mru", ManualClock(), 10)


def test_suffixes_go_before_their_prefix_in_whatever_order_they_came(eviction: Eviction[int]) -> None:
    for key in (5, 3, 2, 1, 0, 4):
        eviction.add(key, None, hint=Hint(name=key, parent=PARENT[key]))
    for key in (1, 0, 4):  # against the grain: only prefixes are used
        eviction.use(key)
    order = evict_all(eviction)
    assert sorted(order) == list(range(6))
    assert all(order.index(child) < order.index(parent) for child, parent in PARENT.items() if parent is not None)


def test_a_pinned_tail_holds_its_chain_and_nothing_else(eviction: Eviction[int]) -> None:
    for key in range(6):
        eviction.add(key, None, hint=Hint(name=key, parent=PARENT[key]))
    eviction.pin(3)
    assert eviction.evictable == 3
    assert sorted(evict_all(eviction)) == [2, 4, 5]
    eviction.unpin(3)
    assert evict_all(eviction) == [3, 1, 0]


def test_a_thousand_deep_chain_is_held_and_let_go(eviction: Eviction[int]) -> None:
    for key in range(5000):
        eviction.add(key, None, hint=Hint(name=key, parent=key - 1 if key else None))
    eviction.lease(4999, None)
    assert (eviction.evictable, eviction.victim()) == (0, None)
    eviction.end_lease(4999)
    assert evict_all(eviction) == list(reversed(range(5000)))


def test_a_removed_prefix_and_its_return_leave_the_order_right(eviction: Eviction[int]) -> None:
    eviction.add(0, None, hint=Hint(name=0))
    eviction.add(1, None, hint=Hint(name=1, parent=0))
    eviction.pin(1)
    eviction.remove(0)
    eviction.add(0, None, hint=Hint(name=0))
    assert eviction.victim() is None, "what it holds up is still pinned"
    eviction.unpin(1)
    assert evict_all(eviction) == [1, 0]
    eviction.check()


def test_a_prefix_is_free_once_the_pinned_tail_behind_it_is_cut_off(eviction: Eviction[int]) -> None:
    for key in range(3):
        eviction.add(key, None, hint=Hint(name=key, parent=PARENT[key]))
    eviction.pin(2)
    assert eviction.evictable == 0
    eviction.remove(1)
    eviction.check()
    assert (eviction.evictable, eviction.victim()) == (1, 0)


@given(steps=st.lists(st.tuples(st.integers(0, 4), st.one_of(st.none(), st.integers(0, 9))), max_size=60))
def test_a_ranking_names_the_smallest_whatever_came_in_between(steps: list[tuple[int, int | None]]) -> None:
    ranking: Ranking[int] = Ranking()
    ranks: dict[int, tuple[int, int]] = {}
    for number, (key, rank) in enumerate(steps):
        if rank is None:
            ranking.discard(key)
            ranks.pop(key, None)
        else:
            ranks[key] = rank, number
            ranking.set(key, ranks[key])
        ordered = sorted(ranks, key=lambda key: ranks[key])
        assert list(ranking) == ordered
        assert (len(ranking), ranking.first()) == (len(ordered), next(iter(ordered), None))
        for kept in ({0, 1}, {2, 3, 4}):
            assert ranking.first(kept) == next((key for key in ordered if key not in kept), None)


def test_of_two_entries_with_one_name_the_new_one_is_continued(eviction: Eviction[int]) -> None:
    eviction.add(1, None, hint=Hint(name="a"))
    eviction.pin(1)  # cleared from the tier's names, and still in use
    eviction.add(2, None, hint=Hint(name="a"))
    eviction.add(3, None, hint=Hint(name="b", parent="a"))
    eviction.unpin(1)
    assert evict_all(eviction).index(3) < [1, 3, 2].index(2)
    eviction.check()


def test_an_entry_cannot_continue_itself(eviction: Eviction[int]) -> None:
    with pytest.raises(InvariantError):
        eviction.add(1, None, hint=Hint(name=1, parent=1))


def test_a_lease_outlives_the_ttl_and_then_the_entry_is_gone() -> None:
    clock = ManualClock(0.0)
    lru: LRU[int] = LRU(clock)
    lru.add(1, 5.0)
    lru.lease(1, 60.0)
    clock.now = 59.0
    assert (lru.expired(1), lru.remaining_s(1), lru.pop_expired(), lru.victim()) == (False, 1.0, [], None)
    clock.now = 60.0
    assert (lru.expired(1), lru.is_leased(1), lru.victim()) == (True, False, 1)
    assert lru.pop_expired() == [1]


def test_ended_leases_go_at_the_place_of_their_last_use() -> None:
    lru: LRU[int] = LRU(ManualClock())
    for key in range(4):
        lru.add(key, None)
    lru.lease(1, None)
    lru.lease(0, None)
    lru.use(3)
    for key in (0, 1):
        lru.end_lease(key)
    assert evict_all(lru) == [0, 1, 2, 3]


def test_many_uses_do_not_grow_the_heap() -> None:
    clock = ManualClock()
    lru: LRU[int] = LRU(clock)
    lru.add(1, 5.0)
    for _ in range(1000):
        clock.now += 0.001
        lru.use(1)
    assert len(lru._deaths._heap) == 1


def test_removed_entries_leave_the_heap_before_they_outnumber_the_rest() -> None:
    lru: LRU[int] = LRU(ManualClock())
    for key in range(5000):
        lru.add(key, 1000.0)
        lru.remove(key)
    assert len(lru._deaths._heap) < 200


def test_a_used_chain_loses_its_tail_first() -> None:
    lru: LRU[int] = LRU(ManualClock())
    for key in (0, 1, 2, 9):
        lru.add(key, None)
    for key in reversed((0, 1, 2)):
        lru.use(key)
    assert list(lru.oldest_first()) == [9, 2, 1, 0]
