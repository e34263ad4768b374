"""The way to one peer: its connections, the breaker, and what is wrong with it.

Covers: turning every fault of a peer into one exception with a reason, and into a line that says what to do. Does not
cover: what is asked, what a fault means for blocks (`peer`).
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from kvstore.breaker import Breaker
from kvstore.codec import BlockCodec
from kvstore.errors import CodecError, MissReason, TierError
from kvstore.peer.wire import Channel, FleetKey, HungUpError, PeerProtocolError, PeerRefusedError
from kvstore.tier import Clock

log = logging.getLogger(__name__)

MAX_IDLE = 4


class PeerUnavailableError(Exception):
    """The peer could not be asked, or did not answer as it should. The message says what to do.

    Attributes:
        reason: as a miss.
    """

    def __init__(self, problem: str, reason: MissReason) -> None:
        super().__init__(problem)
        self.reason = reason


class PeerBusyError(Exception):
    """The peer sends as much as it can."""


class PeerLink:
    """Thread-safe. After three faults in a row the breaker answers for the peer; its probes are ordinary contacts."""

    def __init__(self, address: str, *, codec: BlockCodec, secret: str, timeout_s: float, clock: Clock) -> None:
        """Connect to nothing yet.

        Args:
            address: `host:port`; the host best as a number, because a name is looked up without a deadline.
            codec: of the blocks. secret: of the fleet.
            timeout_s: longest wait for one answer, connecting included.
            clock: of the breaker; deadlines are real time.

        Raises:
            TierError: the address or the secret cannot be used.
        """
        self.address = address
        self._target = _parse(address)
        self._codec = codec
        self._key = FleetKey(secret)
        self._timeout_s = timeout_s
        self._breaker = Breaker(clock)
        self._lock = threading.Lock()
        self._idle: list[Channel] = []
        self._problem = ""
        self._is_open = True

    @property
    def is_healthy(self) -> bool:
        """Whether everybody may ask."""
        return self._breaker.is_closed

    @property
    def problem(self) -> str:
        """What is wrong and what to do; empty when nothing is."""
        return self._problem

    @contextmanager
    def contact(self, ends_at: float) -> Iterator[Channel]:
        """A connection for the time of the block; `renew` it before each answer. Any exception closes it.

        Args:
            ends_at: `time.monotonic()` when the caller's own time is up.

        Raises:
            PeerUnavailableError: instead of any fault of the peer. CodecError: as it was raised.
        """
        started = time.monotonic()
        self._admit(is_late=started >= ends_at)
        channel: Channel | None = None
        try:
            channel = self._take(ends_at)
            yield channel
        except CodecError as error:
            self._lost(f"it sent a value that is not the block: {error}; compare its keyring and version with ours")
            raise
        except TimeoutError as error:
            # A caller in a hurry who hangs up while the peer talks says nothing about the peer.
            hung_up = channel is not None and channel.heard_at >= started and time.monotonic() >= ends_at
            problem = "it did not answer in time; see whether it is overloaded or unreachable"
            raise PeerUnavailableError(problem if hung_up else self._lost(problem), MissReason.DEADLINE) from error
        except PeerBusyError as error:
            raise PeerUnavailableError(self._lost(_remedy(error)), MissReason.BUSY) from error
        except (PeerRefusedError, PeerProtocolError, OSError) as error:
            raise PeerUnavailableError(self._lost(_remedy(error)), MissReason.ERROR) from error
        else:
            self._answered()
            self._give(channel)
            channel = None
        finally:
            if channel is not None:
                channel.close()

    def renew(self, channel: Channel, ends_at: float, *, more_s: float = 0.0) -> None:
        """Grant the peer its time anew, for one more answer; `more_s`: by how much we asked it to wait with that."""
        channel.grant(self._timeout_s + more_s, ends_at)

    def close(self) -> None:
        """Close the idle connections, and the others when they come back; later contacts fail."""
        with self._lock:
            self._is_open = False
            idle, self._idle = self._idle, []
        for channel in idle:
            channel.close()

    def _admit(self, *, is_late: bool) -> None:
        if not self._is_open:
            raise PeerUnavailableError("the tier is closed; open another one", MissReason.ERROR)
        if is_late:
            raise PeerUnavailableError("the deadline had passed; grant more time", MissReason.DEADLINE)
        if not self._breaker.admit():
            raise PeerUnavailableError(self._problem, MissReason.BREAKER)

    def _take(self, ends_at: float) -> Channel:
        while (channel := self._pop()) is not None:
            if channel.is_quiet():
                self.renew(channel, ends_at)
                return channel
            channel.close()
        return self._connect(ends_at)

    def _pop(self) -> Channel | None:
        with self._lock:
            return self._idle.pop() if self._idle else None

    def _connect(self, ends_at: float) -> Channel:
        until = min(time.monotonic() + self._timeout_s, ends_at)
        sock = socket.create_connection(self._target, timeout=max(0.001, until - time.monotonic()))
        channel = Channel(sock, until)
        try:
            self._key.greet(channel, self._codec)
        except BaseException:
            channel.close()
            raise
        self.renew(channel, ends_at)
        return channel

    def _give(self, channel: Channel) -> None:
        with self._lock:
            if self._is_open and len(self._idle) < MAX_IDLE:
                self._idle.append(channel)
                return
        channel.close()

    def _lost(self, problem: str) -> str:
        self._breaker.failed()
        line = f"peer {self.address}: {problem}"
        with self._lock:
            is_new, self._problem = line != self._problem, line
        if is_new:
            log.warning("a peer failed", extra={"peer": self.address, "problem": problem})
        return line

    def _answered(self) -> None:
        self._breaker.succeeded()
        with self._lock:
            was_lost, self._problem = bool(self._problem), ""
        if was_lost:
            log.info("a peer answered again", extra={"peer": self.address})


def _remedy(error: Exception) -> str:
    if isinstance(error, PeerBusyError):
        return "it sends as much as it can; ask another worker, or let it send more at once"
    if isinstance(error, HungUpError):
        return "it hung up; see whether it runs and has not too many connections"
    if isinstance(error, PeerProtocolError):
        return f"{error}; see whether another program listens there"
    if isinstance(error, PeerRefusedError):
        return str(error)
    return f"{error}; see whether it runs and serves peers at this address"


def _parse(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdecimal() or not 0 < int(port) < 65536:
        raise TierError(f"{address!r} is no address of a peer; write host:port, or [host]:port for IPv6")
    return host.removeprefix("[").removesuffix("]"), int(port)
