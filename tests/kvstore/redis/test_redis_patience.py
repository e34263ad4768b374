"""How long a server may be silent: per answer and while it flows; what of that opens the breaker."""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from types import SimpleNamespace

import pytest
import redis

from bench.fault_proxy import Change, Way, proxy
from deploy.redis_server import PrivateRedis
from deploy.sections import RedisSettings
from kvstore.breaker import Breaker
from kvstore.peer import tier as peer_tier
from kvstore.peer.wire import Channel
from kvstore.redis import tier as redis_tier
from kvstore.redis.resp import FLOW_NBYTES, Wire
from kvstore.redis.sockets import Left
from kvstore.redis.tier import RedisTier
from kvstore.tier import BlockMeta
from tests.kvstore import blocks_for_tests
from tests.kvstore.blocks_for_tests import ManualClock, chain, names
from tests.kvstore.redis import redis_for_tests
from tests.kvstore.redis.redis_fleets_for_tests import until
from tests.kvstore.redis.redis_for_tests import WIDE as LAYOUT
from tests.kvstore.redis.redis_for_tests import binary
from workers.config import WorkerConfig

make_tier = partial(redis_for_tests.make_tier, layout=LAYOUT)
payload = partial(blocks_for_tests.payload, layout=LAYOUT)
payloads = partial(blocks_for_tests.payloads, layout=LAYOUT)
buffers = partial(blocks_for_tests.buffers, layout=LAYOUT)

PATIENCE_S = 0.05
TIMEOUT_S = 0.5  # of servers whose answers are held back until it is up
LONG_S, BEARABLE_S = 5.0, 0.12  # a timeout that a server which is slow by so much keeps on a loaded machine, too


def test_everybody_grants_50_ms_by_default() -> None:
    defaults = {
        redis_tier.DEFAULT_TIMEOUT_S,
        peer_tier.DEFAULT_TIMEOUT_S,
        RedisSettings().timeout,
        next(field.default for field in fields(WorkerConfig) if field.name == "redis_timeout_s"),
    }
    assert defaults == {0.05}


class Line:
    """In place of a socket: each piece can be received from its time on, on a clock that waiting moves."""

    def __init__(self, clock: ManualClock, left: Left, pieces: Sequence[tuple[float, bytes]]) -> None:
        self._clock = clock
        self._left = left
        self._pieces = deque(pieces)

    def send(self, parts: Sequence[bytes | memoryview]) -> None:
        raise AssertionError("nothing is sent here")

    def is_quiet(self) -> bool:
        return not self._pieces

    def receive(self, target: memoryview, *, whole: bool = False) -> int:
        while True:
            left = self._left()
            comes_at = self._pieces[0][0] if self._pieces else float("inf")
            if comes_at - self._clock.now > left:
                self._clock.now += left
                continue
            self._clock.now = max(self._clock.now, comes_at)
            _, piece = self._pieces.popleft()
            if len(piece) > len(target):
                self._pieces.appendleft((comes_at, piece[len(target) :]))
            count = min(len(piece), len(target))
            target[:count] = piece[:count]
            return count


def wire_on(clock: ManualClock, pieces: Sequence[tuple[float, bytes]], ends_in_s: float = float("inf")) -> Wire:
    wire = Wire(clock)
    wire._transport = Line(clock, wire.left, pieces)
    wire.patience_s, wire.ends_at = PATIENCE_S, clock.now + ends_in_s
    wire.renew()
    return wire


def pieces_every(clock: ManualClock, pause_s: float, nbytes: int, count: int) -> list[tuple[float, bytes]]:
    return [(clock.now + i * pause_s, bytes(nbytes)) for i in range(1, count + 1)]


def test_a_large_value_on_a_slow_line_arrives_while_it_flows() -> None:
    clock = ManualClock()
    begun = clock.now
    into = memoryview(bytearray(4 << 20))
    wire_on(clock, pieces_every(clock, 0.04, FLOW_NBYTES, len(into) // FLOW_NBYTES)).read_into(into)
    assert clock.now - begun > 50 * PATIENCE_S


def test_a_trickle_is_cut_off() -> None:
    clock = ManualClock()
    begun = clock.now
    into = memoryview(bytearray(4 << 20))
    with pytest.raises(redis.TimeoutError):
        wire_on(clock, pieces_every(clock, 0.001, 100, 1 << 16)).read_into(into)
    assert clock.now - begun < 1.5 * PATIENCE_S


def test_the_deadline_cuts_off_what_flows() -> None:
    clock = ManualClock()
    begun = clock.now
    into = memoryview(bytearray(4 << 20))
    with pytest.raises(redis.TimeoutError):
        wire_on(clock, pieces_every(clock, 0.01, FLOW_NBYTES, 1000), ends_in_s=0.3).read_into(into)
    assert clock.now - begun == pytest.approx(0.3)


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_an_answer_that_came_while_we_had_no_processor_is_taken(pieces: int) -> None:
    """The server is not to blame for what waits in our own socket."""
    clock = ManualClock()
    answer = b"$10\r\n0123456789\r\n"
    cuts = [(clock.now + 0.02, answer[i * 6 : (i + 1) * 6 if i < pieces - 1 else None]) for i in range(pieces)]
    wire = wire_on(clock, cuts)
    clock.now += 10 * PATIENCE_S
    assert wire.read_reply() == b"0123456789"


def test_a_silent_server_costs_the_patience_and_one_look() -> None:
    clock = ManualClock()
    begun = clock.now
    with pytest.raises(redis.TimeoutError):
        wire_on(clock, []).read_reply()
    assert PATIENCE_S <= clock.now - begun < 1.1 * PATIENCE_S


def test_nobody_looks_again_after_the_deadline() -> None:
    clock = ManualClock()
    wire = wire_on(clock, [(clock.now + 0.02, b":1\r\n")], ends_in_s=0.03)
    clock.now += 0.04
    with pytest.raises(redis.TimeoutError):
        wire.read_reply()


def test_a_peer_may_take_long_for_a_large_block_while_it_flows(monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = socket.socketpair()
    pieces, patience_s, ahead_s = 20, 30.0, 0.0
    monkeypatch.setattr("kvstore.peer.wire.time", SimpleNamespace(monotonic=lambda: time.monotonic() + ahead_s))

    def flow() -> None:
        nonlocal ahead_s
        for _ in range(pieces):
            time.sleep(0.01)
            ahead_s += patience_s / 10
            far.sendall(bytes(FLOW_NBYTES))

    with near, far:
        channel = Channel(near, until=0.0)
        channel.grant(patience_s, float("inf"))
        thread = threading.Thread(target=flow)
        thread.start()
        for _ in range(pieces):
            channel.receive_into(memoryview(bytearray(FLOW_NBYTES)))
        thread.join()
        channel.grant(PATIENCE_S, float("inf"))
        with pytest.raises(TimeoutError):
            channel.receive_into(memoryview(bytearray(1)))


def test_one_stall_that_many_callers_meet_counts_once() -> None:
    clock = ManualClock()
    breaker = Breaker(clock)
    for stall in range(3):
        assert breaker.admit()
        asked_at = [clock.now + 0.001 * i for i in range(8)]
        clock.now += PATIENCE_S
        for moment in asked_at:
            breaker.failed(asked_at=moment)
            clock.now += 0.001
        assert breaker.is_closed is (stall < 2)


def test_callers_who_granted_little_time_open_the_breaker_later() -> None:
    breaker = Breaker(ManualClock())
    for _ in range(7):
        breaker.failed(weight=0.4)
        assert breaker.is_closed
    breaker.failed(weight=0.4)
    assert not breaker.is_closed


@pytest.fixture
def way() -> Iterator[Way]:
    with (
        PrivateRedis(binary=binary("system"), maxmemory_bytes=64 << 20, port=0) as server,
        proxy(server.url.removeprefix("redis://").partition("/")[0]) as made,
    ):
        yield made


def url(way: Way) -> str:
    return f"redis://{way.address}/0"


def slow_by(delay_s: float) -> Change:
    def change(data: bytes) -> bytes:
        time.sleep(delay_s)
        return data

    return change


@contextmanager
def held_back(way: Way, *, only: bytes = b"") -> Iterator[None]:
    """What the server says in the block, and begins so, is passed on at the end of the block."""
    over = threading.Event()

    def change(data: bytes) -> bytes:
        if data.startswith(only):
            over.wait(60)
        return data

    way.say(change)
    try:
        yield
    finally:
        over.set()
        way.say_as_it_is()


def read(tier: RedisTier, metas: Sequence[BlockMeta], deadline_s: float | None = None) -> int:
    into = buffers(len(metas))
    count = tier.read(names(metas), into, deadline_s=deadline_s).count
    assert [bytes(b) for b in into[:count]] == [bytes(payload(name)) for name in names(metas)[:count]]
    return count


def test_a_server_that_answers_within_the_timeout_is_healthy_however_often_it_is_slow(way: Way) -> None:
    metas = chain(3, ttl_s=1000.0)
    tier = make_tier(url(way), timeout_s=LONG_S)
    assert tier.write(metas, payloads(metas)) == 3
    way.say(slow_by(BEARABLE_S))
    assert [read(tier, metas) for _ in range(10)] == [3] * 10
    assert "breaker" not in tier.stats().misses
    tier.close()


def test_a_server_that_answers_later_is_given_up_and_taken_back(way: Way) -> None:
    metas = chain(3, ttl_s=1000.0)
    clock = ManualClock()
    tier = make_tier(url(way), timeout_s=TIMEOUT_S, clock=clock)
    assert tier.write(metas, payloads(metas)) == 3
    for _ in range(8):
        with held_back(way):
            assert read(tier, metas) == 0
    assert tier.stats().misses == {"deadline": 3, "breaker": 5}

    def taken_back() -> bool:
        clock.now += 5.0
        return tier.probe() and read(tier, metas) == 3

    until(taken_back, "it is asked again")
    tier.close()


def test_threads_that_meet_one_stall_do_not_open_the_breaker(way: Way) -> None:
    metas = chain(1)
    tier = make_tier(url(way), timeout_s=2 * TIMEOUT_S)
    assert tier.write(metas, payloads(metas)) == 1
    go = threading.Barrier(6)

    def ask() -> None:
        go.wait()
        read(tier, metas)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    with held_back(way):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert tier.stats().misses == {"deadline": 6}
    until(lambda: read(tier, metas) == 1, "its answers are taken again")
    assert "breaker" not in tier.stats().misses
    tier.close()


def test_callers_in_a_hurry_alone_do_not_condemn_a_server_at_once(way: Way) -> None:
    metas = chain(2)
    clock = ManualClock()
    tier = make_tier(url(way), timeout_s=100.0, clock=clock)
    assert tier.write(metas, payloads(metas)) == 2
    with held_back(way):
        for _ in range(100):  # who is late already when it asks says nothing about the server
            assert read(tier, metas, deadline_s=0.02) == 0
            if "breaker" in tier.stats().misses:
                break
        misses = tier.stats().misses
        assert misses["deadline"] >= 12
        assert misses["breaker"] == 1
    clock.now += 5.0
    assert read(tier, metas) == 2
    tier.close()


def test_blocks_that_have_arrived_count_though_the_server_stalls_before_their_ttls_are_renewed(way: Way) -> None:
    metas = chain(2, ttl_s=1000.0)
    writer, tier = make_tier(url(way)), make_tier(url(way), timeout_s=2 * TIMEOUT_S)
    assert writer.write(metas, payloads(metas)) == 2

    with held_back(way, only=b":"):
        assert read(tier, metas) == 2
    assert (tier.stats().hits, tier.stats().misses) == (2, {})
    assert "does not answer in time" in tier.stats().problem
    tier.close()
    writer.close()
