"""Lines of traces: both formats, and what is said about wrong ones."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.merging import merge
from replay.trace_lines import parse_line, runs_of
from replay.traces import Trace, load, shipped
from tests.replay.made import made

OURS = {"timestamp_ms": 5, "input_length": 40, "output_length": 1, "block_size": 16, "hash_runs": [[0, 2]]}
MOONCAKE = {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 48, 49, 50, 0, 1]}


def test_mooncakes_own_format_reads_as_ours() -> None:
    line = parse_line(json.dumps({**MOONCAKE, "hash_ids": [3, 4, 5, 9, 10, 2]}))
    assert (line.time_s, line.input_length, line.output_length) == (27.482, 6955, 52)
    assert (line.block_size, line.runs) == (512, ((3, 3), (9, 2), (2, 1)))


def test_a_shipped_trace_written_as_mooncake_does_is_the_same_trace(tmp_path: Path) -> None:
    trace = load(shipped()["mooncake_synthetic"])
    with gzip.open(tmp_path / "theirs.jsonl.gz", "wt") as file:
        for one in trace.requests:
            ids = [n for first, count in one.runs for n in range(first, first + count)]
            fields = {"timestamp": one.time_s * 1e3, "input_length": one.input_length, "hash_ids": ids}
            file.write(json.dumps({**fields, "output_length": one.output_length}) + "\n")
    theirs = load(tmp_path / "theirs.jsonl.gz")
    assert theirs.block_size == trace.block_size
    assert [runs_of(_ids(one.runs)) for one in trace.requests] == [one.runs for one in theirs.requests]
    assert [one.time_s for one in theirs.requests] == pytest.approx([one.time_s for one in trace.requests])


def _ids(runs: tuple[tuple[int, int], ...]) -> list[int]:
    return [n for first, count in runs for n in range(first, first + count)]


@given(st.lists(st.integers(0, 40)))
def test_runs_stand_for_their_ids(ids: list[int]) -> None:
    runs = runs_of(ids)
    assert _ids(runs) == ids
    assert all(a[0] + a[1] != b[0] for a, b in itertools.pairwise(runs))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "no JSON"),
        ("[1]", "not a JSON object"),
        ("[" * 200_000, "no JSON"),
        (json.dumps({**OURS, "timestamp_ms": 1e300}), "a thousand years at most"),
        ("{}", "neither timestamp_ms"),
        (json.dumps({**OURS, "timestamp_ms": -1}), "timestamp_ms is -1; it should be a number from 0"),
        (json.dumps({**OURS, "timestamp_ms": "now"}), "timestamp_ms is 'now'"),
        ('{"timestamp_ms": NaN, "input_length": 1, "output_length": 1}', "timestamp_ms is nan"),
        (json.dumps({**OURS, "input_length": 0}), "whole number from 1"),
        (json.dumps({**OURS, "input_length": 2.5}), "input_length is 2.5"),
        (json.dumps({**OURS, "output_length": None}), "output_length is None"),
        (json.dumps({**OURS, "output_length": True}), "output_length is True"),
        (json.dumps({**OURS, "output_length": 1e300}), "output_length"),
        (json.dumps({**OURS, "hash_runs": [3]}), "hash_runs has 3"),
        (json.dumps({**OURS, "hash_runs": [[3, 0]]}), "count of at least 1"),
        (json.dumps({**OURS, "hash_runs": [[0, 9]]}), "9 blocks of 16 tokens"),
        (json.dumps({**OURS, "block_size": None}), "no block_size"),
        (json.dumps({**OURS, "block_size": 0}), "block_size is 0"),
        (json.dumps({**OURS, "session_id": [1]}), "session_id"),
        (json.dumps({**OURS, "fates": {"attic": 1}}), "fates"),
        (json.dumps({**MOONCAKE, "hash_ids": "x"}), "hash_ids is no list"),
        (json.dumps({**MOONCAKE, "hash_ids": [1.5]}), "hash_ids is no list"),
        (json.dumps({key: value for key, value in MOONCAKE.items() if key != "hash_ids"}), "without prefixes"),
    ],
)
def test_a_wrong_line_says_what_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(OURS) + "\n" + text + "\n")
    with pytest.raises(ValueError, match=r"mine\.jsonl, line 2: no request of a trace") as caught:
        load(file)
    assert said in str(caught.value)


def write(path: Path, *runs: list[list[int]]) -> Path:
    path.write_text("".join(json.dumps({**OURS, "input_length": 1600, "hash_runs": one}) + "\n" for one in runs))
    return path


def test_ids_that_do_not_stand_for_their_prefix_are_found(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 2: block id 5 stands behind 1 and behind 2"):
        load(write(tmp_path / "a.jsonl", [[0, 2], [5, 1]], [[0, 3], [5, 1]]))
    with pytest.raises(ValueError, match=r"block id 1 stands behind 0 and at the start"):
        load(write(tmp_path / "b.jsonl", [[0, 3]], [[1, 2]]))
    assert len(load(write(tmp_path / "c.jsonl", [[0, 3]], [[0, 1], [3, 4]], [[0, 1], [3, 1], [9, 1]])).requests) == 3


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "holds no request"), (b"\xff\xfe\n", "must be named .gz"), (b"hello", "no request")]
)
def test_what_is_no_trace_at_all_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        load(tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl.gz").write_bytes(b"plain text")
    with pytest.raises(ValueError, match="no gzip file"):
        load(tmp_path / "x.jsonl.gz")


def trace_of(at: float, blocks: list[int], started_s: float | None) -> Trace:
    made_one = made([(at, blocks)], session="a")
    return Trace("one", made_one.block_size, made_one.requests, started_s)


def test_traces_merge_by_time_and_keep_their_prefixes_apart() -> None:
    first, second = trace_of(5.0, [1, 2], 1000.0), trace_of(1.0, [1, 2], 1003.0)
    merged = merge([first, second])
    assert [one.time_s for one in merged.requests] == [4.0, 5.0]
    assert len({block for one in merged.requests for block in _ids(one.runs)}) == 4
    assert len({one.session for one in merged.requests}) == 2
    together = merge([first, trace_of(1.0, [1, 2], None)])
    assert [one.time_s for one in together.requests] == [1.0, 5.0]
    assert merge([first]) is first
    with pytest.raises(ValueError, match="block sizes"):
        merge([first, Trace("other", 512, first.requests)])
