"""Each policy against a model that keeps plain lists and searches them, on random requests to a small cache.

The models of `arc` and `s3fifo` follow the papers' pseudo-code, with the liberties that the modules name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain as concatenated
from itertools import pairwise
from typing import Protocol

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.eviction.policies import POLICIES, Eviction, Hint, make_eviction
from kvstore.eviction.reuse import _EDGES, _PRIOR, _PRIOR_REUSED, ReuseOrder, age_bucket, kind_of, worth
from kvstore.eviction.tail import DEFAULT_SPARE_BLOCKS, Spare, spare_blocks
from tests.kvstore.blocks_for_tests import ManualClock

CAPACITY = 5
# Few keys and many requests: queues must go round, and remembered names come back.
REQUESTS = st.one_of(
    st.lists(st.integers(0, 11), max_size=60),
    st.lists(st.integers(0, 8), min_size=80, max_size=200),
    st.randoms(use_true_random=False).map(
        lambda random: [min(11, random.getrandbits(random.randint(1, 4))) for _ in range(200)]
    ),
)


def priority_of(key: int) -> int:
    return key % 3


class Model(Protocol):
    def holds(self, key: int) -> bool: ...
    def hit(self, key: int) -> None: ...
    def evict(self) -> int: ...
    def insert(self, key: int) -> None: ...


class NaiveLru:
    def __init__(self) -> None:
        self.keys: list[int] = []

    def holds(self, key: int) -> bool:
        return key in self.keys

    def hit(self, key: int) -> None:
        self.keys.remove(key)
        self.keys.append(key)

    def evict(self) -> int:
        return self.keys.pop(0)

    def insert(self, key: int) -> None:
        self.keys.append(key)


class NaivePriority(NaiveLru):
    def evict(self) -> int:
        lowest = min(map(priority_of, self.keys))
        victim = next(key for key in self.keys if priority_of(key) == lowest)
        self.keys.remove(victim)
        return victim


class NaiveLfuDa(NaiveLru):
    def __init__(self) -> None:
        super().__init__()
        self.age = 0
        self.frequency: dict[int, int] = {}
        self.value: dict[int, int] = {}

    def hit(self, key: int) -> None:
        super().hit(key)
        self.frequency[key] += 1
        self.value[key] = self.age + self.frequency[key]

    def insert(self, key: int) -> None:
        super().insert(key)
        self.frequency[key] = 1
        self.value[key] = self.age + 1

    def evict(self) -> int:
        self.age = min(self.value[key] for key in self.keys)
        victim = next(key for key in self.keys if self.value[key] == self.age)
        self.keys.remove(victim)
        return victim


class NaiveS3Fifo:
    def __init__(self) -> None:
        self.small: list[int] = []
        self.main: list[int] = []
        self.ghost: list[int] = []
        self.frequency: dict[int, int] = {}

    def holds(self, key: int) -> bool:
        return key in self.small + self.main

    def hit(self, key: int) -> None:
        self.frequency[key] = min(3, self.frequency[key] + 1)

    def insert(self, key: int) -> None:
        self.frequency[key] = 0
        if key in self.ghost:
            self.ghost.remove(key)
            self.main.append(key)
        else:
            self.small.append(key)

    def evict(self) -> int:
        while True:
            if self.small and (len(self.small) > 1 or not self.main):
                key = self.small.pop(0)
                if self.frequency[key] == 0:
                    self.ghost = [*self.ghost, key][-CAPACITY:]
                    return key
                self.frequency[key] = 0
            else:
                key = self.main.pop(0)
                if self.frequency[key] == 0:
                    return key
                self.frequency[key] -= 1
            self.main.append(key)


class NaiveArc:
    def __init__(self) -> None:
        self.t1: list[int] = []
        self.t2: list[int] = []
        self.b1: list[int] = []
        self.b2: list[int] = []
        self.p = 0.0

    def holds(self, key: int) -> bool:
        return key in self.t1 + self.t2

    def hit(self, key: int) -> None:
        (self.t1 if key in self.t1 else self.t2).remove(key)
        self.t2.append(key)

    def evict(self) -> int:
        if self.t1 and (len(self.t1) > self.p or not self.t2):
            key = self.t1.pop(0)
            self.b1.append(key)
        else:
            key = self.t2.pop(0)
            self.b2.append(key)
        self.trim()
        return key

    def insert(self, key: int) -> None:
        if key in self.b1:
            self.p = min(CAPACITY, self.p + max(1, len(self.b2) / len(self.b1)))
            self.b1.remove(key)
            self.t2.append(key)
        elif key in self.b2:
            self.p = max(0, self.p - max(1, len(self.b1) / len(self.b2)))
            self.b2.remove(key)
            self.t2.append(key)
        else:
            self.t1.append(key)
            self.trim(second=False)

    def trim(self, *, second: bool = True) -> None:
        while len(self.t1) + len(self.b1) > CAPACITY:
            self.b1.pop(0)
        while second and len(self.b1) + len(self.b2) > CAPACITY:
            self.b2.pop(0)


MODELS: dict[str, Callable[[], Model]] = {
    "lru": NaiveLru,
    "priority": NaivePriority,
    "lfu_da": NaiveLfuDa,
    "s3fifo": NaiveS3Fifo,
    "arc": NaiveArc,
}


@pytest.mark.parametrize("policy", MODELS)
@settings(max_examples=150, deadline=None)
@given(requests=REQUESTS, by_name=st.booleans())
def test_policy_evicts_what_its_model_evicts(policy: str, requests: list[int], by_name: bool) -> None:
    eviction: Eviction[int] = make_eviction(policy, ManualClock(), CAPACITY)
    model = MODELS[policy]()
    slots: dict[int, int] = {}  # with `by_name` keys are new numbers, and only the name comes back
    for number, request in enumerate(requests):
        assert (request in slots) == model.holds(request)
        if request in slots:
            eviction.use(slots[request])
            model.hit(request)
            continue
        if len(slots) == CAPACITY:
            victim, expected = eviction.victim(), model.evict()
            assert victim == slots[expected]
            eviction.remove(slots.pop(expected))
        key = slots[request] = 1000 + number if by_name else request
        eviction.add(key, None, hint=Hint(name=request if by_name else None, priority=priority_of(request)))
        model.insert(request)
        eviction.check()


@pytest.mark.parametrize("policy", MODELS)
@settings(max_examples=50, deadline=None)
@given(requests=REQUESTS)
def test_pins_only_delay_what_would_have_gone(policy: str, requests: list[int]) -> None:
    """With an entry pinned, the victim is what the policy names first of the others."""
    eviction: Eviction[int] = make_eviction(policy, ManualClock(), CAPACITY)
    for request in requests:
        if request in eviction:
            eviction.use(request)
            continue
        if len(eviction) == CAPACITY:
            first = eviction.victim()
            assert first is not None
            eviction.pin(first)
            second = eviction.victim()
            assert second not in (None, first)
            eviction.unpin(first)
            eviction.remove(second)  # type: ignore[arg-type]
        eviction.add(request, None, hint=Hint(priority=priority_of(request)))
        eviction.check()


@pytest.mark.parametrize("policy", ["s3fifo", "lfu_da", "arc"])
def test_the_first_use_of_an_entry_ends_without_counting_twice(policy: str) -> None:
    eviction: Eviction[str] = make_eviction(policy, ManualClock(), 3)
    eviction.add("once", None, pins=2)
    eviction.add("twice", None, pins=1)
    eviction.unpin("twice")
    eviction.pin("twice")
    eviction.unpin("twice")
    eviction.add("new", None)
    eviction.use("new")
    eviction.unpin("once")
    eviction.unpin("once")
    assert eviction.victim() == "once"


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5), spare=st.integers(0, 4))
def test_tail_optimized_takes_what_each_conversation_can_spare_first(lengths: list[int], spare: int) -> None:
    eviction: Eviction[tuple[int, int]] = make_eviction("tail_optimized", ManualClock(), 99, spare_blocks=spare)
    chats = [[(chat, block) for block in range(length)] for chat, length in enumerate(lengths)]
    for chat in chats:
        for key in reversed(chat):
            parent = (key[0], key[1] - 1) if key[1] else None
            eviction.add(key, None, hint=Hint(name=key, parent=parent, position=key[1]))
    order = []
    while (victim := eviction.victim()) is not None:
        eviction.remove(victim)
        order.append(victim)
    spared = [list(reversed(chat))[:spare] for chat in chats]
    rest = [list(reversed(chat))[spare:] for chat in chats]
    assert order == list(concatenated(*spared, *rest))


def test_a_conversation_that_goes_on_from_a_shorter_prefix_can_spare_anew() -> None:
    eviction: Eviction[int] = make_eviction("tail_optimized", ManualClock(), 99, spare_blocks=2)
    for key in reversed(range(4)):
        eviction.add(key, None, hint=Hint(name=key, parent=key - 1 if key else None, position=key))
    eviction.add(9, None, hint=Hint(name=9))
    for tail in (3, 2):
        assert eviction.victim() == tail
        eviction.remove(tail)
    assert sorted(eviction) == [0, 1, 9]
    assert eviction.victim() == 9, "two of the four are gone; a third would make the next turn late"
    for key in (1, 0):
        eviction.pin(key)
        eviction.unpin(key)
    eviction.use(9)
    assert eviction.victim() == 1


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=90),
    spares=st.lists(st.integers(0, 6), min_size=1, max_size=4),
)
def test_tail_optimized_goes_by_the_spare_of_the_day_and_needs_no_positions(
    lengths: list[int], spares: list[int]
) -> None:
    spare = 3
    live: Eviction[tuple[int, int]] = make_eviction("tail_optimized", ManualClock(), 999, spare_blocks=lambda: spare)
    for chat, length in enumerate(lengths):
        for block in reversed(range(length)):
            hint = Hint(name=(chat, block), parent=(chat, block - 1) if block else None)
            live.add((chat, block), None, hint=hint)
    for spare in spares:  # noqa: B007 - what `live` asks for
        live.victim(), live.victim()  # two evictions look at 128 candidates
    order = []
    while (victim := live.victim()) is not None:
        live.remove(victim)
        order.append(victim)
    chats = [[(chat, block) for block in reversed(range(length))] for chat, length in enumerate(lengths)]
    assert order == [*concatenated(*(c[:spare] for c in chats)), *concatenated(*(c[spare:] for c in chats))]


def test_the_spare_follows_what_prefills_cost_once_a_second_and_passes_over_noise() -> None:
    clock = ManualClock()
    spare = Spare(0.5, 16, clock)
    assert spare() == DEFAULT_SPARE_BLOCKS
    spare.learn(lambda tokens: tokens / 8.0)  # 8,000 a second: 4,000 tokens
    assert spare() == 250
    spare.learn(lambda tokens: tokens / 80.0)
    assert spare() == 250, "not again within the second"
    clock.now += 1.0
    spare.learn(lambda tokens: tokens / 8.5)
    assert spare() == 250, "too small a change"
    clock.now += 1.0
    spare.learn(lambda tokens: 100.0 + tokens / 0.8)  # 800 a second, and a tenth of one for each step
    assert spare() == 20
    clock.now += 1.0
    spare.learn(lambda tokens: 600.0)
    assert spare() == 0


@given(
    threshold_s=st.floats(0.0, 3.0),
    tokens_per_s=st.floats(500.0, 50000.0),
    block_size=st.integers(1, 64),
    next_turn=st.integers(0, 500),
)
def test_spare_blocks_fit_the_threshold_and_one_more_does_not(
    threshold_s: float, tokens_per_s: float, block_size: int, next_turn: int
) -> None:
    def prefill_ms(tokens: int) -> float:
        return tokens / tokens_per_s * 1e3

    spare = spare_blocks(threshold_s, prefill_ms, block_size, next_turn_tokens=next_turn)
    assert spare == 0 or prefill_ms(next_turn + spare * block_size) <= threshold_s * 1e3
    assert prefill_ms(next_turn + (spare + 1) * block_size) > threshold_s * 1e3


BUCKETS = len(worth(0.0, [0.0] * 14))


@given(starts=st.floats(0, 1e4), shares=st.lists(st.floats(0, 1 / 14), min_size=14, max_size=14))
def test_worth_is_the_best_ratio_of_reuses_to_room(starts: float, shares: list[float]) -> None:
    reused = [share * starts for share in shares]
    hits = [count + _PRIOR * _PRIOR_REUSED / BUCKETS for count in reused]
    for age, value in enumerate(worth(starts, reused)):
        ratios = []
        for until in range(age, BUCKETS):
            room = sum(
                (_EDGES[b + 1] - _EDGES[b]) * max(0.5, starts + _PRIOR - sum(hits[:b])) for b in range(age, until + 1)
            )
            ratios.append(sum(hits[age : until + 1]) / room)
        assert value == pytest.approx(max(ratios))


def test_ages_fall_into_their_buckets() -> None:
    assert [age_bucket((start + end) / 2) for start, end in pairwise(_EDGES)] == list(range(14))
    assert (age_bucket(-1.0), age_bucket(1e9)) == (0, 13)


def test_reuse_learns_which_turns_are_followed_by_another_even_of_what_it_evicted() -> None:
    """First turns never come back, second ones after a minute: once that is known, an older second turn stays."""
    clock = ManualClock(0.0)
    eviction: Eviction[int] = make_eviction("reuse", clock, 20)

    def ask(name: int, turn: int) -> None:
        if name in eviction:
            eviction.use(name)
            return
        while len(eviction) >= 20 and (victim := eviction.victim()) is not None:
            eviction.remove(victim)
        eviction.add(name, None, hint=Hint(name=name, turn=turn))

    for second in range(3000):
        clock.now = float(second)
        ask(second, 1)
        if second % 10 == 0:
            ask(1_000_000 + second, 2)
        if second % 10 == 0 and second >= 60:
            ask(1_000_000 + second - 60, 2)
    kept = [name for name in eviction if name >= 1_000_000]
    assert len(kept) >= 6, "all that will come back within the minute"
    assert eviction.victim() not in kept


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (Hint(turn=2, think_s=10.0), Hint(turn=2, think_s=100.0)),
        (Hint(turn=2, think_s=100.0), Hint(turn=2, think_s=1000.0)),
        (Hint(turn=1, new_tokens=100), Hint(turn=1, new_tokens=5000)),
        (Hint(turn=1, new_tokens=5000), Hint(turn=1, new_tokens=10_000)),
        (Hint(turn=1, new_tokens=10_000), Hint(turn=1, new_tokens=100_000)),
        (Hint(turn=2, awaits_tool=True), Hint(turn=2, awaits_tool=False)),
        (Hint(turn=2), Hint(turn=1)),
        (Hint(turn=2), Hint()),
    ],
)
def test_reuse_tells_apart_by_all_that_it_is_told(good: Hint, bad: Hint) -> None:
    """Of entries of one age, those stay that are like others that came back, if nothing else speaks for them."""
    clock = ManualClock(0.0)
    eviction: Eviction[int] = make_eviction("reuse", clock, 10)
    for name in range(1500):
        clock.now += 1.0
        eviction.add(name, None, hint=replace(bad if name % 2 else good, name=name))
        if name >= 6 and name % 2 == 0:
            eviction.use(name - 6)
        while len(eviction) > 10:
            victim = eviction.victim()
            assert victim is not None
            eviction.remove(victim)
    held = list(eviction)
    assert len([name for name in held if name % 2 == 0]) >= 7, held


def test_a_class_that_was_hardly_seen_takes_after_what_it_is_a_part_of() -> None:
    """Second turns have come back, first ones never, all of them short; now there is a long one of each."""
    clock = ManualClock(0.0)
    order: ReuseOrder[int] = ReuseOrder(clock, 5000)
    eviction = Eviction(clock, order)
    for name in range(1000):
        clock.now += 1.0
        eviction.add(name, None, hint=Hint(name=name, turn=1 + name % 2, new_tokens=100))
        if name % 2 and name > 4:
            eviction.use(name - 4)
    eviction.add(2000, None, hint=Hint(name=2000, turn=2, new_tokens=100_000))
    eviction.add(2001, None, hint=Hint(name=2001, turn=1, new_tokens=100_000))
    order._learn()
    kinds = [kind_of(Hint(turn=turn, new_tokens=tokens)) for turn, tokens in [(2, 100_000), (1, 100_000), (1, 100)]]
    alike, other, seen = (order._classes[kind].worth[age_bucket(2.0)] for kind in kinds)
    assert alike > 5 * other
    assert other > seen, "what was not seen at all is believed to come back more than what never did"


def test_reuse_counts_what_comes_back_after_it_was_evicted() -> None:
    clock = ManualClock(0.0)
    order: ReuseOrder[int] = ReuseOrder(clock, 4)
    eviction = Eviction(clock, order)
    eviction.add(1, None, hint=Hint(name="again", turn=1))
    assert eviction.victim() == 1
    eviction.remove(1)
    clock.now = 60.0
    eviction.add(7, None, hint=Hint(name="again", turn=2))
    counts = order._classes[kind_of(Hint(turn=1))]
    assert (counts.starts, counts.reused[age_bucket(60.0)], sum(counts.reused)) == (1, 1, 1)


def test_reuse_knows_nothing_at_first_and_is_lru() -> None:
    clock = ManualClock(0.0)
    eviction: Eviction[int] = make_eviction("reuse", clock, 100)
    for key in range(50):
        clock.now += 7.0
        eviction.add(key, None, hint=Hint(name=key, turn=key % 3))
    order = []
    while (victim := eviction.victim()) is not None:
        eviction.remove(victim)
        order.append(victim)
    assert order == list(range(50))


@pytest.mark.parametrize("policy", POLICIES)
def test_memory_stays_bounded_over_many_strangers(policy: str) -> None:
    """What a policy remembers of the gone is a multiple of the capacity, however many there were."""
    eviction: Eviction[int] = make_eviction(policy, ManualClock(), 10)
    for key in range(3000):
        if len(eviction) == 10 and (victim := eviction.victim()) is not None:
            eviction.remove(victim)
        eviction.add(key, 5.0, hint=Hint(name=key, parent=key - 1 if key % 7 else None, position=key % 7))
    sizes = [len(part) for part in vars(eviction._order).values() if hasattr(part, "__len__")]
    assert max(sizes, default=0) <= 40
    assert len(eviction._candidates._names) <= 20


def test_s3fifo_does_not_count_used_blocks_inside_chains_as_newcomers() -> None:
    """Else a long conversation would fill the small queue by itself, and lose each new tail at once."""
    eviction: Eviction[str] = make_eviction("s3fifo", ManualClock(), 20)
    for number in range(10):
        eviction.add(f"old {number}", None)
        eviction.use(f"old {number}")
    assert eviction.victim() == "old 0", "all have moved to the main queue"
    for number in range(7):
        eviction.add(f"chat {number}", None, hint=Hint(name=number, parent=number - 1 if number else None))
        if number < 6:
            eviction.use(f"chat {number}")
    assert eviction.victim() == "old 0"
    for number in range(2):
        eviction.add(f"new {number}", None)
    assert eviction.victim() == "chat 6", "three newcomers, where two have room"
