"""What routers count on after somebody has emptied a server: nothing that is gone, and soon all that is there."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import redis

from deploy.redis_server import PrivateRedis
from kvstore.blocks import short
from kvstore.events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent, RemovalCause, TierName
from kvstore.redis.books import TOLD_S, RedisBooks
from kvstore.redis.push import PushConnection
from kvstore.redis.watch import RedisWatch
from kvstore.tier import BlockMeta
from tests.kvstore.blocks_for_tests import chain
from tests.kvstore.redis.redis_for_tests import PREFIX, client_of, key

GIVE_UP_S = 60.0


@pytest.fixture
def server() -> Iterator[PrivateRedis]:
    with PrivateRedis(maxmemory_bytes=64 << 20) as running:
        yield running


class Router:
    """Counts on the shared tier as the events of several workers say, in the order in which they come."""

    def __init__(self) -> None:
        self.credit: set[bytes] = set()

    def apply(self, events: Sequence[KvEvent]) -> None:
        for event in events:
            match event:
                case BlockStored(hashes=hashes):
                    self.credit.update(hashes)
                case BlockRemoved(hashes=hashes):
                    self.credit.difference_update(hashes)
                case AllBlocksCleared():
                    self.credit.clear()


class Worker:
    """Books and their watch."""

    def __init__(self, server: PrivateRedis, tell_again_s: float) -> None:
        self.books = RedisBooks()
        self._server = server
        self.watch = RedisWatch(
            server.url,
            prefix=PREFIX.encode(),
            books=self.books,
            may_configure=True,
            ask_every_s=3600.0,
            tell_again_s=tell_again_s,
        )

    def write(self, metas: Sequence[BlockMeta]) -> None:
        with client_of(self._server) as client:
            for meta in metas:
                client.set(key(meta.hash), b"block")
        self.books.stored(metas, written=len(metas), nbytes=1)


@contextmanager
def worker(server: PrivateRedis, *, tell_again_s: float = 3600.0) -> Iterator[Worker]:
    made = Worker(server, tell_again_s)
    until(lambda: made.watch.hearing is not None and made.watch._has_listened)
    try:
        yield made
    finally:
        made.watch.close()
        made.books.check()


def until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + GIVE_UP_S
    while not condition():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.002)


def shorts(metas: Sequence[BlockMeta]) -> set[bytes]:
    return {short(meta.hash) for meta in metas}


def flush(server: PrivateRedis) -> None:
    with client_of(server) as client:
        client.flushall()


def test_what_a_dead_worker_wrote_is_not_counted_on_though_something_is_written_at_once(
    server: PrivateRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead, ours, fresh = chain(3), chain(20, first_token=1), chain(1, first_token=2)
    router = Router()
    go = threading.Event()
    with worker(server) as it:
        with client_of(server) as client:
            for meta in dead:
                client.set(key(meta.hash), b"block")
        router.credit |= shorts(dead)
        it.write(ours)
        confirm = it.watch._confirm_all
        monkeypatch.setattr(it.watch, "_confirm_all", lambda connection: (go.wait(), confirm(connection)))
        flush(server)
        it.write(fresh)
        go.set()
        until(lambda: {meta.hash for meta in fresh} == set(it.books.names()))
        until(lambda: it.watch._flushes == 1)
        router.apply(it.books.drain_events())
        assert router.credit == shorts(fresh)


def test_an_idle_worker_tells_of_a_flush_though_it_believes_in_nothing(server: PrivateRedis) -> None:
    router = Router()
    with worker(server) as idle:
        router.credit |= shorts(chain(3))
        flush(server)
        until(lambda: idle.books.flushes == 1)
        router.apply(idle.books.drain_events())
        assert router.credit == set()


def test_what_was_believed_and_is_written_again_is_told_again(server: PrivateRedis) -> None:
    """It is no news to the books, which believed in it all the time."""
    metas, router = chain(3), Router()
    with worker(server) as it, client_of(server) as client:
        it.write(metas)
        with client.pipeline() as pipe:
            pipe.flushall()
            for meta in metas:
                pipe.set(key(meta.hash), b"block")
            pipe.execute()
        until(lambda: it.watch._flushes == 1)
        router.apply(it.books.drain_events())
        assert router.credit == shorts(metas)


def test_news_of_a_flush_that_overtakes_a_block_takes_its_credit_for_a_while_only(server: PrivateRedis) -> None:
    """One worker writes, another one is idle, and the idle one's events come late."""
    metas, router = chain(3), Router()
    with worker(server, tell_again_s=0.3) as busy, worker(server) as idle:
        flush(server)
        until(lambda: busy.watch._flushes == idle.watch._flushes == 1)
        busy.write(metas)
        router.apply(busy.books.drain_events())
        assert router.credit == shorts(metas)
        router.apply(idle.books.drain_events())
        assert router.credit == set()
        until(lambda: busy.watch._tell_again_at == float("inf"))
        router.apply(busy.books.drain_events())
        assert router.credit == shorts(metas)


def test_it_is_told_twice_and_not_for_ever(server: PrivateRedis) -> None:
    metas = chain(3)
    with worker(server, tell_again_s=0.01) as it:
        flush(server)
        it.write(metas)
        until(lambda: it.watch._flushes == 1 and it.watch._tell_again_at == float("inf"))
        it.books.drain_events()
        last = chain(1, first_token=5)
        it.write(last)
        with client_of(server) as client:
            client.delete(key(last[0].hash))
        until(lambda: last[0].hash not in it.books.names())
        told = [name for e in it.books.drain_events() if isinstance(e, BlockStored) for name in e.hashes]
        assert set(told) == shorts(last)


def test_a_flush_is_not_forgotten_when_the_connection_breaks_meanwhile(
    server: PrivateRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, kept, router = chain(3), chain(2, first_token=1), Router()
    exist, breaks = PushConnection.exist, iter([True])

    def fragile(connection: PushConnection, keys: Sequence[bytes]) -> list[bool]:
        if next(breaks, False):
            raise redis.ConnectionError("it broke")
        return exist(connection, keys)

    with worker(server) as it:
        it.write(gone)
        monkeypatch.setattr(PushConnection, "exist", fragile)
        with client_of(server) as client, client.pipeline() as pipe:
            pipe.flushall()
            for meta in kept:
                pipe.set(key(meta.hash), b"block")
            it.books.stored(kept, written=2, nbytes=1)
            pipe.execute()
        until(lambda: it.watch._flushes == 1)
        events = it.books.drain_events()
        router.apply(events)
        assert router.credit == shorts(kept)
        causes = {event.cause for event in events if isinstance(event, BlockRemoved)}
        assert causes == {RemovalCause.CLEARED}


def test_an_absence_is_told_of_the_first_block_whatever_was_believed() -> None:
    metas, now = chain(4), [1e9]
    books = RedisBooks(wall_clock=lambda: now[0])
    names = [meta.hash for meta in metas]
    books.absent(names)
    assert books.drain_events() == [BlockRemoved(TierName.REDIS, (short(names[0]),), RemovalCause.ABSENT)]
    assert books.stats().removals == {}
    books.stored(metas[2:], written=2, nbytes=1)
    books.drain_events()
    now[0] += TOLD_S
    books.absent(names[1:])
    told = tuple(short(name) for name in names[1:])
    assert books.drain_events() == [BlockRemoved(TierName.REDIS, told, RemovalCause.ABSENT)]
    assert books.stats().removals == {"absent": 2}
    books.absent(names)
    assert books.drain_events() == [BlockRemoved(TierName.REDIS, (short(names[0]),), RemovalCause.ABSENT)]
    books.absent(names)
    assert books.drain_events() == []  # it was told just now
    now[0] += TOLD_S
    books.absent(names)
    assert books.drain_events() == [BlockRemoved(TierName.REDIS, (short(names[0]),), RemovalCause.ABSENT)]
    books.absent([])
    assert books.drain_events() == []
