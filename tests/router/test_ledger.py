from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from router.ledger import FATES, Entry, Ledger, settled_fates

counts = st.dictionaries(st.sampled_from(FATES), st.integers(0, 1000), max_size=6)


@given(counts, st.integers(0, 3000))
def test_settled_fates_always_sum_to_the_prompt(reported: dict[str, int], prompt_tokens: int) -> None:
    fates, right = settled_fates(reported, prompt_tokens)
    assert sum(fates.values()) == prompt_tokens
    assert all(count >= 0 for count in fates.values())
    assert right == (sum(reported.values()) == prompt_tokens)


@given(st.lists(st.tuples(counts, st.sampled_from(["OK", "CANCELLED"]), st.integers(0, 50)), max_size=20))
def test_totals_are_the_sums_of_the_entries(requests: list[tuple[dict[str, int], str, int]]) -> None:
    ledger = Ledger()
    for fates, code, generated in requests:
        ledger.record(Entry("t", "w", code, sum(fates.values()), fates, generated, 3))
    totals = ledger.totals
    assert sum(totals.fates.values()) == totals.prompt_tokens == sum(sum(f.values()) for f, _, _ in requests)
    assert totals.reused == totals.prompt_tokens - totals.fates["computed"]
    assert totals.requests.total() == len(requests)
    assert totals.generated_tokens == sum(g for _, _, g in requests)
    assert totals.predicted_cached == 3 * sum(1 for f, _, _ in requests if f)


def test_a_request_that_no_worker_ran_adds_no_prompt_tokens() -> None:
    ledger = Ledger()
    ledger.record(Entry("t", "", "RESOURCE_EXHAUSTED", 100))
    assert ledger.totals.prompt_tokens == 0
    assert ledger.totals.requests == {"RESOURCE_EXHAUSTED": 1}


def test_fates_that_do_not_sum_are_refused() -> None:
    with pytest.raises(ValueError, match="do not sum"):
        Ledger().record(Entry("t", "w", "OK", 10, {"computed": 9}))
