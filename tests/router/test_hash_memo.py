from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from kvstore.blocks import HashScheme, block_hashes, short
from router.hash_memo import HashMemo

SCHEME = HashScheme(b"f" * 32, "L", 2)
ROOT, OTHER = SCHEME.root(b"a"), SCHEME.root(b"b")
# At 2 tokens a block a segment has 64 tokens; prompts that share beginnings of any length.
base = [n % 7 for n in range(500)]
prompts = st.builds(lambda keep, tail: base[:keep] + tail, st.integers(0, 500), st.lists(st.integers(0, 9), max_size=5))


@given(st.lists(st.tuples(prompts, st.sampled_from([ROOT, OTHER])), max_size=12), st.integers(1, 4))
def test_remembered_names_equal_computed_ones_in_any_order_and_memory_is_bounded(
    asked: list[tuple[list[int], bytes]], bound: int
) -> None:
    memo = HashMemo(max_segments=bound)
    for token_ids, root in asked:
        names = memo.names(token_ids, root, 2)  # type: ignore[arg-type]
        assert names.full == block_hashes(token_ids, root, 2)  # type: ignore[arg-type]
        assert names.short == [short(name) for name in names.full]
        assert len(memo) <= bound


def test_answers_are_the_callers_own_lists() -> None:
    memo = HashMemo()
    memo.names(base, ROOT, 2).full.clear()
    assert memo.names(base, ROOT, 2).full == block_hashes(base, ROOT, 2)


def test_two_tenants_never_share_a_segment() -> None:
    memo = HashMemo()
    assert not set(memo.names(base, ROOT, 2).full) & set(memo.names(base, OTHER, 2).full)
