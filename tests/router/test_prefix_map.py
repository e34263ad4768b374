from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
from hypothesis import given

from router.prefix_map import PrefixMap


def chain(path: str) -> list[bytes]:
    return [path[: n + 1].encode() for n in range(len(path))]


def test_the_shared_beginning_of_prompts_is_found_with_its_count() -> None:
    prefixes = PrefixMap()
    for path in ("abcdX", "abcdY", "abcdZ", "q"):
        prefixes.count(chain(path), "t", path)
    best = prefixes.most_used(5)
    assert [(p.hashes, p.requests) for p in best] == [(chain("abcd"), 3)]
    assert best[0].tenant == "t"


def test_of_a_growing_chat_each_turn_is_a_longer_prefix() -> None:
    prefixes = PrefixMap()
    for path in ("ab", "abcd", "abcdef"):
        prefixes.count(chain(path), "t", "")
    assert {(len(p.hashes), p.requests) for p in prefixes.most_used(5)} == {(2, 3), (4, 2)}


def test_prompts_asked_once_are_shown_only_when_there_is_nothing_else() -> None:
    prefixes = PrefixMap()
    prefixes.count(chain("abc"), "t", "words")
    assert [(p.requests, p.words) for p in prefixes.most_used(5)] == [(1, "words")]


def test_long_prompts_count_up_to_their_bound() -> None:
    prefixes = PrefixMap(max_blocks=3)
    prefixes.count(chain("abcdef"), "t", "")
    assert prefixes.most_used(1)[0].hashes == chain("abc")


def test_a_beginning_outlives_what_follows_it() -> None:
    prefixes = PrefixMap(max_nodes=2)
    prefixes.count(chain("abX"), "t", "")
    prefixes.count(chain("abY"), "t", "")
    assert [(p.hashes, p.requests) for p in prefixes.most_used(5)] == [(chain("ab"), 2)]
    prefixes.count(chain("q"), "t", "")
    assert [(p.hashes, p.requests) for p in prefixes.most_used(5)] == [(chain("ab"), 2)]


@given(st.lists(st.text("ab", min_size=1, max_size=6), max_size=40))
def test_counts_match_a_naive_count(paths: list[str]) -> None:
    prefixes = PrefixMap()
    naive: Counter[bytes] = Counter()
    for path in paths:
        prefixes.count(chain(path), "t", "")
        naive.update(chain(path))
    for used in prefixes.most_used(100):
        assert used.requests == naive[used.hashes[-1]]
        assert used.hashes == chain(used.hashes[-1].decode())


@given(st.lists(st.text("abc", min_size=1, max_size=6), max_size=60), st.integers(1, 5))
def test_memory_is_bounded_and_the_last_prompt_is_kept(paths: list[str], bound: int) -> None:
    prefixes = PrefixMap(max_nodes=bound)
    for path in paths:
        prefixes.count(chain(path), "t", "")
        assert len(prefixes) <= bound
        for used in prefixes.most_used(100):
            assert used.hashes == chain(used.hashes[-1].decode())
