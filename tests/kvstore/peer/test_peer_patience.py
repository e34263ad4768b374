"""How long a peer may be silent: what has come is taken even when it is this process that was late."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Iterator

import pytest

from kvstore.peer.wire import Channel

PATIENCE_S = 0.01


@pytest.fixture
def ends() -> Iterator[tuple[Channel, socket.socket]]:
    ours, theirs = socket.socketpair()
    channel = Channel(ours, math.inf)
    yield channel, theirs
    channel.close()
    theirs.close()


def oversleep() -> None:
    """No processor until the patience is up."""
    time.sleep(5 * PATIENCE_S)


def test_an_answer_that_waits_for_us_is_taken_though_the_patience_is_up(ends: tuple[Channel, socket.socket]) -> None:
    channel, peer = ends
    channel.grant(PATIENCE_S, math.inf)
    peer.sendall(b"head" + b"body")
    oversleep()
    for expected in (b"head", b"body"):
        channel.receive_into(target := memoryview(bytearray(4)))
        assert bytes(target) == expected


def test_silence_is_silence(ends: tuple[Channel, socket.socket]) -> None:
    channel, peer = ends
    channel.grant(PATIENCE_S, math.inf)
    oversleep()
    with pytest.raises(TimeoutError):
        channel.receive_into(memoryview(bytearray(1)))
    peer.sendall(b"late")
    with pytest.raises(TimeoutError):  # the look is spent
        channel.receive_into(memoryview(bytearray(1)))


def test_one_that_trickles_gains_little(ends: tuple[Channel, socket.socket]) -> None:
    channel, peer = ends
    channel.grant(PATIENCE_S, math.inf)
    oversleep()
    for _ in range(4):
        peer.sendall(b"x")
        channel.receive_into(memoryview(bytearray(1)))
    peer.sendall(b"x")
    with pytest.raises(TimeoutError):
        channel.receive_into(memoryview(bytearray(1)))


def test_beyond_the_callers_own_time_nothing_is_taken(ends: tuple[Channel, socket.socket]) -> None:
    channel, peer = ends
    channel.grant(10.0, time.monotonic() + PATIENCE_S)
    peer.sendall(b"late")
    oversleep()
    with pytest.raises(TimeoutError):
        channel.receive_into(memoryview(bytearray(4)))
