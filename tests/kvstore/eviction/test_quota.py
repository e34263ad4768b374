"""Quotas with borrowing: who must give, held against a model that counts."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.eviction.policies import POLICIES, Eviction, Hint, make_eviction
from tests.kvstore.blocks_for_tests import ManualClock

CAPACITY = 10
SHARES = {"a": 5, "b": 3}  # two are left for all others


def quota(policy: str = "lru") -> Eviction[int]:
    return make_eviction(policy, ManualClock(), CAPACITY, shares=SHARES)


def fill(eviction: Eviction[int], *roots: str | None) -> None:
    for root in roots:
        eviction.add(len(eviction), None, hint=Hint(root=root))


def tenant(root: str | None) -> str:
    return root if root in SHARES else "others"


def share(name: str) -> int:
    return SHARES.get(name, CAPACITY - sum(SHARES.values()))


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "c", None]), st.sampled_from(["add", "use", "pin", "unpin"]), st.integers()
        ),
        max_size=80,
    )
)
def test_a_root_within_its_share_gives_nothing_to_one_that_is_over(
    policy: str, steps: list[tuple[str | None, str, int]]
) -> None:
    eviction = quota(policy)
    roots: dict[int, str | None] = {}
    for number, (root, step, pick) in enumerate(steps):
        key = sorted(roots)[pick % len(roots)] if roots else None
        if step == "add":
            make_room(eviction, roots, root)
            if len(roots) < CAPACITY:
                eviction.add(number, None, hint=Hint(root=root))
                roots[number] = root
        elif key is not None and step == "use":
            eviction.use(key)
        elif key is not None and step == "pin":
            eviction.pin(key)
        elif key is not None and eviction.pins(key):
            eviction.unpin(key)
        eviction.check()


def make_room(eviction: Eviction[int], roots: dict[int, str | None], root: str | None) -> None:
    if len(roots) < CAPACITY:
        return
    held = Counter(map(tenant, roots.values()))
    loose = {tenant(roots[key]) for key in roots if not eviction.pins(key)}
    over = {name for name in loose if held[name] > share(name)}
    victim = eviction.victim(root=root)
    if victim is None:
        assert not over
        assert root is None or tenant(root) not in loose, "it could have given of its own"
        return
    giver = tenant(roots[victim])
    assert giver in loose
    if over:
        most = max(held[name] - share(name) for name in over)
        assert held[giver] - share(giver) == most
    elif root is not None:
        assert giver == tenant(root)
    eviction.remove(victim)
    del roots[victim]


def test_what_nobody_uses_may_be_borrowed_and_is_given_back() -> None:
    eviction = quota()
    fill(eviction, *"bbbbbbbbb")
    eviction.add(100, None, hint=Hint(root="a"))
    for number in range(4):
        assert eviction.victim(root="a") == number, "b's oldest"
        eviction.remove(number)
        eviction.add(200 + number, None, hint=Hint(root="a"))
    assert eviction.victim(root="a") == 4, "b has five now, and its share is three"


def test_one_who_takes_more_pays_with_its_own() -> None:
    eviction = quota()
    fill(eviction, *"aaaaabbbcc")
    assert eviction.victim(root="a") == 0
    assert eviction.victim(root="b") == 5
    assert eviction.victim(root="c") == 8
    assert eviction.victim(root="d") == 8, "those without a share have one together"


def test_when_all_is_in_use_of_those_who_are_over_nobody_else_pays() -> None:
    eviction = quota()
    fill(eviction, *"aaaa", *"bbbbb", "c")
    for key in range(4, 9):
        eviction.pin(key)
    assert eviction.victim(root="b") is None
    assert eviction.victim(root="a") == 0, "its own, since it is a's room to make"
    assert eviction.victim() in (0, 9), "for nobody in particular, anyone"


def test_policy_goes_by_its_own_order_within_a_root() -> None:
    eviction = make_eviction("priority", ManualClock(), 4, shares={"a": 1})
    for key, priority in enumerate((50, 10, 70)):
        eviction.add(key, None, hint=Hint(root="a", priority=priority))
    eviction.add(3, None, hint=Hint(root="b", priority=0))
    assert eviction.victim(root="b") == 1


@pytest.mark.parametrize("shares", [{"a": 6, "b": 5}, {"a": -1}])
def test_shares_that_do_not_fit_are_refused(shares: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="make them smaller"):
        make_eviction("lru", ManualClock(), CAPACITY, shares=shares)
