"""Runs of blocks, and what a clear selects."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from kvstore.chains import consecutive_runs, select, tree_runs
from tests.kvstore.blocks_for_tests import OTHER_ROOT, ROOT, chain, names


def test_a_sequence_is_cut_where_a_block_does_not_follow() -> None:
    metas = chain(5)
    runs = list(consecutive_runs(meta.link for meta in metas[:2] + metas[3:]))
    assert runs == [(None, names(metas[:2])), (metas[2].hash, names(metas[3:]))]


@given(st.dictionaries(st.integers(0, 30), st.integers(0, 30), max_size=25))
def test_runs_of_a_forest_hold_every_block_once_and_parents_come_first(drawn: dict[int, int]) -> None:
    # Only edges to smaller numbers, so that there is no cycle: a hash chain has none.
    parents = {bytes([name]): bytes([parent]) if parent < name else None for name, parent in drawn.items()}
    seen: list[bytes] = []
    for parent, run in tree_runs(parents):
        assert parents[run[0]] == parent
        assert all(parents[after] == before for before, after in itertools.pairwise(run))
        assert parent is None or parent not in parents or parent in seen
        seen += run
    assert sorted(seen) == sorted(parents)


def test_a_root_selects_its_blocks_and_a_prefix_its_followers() -> None:
    mine, other = chain(4), chain(2, root=OTHER_ROOT)
    assert select(mine + other, OTHER_ROOT, None) == names(other)
    assert set(select(mine + other, None, mine[1].hash)) == set(names(mine[1:]))
    assert select(mine + other, OTHER_ROOT, mine[1].hash) == []
    assert set(select(mine + other, ROOT, mine[3].hash)) == {mine[3].hash}


def test_followers_of_a_block_that_is_not_held_itself_are_selected() -> None:
    metas = chain(4)
    assert set(select(metas[2:], None, metas[1].hash)) == set(names(metas[2:]))


def test_what_follows_a_block_is_found_in_time_though_several_tiers_hold_it():
    metas = chain(200)
    assert select(metas * 3, None, metas[50].hash) == [meta.hash for meta in metas[50:]]
