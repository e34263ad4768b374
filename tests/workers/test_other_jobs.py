"""What a worker tells each router of the jobs of the others, against a router that applies it as it comes."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kvstore.fading_sum import WORK_MEMORY_S
from tests.workers.serving import INFO, Gate, routers, serving, simulated
from tests.workers.stream_client import StreamClient, job
from warmkv.v1 import worker_pb2
from workers.other_jobs import News, RunningJobs

PREFILL, DECODE, ENDED = (
    worker_pb2.OTHER_JOB_STATE_PREFILL,
    worker_pb2.OTHER_JOB_STATE_DECODE,
    worker_pb2.OTHER_JOB_STATE_ENDED,
)


def of_job(number: int, *, work_ms: float = 5.0, blocks: int = 2) -> worker_pb2.Job:
    return worker_pb2.Job(job_id=number, block_hashes=bytes([number]) * 16 * blocks, cached_blocks=1, work_ms=work_ms)


class Reader:
    """A router that keeps what it was told."""

    def __init__(self) -> None:
        self.jobs: dict[int, tuple[int, bytes, int]] = {}
        self.work_ms = 0.0

    def hear(self, messages: list[worker_pb2.OtherJob]) -> None:
        for told in messages:
            if told.state == ENDED:
                self.jobs.pop(told.number, None)
            elif told.number in self.jobs:
                self.jobs[told.number] = (told.state, *self.jobs[told.number][1:])
            else:
                self.work_ms += told.work_ms
                self.jobs[told.number] = (told.state, told.block_hashes, told.cached_blocks)


steps = st.lists(
    st.tuples(st.sampled_from(["came", "came", "token", "ended", "pop", "resync", "lose"]), st.integers(0, 5)),
    max_size=60,
)


@settings(max_examples=400)
@given(steps)
def test_whatever_happens_between_two_looks_the_router_ends_with_what_runs(script: list[tuple[str, int]]) -> None:
    running, news, reader = RunningJobs(0.0), News(), Reader()
    truth: dict[int, tuple[int, bytes, int]] = {}
    numbers: dict[int, int] = {}
    for what, number in script:
        told = None
        if what == "came" and number not in numbers:
            told = running.came(1, of_job(number), 0.0)
            numbers[number] = told.number
            truth[told.number] = (PREFILL, bytes([number]) * 32, 1)
        elif what == "token":
            told = running.has_token(1, number)
            if number in numbers:
                truth[numbers[number]] = (DECODE, bytes([number]) * 32, 1)
        elif what == "ended":
            told = running.ended(1, number)
            truth.pop(numbers.pop(number, 0), None)
        elif what == "pop":
            reader.hear(news.pop(40))
        elif what == "resync":  # asked for though nothing was lost
            news.again(running.of_others(2))
        elif what == "lose":  # a gap: what is on its way is lost, and the router forgets all
            news.pop(1 << 20)
            reader.jobs.clear()
            news.again(running.of_others(2))
        if told is not None:
            news.add(told)
    while news:
        reader.hear(news.pop(1 << 20))
    assert reader.jobs == truth
    assert list(running.of_others(1)) == []


def test_a_router_that_does_not_read_costs_one_message_for_each_job_that_runs() -> None:
    running, news = RunningJobs(0.0), News()
    for number in range(1000):
        news.add(running.came(1, of_job(number % 200), 0.0))
        if (token := running.has_token(1, number % 200)) is not None:
            news.add(token)
        if (end := running.ended(1, number % 200)) is not None:
            news.add(end)
    assert not news
    news.add(running.came(1, of_job(1), 0.0))
    assert len(news.pop(1 << 20)) == 1


def test_work_is_told_once_and_what_ran_before_is_in_the_hello() -> None:
    running, late = RunningJobs(0.0), News()
    running.came(1, of_job(1, work_ms=100.0), 10.0)
    now = 10.0 + WORK_MEMORY_S
    assert running.recent_work_ms(now) == pytest.approx(100.0 / math.e)
    late.again(running.of_others(2))
    token = running.has_token(1, 1)
    assert token is not None
    late.add(token)
    (told,) = late.pop(1 << 20)
    assert (told.state, told.work_ms, told.work_is_known, len(told.block_hashes)) == (DECODE, 100.0, True, 32)


def test_work_that_waits_to_be_told_is_no_less_news_after_a_resync() -> None:
    running, news = RunningJobs(0.0), News()
    news.add(running.came(1, of_job(1), 0.0))
    news.pop(1 << 20)
    news.add(running.came(1, of_job(2), 0.0))
    for _ in range(2):
        news.again(running.of_others(2))
        assert [job.work_is_known for job in news._waiting.values()] == [True, False]


def test_work_that_the_hello_tells_is_no_news_after_a_resync() -> None:
    running, late = RunningJobs(0.0), News()
    running.came(1, of_job(1), 0.0)
    for _ in range(2):
        late.again(running.of_others(2))
    (told,) = late.pop(1 << 20)
    assert told.work_is_known


def others(router: StreamClient) -> list[worker_pb2.OtherJob]:
    return [other for message in list(router.messages) for other in message.step.others]


def test_routers_hear_of_one_anothers_jobs_and_not_of_their_own() -> None:
    gate = Gate()
    with serving(simulated(sleep=gate)) as (_, address), routers(address, 2) as (one, other):
        sent = job(INFO.scheme, 1, list(range(40)))
        sent.work_ms, sent.cached_blocks = 12.0, 1
        one.send(submit=sent)
        other.wait_for(lambda: others(other))
        (told,) = others(other)
        assert (told.state, told.work_ms, told.cached_blocks) == (PREFILL, 12.0, 1)
        assert told.block_hashes == sent.block_hashes
        gate.open()
        one.wait_finished(1)
        other.wait_for(lambda: others(other)[-1].state == ENDED)
        assert {each.number for each in others(other)} == {told.number}
        assert others(one) == []


def test_a_router_that_comes_later_hears_of_what_runs_and_of_the_work_that_was() -> None:
    gate = Gate()
    with serving(simulated(sleep=gate)) as (_, address), routers(address) as (one,):
        for number in (1, 2):
            sent = job(INFO.scheme, number, [number] * 40)
            sent.work_ms = 50.0
            one.send(submit=sent)
        one.wait_handled()
        late = StreamClient(address, name="late")
        late.wait_for(lambda: len(others(late)) == 2)
        hello = late.messages[0].hello
        assert 50.0 < hello.recent_work_ms <= 100.0  # it fades
        assert [(told.work_ms, told.work_is_known) for told in others(late)] == [(50.0, True)] * 2
        one.drop()  # takes its jobs with it
        late.wait_for(lambda: [told.state for told in others(late)].count(ENDED) == 2)
        gate.open()
        late.drop()
