from __future__ import annotations

import gc
import random
import tracemalloc
from array import array

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvstore.blocks import HashScheme, block_hashes, short
from router import hash_memo
from router.hash_memo import HashMemo

SCHEME = HashScheme(b"f" * 32, "L", 2)
ROOT, OTHER = SCHEME.root(b"a"), SCHEME.root(b"b")
# Prompts that share beginnings of any length, of 2 tokens a block, some of them within a block.
base = [n % 7 for n in range(120)]
prompts = st.builds(lambda keep, tail: base[:keep] + tail, st.integers(0, 120), st.lists(st.integers(0, 3), max_size=9))


def nodes(memo: HashMemo) -> list[hash_memo._Node]:
    found, todo = [], list(memo._root.children.values())
    while todo:
        found.append(todo.pop())
        todo += found[-1].children.values()
    return found


def check(memo: HashMemo, max_bytes: int) -> None:
    known = nodes(memo)
    assert memo.nbytes == sum(node.nbytes for node in known) <= max_bytes
    assert set(memo._recent) == set(known)
    order = {node: place for place, node in enumerate(memo._recent)}
    for node in known:
        assert node.parent is memo._root or order[node.parent] > order[node]
        assert node.parent.children[node.key] is node
        assert len(node.short) * 2 * 4 == len(node.tokens)


@given(st.lists(st.tuples(prompts, st.sampled_from([ROOT, OTHER])), max_size=14), st.integers(0, 30))
def test_remembered_names_equal_computed_ones_in_any_order_and_memory_is_bounded(
    asked: list[tuple[list[int], bytes]], thousands: int
) -> None:
    memo = HashMemo(max_bytes=thousands * 1000)
    for token_ids, root in asked:
        names = memo.names(token_ids, root, 2)  # type: ignore[arg-type]
        expected = block_hashes(token_ids, root, 2)  # type: ignore[arg-type]
        assert names.full == expected
        assert names.joined == b"".join(expected)
        assert names.short == [short(name) for name in expected]
        assert names.last == (expected[-1] if expected else b"")
        check(memo, thousands * 1000)


def test_what_was_asked_for_is_not_hashed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []

    def counted(tokens: array[int], *args: object) -> object:
        hashed.append(len(tokens) // 2)
        return block_hashes(tokens, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(hash_memo, "block_hashes", counted)
    memo = HashMemo()
    for length in (100, 100, 60, 31, 120, 120):
        memo.names(base[:length], ROOT, 2)
    assert hashed == [50, 10]  # the first time all of it, and then what was new
    hashed.clear()
    memo.names([*base[:40], 9, 9, 9], ROOT, 2)
    memo.names([*base[:40], 9, 9, 9, 9], ROOT, 2)
    memo.names(base, ROOT, 2)
    memo.names([*base[:80], 9, 9], ROOT, 2)
    assert hashed == [1, 1, 1]


def test_the_least_recently_used_are_forgotten_and_what_is_left_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    memo = HashMemo(max_bytes=40_000)
    memo.names(base, ROOT, 2)
    for n in range(1, 60):  # each parts from the first one elsewhere, which is asked for in between
        memo.names([*base[: 2 * n], 9, 9], ROOT, 2)
        memo.names(base, ROOT, 2)
    hashed: list[int] = []
    monkeypatch.setattr(hash_memo, "block_hashes", lambda t, *a: hashed.append(len(t)) or block_hashes(t, *a))
    memo.names(base, ROOT, 2)
    assert hashed == []
    for n in range(100):
        memo.names([n, n, n, n], OTHER, 2)
    for node in nodes(memo):
        assert len(node.children) != 1  # or a path would grow with all that ever parted from it


@pytest.mark.parametrize("tokens", [17, 1024])
def test_the_bound_is_what_the_memory_takes(tokens: int) -> None:
    rng = random.Random(1)
    bound = 2 << 20
    gc.collect()
    tracemalloc.start()
    try:
        memo = HashMemo(max_bytes=bound)
        shared = rng.choices(range(100_000), k=512)
        for _ in range(1500 if tokens > 17 else 4000):
            begin, end = rng.randrange(512), rng.choices(range(100_000), k=rng.randrange(16, tokens))
            memo.names([*shared[: begin if tokens > 17 else 0], *end], ROOT, 16)
        gc.collect()
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert bound * 0.7 < taken < bound * 1.02


def test_answers_are_the_callers_own_lists() -> None:
    memo = HashMemo()
    for _ in range(2):
        memo.names(base, ROOT, 2).short.clear()
    assert memo.names(base, ROOT, 2).short == [short(name) for name in block_hashes(base, ROOT, 2)]


def test_tokens_may_come_packed() -> None:
    memo = HashMemo()
    assert memo.names(array("I", base), ROOT, 2) == memo.names(base, ROOT, 2)


def test_two_tenants_never_share_a_name() -> None:
    memo = HashMemo()
    assert not set(memo.names(base, ROOT, 2).full) & set(memo.names(base, OTHER, 2).full)
