"""Asking many nodes at once: nobody with a deadline queues beyond it, whatever else is under way."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from kvstore.errors import MissReason
from kvstore.redis.link import NEVER, UnavailableError
from kvstore.redis.slots import SLOTS, Primary, SlotMap
from kvstore.redis.topology import OTHER_THREADS, QUESTION_THREADS, Topology

NODES = 3
ONE_OF_EACH = [0, 1, 2]


class Node:
    """Knows nothing; what is asked of it is the test's."""

    def close(self) -> None:
        """Nothing to close."""


@pytest.fixture
def topology() -> Iterator[Topology]:
    made = Topology(["redis://127.0.0.1:1"], lambda url, primary: Node(), clock=time.monotonic)  # type: ignore[arg-type,return-value]
    primaries = tuple(Primary("127.0.0.1", 7000 + i, str(i)) for i in range(NODES))
    made._adopt(SlotMap(primaries, [i % NODES for i in range(SLOTS)], 0))
    yield made
    made.close()


class Stall:
    """Callers whose work does not end until `go`."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.busy = threading.Semaphore(0)
        self.threads: list[threading.Thread] = []

    def work(self, node: object, part: list[int]) -> None:
        self.busy.release()
        self.go.wait()

    def end(self) -> None:
        self.go.set()
        for thread in self.threads:
            thread.join()


@pytest.fixture
def stall() -> Iterator[Stall]:
    made = Stall()
    yield made
    made.end()


def test_a_question_does_not_queue_behind_writes(topology: Topology, stall: Stall) -> None:
    for _ in range(OTHER_THREADS):
        stall.threads.append(threading.Thread(target=topology.tell, args=(ONE_OF_EACH, stall.work)))
        stall.threads[-1].start()
    for _ in range(2 * OTHER_THREADS):
        stall.busy.acquire()
    asked = topology.ask(ONE_OF_EACH, lambda node, part: "here", NEVER)
    assert [answer for _, answer in asked] == ["here"] * NODES


def test_a_question_that_could_not_be_asked_in_time_is_a_miss(topology: Topology, stall: Stall) -> None:
    """All threads are taken by questions of others; the caller's own thread asks one node all the same."""
    for _ in range(QUESTION_THREADS // 2):
        stall.threads.append(threading.Thread(target=topology.ask, args=(ONE_OF_EACH, stall.work, NEVER)))
        stall.threads[-1].start()
    for _ in range(QUESTION_THREADS // 2 * NODES):
        stall.busy.acquire()
    answers = [answer for _, answer in topology.ask(ONE_OF_EACH, lambda node, part: "here", time.monotonic() + 0.02)]
    faults = [answer for answer in answers if isinstance(answer, UnavailableError)]
    assert [fault.reason for fault in faults] == [MissReason.DEADLINE] * (NODES - 1)
    assert "grant more time" in str(faults[0])
    assert answers[-1] == "here"


def test_what_has_begun_is_waited_for(topology: Topology) -> None:
    """It may fill the caller's buffers, which belong to somebody else once we have returned."""
    ended: list[int] = []

    def work(node: object, part: list[int]) -> str:
        time.sleep(0.05)
        ended.append(part[0])
        return "here"

    answers = topology.ask(ONE_OF_EACH, work, time.monotonic() + 0.01)
    begun = [part[0] for part, answer in answers if answer == "here"]
    assert sorted(begun) == sorted(ended)
    time.sleep(0.1)
    assert sorted(begun) == sorted(ended)
