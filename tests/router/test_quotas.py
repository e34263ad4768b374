"""Token buckets against a naive account of every token, and what a router's part is."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.quotas import TokenQuotas


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_holds_a_minute_and_says_exactly_when_it_will_have_refilled() -> None:
    clock = Clock()
    quotas = TokenQuotas({"a": 600}, None, clock)
    assert quotas.wait_s("a", 600) == 0
    quotas.take("a", 550)
    assert quotas.wait_s("a", 50) == 0
    assert quotas.wait_s("a", 150) == pytest.approx(10.0)
    clock.now += 9.99
    assert quotas.wait_s("a", 150) > 0
    clock.now += 0.02
    assert quotas.wait_s("a", 150) == 0


def test_a_request_larger_than_a_minute_is_let_in_when_the_bucket_is_full_and_is_paid_off_after() -> None:
    clock = Clock()
    quotas = TokenQuotas({"a": 60}, None, clock)
    assert quotas.wait_s("a", 1000) == 0
    quotas.take("a", 240)
    assert quotas.wait_s("a", 1) == pytest.approx(181.0)
    clock.now += 181.0
    assert quotas.wait_s("a", 1) == pytest.approx(0.0, abs=1e-9)
    assert quotas.wait_s("a", 1000) == pytest.approx(59.0)


def test_giving_back_never_overfills_and_a_full_bucket_is_forgotten() -> None:
    quotas = TokenQuotas({}, 100, Clock())
    quotas.take("a", 80)
    quotas.take("a", -500)
    assert quotas.wait_s("a", 100) == 0
    quotas.take("a", 100)
    assert quotas.wait_s("a", 1) > 0
    quotas.take("a", -100)
    assert not quotas._buckets


def test_buckets_of_ever_more_tenants_are_forgotten_once_they_are_full_and_never_before() -> None:
    clock = Clock()
    quotas = TokenQuotas({}, 600, clock)
    quotas.take("deep", 600 * 10_000)  # in debt for a week
    for n in range(10_000):
        clock.now += 1.0
        quotas.take(f"tenant-{n}", 100)  # full again after ten seconds
    assert len(quotas._buckets) < 200
    assert quotas.wait_s("deep", 1) > 0
    assert quotas.wait_s("tenant-9999", 600) == pytest.approx(10.0)


def test_who_has_no_quota_is_not_limited_and_the_default_is_each_tenants_own() -> None:
    quotas = TokenQuotas({"a": 10}, None, Clock())
    quotas.take("b", 1e9)
    assert quotas.wait_s("b", 1e9) == 0
    quotas = TokenQuotas({"a": 10}, 100, Clock())
    quotas.take("b", 100)
    assert quotas.wait_s("b", 1) > 0
    assert quotas.wait_s("c", 100) == 0


def test_routers_share_a_quota_evenly_and_follow_their_number() -> None:
    clock, routers = Clock(), [2]
    quotas = TokenQuotas({"a": 600}, None, clock, routers=lambda: routers[0])
    assert quotas.limit("a") == 300
    quotas.take("a", 300)
    assert quotas.wait_s("a", 50) == pytest.approx(10.0)
    routers[0] = 1
    assert quotas.wait_s("a", 50) == pytest.approx(5.0)
    routers[0] = 0
    assert quotas.limit("a") == 600


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0, 400)), max_size=60))
def test_what_is_admitted_never_exceeds_a_minutes_burst_and_the_rate(steps: list[tuple[float, float]]) -> None:
    clock, limit = Clock(), 600
    quotas = TokenQuotas({"a": limit}, None, clock)
    admitted = 0.0
    for pause, tokens in steps:
        clock.now += pause
        if quotas.wait_s("a", tokens) == 0:
            quotas.take("a", tokens)
            admitted += tokens
        assert admitted <= limit + clock.now * limit / 60 + 1e-6


@settings(deadline=None)
@given(st.floats(0, 2000), st.floats(1, 2000))
def test_after_the_wait_that_is_told_a_request_is_let_in(taken: float, tokens: float) -> None:
    clock = Clock()
    quotas = TokenQuotas({"a": 600}, None, clock)
    quotas.take("a", taken)
    clock.now += quotas.wait_s("a", tokens) + 1e-6
    assert quotas.wait_s("a", tokens) == 0
