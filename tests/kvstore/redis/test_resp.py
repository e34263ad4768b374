"""Framing and deadlines. The other end is a socket of the test's own."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.redis.resp import Wire, pack
from tests.kvstore.redis.redis_for_tests import PATIENT_S


class Peer:
    """Stands in for redis-py's connection, whose socket is one end of a pair."""

    def __init__(self) -> None:
        self._sock, self.far = socket.socketpair()
        self.wire = Wire(time.monotonic)
        self.wire.attach(self)  # type: ignore[arg-type]
        self.wire.patience_s = PATIENT_S
        self.wire.renew()

    def disconnect(self) -> None:
        self._sock.close()
        self.far.close()


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer()
    yield made
    made.disconnect()


@contextlib.contextmanager
def saying(*pieces: bytes) -> Iterator[Wire]:
    """A connection at whose other end these pieces are said, each on its own, and then nothing more."""
    peer = Peer()
    with contextlib.ExitStack() as stack:
        stack.callback(peer.disconnect)

        def say() -> None:
            for piece in pieces:
                peer.far.sendall(piece)
            peer.far.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=say)
        thread.start()
        stack.callback(thread.join)
        yield peer.wire


def test_a_command_is_packed_in_resp() -> None:
    assert pack(b"GET", b"k\r\n") == b"*2\r\n$3\r\nGET\r\n$3\r\nk\r\n\r\n"


@pytest.mark.parametrize(
    ("said", "reply"),
    [
        (b"+OK\r\n", b"OK"),
        (b":-2\r\n", -2),
        (b"$-1\r\n", None),
        (b"$0\r\n\r\n", b""),
        (b"$4\r\na\r\nb\r\n", b"a\r\nb"),
        (b"*-1\r\n", None),
        (b"*2\r\n$1\r\nx\r\n*1\r\n:7\r\n", [b"x", [7]]),
    ],
)
def test_replies_are_read_however_they_are_cut(said: bytes, reply: object) -> None:
    for cut in range(1, len(said)):
        with saying(said[:cut], said[cut:]) as wire:
            assert wire.read_reply() == reply


def test_an_error_reply_is_returned_and_one_that_ends_the_conversation_is_raised() -> None:
    with saying(b"-WRONGTYPE no\r\n-LOADING wait\r\n") as wire:
        error = wire.read_reply()
        assert isinstance(error, redis.ResponseError)
        with pytest.raises(redis.BusyLoadingError):
            wire.read_reply()


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 400\r\n",
        b"$x\r\n",
        b"$-2\r\n",
        b":one\r\n",
        b"$3\r\nabcd\r\n",
        b"$99999999999\r\n",
        b"\r\n",
        b"+" * 40000,
    ],
)
def test_what_is_not_resp_is_refused(said: bytes) -> None:
    with saying(said) as wire, pytest.raises(redis.InvalidResponse):
        wire.read_reply()


@pytest.mark.parametrize("said", [b"", b"+O", b"$3\r\n", b"$3\r\nab", b"$3\r\nabc\r", b"*2\r\n:1\r\n"])
def test_a_stream_that_ends_in_the_middle_is_a_lost_connection(said: bytes) -> None:
    with saying(said) as wire, pytest.raises(redis.ConnectionError):
        wire.read_reply()


@settings(deadline=None)
@given(st.lists(st.integers(-1, 300), min_size=1, max_size=50), st.integers(1, 100))
def test_numbers_in_bulk_are_the_numbers_one_by_one(numbers: list[int], size: int) -> None:
    said = b"".join(b":%d\r\n" % number for number in numbers)
    with saying(*(said[i : i + size] for i in range(0, len(said), size))) as wire:
        assert wire.ask_numbers(b"", len(numbers)) == numbers


def test_an_error_among_numbers_is_in_its_place() -> None:
    with saying(b":1\r\n-ERR no\r\n:0\r\n") as wire:
        one, error, nought = wire.ask_numbers(b"", 3)
        assert (one, nought) == (1, 0)
        assert isinstance(error, redis.ResponseError)


@pytest.mark.parametrize(
    "said", [b":1\r\n:1\r\n:1\r\n", b":1\r\n$1\r\nx\r\n", b":1\r\n+OK\r\n", b":1\r\n:" + b"9" * 5000]
)
def test_other_or_more_answers_than_numbers_are_refused(said: bytes) -> None:
    with saying(said) as wire, pytest.raises(redis.InvalidResponse):
        wire.ask_numbers(b"", 2)


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=40), st.integers(0, 40), st.integers(1, 7), st.booleans())
def test_bytes_are_taken_whole_or_not_at_all(expected: bytes, at: int, size: int, is_other: bool) -> None:
    said = bytearray(expected)
    if is_other:
        said[at % len(said)] ^= 1
    pieces = [bytes(said[i : i + size]) for i in range(0, len(said), size)]
    with saying(*pieces, b"+next\r\n") as wire:
        assert wire.accept(expected) is not is_other
        rest = memoryview(bytearray(len(said) if is_other else 0))
        wire.read_into(rest)
        assert rest == (said if is_other else b"")
        assert wire.read_reply() == b"next"


def test_a_shorter_reply_of_another_kind_is_not_waited_for(peer: Peer) -> None:
    peer.wire.patience_s = float("inf")  # the suite's own timeout ends this test if it waits
    peer.wire.renew()
    peer.far.sendall(b"*2\r\n$-1\r\n$-1\r\n")
    assert not peer.wire.accept(b"*2\r\n$640\r\n" + b"x" * 700)
    assert peer.wire.read_reply() == [None, None]


@pytest.mark.parametrize("said", [b"$3\r\nabc\r\n", b"+OK\r\n", b"*-7\r\n"])
def test_what_is_no_array_is_no_count(said: bytes) -> None:
    with saying(said) as wire, pytest.raises(redis.InvalidResponse):
        wire.read_count()


def test_pieces_are_sent_in_order_whatever_the_socket_takes_at_once(peer: Peer) -> None:
    pieces = [bytes([n]) * size for n, size in enumerate((1, 3 << 20, 0, 17, 2 << 20, 5))]
    received = bytearray()

    def receive() -> None:
        while len(received) < sum(map(len, pieces)):
            received.extend(peer.far.recv(100_000))

    thread = threading.Thread(target=receive)
    thread.start()
    peer.wire.send([memoryview(piece) for piece in pieces])
    thread.join()
    assert received == b"".join(pieces)


@settings(deadline=None)
@given(st.binary(max_size=5000), st.integers(1, 2000), st.integers(0, 5000))
def test_a_value_lands_in_its_buffers(value: bytes, size: int, split: int) -> None:
    said = b"$%d\r\n%b\r\n+next\r\n" % (len(value), value)
    with saying(*(said[i : i + size] for i in range(0, len(said), size))) as wire:
        target = memoryview(bytearray(len(value)))
        assert wire.read_length() == len(value)
        wire.read_into(target[:split])
        wire.read_into(target[split:])
        wire.end_value()
        assert bytes(target) == value
        assert wire.read_reply() == b"next"


def test_a_server_that_trickles_is_given_up_in_time(peer: Peer) -> None:
    stop = threading.Event()

    def trickle() -> None:
        peer.far.sendall(b"$100000000\r\n")
        while not stop.wait(0.01):
            peer.far.sendall(b"x")

    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        peer.wire.patience_s = 30.0
        peer.wire.renew()
        assert peer.wire.read_length() == 100_000_000
        peer.wire.patience_s = 0.2
        peer.wire.renew()
        with pytest.raises((redis.TimeoutError, TimeoutError)):  # a timeout for each packet would never end
            peer.wire.read_into(memoryview(bytearray(100_000_000)))
    finally:
        stop.set()
        thread.join()


def test_a_server_that_takes_nothing_is_given_up_in_time(peer: Peer) -> None:
    peer.wire.patience_s = 0.05
    peer.wire.renew()
    with pytest.raises((redis.TimeoutError, TimeoutError)):
        peer.wire.send([bytes(32 << 20)])


def test_a_server_that_takes_a_little_at_a_time_is_given_up_in_time(peer: Peer) -> None:
    peer.far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    stop = threading.Event()

    def trickle() -> None:
        while not stop.wait(0.01):
            peer.far.recv(100)

    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        peer.wire.patience_s = 0.2
        peer.wire.renew()
        with pytest.raises(redis.TimeoutError):  # a timeout for each packet would last for hours
            peer.wire.send([bytes(32 << 20)])
    finally:
        stop.set()
        thread.join()


def test_renewing_never_goes_beyond_the_callers_end(peer: Peer) -> None:
    peer.wire.ends_at = time.monotonic()
    peer.wire.renew()
    with pytest.raises(redis.TimeoutError):
        peer.wire.read_reply()
