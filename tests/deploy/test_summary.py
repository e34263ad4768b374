from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from deploy.summary import FATES, Act, Result, comparison, percentile, shown_fates
from router.ledger import FATES as router_fates


def result(**changes: object) -> Result:
    fields = {"session": "s", "turn": 0, "tenant": "t", "started_s": 0.0, "ttft_s": 0.1, "prompt_tokens": 100}
    return Result(**{**fields, "fates": {"computed": 25, "device": 75}, **changes})  # type: ignore[arg-type]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0.01, 1.0))
def test_a_percentile_is_the_smallest_sample_that_its_share_does_not_exceed(samples: list[float], share: float) -> None:
    got = percentile(samples, share)
    at_most = sum(sample <= got for sample in samples) / len(samples)
    below = sum(sample < got for sample in samples) / len(samples)
    assert got in samples
    assert at_most >= share - 1e-9
    assert below < share


@pytest.mark.parametrize(("samples", "median"), [([], 0.0), ([7.0], 7.0), ([1.0, 2.0, 3.0, 4.0], 2.0)])
def test_percentiles_of_few(samples: list[float], median: float) -> None:
    assert percentile(samples, 0.5) == median


def test_an_act_counts_only_what_was_answered_and_says_what_failed() -> None:
    act = Act("x", (result(), result(error="lost", ttft_s=9.0)), 2.0)
    assert (act.failed, act.prompt_tokens, act.tokens("computed")) == (1, 100, 25)
    assert act.hit_rate == pytest.approx(0.75)
    assert act.ttft_ms(0.95) == pytest.approx(100.0)
    assert act.requests_per_s == pytest.approx(0.5)
    nowhere = {"host": 0, "disk": 0, "redis": 0, "peer": 0}
    assert act.as_dict()["tokens_by_fate"] == {"computed": 25, "device": 75, **nowhere}


def test_an_act_without_requests_divides_by_nothing() -> None:
    act = Act("empty", (), 0.0)
    assert (act.hit_rate, act.requests_per_s, act.ttft_ms(0.5)) == (0.0, 0.0, 0.0)


def test_the_table_has_a_column_an_act_and_every_fate() -> None:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115 - closed with the process
    with console.file:
        console.print(comparison([Act("one", (result(),), 1.0), Act("two", (), 0.0)]))
        text = console.export_text()
    assert "disk" not in text
    assert "peer" not in text
    for word in ("one", "two", "computed", "device", "host", "redis", "75 (75%)", "1 of 1"):
        assert word in text


def test_the_rows_of_a_table_add_up_to_the_prompt_whatever_tier_it_came_from() -> None:
    acts = [Act("one", (result(fates={fate: 10 + place}),), 1.0) for place, fate in enumerate(FATES)]
    assert set(FATES) == set(router_fates)
    assert shown_fates(acts) == list(FATES)
    for act in acts:
        (shown,) = [fate for fate in shown_fates([act]) if act.tokens(fate)]
        assert act.tokens(shown) == sum(act.results[0].fates.values())
