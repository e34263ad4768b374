"""The share of a copy. Decisions as a whole are tested through the router (`test_core`)."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from router.decide import Question, _Shares


def question(tokens: int) -> Question:
    return Question([], tokens, 16, b"")


def test_a_block_that_others_in_flight_share_costs_its_part() -> None:
    shares = _Shares(question(64), [(3, 1), (1, 2)])
    assert shares.of(0) == pytest.approx((16 / 4 + 16 / 2 + 32) / 64)
    assert shares.of(16) == pytest.approx((16 / 2 + 32) / 48)
    assert shares.of(32) == 1.0


def test_a_private_prompt_is_charged_in_full() -> None:
    assert _Shares(question(64), []).of(0) == 1.0


@given(st.integers(1, 400), st.lists(st.integers(1, 40), max_size=30), st.integers(0, 30))
def test_a_share_is_what_its_blocks_add_up_to(tokens: int, sharers: list[int], cached_blocks: int) -> None:
    counts = sorted(sharers, reverse=True)[: tokens // 16]
    cached = min(cached_blocks, tokens // 16) * 16  # whole blocks, but for the one token that is always computed
    cached = min(cached, tokens - 1)
    runs = [(k, len(counts) - counts[::-1].index(k)) for k in sorted(set(counts), reverse=True)]
    share = _Shares(question(tokens), runs).of(cached)
    assert 0 < share <= 1.0
    first, missing = cached // 16, tokens - cached
    saved = sum(16 - 16 / (1 + k) for k in counts[first:]) if missing >= 16 else 0.0
    assert share == pytest.approx((missing - saved) / missing)
