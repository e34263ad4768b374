from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvstore.layout import KV_DTYPES, UNQUANTISED, KVLayout
from router.board import percentile, stored_dtype


@pytest.mark.parametrize(("quantile", "value"), [(0.0, 1.0), (0.5, 2.0), (0.51, 3.0), (0.95, 4.0), (1.0, 4.0)])
def test_it_is_the_nearest_rank_of_samples_in_any_order(quantile: float, value: float) -> None:
    assert percentile([3.0, 1.0, 4.0, 2.0], quantile) == value


def test_of_nothing_it_is_zero() -> None:
    assert percentile([], 0.5) == 0.0


@given(st.lists(st.integers(), min_size=1), st.integers(1, 99))
def test_it_is_the_smallest_sample_that_the_share_does_not_exceed(samples: list[int], percent: int) -> None:
    found = percentile(samples, percent / 100)
    assert sum(s <= found for s in samples) * 100 >= percent * len(samples)
    assert sum(s < found for s in samples) * 100 < percent * len(samples)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_what_is_stored_is_read_from_any_layout_in_words(dtype: str, kv_dtype: str) -> None:
    layout = KVLayout(8, 4, 64, 80, dtype, 32, kv_dtype)
    assert stored_dtype(layout.describe()) == (dtype if kv_dtype == UNQUANTISED else kv_dtype)


@pytest.mark.parametrize("words", ["", "a layout", "1 2 3 4 5"])
def test_words_of_another_form_say_nothing(words: str) -> None:
    assert stored_dtype(words) == ""
