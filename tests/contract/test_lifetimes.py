"""How long blocks live, held against all tiers: fixed ends, sliding ones, both, and the longer one of several."""

from __future__ import annotations

from typing import Any

import pytest

from kvstore.lifetime import FOR_EVER, Lifetime
from kvstore.tier import BlockMeta
from tests.contract.conftest import Harness
from tests.kvstore.blocks_for_tests import buffers, chain, names, payloads


def lasting(harness: Harness, length: int, *, ttl_s: float = 0.0, until: float | None = None) -> list[BlockMeta]:
    """A chain with this lifetime, in the harness's own times to live, from now."""
    end = None if until is None else harness.wall() + until * harness.ttl_s
    return chain(length, ttl_s=ttl_s * harness.ttl_s, until=end)


def hold(harness: Harness, metas: list[BlockMeta]) -> None:
    assert harness.tier.write(metas, payloads(metas)) == len(metas)


def use(harness: Harness, metas: list[BlockMeta], how: str) -> None:
    match how:
        case "read":
            assert harness.tier.read(names(metas), buffers(len(metas))).count == len(metas)
        case "touch":
            harness.tier.touch(names(metas))
        case "write":
            hold(harness, metas)


def promise(harness: Harness, metas: list[BlockMeta], lifetime: Lifetime) -> None:
    """Give blocks that are held another lifetime, as the store does."""
    tier: Any = harness.tier
    if hasattr(tier, "prolong"):
        tier.prolong(names(metas), lifetime)
        return
    again = [BlockMeta(m.hash, m.parent, m.root, lifetime.ttl_s, until=lifetime.until) for m in metas]
    if hasattr(tier, "refresh"):
        assert tier.refresh(again) == []
    else:
        hold(harness, again)


def later(harness: Harness, share: float) -> None:
    harness.wait(share * harness.ttl_s)


def held(harness: Harness, metas: list[BlockMeta]) -> int:
    return harness.tier.match(names(metas))


@pytest.mark.parametrize("how", ["read", "touch", "write"])
def test_no_use_renews_a_fixed_lifetime(harness: Harness, how: str) -> None:
    metas = lasting(harness, 3, until=1.0)
    hold(harness, metas)
    for _ in range(2):
        later(harness, 0.4)
        use(harness, metas, how)
    later(harness, 0.3)
    assert held(harness, metas) == 0
    assert harness.tier.read(names(metas), buffers(3)).count == 0


@pytest.mark.parametrize("how", ["read", "touch", "write"])
def test_a_use_renews_the_sliding_part_beyond_the_fixed_end(harness: Harness, how: str) -> None:
    metas = lasting(harness, 2, ttl_s=1.0, until=2.0)
    hold(harness, metas)
    later(harness, 1.7)
    assert held(harness, metas) == 2, "the end is not before the fixed one"
    use(harness, metas, how)
    later(harness, 0.8)
    assert held(harness, metas) == 2, "the use began the time to live again"
    later(harness, 0.4)
    assert held(harness, metas) == 0


def test_an_early_use_does_not_bring_the_fixed_end_forward(harness: Harness) -> None:
    metas = lasting(harness, 2, ttl_s=0.2, until=2.0)
    hold(harness, metas)
    use(harness, metas, "read")
    later(harness, 1.8)
    assert held(harness, metas) == 2
    later(harness, 0.4)
    assert held(harness, metas) == 0


def test_the_later_one_of_two_fixed_ends_holds_whichever_came_first(harness: Harness) -> None:
    metas = lasting(harness, 2, until=1.0)
    hold(harness, metas)
    now = harness.wall()
    promise(harness, metas, Lifetime(0.0, now + 3.0 * harness.ttl_s))
    promise(harness, metas, Lifetime(0.0, now + 2.0 * harness.ttl_s))
    later(harness, 2.7)
    assert held(harness, metas) == 2
    use(harness, metas, "read")
    later(harness, 0.5)
    assert held(harness, metas) == 0


def test_a_sliding_lifetime_joins_a_fixed_one(harness: Harness) -> None:
    metas = lasting(harness, 2, until=2.0)
    hold(harness, metas)
    promise(harness, metas, Lifetime(0.5 * harness.ttl_s))
    later(harness, 1.8)
    assert held(harness, metas) == 2
    promise(harness, metas, Lifetime(1.0 * harness.ttl_s))
    later(harness, 0.7)
    assert held(harness, metas) == 2
    later(harness, 0.5)
    assert held(harness, metas) == 0


def test_what_lives_until_it_is_evicted_absorbs_a_fixed_end(harness: Harness) -> None:
    metas = lasting(harness, 2, until=1.0)
    hold(harness, metas)
    promise(harness, metas, FOR_EVER)
    later(harness, 9.0)
    harness.tier.sweep()
    assert held(harness, metas) == 2


def test_a_block_whose_fixed_end_has_passed_can_be_written_again(harness: Harness) -> None:
    metas = lasting(harness, 2, until=1.0)
    hold(harness, metas)
    later(harness, 1.1)
    again = lasting(harness, 2, until=1.0)
    hold(harness, again)
    later(harness, 0.8)
    assert held(harness, again) == 2
    later(harness, 0.3)
    assert held(harness, again) == 0


@pytest.fixture
def local(harness: Harness) -> Any:
    if not hasattr(harness.tier, "prolong"):
        pytest.skip("no local tier")
    return harness.tier


def test_the_default_leaves_a_fixed_end_and_lengthens_what_slides(harness: Harness, local: Any) -> None:
    fixed = lasting(harness, 2, until=1.0)
    sliding = chain(2, ttl_s=harness.ttl_s, first_token=1)
    for metas in (fixed, sliding):
        hold(harness, metas)
        local.prolong(names(metas), Lifetime(5.0 * harness.ttl_s, is_default=True))
    later(harness, 1.1)
    assert (held(harness, fixed), held(harness, sliding)) == (0, 2)
    local.sweep()
    assert set(names(sliding)) == {meta.hash for meta in local.metas()}


def test_a_local_tier_says_how_long_each_block_still_lives(harness: Harness, local: Any) -> None:
    now, ttl_s = harness.wall(), harness.ttl_s
    fixed = chain(1, ttl_s=0.0, until=now + 2 * ttl_s)
    sliding, endless = chain(1, ttl_s=ttl_s, first_token=1), chain(1, first_token=2)
    absent = chain(1, first_token=3)
    for metas in (fixed, sliding, endless):
        hold(harness, metas)
    later(harness, 0.5)
    left = local.ttl_left_s(names([*fixed, *sliding, *endless, *absent]))
    assert left == {
        fixed[0].hash: pytest.approx(1.5 * ttl_s),
        sliding[0].hash: pytest.approx(0.5 * ttl_s),
        endless[0].hash: None,
    }


def test_a_local_tier_knows_priority_and_turn_of_what_it_holds(local: Any) -> None:
    (meta,) = chain(1)
    told = BlockMeta(meta.hash, meta.parent, meta.root, 30.0, 70, turn=4)
    assert local.write([told], payloads([told])) == 1
    assert local.find(meta.hash) == told
