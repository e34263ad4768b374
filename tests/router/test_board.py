from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvstore.layout import KV_DTYPES, UNQUANTISED, KVLayout
from router.board import percentile
from router.pairing import PREFILL
from router.worker_facts import stored_dtype
from tests.router.fake_worker import FakeWorker
from tests.router.rig import eventually
from tests.router.test_fleet import fakes


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


@pytest.mark.asyncio
async def test_workers_say_their_role_ranks_mode_and_what_they_store() -> None:
    worker = FakeWorker("p0", role=PREFILL)
    scheme = worker.hello.scheme
    scheme.layout, scheme.tp_size, scheme.canonical = "L8 KVH4 K64 V64 bfloat16 B16 int8/row", 2, True
    async with fakes(worker) as (_, router):
        before = [(told.role, told.ranks, told.kv_dtype) for told in router.list_workers()]
        assert before in ([], [("", 0, "")])
        await eventually(lambda: any(told.ranks for told in router.list_workers()))
        (told,) = router.list_workers()
        assert (told.role, told.ranks, told.deterministic, told.kv_dtype) == ("prefill", 2, True, "int8")
        labels = {"worker": "p0", "role": "prefill", "ranks": "2", "kv_dtype": "int8", "deterministic": "yes"}
        assert router.metrics.registry.get_sample_value("warmkv_worker_info", labels) == 1
