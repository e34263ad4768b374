"""Bytes in and out of a socket within a deadline, in as few system calls as the socket allows.

Covers: plain sockets (TCP, unix) and TLS. Does not cover: what the bytes mean (`resp`), opening (`pool`).

A plain socket blocks in the kernel: one call fills a whole value (MSG_WAITALL), and SO_RCVTIMEO bounds all waits of
that call together, so a peer that trickles gains nothing. The kernel's limit is a power of two of milliseconds, at most
what is left: it is set anew only when that changes, and a wait that ends early is taken up again with what is left.
Sending does not block: a unix socket grants its timeout to each packet anew, so we poll for what is left instead.

TLS knows neither flags nor `sendmsg`: pieces go one by one, and each call moves one record of 16 KiB at most.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import redis

SEND_BUFFER_NBYTES = 1 << 20  # of a unix socket; with the usual 208 KiB the sender idles while the server copies

Left = Callable[[], float]  # seconds that are left; raises redis.TimeoutError when none are


class Transport(Protocol):
    """Used by one thread at a time. Waits no longer than its `Left` says; any exception ends its use."""

    def send(self, parts: Sequence[bytes | memoryview]) -> None:
        """Send all bytes of all parts.

        Raises:
            redis.TimeoutError: not in time. OSError: the connection is gone.
        """
        ...

    def receive(self, target: memoryview, *, whole: bool = False) -> int:
        """Wait for bytes and put them into `target`; how many. `whole`: wait for as many as fit, where that is cheaper.

        Raises:
            redis.TimeoutError: none in time. redis.ConnectionError, OSError: the connection is gone.
        """
        ...

    def is_quiet(self) -> bool:
        """Whether nothing can be received now, not even the end."""
        ...


def transport(sock: Any, left: Left) -> Transport:
    """The right one for a socket, which is ours from now on."""
    return TlsTransport(sock, left) if isinstance(sock, ssl.SSLSocket) else PlainTransport(sock, left)


class PlainTransport:
    """A TCP or unix socket."""

    def __init__(self, sock: socket.socket, left: Left) -> None:
        sock.settimeout(None)
        if sock.family == socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_NBYTES)
        self._sock = sock
        self._left = left
        self._granted_ms = 0  # what SO_RCVTIMEO is set to
        self._incoming, self._outgoing = _poll_for(sock, select.POLLIN), _poll_for(sock, select.POLLOUT)

    def send(self, parts: Sequence[bytes | memoryview]) -> None:
        """As `Transport.send`; the parts are gathered by the kernel."""
        unsent = [part for part in parts if len(part)]
        while unsent:
            try:
                count = self._sock.sendmsg(unsent, (), socket.MSG_DONTWAIT)
            except BlockingIOError:
                self._outgoing.poll(1000 * self._left())
                continue
            while unsent and count >= len(unsent[0]):
                count -= len(unsent.pop(0))
            if count:
                unsent[0] = memoryview(unsent[0])[count:]

    def receive(self, target: memoryview, *, whole: bool = False) -> int:
        """As `Transport.receive`."""
        flags = socket.MSG_WAITALL if whole else 0
        while True:
            self._grant(self._left())
            try:
                count = self._sock.recv_into(target, 0, flags)
            except BlockingIOError:
                continue
            if not count:
                raise redis.ConnectionError("the server closed the connection")
            return count

    def is_quiet(self) -> bool:
        """As `Transport.is_quiet`."""
        return not self._incoming.poll(0)

    def _grant(self, left_s: float) -> None:
        ms = 1 << (int(1000 * min(left_s, 3600.0)) | 1).bit_length() - 1
        if ms != self._granted_ms:
            limit = struct.pack("ll", ms // 1000, ms % 1000 * 1000)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            self._granted_ms = ms


class TlsTransport:
    """A socket with TLS, never blocking; either direction may have to wait for the other (new keys, tickets)."""

    def __init__(self, sock: ssl.SSLSocket, left: Left) -> None:
        sock.settimeout(0)
        self._sock = sock
        self._left = left
        self._incoming, self._outgoing = _poll_for(sock, select.POLLIN), _poll_for(sock, select.POLLOUT)

    def send(self, parts: Sequence[bytes | memoryview]) -> None:
        """As `Transport.send`, piece by piece."""
        for part in parts:
            rest = memoryview(part)
            while rest:
                rest = rest[self._retry(partial(self._sock.send, rest)) :]

    def receive(self, target: memoryview, *, whole: bool = False) -> int:
        """As `Transport.receive`."""
        count = self._retry(lambda: self._sock.recv_into(target))
        if not count:
            raise redis.ConnectionError("the server closed the connection")
        return count

    def is_quiet(self) -> bool:
        """As `Transport.is_quiet`; messages of TLS itself are no news."""
        try:
            self._sock.recv(1)
        except ssl.SSLWantReadError:
            return True
        except OSError:
            return False
        return False

    def _retry(self, attempt: Callable[[], int]) -> int:
        while True:
            left_s = self._left()
            try:
                return attempt()
            except ssl.SSLWantReadError:
                self._incoming.poll(1000 * left_s)
            except ssl.SSLWantWriteError:
                self._outgoing.poll(1000 * left_s)


def _poll_for(sock: Any, event: int) -> select.poll:
    poll = select.poll()  # not select.select, which knows no descriptor above 1023
    poll.register(sock, event)
    return poll
