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
