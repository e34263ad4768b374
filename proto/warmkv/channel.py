"""How clients connect and when they try again. Both clients use it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import grpc

from warmkv.errors import WarmkvError

MAX_MESSAGE_BYTES = 256 << 20
_WORKER_LOST = "WORKER_LOST"
# The server allows pings every 10 s; an idle connection through a balancer lives by them.
OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files of a TLS connection.

    Attributes:
        ca: what the router's certificate is checked against; None: the system's authorities.
        cert, key: the client's own, for routers that ask for one (mTLS); both or neither.
        server_name: the name in the router's certificate, where it differs from the address.
    """

    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = None
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Credentials made of the files.

        Raises:
            OSError: a file cannot be read. ValueError: a certificate without its key, or the reverse.
        """
        if (self.cert is None) != (self.key is None):
            raise ValueError("a client certificate needs its key, and the reverse. Give both cert and key.")
        return grpc.ssl_channel_credentials(_bytes(self.ca), _bytes(self.key), _bytes(self.cert))

    def options(self) -> tuple[tuple[str, str], ...]:
        """Channel options."""
        return (("grpc.ssl_target_name_override", self.server_name),) if self.server_name else ()


@dataclass(frozen=True, slots=True)
class Retry:
    """When a call is made again: only before its first message, only on UNAVAILABLE, and not if it lost a worker.

    Attributes:
        attempts: calls at most, the first included. first_s, most_s: the wait doubles from one to the other.
        jitter: a number in [0, 1); waits are spread by it between half and full.
    """

    attempts: int = 4
    first_s: float = 0.1
    most_s: float = 1.0
    jitter: Callable[[], float] = random.random

    def waits(self, timeout: float | None, clock: Callable[[], float] = time.monotonic) -> Waits:
        """The waits of one call that may take `timeout` seconds in all."""
        return Waits(self, None if timeout is None else clock() + timeout, clock)


class Waits:
    """The waits of one call, and the time that it has left."""

    def __init__(self, retry: Retry, deadline: float | None, clock: Callable[[], float]) -> None:
        self._left = self._steps(retry)
        self._deadline = deadline
        self._clock = clock

    def time_left(self) -> float | None:
        """Seconds to the deadline, for the next attempt; None: unlimited."""
        return None if self._deadline is None else max(0.0, self._deadline - self._clock())

    def before_retry(self, error: WarmkvError) -> float | None:
        """Seconds to wait before the next attempt; None: do not try again."""
        # A call that lost a worker may be what killed it: whether it is sent again is for a person to say.
        if error.code is not grpc.StatusCode.UNAVAILABLE or error.reason == _WORKER_LOST:
            return None
        wait = next(self._left, None)
        left = self.time_left()
        if wait is None or (left is not None and wait >= left):
            return None
        return wait

    @staticmethod
    def _steps(retry: Retry) -> Iterator[float]:
        for attempt in range(retry.attempts - 1):
            full = min(retry.most_s, retry.first_s * 2.0**attempt)
            yield full * (0.5 + retry.jitter() / 2)


class ConnectOptions(TypedDict, total=False):
    """How to reach a router.

    Attributes:
        api_key: sent with every call. tls: plaintext when left out.
        timeout: seconds that a call may take when it says nothing itself; unlimited when left out.
        retry: when to call again; see `Retry`. channel_options: gRPC channel options that come before ours.
    """

    api_key: str | None
    tls: Tls | None
    timeout: float | None
    retry: Retry
    channel_options: Sequence[tuple[str, Any]]


@dataclass(frozen=True, slots=True)
class Calls:
    """What every call of a client has in common."""

    api_key: str | None
    timeout: float | None
    retry: Retry

    @classmethod
    def of(cls, options: ConnectOptions) -> Calls:
        """As the options say."""
        return cls(options.get("api_key"), options.get("timeout"), options.get("retry", Retry()))

    def waits(self) -> Waits:
        """The waits of a call that says nothing itself."""
        return self.retry.waits(self.timeout)

    def metadata(self, request_id: str | None = None, traceparent: str | None = None) -> tuple[tuple[str, str], ...]:
        """What travels beside a request."""
        return metadata_of(self.api_key, request_id, traceparent)


def channel_arguments(options: ConnectOptions) -> tuple[grpc.ChannelCredentials | None, list[tuple[str, Any]]]:
    """Credentials (None: plaintext) and gRPC's channel options.

    Raises:
        TypeError: an option has no such name. OSError, ValueError: the TLS files are missing or incomplete.
    """
    if unknown := options.keys() - ConnectOptions.__optional_keys__:
        raise TypeError(f"unknown options {sorted(unknown)}. Use {sorted(ConnectOptions.__optional_keys__)}.")
    tls = options.get("tls")
    chosen = dict([*OPTIONS, *(tls.options() if tls else ()), *options.get("channel_options", ())])
    return (tls.credentials() if tls else None), list(chosen.items())


def metadata_of(api_key: str | None, request_id: str | None, traceparent: str | None) -> tuple[tuple[str, str], ...]:
    """What travels beside a request."""
    values = {
        "authorization": f"Bearer {api_key}" if api_key else None,
        "x-request-id": request_id,
        "traceparent": traceparent,
    }
    return tuple((key, value) for key, value in values.items() if value)


def _bytes(path: str | Path | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()
