"""Operators that watch requests go by: what a trace is recorded from.

Covers: what is told of a request, references instead of names, one bounded buffer a watcher, and the count of what did
not fit. Does not cover: numbering blocks or writing files (`replay.recorder`). Costs one comparison a request while
nobody watches. Owned by one event loop.

A watcher that does not keep up loses requests and is told how many; it never makes a request wait. Names of blocks are
hashes salted by the tenant's trust group, cut to 8 bytes: among ten million blocks two are taken for one with a chance
of 3 in a million.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import grpc

from router.errors import InvalidRequest, Overloaded, PermissionDenied
from router.ledger import Entry
from router.request import PreparedPrompt, Request, turn_of
from warmkv.v1 import admin_pb2, common_pb2, inference_pb2

NAME_BYTES = 8
MAX_WATCHERS = 8
_REF_BYTES = 8
_SALT_BYTES = range(8, 65)
_MAX_WAITING_BYTES = 32 << 20
_MESSAGE_BYTES = 1 << 20
_HEARTBEAT_S = 1.0
_WRONG = grpc.StatusCode.INVALID_ARGUMENT.name
_GATHER_S = 0.05  # so that a busy router sends few messages instead of many


@dataclass(frozen=True, slots=True)
class Arrival:
    """What must be kept of a request until it has ended, because nobody else does."""

    arrived_us: int
    hashes: Sequence[bytes]
    affinity: str
    turn: int
    priority: int
    ttl_seconds: int | None
    text: str


class Watch:
    """One watcher: what it has not been sent yet.

    Attributes:
        since: requests that came earlier, on the router's clock, are not its business. with_text: whether it gets
        prompts. max_bytes: of what waits. missed: requests that its buffer had no room for.
    """

    def __init__(self, key: bytes, since: float, *, with_text: bool, max_bytes: int) -> None:
        self.since = since
        self.with_text = with_text
        self.missed = 0
        self._key = key
        self._max_bytes = max_bytes
        self._waiting: deque[tuple[int, admin_pb2.RequestRecord]] = deque()
        self._waiting_bytes = 0
        self._news = asyncio.Event()

    def refer(self, kind: str, name: str) -> bytes:
        """What stands for a name in this watch; empty for none."""
        if not name:
            return b""
        return hashlib.blake2b(f"{kind}\0{name}".encode(), key=self._key, digest_size=_REF_BYTES).digest()

    def offer(self, record: admin_pb2.RequestRecord) -> None:
        """Queue it, or count it as missed."""
        nbytes = record.ByteSize()
        if self._waiting and self._waiting_bytes + nbytes > self._max_bytes:
            self.missed += 1
        else:
            self._waiting.append((nbytes, record))
            self._waiting_bytes += nbytes
        self._news.set()

    def take(self) -> list[admin_pb2.RequestRecord]:
        """The oldest that wait, about a megabyte of them."""
        taken, size = [], 0
        while self._waiting and size < _MESSAGE_BYTES:
            nbytes, record = self._waiting.popleft()
            self._waiting_bytes -= nbytes
            size += nbytes
            taken.append(record)
        if not self._waiting:
            self._news.clear()
        return taken

    async def wait(self) -> None:
        """Return when there is something, a little later so that more may come; or at the heartbeat."""
        try:
            async with asyncio.timeout(_HEARTBEAT_S):
                await self._news.wait()
        except TimeoutError:
            return
        await asyncio.sleep(_GATHER_S)


class Watchers:
    """All watchers of one router.

    Args:
        clock: the router's. wall_clock: seconds since the epoch. block_size: tokens a block; zero: not known yet.
        secret: the fleet's, so that references are alike on all its routers. show_prompts: whether text may be sent.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        block_size: Callable[[], int],
        *,
        secret: str,
        show_prompts: bool,
    ) -> None:
        self._clock, self._wall_clock = clock, wall_clock
        self._block_size = block_size
        self._secret = secret
        self._show_prompts = show_prompts
        self._watches: set[Watch] = set()

    def arrived(self, work: Request, body: inference_pb2.GenerateRequest, prepared: PreparedPrompt) -> None:
        """Remember what its record will need, if anybody watches."""
        if not self._watches:
            return
        with_text = any(watch.with_text for watch in self._watches)
        work.arrival = Arrival(
            arrived_us=round((self._wall_clock() - (self._clock() - work.started)) * 1e6),
            hashes=prepared.question.hashes,
            affinity=prepared.question.affinity,
            turn=turn_of(body.input),
            priority=body.priority,
            ttl_seconds=body.cache.ttl_seconds if body.cache.HasField("ttl_seconds") else None,
            text=prepared.prompt.rendered if with_text else "",
        )

    def ended(self, work: Request, entry: Entry) -> None:
        """Tell those who have watched since it came; not of requests that were wrong, which no fleet could serve."""
        arrival = work.arrival
        if arrival is None or entry.code == _WRONG:
            return
        told = [watch for watch in self._watches if watch.since <= work.started]
        if not told:
            return
        shared = self._record(work, arrival, entry)
        for watch in told:
            record = admin_pb2.RequestRecord()
            record.CopyFrom(shared)
            record.tenant = watch.refer("tenant", work.caller.tenant)
            record.session = watch.refer("session", arrival.affinity)
            if watch.with_text:
                record.text = arrival.text
            watch.offer(record)

    async def watch(
        self, request: admin_pb2.WatchRequestsRequest
    ) -> AsyncGenerator[admin_pb2.WatchRequestsResponse, None]:
        """Messages for one watcher, until the iterator is closed.

        Raises:
            PermissionDenied: text was asked for and the settings forbid it. InvalidRequest: a salt of a wrong length.
            Overloaded: too many watchers.
        """
        with self._joined(request) as watch:
            yield self._message(watch)
            while True:
                await watch.wait()
                yield self._message(watch)

    @contextmanager
    def _joined(self, request: admin_pb2.WatchRequestsRequest) -> Iterator[Watch]:
        self._check(request)
        salt = request.salt or secrets.token_bytes(16)
        key = hashlib.blake2b(salt, key=hashlib.sha256(self._secret.encode()).digest()).digest()
        watch = Watch(key, self._clock(), with_text=request.with_text, max_bytes=_MAX_WAITING_BYTES)
        self._watches.add(watch)
        try:
            yield watch
        finally:
            self._watches.discard(watch)

    def _check(self, request: admin_pb2.WatchRequestsRequest) -> None:
        if request.with_text and not self._show_prompts:
            raise PermissionDenied(
                "This router hands out no prompts. Record without text, or start it with router.show_prompts on."
            )
        if request.salt and len(request.salt) not in _SALT_BYTES:
            raise InvalidRequest(f"The salt has {len(request.salt)} bytes. Send 8 to 64, or none.", field="salt")
        if len(self._watches) >= MAX_WATCHERS:
            raise Overloaded(
                f"{MAX_WATCHERS} watchers follow this router's requests already; end one of them.", retry_after_s=5.0
            )

    def _message(self, watch: Watch) -> admin_pb2.WatchRequestsResponse:
        return admin_pb2.WatchRequestsResponse(
            requests=watch.take(),
            missed=watch.missed,
            block_size=self._block_size(),
            time_us=round(self._wall_clock() * 1e6),
        )

    def _record(self, work: Request, arrival: Arrival, entry: Entry) -> admin_pb2.RequestRecord:
        """All but what differs between watchers."""
        return admin_pb2.RequestRecord(
            arrived_us=arrival.arrived_us,
            block_names=b"".join(name[:NAME_BYTES] for name in arrival.hashes),
            prompt_tokens=entry.prompt_tokens,
            generated_tokens=entry.generated_tokens,
            turn=arrival.turn,
            priority=arrival.priority,
            ttl_seconds=arrival.ttl_seconds,
            finish_reason=work.finish_reason,
            code=entry.code,
            fates=common_pb2.TokensByFate(**entry.fates) if entry.fates else None,
            ttft_ms=work.ttft_ms or None,
            duration_ms=(self._clock() - work.started) * 1000.0,
            worker=entry.worker,
        )
