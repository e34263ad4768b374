"""Recording: the file means what was told, and nothing in it can be linked to content."""

from __future__ import annotations

import gzip
import hashlib
import json
import stat
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.recorder import BlockSizeChanged, Numbering, Recorder, TraceFile, shares
from replay.simulated_router import RouterSettings
from replay.simulation import Setup, simulate
from replay.traces import Trace, load
from replay.workload import workload
from warmkv.v1 import admin_pb2, common_pb2

BLOCK = 16
BEGAN = 1_700_000_000_000_000


def chain(prompt: Sequence[int]) -> list[bytes]:
    """Names as a router has them: each stands for all before it."""
    return [hashlib.sha256(repr(list(prompt[: end + 1])).encode()).digest()[:8] for end in range(len(prompt))]


def told(prompt: Sequence[int], at_s: float = 0.0, **fields: object) -> admin_pb2.RequestRecord:
    known = {"prompt_tokens": BLOCK * len(prompt) + 3, "generated_tokens": 2, "code": "OK", "worker": "w0"}
    record = admin_pb2.RequestRecord(**{**known, **fields})  # type: ignore[arg-type]
    record.block_names = b"".join(chain(prompt))
    record.arrived_us = BEGAN + round(at_s * 1e6)
    return record


def message(*records: admin_pb2.RequestRecord, **fields: object) -> admin_pb2.WatchRequestsResponse:
    said = {"block_size": BLOCK, "time_us": BEGAN + 9_000_000, **fields}
    return admin_pb2.WatchRequestsResponse(requests=records, **said)  # type: ignore[arg-type]


def recorded(path: Path, *messages: admin_pb2.WatchRequestsResponse) -> tuple[Trace, Recorder]:
    with TraceFile(path) as file:
        recorder = Recorder(file, BEGAN)
        for one in messages:
            recorder.take("r0", one)
    return load(path), recorder


def ids(trace: Trace) -> list[list[int]]:
    return [[n for first, count in one.runs for n in range(first, first + count)] for one in trace.requests]


def common(one: Sequence[object], other: Sequence[object]) -> int:
    """How much two of them begin alike."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@given(prompts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=12))
def test_prompts_begin_alike_in_the_file_as_far_as_they_did(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[list[int]]
) -> None:
    path = tmp_path_factory.mktemp("traces") / "t.jsonl.gz"
    trace, recorder = recorded(path, *(message(told(prompt, n)) for n, prompt in enumerate(prompts)))
    numbers = ids(trace)
    assert [len(one) for one in numbers] == [len(prompt) for prompt in prompts]
    for one, a in zip(numbers, prompts, strict=True):
        for other, b in zip(numbers, prompts, strict=True):
            assert common(one, other) == common(a, b)
    assert recorder.done.blocks == len({tuple(p[: n + 1]) for p in prompts for n in range(len(p))})
    assert sorted({n for one in numbers for n in one}) == list(range(recorder.done.blocks))
    seen: set[bytes] = set()
    shared = 0
    for prompt in prompts:
        shared += sum(name in seen for name in chain(prompt)) * BLOCK
        seen |= set(chain(prompt))
    assert recorder.done.shared_tokens == shared


def test_a_line_has_what_became_of_the_request(tmp_path: Path) -> None:
    fates = common_pb2.TokensByFate(computed=3, device=16, redis=16)
    one = told(
        [1, 2], 2.5, session=b"s" * 8, turn=4, tenant=b"t" * 8, priority=-2, ttl_seconds=60, fates=fates,
        ttft_ms=12.3456, duration_ms=99.0, finish_reason=common_pb2.FINISH_REASON_STOP,
    )  # fmt: skip
    trace, recorder = recorded(tmp_path / "t.jsonl", message(one))
    line = json.loads((tmp_path / "t.jsonl").read_text())
    assert line == {
        "timestamp_ms": 2500.0, "input_length": 35, "output_length": 2, "block_size": BLOCK, "hash_runs": [[0, 2]],
        "tenant": 0, "started_unix_ms": BEGAN // 1000, "session_id": "s0", "turn": 4, "priority": -2, "ttl_s": 60,
        "duration_ms": 99.0, "worker": "w0", "ttft_ms": 12.346, "fates": {"computed": 3, "device": 16, "redis": 16},
        "finish": "stop",
    }  # fmt: skip
    happened = trace.requests[0].happened
    assert happened is not None
    assert (happened.cached, happened.computed, happened.worker) == (32, 3, "w0")
    assert happened.ttft_s == pytest.approx(0.012346)
    assert trace.started_s == BEGAN / 1e6
    assert shares(recorder.done) == (32 / 35, 0.0)


def test_names_tenants_and_sessions_do_not_appear(tmp_path: Path) -> None:
    records = [told([n], n, session=bytes([200 + n]) * 8, tenant=bytes([220 + n]) * 8) for n in range(3)]
    trace, _ = recorded(tmp_path / "t.jsonl", message(*records))
    raw = (tmp_path / "t.jsonl").read_bytes()
    for record in records:
        for secret in (record.session, record.tenant, record.block_names):
            assert secret not in raw
            assert secret.hex().encode() not in raw
    assert [one.tenant for one in trace.requests] == [0, 1, 2]
    assert [one.session for one in trace.requests] == ["s0", "s1", "s2"]


def test_think_time_is_from_the_answer_before_and_unknown_for_parallel_requests(tmp_path: Path) -> None:
    of_one = b"s" * 8
    records = [told([1], at, session=of_one, duration_ms=2000.0) for at in (0.0, 5.0, 6.0)]
    trace, _ = recorded(tmp_path / "t.jsonl", message(*records))
    assert [one.think_s for one in trace.requests] == [None, 3.0, None]
    assert [one.turn for one in trace.requests] == [1, 2, 3]


def test_sessions_that_are_silent_for_long_are_forgotten(tmp_path: Path) -> None:
    with TraceFile(tmp_path / "t.jsonl") as file:
        recorder = Recorder(file, began_us=0, most_sessions=2)
        for at, name in enumerate((b"a", b"b", b"a", b"c", b"a", b"b")):
            recorder.take("r0", message(told(range(64), at_s=10.0 * at, session=name, duration_ms=1.0)))
    found = load(tmp_path / "t.jsonl").requests
    assert [(request.session, request.turn) for request in found] == [
        *(("s0", 1), ("s1", 1), ("s0", 2), ("s2", 1), ("s0", 3), ("s1", 1)),  # b was silent when c came
    ]
    assert [request.think_s is not None for request in found] == [False, False, True, False, True, False]


def test_missed_requests_are_added_up_over_routers_and_messages(tmp_path: Path) -> None:
    with TraceFile(tmp_path / "t.jsonl") as file:
        recorder = Recorder(file, BEGAN)
        for router, missed in (("a", 2), ("b", 5), ("a", 3)):
            recorder.take(router, message(missed=missed))
    assert recorder.done.missed == 8


def test_it_takes_no_more_than_it_is_to(tmp_path: Path) -> None:
    with TraceFile(tmp_path / "t.jsonl") as file:
        recorder = Recorder(file, BEGAN)
        assert not recorder.take("r0", message(told([1])), most=3)
        assert recorder.take("r0", message(told([1]), told([2]), told([3])), most=3)
        assert recorder.take("r0", message(told([4])), most=3)
    assert len(load(tmp_path / "t.jsonl").requests) == 3


def test_another_block_size_ends_the_recording(tmp_path: Path) -> None:
    with TraceFile(tmp_path / "t.jsonl") as file:
        recorder = Recorder(file, BEGAN)
        recorder.take("r0", message(block_size=0))
        recorder.take("r0", message(told([1])))
        with pytest.raises(BlockSizeChanged, match="another file"):
            recorder.take("r0", message(told([1]), block_size=64))


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_a_file_whose_writer_was_killed_reads_up_to_its_last_whole_line(tmp_path: Path, name: str) -> None:
    file = TraceFile(tmp_path / name)
    recorder = Recorder(file, BEGAN)
    recorder.take("r0", message(*(told([n], n) for n in range(50))))
    left = (tmp_path / name).read_bytes()  # what a kill -9 would leave now: nothing was closed
    file.close()
    for cut in (0, 7):
        torn = tmp_path / f"torn{cut}-{name}"
        torn.write_bytes(left[: len(left) - cut])
        trace = load(torn)
        assert len(trace.requests) in ((50,) if not cut else (48, 49, 50))
        assert trace.cut_off == (cut > 0 or name.endswith(".gz"))


def test_a_file_is_never_overwritten_and_one_with_text_is_its_owners_alone(tmp_path: Path) -> None:
    TraceFile(tmp_path / "a.jsonl", private=True).close()
    assert stat.S_IMODE((tmp_path / "a.jsonl").stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        TraceFile(tmp_path / "a.jsonl")


def test_text_is_written_when_it_was_told(tmp_path: Path) -> None:
    recorded(tmp_path / "t.jsonl.gz", message(told([1], text="die Größe")))
    assert json.loads(gzip.decompress((tmp_path / "t.jsonl.gz").read_bytes()))["text"] == "die Größe"


def test_a_recording_can_be_replayed(tmp_path: Path) -> None:
    records = [told([1, 2, 3, n], n * 0.5) for n in range(30)]
    trace, _ = recorded(tmp_path / "t.jsonl.gz", message(*records))
    outcome = simulate(workload(trace), Setup(2, RouterSettings("cache_aware")))
    assert outcome.figures(warm_up=0.2).hit == pytest.approx(48 / 67)


@given(st.lists(st.integers(0, 30), max_size=200), st.integers(2, 20))
def test_numbers_are_dense_stable_while_known_and_memory_is_bounded(names: list[int], most: int) -> None:
    numbering = Numbering(most)
    latest: dict[int, int] = {}
    for place, name in enumerate(names):
        key = name.to_bytes(8, "big")
        known = key in numbering
        number = numbering.number(key)
        recent = set(names[max(0, place - most // 2) : place])
        assert known or name not in recent, "what was met within the last half is known"
        if known:
            assert number == latest[name]
        latest[name] = number
        assert len(numbering._young) + len(numbering._old) <= most
    assert set(latest.values()) <= set(range(numbering.given))
