from __future__ import annotations

import asyncio

import pytest

from router.flight import Flight, FlightEnd, FlightGap, FlightLost
from warmkv.v1 import common_pb2, worker_pb2


class Log:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ends: list[FlightEnd] = []
        self.flight = Flight("w", worker_pb2.Job(), on_tokens=self.tokens.append, on_end=self.ends.append)


def output(*ids: int, text: str = "", total: int = 0, finish: int = 0) -> worker_pb2.SequenceOutput:
    return worker_pb2.SequenceOutput(token_ids=ids, text=text, completion_tokens=total, finish_reason=finish)  # type: ignore[arg-type]


@pytest.mark.asyncio
async def test_what_waits_for_a_slow_caller_is_merged_in_order() -> None:
    log = Log()
    log.flight.deliver(output(1, text="a", total=1))
    log.flight.deliver(output(2, text="b", total=2))
    log.flight.deliver(output(3, text="c", total=3, finish=common_pb2.FINISH_REASON_STOP))
    merged = await log.flight.next()
    assert (list(merged.token_ids), merged.text, merged.completion_tokens) == ([1, 2, 3], "abc", 3)
    assert merged.finish_reason == common_pb2.FINISH_REASON_STOP
    assert log.tokens == [1, 1, 1]
    assert [end.generated for end in log.ends] == [3]


@pytest.mark.asyncio
async def test_a_lost_flight_hands_out_what_came_before() -> None:
    log = Log()
    log.flight.deliver(output(1, total=1))
    log.flight.lose("gone")
    assert list((await log.flight.next()).token_ids) == [1]
    with pytest.raises(FlightLost, match="gone"):
        await log.flight.next()
    log.flight.lose("again")
    assert [end.lost for end in log.ends] == ["gone"]


@pytest.mark.asyncio
async def test_a_waiting_caller_is_woken() -> None:
    log = Log()
    waiting = asyncio.ensure_future(log.flight.next())
    await asyncio.sleep(0)
    log.flight.deliver(output(5, total=1))
    assert list((await waiting).token_ids) == [5]


@pytest.mark.asyncio
async def test_missing_tokens_are_noticed_and_never_skipped() -> None:
    log = Log()
    log.flight.deliver(output(1, total=1))
    log.flight.deliver(output(3, total=3))
    assert list((await log.flight.next()).token_ids) == [1]
    with pytest.raises(FlightGap, match="1 tokens"):
        await log.flight.next()


@pytest.mark.asyncio
async def test_tokens_are_handed_out_before_the_error_that_came_with_them() -> None:
    log = Log()
    log.flight.deliver(output(1, text="a", total=1))
    failed = output(2, text="b", total=2, finish=common_pb2.FINISH_REASON_ERROR)
    failed.error.reason = "WORKER_DRAINING"
    log.flight.deliver(failed)
    first, last = await log.flight.next(), await log.flight.next()
    assert (list(first.token_ids), first.text, first.finish_reason, first.HasField("error")) == ([1, 2], "ab", 0, False)
    assert (list(last.token_ids), last.text, last.error.reason) == ([], "", "WORKER_DRAINING")
    assert last.finish_reason == common_pb2.FINISH_REASON_ERROR
    assert log.tokens == [1, 1]


@pytest.mark.asyncio
async def test_fates_that_were_told_outlive_a_loss() -> None:
    log = Log()
    first = output(1, total=1)
    first.fates.computed, first.resumed_fates.redis = 5, 3
    log.flight.deliver(first)
    log.flight.lose("gone")
    (end,) = log.ends
    assert end.fates == common_pb2.TokensByFate(computed=5)
    assert end.resumed_fates == common_pb2.TokensByFate(redis=3)


@pytest.mark.asyncio
async def test_a_resumed_job_counts_from_where_it_was_left() -> None:
    log = Log()
    log.flight = Flight("w", worker_pb2.Job(resumed_tokens=5), on_tokens=log.tokens.append, on_end=log.ends.append)
    log.flight.deliver(output(6, total=6))
    log.flight.deliver(output(8, total=8))
    assert list((await log.flight.next()).token_ids) == [6]
    with pytest.raises(FlightGap, match="1 tokens"):
        await log.flight.next()
    assert [end.generated for end in log.ends] == [6]
