"""Shapes and sizes of blocks, and the choice of the block size."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.blocks import HashScheme
from kvstore.errors import LayoutError
from kvstore.layout import DTYPE_BYTES, KV_DTYPES, KVLayout

KIB, MIB = 1 << 10, 1 << 20
LLAMA_8B = KVLayout(layers=32, kv_heads=8, k_dim=128, v_dim=128, dtype="bfloat16")

# Made with the first version that wrote blocks.
DIGEST_OF_LLAMA_8B = "b67ff3e9c4c34e8afa14e47ebed250d0e8f3b88bfc2a9ac410dd6ed9854d5b88"

layouts = st.builds(
    KVLayout,
    layers=st.integers(1, 128),
    kv_heads=st.integers(1, 128),
    k_dim=st.integers(1, 576),
    v_dim=st.integers(1, 576),
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
    block_size=st.integers(1, 64),
    kv_dtype=st.sampled_from(KV_DTYPES),
)


def test_sizes_of_a_known_model() -> None:
    assert LLAMA_8B.token_nbytes == 128 * KIB
    assert LLAMA_8B.block_nbytes == 2 * MIB
    assert LLAMA_8B.layer_nbytes == 16 * 8 * 256 * 2
    assert LLAMA_8B.describe() == "L32 KVH8 K128 V128 bfloat16 B16"


@given(layouts)
def test_a_block_is_its_layers_one_after_the_other(layout: KVLayout) -> None:
    assert layout.block_nbytes == layout.layers * layout.layer_nbytes
    padding = layout.block_nbytes - layout.token_nbytes * layout.block_size
    assert 0 <= padding < layout.layers * 4 * 16
    assert padding == 0 or layout.quantised


@given(layouts)
def test_the_areas_of_a_layer_fill_it_one_after_the_other_and_never_overlap(layout: KVLayout) -> None:
    rows, element = layout.block_size * layout.kv_heads, 1 if layout.quantised else DTYPE_BYTES[layout.dtype]
    k, k_scales, v, v_scales = layout.areas
    assert (k.start, k.nbytes, v.nbytes) == (0, rows * layout.k_dim * element, rows * layout.v_dim * element)
    assert (k_scales is None, v_scales is None) == (not layout.quantised,) * 2
    areas = [area for area in layout.areas if area is not None]
    for one, following in zip(areas, [*areas[1:], None], strict=True):
        stop = layout.layer_nbytes if following is None else following.start
        assert 0 <= stop - (one.start + one.nbytes) < 16
    if layout.quantised:
        assert k_scales is not None
        assert k_scales.nbytes == rows * 2
        assert layout.layer_nbytes % 16 == 0
        assert [area.start % 16 for area in areas] == [0] * 4


@pytest.mark.parametrize("kv_dtype", ["fp8_e4m3", "int8"])
def test_quantised_blocks_of_a_known_model_are_half_as_large(kv_dtype: str) -> None:
    quantised = replace(LLAMA_8B, kv_dtype=kv_dtype)
    assert quantised.token_nbytes == 32 * 8 * (128 + 128 + 2 + 2)
    assert quantised.block_nbytes / LLAMA_8B.block_nbytes == 65 / 128
    assert quantised.describe() == f"L32 KVH8 K128 V128 bfloat16 B16 {kv_dtype}/row"
    assert LLAMA_8B.with_chosen_block_size().block_size == 16
    small = KVLayout(24, 2, 64, 64, "bfloat16")
    assert small.with_chosen_block_size().block_size == 32  # 12 KiB a token
    assert replace(small, kv_dtype=kv_dtype).with_chosen_block_size().block_size == 64  # 6.2 KiB a token


def test_a_name_that_was_given_before_quantised_blocks_existed_is_the_same_still() -> None:
    """Blocks that lie on disk and in Redis must be found by a newer version."""
    scheme = HashScheme(b"f" * 32, LLAMA_8B.describe(), 16)
    assert scheme.digest().hex() == DIGEST_OF_LLAMA_8B
    names = {
        HashScheme(b"f" * 32, replace(LLAMA_8B, kv_dtype=kv_dtype).describe(), 16).digest() for kv_dtype in KV_DTYPES
    }
    assert len(names) == len(KV_DTYPES)


@given(layouts)
def test_the_chosen_block_size_is_the_allowed_one_nearest_to_sixteen(layout: KVLayout) -> None:
    chosen = layout.with_chosen_block_size()
    assert replace(chosen, block_size=layout.block_size) == layout
    nbytes = {size: replace(layout, block_size=size).block_nbytes for size in (16, 32, 64, 8, 4, 2, 1)}
    fitting = [size for size in nbytes if 256 * KIB <= nbytes[size] <= 4 * MIB]
    if fitting:
        assert chosen.block_size == fitting[0]
    else:  # nothing fits: as near as it gets
        assert chosen.block_size == (64 if nbytes[64] < 256 * KIB else 1)


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
    with pytest.raises(LayoutError, match="choose one of auto, fp8_e4m3, int8"):
        replace(LLAMA_8B, kv_dtype="int4")
    for name in ("layers", "kv_heads", "k_dim", "v_dim", "block_size"):
        with pytest.raises(LayoutError, match="positive"):
            replace(LLAMA_8B, **{name: 0})
