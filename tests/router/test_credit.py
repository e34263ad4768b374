"""How much of what is believed counts: factors, their product, and what they do to overlaps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.events import BlockStored, TierName
from router.beliefs import Beliefs
from router.credit import FULL_CREDIT, Credits, discounted
from router.index import Overlap, PrefixIndex


def blocks(count: int) -> list[bytes]:
    return [at.to_bytes(16, "big") for at in range(count)]


def held_by(**tiers: int) -> Beliefs:
    """A worker `w` that holds so many leading blocks at each tier, and `v` that holds ten in its device."""
    index = PrefixIndex(lambda: 0.0)
    for worker in ("w", "v"):
        index.join(worker, 1, shared_id="run")
        index.begin_snapshot(worker, 1)
        index.end_snapshot(worker, 1)
    index.apply("w", 1, [BlockStored(TierName(tier), tuple(blocks(count))) for tier, count in tiers.items() if count])
    index.apply("v", 1, [BlockStored(TierName.DEVICE, tuple(blocks(10)))])
    return Beliefs(index, lambda: 0.0)


def test_nobody_is_doubted_without_a_reason() -> None:
    credits = Credits()
    assert credits.of("w") is FULL_CREDIT
    credits.is_behind("w", 0.2)
    credits.judged("w", 0.97, 0.96)
    assert credits.of("w") is FULL_CREDIT
    assert not credits.below


def test_a_gap_halves_lag_divides_and_both_multiply() -> None:
    credits = Credits()
    credits.missed_messages("w")
    assert credits.of("w").factor == 0.5
    credits.is_behind("w", 3.0)
    assert credits.of("w").factor == pytest.approx(0.125)
    assert "3.0 s behind" in credits.of("w").why
    credits.is_behind("w", 0.0)
    assert credits.of("w").factor == 0.5
    assert credits.of("v") is FULL_CREDIT
    credits.restored("w")
    assert credits.of("w") is FULL_CREDIT


@pytest.mark.parametrize(
    ("precision", "recall", "factor"), [(0.8, 1.0, 0.8), (1.0, 0.8, 0.8), (0.8, 0.5, 0.4), (0.49, 1.0, 0.0)]
)
def test_precision_and_recall_lower_the_credit_and_below_a_half_nothing_counts(
    precision: float, recall: float, factor: float
) -> None:
    credits = Credits()
    credits.judged("w", precision, recall)
    assert credits.of("w").factor == pytest.approx(factor)
    credits.judged("w", 1.0, 1.0)
    assert not credits.below


@given(st.lists(st.integers(0, 50), min_size=4, max_size=4), st.floats(0, 1), st.integers(0, 60))
def test_a_discounted_overlap_is_cumulative_and_no_longer_than_before(
    depths: list[int], factor: float, shared_run: int
) -> None:
    before = Overlap(*sorted(depths))
    after = discounted(before, factor, shared_run)
    assert after.device <= after.host <= after.disk <= after.shared
    assert all(mine <= was for mine, was in zip(after, before, strict=True))
    assert after.disk == int(before.disk * factor)
    assert after.shared >= min(shared_run, before.shared)


def test_only_the_doubted_workers_own_blocks_count_less() -> None:
    beliefs = held_by(device=4, host=8, redis=6)
    beliefs.credits.missed_messages("w")
    overlaps = beliefs.match(blocks(12))
    # The shared tier's six are nobody's memory of the worker.
    assert overlaps["w"] == Overlap(2, 4, 4, 6)
    assert overlaps["v"].device == 10


def test_the_index_itself_is_left_as_it_is() -> None:
    beliefs = held_by(device=4)
    before = beliefs.match(blocks(12))["w"]
    beliefs.credits.missed_messages("w")
    beliefs.match(blocks(12))
    beliefs.credits.restored("w")
    assert beliefs.match(blocks(12))["w"] == before == Overlap(4, 4, 4, 4)
    assert beliefs.holds("w", blocks(4)[3])
    assert not beliefs.holds("w", blocks(5)[4])
    assert not beliefs.holds("nobody", blocks(1)[0])
