"""Token ids as bytes, against `int.to_bytes`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.token_ids import packed, u32, unpacked

ids = st.lists(st.integers(0, 2**32 - 1), max_size=40)


@given(ids)
def test_an_id_is_four_bytes_the_lowest_first(token_ids: list[int]) -> None:
    expected = b"".join(token.to_bytes(4, "little") for token in token_ids)
    assert packed(token_ids) == packed(u32(token_ids)) == expected
    assert unpacked(expected).tolist() == token_ids


def test_a_copy_is_a_copy() -> None:
    mine = u32([1, 2])
    other = u32(mine)
    other.append(3)
    assert mine.tolist() == [1, 2]


@pytest.mark.parametrize("bad", [-1, 2**32])
def test_ids_that_do_not_fit_are_refused(bad: int) -> None:
    with pytest.raises(OverflowError):
        packed([1, bad])


def test_half_an_id_is_refused() -> None:
    with pytest.raises(ValueError, match="5 bytes are no whole number"):
        unpacked(b"12345")
