"""Traces: every shipped file reads, and segments mean what its blocks mean."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.traces import Request, load, segments, shipped


def request(*runs: tuple[int, int], time_s: float = 0.0) -> Request:
    return Request(time_s, 100, 1, runs, None, None, None, None, None)


def runs_of(ids: list[int]) -> tuple[tuple[int, int], ...]:
    runs: list[tuple[int, int]] = []
    for block in ids:
        if runs and sum(runs[-1]) == block:
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((block, 1))
    return tuple(runs)


def prompts_to_ids(prompts: list[list[int]]) -> list[list[int]]:
    """Number each distinct prefix in order of first use, as the files do."""
    numbers: dict[tuple[int, ...], int] = {}
    return [
        [numbers.setdefault(tuple(prompt[: end + 1]), len(numbers)) for end in range(len(prompt))] for prompt in prompts
    ]


PROMPTS = st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=20)


@given(prompts=PROMPTS, longest=st.sampled_from([None, 1, 3]))
def test_segments_expand_to_the_blocks_they_stand_for(prompts: list[list[int]], longest: int | None) -> None:
    ids = prompts_to_ids(prompts)
    found = segments([request(*runs_of(prompt)) for prompt in ids], longest=longest)
    owner: dict[int, int] = {}  # block to segment
    for prompt, chain in zip(ids, found.chains, strict=True):
        assert sum(found.lengths[segment] for segment in chain) == len(prompt)
        blocks = iter(prompt)
        for depth, segment in enumerate(chain):
            assert found.parents[segment] == (chain[depth - 1] if depth else None)
            for _ in range(found.lengths[segment]):
                block = next(blocks)
                assert owner.setdefault(block, segment) == segment
        assert found.ends[chain[-1]] == len(prompt) if chain else True
    assert len(set(owner.values())) == len(found.lengths)
    assert longest is None or max(found.lengths, default=0) <= longest


def test_every_shipped_trace_reads_and_is_what_its_page_says() -> None:
    page = (Path(__file__).parents[2] / "replay/data/README.md").read_text()
    assert "mooncake_conversation" in shipped()
    for name, path in shipped().items():
        trace = load(path)
        assert f"| `{name}` | {len(trace.requests):,} |" in page
        assert trace.block_size is not None
        for one in trace.requests:
            assert sum(count for _, count in one.runs) <= one.input_length / trace.block_size + 1


def test_shipped_traces_stay_small() -> None:
    assert sum(path.stat().st_size for path in shipped().values()) < 600_000


def line(**fields: object) -> str:
    return json.dumps({"timestamp_ms": 5, "input_length": 3, "output_length": 1, "block_size": 16, **fields})


def test_plain_files_are_read_and_sorted_by_time(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(line(timestamp_ms=2000, turn=3, think_ms=1500) + "\n" + line(hash_runs=[[7, 2]]) + "\n")
    trace = load(file)
    assert (trace.name, trace.block_size) == ("mine", 16)
    assert [one.time_s for one in trace.requests] == [0.005, 2.0]
    assert trace.requests[0].runs == ((7, 2),)
    assert (trace.requests[1].turn, trace.requests[1].think_s) == (3, 1.5)


@pytest.mark.parametrize("text", ["not json", "{}", line(hash_runs=[3]), line(input_length="many")])
def test_a_wrong_line_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(line() + "\n" + text + "\n")
    with pytest.raises(ValueError, match=r"mine\.jsonl, line 2"):
        load(file)


def test_one_block_size_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(line() + "\n" + line(block_size=64) + "\n")
    with pytest.raises(ValueError, match="exactly one"):
        load(file)
