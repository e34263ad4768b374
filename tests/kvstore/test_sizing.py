"""Sizes and break-even points against known figures and brute force."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.layout import KVLayout
from kvstore.sizing import TierPlan, break_even_bytes_per_s, size_tier, worth_loading_tokens

LLAMA_8B = KVLayout(layers=32, kv_heads=8, k_dim=128, v_dim=128, dtype="bfloat16")
H100_TOKENS_PER_S = 1 / 31e-6
GIB = 1 << 30


def test_the_figures_of_the_design_come_out() -> None:
    # 128 KiB a token, recomputed in 31 us: 4.2 GB/s; pinned RAM at 50 GB/s is 12 times as fast, 1 GB/s is too slow.
    assert break_even_bytes_per_s(LLAMA_8B, H100_TOKENS_PER_S) == pytest.approx(4.228e9, rel=1e-3)
    ram = size_tier(LLAMA_8B, TierPlan(64 * GIB, bytes_per_s=50e9), H100_TOKENS_PER_S)
    assert (ram.blocks, ram.tokens) == (32 * 1024, 512 * 1024)
    assert ram.speedup == pytest.approx(11.8, rel=1e-2)
    assert ram.worth_tokens == 16
    wire = size_tier(LLAMA_8B, TierPlan(64 * GIB, bytes_per_s=1e9), H100_TOKENS_PER_S)
    assert wire.speedup == pytest.approx(0.2365, rel=1e-2)
    assert wire.worth_tokens is None


def test_headers_and_alignment_count() -> None:
    disk = TierPlan(10 * GIB, overhead_bytes=512, align_bytes=4096)
    sized = size_tier(LLAMA_8B, disk, 1000.0)
    assert sized.stored_block_bytes == (2 << 20) + 4096
    assert sized.blocks == 10 * GIB // ((2 << 20) + 4096)
    assert (sized.speedup, sized.worth_tokens) == (None, None)


def test_a_tier_smaller_than_a_block_holds_none() -> None:
    assert size_tier(LLAMA_8B, TierPlan(1 << 20), 1000.0).blocks == 0


@given(
    bandwidth=st.floats(1e6, 1e12),
    latency_s=st.floats(0, 0.5),
    rate=st.floats(10, 1e6),
    block_size=st.sampled_from([1, 16, 64]),
)
def test_the_shortest_worthwhile_prefix_is_the_first_that_is_loaded_sooner(
    bandwidth: float, latency_s: float, rate: float, block_size: int
) -> None:
    layout = KVLayout(4, 2, 8, 8, "float16", block_size)
    plan = TierPlan(GIB, bytes_per_s=bandwidth, latency_s=latency_s)

    def saved_s(tokens: int) -> float:
        return tokens / rate - latency_s - tokens * layout.token_nbytes / bandwidth

    worth = worth_loading_tokens(layout, plan, rate)
    if worth is None:
        assert saved_s(10**9) <= 0 or bandwidth <= layout.token_nbytes * rate
        return
    assert worth % block_size == 0
    tolerance = 1e-9 * (1 + worth / rate)
    assert saved_s(worth) > -tolerance
    assert worth == block_size or saved_s(worth - block_size) <= tolerance


@pytest.mark.parametrize("rate", [0.0, -1.0])
def test_a_prefill_rate_must_be_positive(rate: float) -> None:
    with pytest.raises(ValueError, match="more than zero"):
        break_even_bytes_per_s(LLAMA_8B, rate)


def test_a_tier_cannot_have_negative_sizes() -> None:
    with pytest.raises(ValueError, match="negative"):
        TierPlan(-1)
    with pytest.raises(ValueError, match="negative"):
        TierPlan(1, align_bytes=0)
