"""Shapes and sizes of blocks, and the choice of the block size."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import LayoutError
from kvstore.layout import DTYPE_BYTES, KVLayout

KIB, MIB = 1 << 10, 1 << 20
LLAMA_8B = KVLayout(layers=32, kv_heads=8, k_dim=128, v_dim=128, dtype="bfloat16")

layouts = st.builds(
    KVLayout,
    layers=st.integers(1, 128),
    kv_heads=st.integers(1, 128),
    k_dim=st.integers(1, 576),
    v_dim=st.integers(1, 576),
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
    block_size=st.integers(1, 64),
)


def test_sizes_of_a_known_model() -> None:
    assert LLAMA_8B.token_nbytes == 128 * KIB
    assert LLAMA_8B.block_nbytes == 2 * MIB
    assert LLAMA_8B.layer_nbytes == 16 * 8 * 256 * 2
    assert LLAMA_8B.describe() == "L32 KVH8 K128 V128 bfloat16 B16"


@given(layouts)
def test_a_block_is_its_layers_one_after_the_other(layout: KVLayout) -> None:
    assert layout.block_nbytes == layout.layers * layout.layer_nbytes
    assert layout.block_nbytes == layout.token_nbytes * layout.block_size


@given(layouts)
def test_the_chosen_block_size_is_the_allowed_one_nearest_to_sixteen(layout: KVLayout) -> None:
    chosen = layout.with_chosen_block_size()
    assert replace(chosen, block_size=layout.block_size) == layout
    fitting = [size for size in (16, 32, 64, 8, 4, 2, 1) if 256 * KIB <= layout.token_nbytes * size <= 4 * MIB]
    if fitting:
        assert chosen.block_size == fitting[0]
    else:  # nothing fits: as near as it gets
        assert chosen.block_size == (64 if layout.token_nbytes * 64 < 256 * KIB else 1)


@pytest.mark.parametrize(
    ("layout", "block_size"),
    [
        (LLAMA_8B, 16),
        (KVLayout(80, 8, 128, 128, "bfloat16"), 8),  # 70B on one device: 320 KiB a token
        (KVLayout(80, 1, 128, 128, "bfloat16"), 16),  # the same, one of eight ranks
        (KVLayout(24, 2, 64, 64, "bfloat16"), 32),  # 0.5B: 12 KiB a token
        (KVLayout(2, 1, 4, 4, "float32"), 64),  # a toy
        (KVLayout(60, 128, 192, 128, "float32"), 1),  # 9.4 MiB a token
    ],
)
def test_block_sizes_of_known_models(layout: KVLayout, block_size: int) -> None:
    assert layout.with_chosen_block_size().block_size == block_size


@given(layouts, layouts)
def test_two_layouts_are_described_alike_only_if_they_are_alike(one: KVLayout, other: KVLayout) -> None:
    assert (one.describe() == other.describe()) == (one == other)


def test_what_cannot_be_stored_is_refused_with_the_remedy() -> None:
    with pytest.raises(LayoutError, match="choose one of float32, bfloat16, float16"):
        replace(LLAMA_8B, dtype="float8_e4m3fn")
    for name in ("layers", "kv_heads", "k_dim", "v_dim", "block_size"):
        with pytest.raises(LayoutError, match="positive"):
            replace(LLAMA_8B, **{name: 0})
