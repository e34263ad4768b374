"""Workloads: chains are sequences of block names, and parts of a trace are what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.traces import Trace
from replay.workload import part, workload
from tests.replay.made import made, made_work

PROMPTS = st.lists(st.lists(st.integers(0, 2), max_size=9), min_size=1, max_size=15)


@given(prompts=PROMPTS)
def test_equal_names_mean_equal_prefixes(prompts: list[list[int]]) -> None:
    chains = [list(chain) for chain in made_work([(0.0, prompt) for prompt in prompts]).chains]
    for chain, prompt in zip(chains, prompts, strict=True):
        assert len(chain) == len(prompt)
        for other, blocks in zip(chains, prompts, strict=True):
            same = next((n for n, pair in enumerate(zip(prompt, blocks, strict=False)) if pair[0] != pair[1]), None)
            common = min(len(prompt), len(blocks)) if same is None else same
            assert chain[:common] == other[:common]
            assert not set(chain[common:]) & set(other[common:])


def test_a_chain_is_indexed_as_a_list_is() -> None:
    chain = made_work([(0.0, [1, 2, 3]), (0.0, [1, 2, 4, 5])]).chains[1]
    names = list(chain)
    assert len(chain.segments) == 2
    assert chain[-1] == names[3]
    assert chain[1:3] == names[1:3]
    with pytest.raises(IndexError):
        chain[4]


def test_a_coarse_clock_is_undone_in_order() -> None:
    trace = made([(0.0, [1]), (0.0, [2]), (3.0, [3])])
    spread = part(trace, jitter_s=3.0)
    times = [request.time_s for request in spread.requests]
    assert times == sorted(times)
    assert 0 <= times[0] < times[1] < 3.0 <= times[2]
    assert [request.runs for request in spread.requests] == [request.runs for request in trace.requests]
    assert part(trace, jitter_s=3.0) == spread != part(trace, jitter_s=3.0, seed=4)


def test_a_part_keeps_whole_sessions_with_their_sub_agents() -> None:
    one = made([(0.0, [1])] * 200).requests
    requests = [replace(r, session=f"s{n // 2}", parent=f"p{n // 4}") for n, r in enumerate(one)]
    kept = part(Trace("t", 10, tuple(requests)), share=0.5).requests
    assert 40 < len(kept) < 160
    assert all([r.parent for r in kept].count(request.parent) == 4 for request in kept)


def test_long_prompts_are_left_out() -> None:
    assert [r.input_length for r in part(made([(0.0, [1]), (1.0, [1, 2])]), longest=10).requests] == [10]


def test_a_faster_trace_and_a_closed_loop() -> None:
    work = workload(made([(0.0, [1]), (4.0, [1, 2])], session="a"), speed=2.0, closed_loop=True)
    assert work.arrivals_s == [0.0, 2.0]
    assert work.waits_for == {1: 0}


def test_what_cannot_be_replayed_is_refused() -> None:
    with pytest.raises(ValueError, match="another trace"):
        workload(Trace("t", None, made([(0.0, [1])]).requests))
    with pytest.raises(ValueError, match="positive"):
        workload(made([(0.0, [1])]), speed=0.0)
