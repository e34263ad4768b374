"""The watch on a Redis server: what the server drops is told, nothing else is, whatever happens to the server."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import redis

from deploy.redis_server import PrivateRedis
from kvstore.blocks import short
from kvstore.errors import TierError
from kvstore.events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent, RemovalCause
from kvstore.redis.books import RedisBooks
from kvstore.redis.push import Hearing
from kvstore.redis.tier import RedisTier
from kvstore.redis.watch import RedisWatch, Watching
from kvstore.tier import BlockMeta
from tests.kvstore.blocks_for_tests import chain, payloads
from tests.kvstore.redis.redis_for_tests import PREFIX, SERVERS, binary, client_of, key, make_tier

GIVE_UP_S = 60.0
EVENTS = {"notify-keyspace-events": "Egxe"}


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[PrivateRedis]:
    with PrivateRedis(binary=binary(request.param), maxmemory_bytes=64 << 20) as running:
        yield running


@pytest.fixture(params=["keyevents", "invalidations"])
def telling(request: pytest.FixtureRequest, server: PrivateRedis) -> PrivateRedis:
    """A server that tells of removals in one of the two ways."""
    if request.param == "keyevents":
        with client_of(server) as client:
            client.config_set("notify-keyspace-events", "KEA")
    return server


class Watched:
    """Books under watch, and all that they told."""

    def __init__(self, server: PrivateRedis, **settings: Any) -> None:
        self.server = server
        self.books = RedisBooks()
        # Asking in turn is off unless a test is about it: else it would find what the other ways missed.
        self.watch = RedisWatch(
            server.url,
            prefix=PREFIX.encode(),
            books=self.books,
            **{"ask_every_s": 3600.0, "patience_s": 1.0, **settings},
        )
        self.told: list[KvEvent] = []

    def until(self, condition: Callable[[], bool]) -> None:
        give_up = time.monotonic() + GIVE_UP_S
        while not condition():
            assert time.monotonic() < give_up, (self.watch.problem, self.watch.advice, self.told[-5:])
            time.sleep(0.002)

    def until_it_hears(self, hearing: Hearing | None = None) -> None:
        self.until(lambda: self.watch.hearing is not None)
        assert hearing in (None, self.watch.hearing)

    def hear(self) -> list[KvEvent]:
        self.told += self.books.drain_events()
        return self.told

    def removed(self) -> dict[bytes, RemovalCause]:
        return {name: e.cause for e in self.hear() if isinstance(e, BlockRemoved) for name in e.hashes}

    def credit(self) -> set[bytes]:
        """What a router that follows the events counts on."""
        held: set[bytes] = set()
        for event in self.hear():
            match event:
                case BlockStored(hashes=hashes):
                    held.update(hashes)
                case BlockRemoved(hashes=hashes):
                    held.difference_update(hashes)
                case AllBlocksCleared():
                    held.clear()
        return held

    def settle(self) -> None:
        """Until everything that the server has said by now has been taken in: a last word of ours comes after it."""
        last = chain(1, first_token=random.randrange(10**6, 10**9))
        self.store(last)
        with client_of(self.server) as client:
            client.unlink(key(last[0].hash))
        self.until(lambda: short(last[0].hash) in self.removed())

    def store(self, metas: Sequence[BlockMeta], value: bytes = b"block", **options: Any) -> None:
        with client_of(self.server) as client:
            for meta in metas:
                client.set(key(meta.hash), value, **options)
        self.books.stored(metas, written=len(metas), nbytes=1)


@contextmanager
def watched(server: PrivateRedis, **settings: Any) -> Iterator[Watched]:
    made = Watched(server, **settings)
    try:
        yield made
    finally:
        made.watch.close()
        assert not made.watch._thread.is_alive()
        made.books.check()


def shorts(metas: Sequence[BlockMeta]) -> set[bytes]:
    return {short(meta.hash) for meta in metas}


def test_a_block_that_somebody_drops_is_told_and_the_others_are_kept(telling: PrivateRedis) -> None:
    metas = chain(4)
    with watched(telling) as it, client_of(telling) as client:
        it.until_it_hears()
        it.store(metas)
        client.delete(key(metas[1].hash))
        client.unlink(key(metas[3].hash))
        it.until(lambda: set(it.removed()) == shorts([metas[1], metas[3]]))
        assert it.credit() == shorts([metas[0], metas[2]])
        assert set(it.books.names()) == {metas[0].hash, metas[2].hash}


def test_an_expired_block_is_told(telling: PrivateRedis) -> None:
    metas = chain(2)
    with watched(telling) as it:
        it.until_it_hears()
        it.store(metas[:1])
        it.store(metas[1:], px=1)
        it.until(lambda: set(it.removed()) == shorts(metas[1:]))


def test_evicted_blocks_are_told_all_of_them_and_only_them(telling: PrivateRedis) -> None:
    metas = [block for token in range(40) for block in chain(5, first_token=token)]
    with watched(telling) as it, client_of(telling) as client:
        it.until_it_hears()
        client.config_set("maxmemory", client.info("memory")["used_memory"] + (4 << 20))
        it.store(metas, value=bytes(60_000))
        it.settle()
        held = {short(meta.hash) for meta in metas if client.exists(key(meta.hash))}
        assert 0 < len(held) < len(metas)
        it.until(lambda: it.credit() == held)


@pytest.mark.parametrize("server", ["system"], indirect=True)
def test_a_keyevent_names_the_cause(server: PrivateRedis) -> None:
    gone, expired, evicted = chain(1), chain(1, first_token=1), chain(1, first_token=2)
    with watched(server, may_configure=True) as it, client_of(server) as client:
        it.until_it_hears(Hearing.EVENTS)
        it.store(gone + evicted)
        it.store(expired, px=1)
        client.delete(key(gone[0].hash))
        it.until(lambda: len(it.removed()) == 2)
        client.config_set("maxmemory", 1)
        with pytest.raises(redis.OutOfMemoryError):
            client.set("x", "y")
        it.until(lambda: len(it.removed()) == 3)
        assert it.removed() == {
            short(gone[0].hash): RemovalCause.CLEARED,
            short(expired[0].hash): RemovalCause.EXPIRED,
            short(evicted[0].hash): RemovalCause.EVICTED,
        }
        assert it.books.stats().removals == {"cleared": 1, "expired": 1, "evicted": 1}


def test_writes_and_longer_ttls_take_no_credit_away(telling: PrivateRedis) -> None:
    metas = chain(3)
    with watched(telling) as it, client_of(telling) as client:
        it.until_it_hears()
        it.store(metas)
        for meta in metas:
            client.set(key(meta.hash), b"again")
            client.pexpire(key(meta.hash), 10**7)
            client.touch(key(meta.hash))
        it.settle()
        assert it.credit() == shorts(metas)


def test_keyevents_tell_of_blocks_that_others_wrote(server: PrivateRedis) -> None:
    theirs = chain(2)
    with client_of(server) as client:
        client.config_set("notify-keyspace-events", "EA")
        with watched(server) as it:
            it.until_it_hears(Hearing.EVENTS)
            for meta in theirs:
                client.set(key(meta.hash), b"block")
            client.delete(key(theirs[0].hash))
            it.until(lambda: set(it.removed()) == shorts(theirs[:1]))
            assert it.books.stats().removals == {}  # not ours to count


@pytest.mark.parametrize("options", [{}, {"rewritten": True}])
def test_news_may_be_faster_than_the_writer(telling: PrivateRedis, options: dict[str, bool]) -> None:
    """A block is evicted before its writer has entered it into the books."""
    metas = chain(1)
    with watched(telling) as it, client_of(telling) as client:
        it.until_it_hears()
        client.set(key(metas[0].hash), b"block")
        client.delete(key(metas[0].hash))
        if options:
            client.set(key(metas[0].hash), b"block")
        it.settle()
        it.books.stored(metas, written=1, nbytes=1)
        it.settle()
        expected = shorts(metas) if options else set()
        it.until(lambda: it.credit() == expected and it.books.take_doubtful() == [])


def test_other_keys_are_nobodys_business(telling: PrivateRedis) -> None:
    odd = ["user:1", PREFIX, PREFIX + "zz", PREFIX + "00", "warmkv:ffffffffffffffff:" + "00" * 32, PREFIX + "é"]
    with watched(telling) as it, client_of(telling) as client:
        it.until_it_hears()
        it.hear()
        for name in odd:
            client.set(name, b"x")
            client.delete(name)
        it.settle()
        assert len(it.removed()) == 1


@pytest.mark.parametrize("command", ["FLUSHALL", "FLUSHDB", "FLUSHALL ASYNC"])
def test_a_flush_is_told_as_such_though_it_has_no_keyevent(telling: PrivateRedis, command: str) -> None:
    metas = chain(3)
    with watched(telling) as it, client_of(telling) as client:
        it.until_it_hears()
        it.store(metas)
        it.settle()
        before = it.books.stats().removals.get("cleared", 0)
        client.execute_command(*command.split())
        it.until(lambda: any(isinstance(event, AllBlocksCleared) for event in it.hear()) and not it.books.names())
        assert it.credit() == set()
        assert it.books.stats().removals["cleared"] - before == 3


def test_a_flush_spares_what_was_written_after_it(telling: PrivateRedis) -> None:
    before, after = chain(3), chain(2, first_token=1)
    with watched(telling) as it, client_of(telling) as client:
        it.until_it_hears()
        it.store(before)
        with client.pipeline() as pipe:  # at once: no moment at which the server is empty can be seen
            pipe.flushdb()
            for meta in after:
                pipe.set(key(meta.hash), b"block")
            it.books.stored(after, written=2, nbytes=1)
            pipe.execute()
        it.until(lambda: not it.credit() & shorts(before))
        it.settle()
        assert it.credit() == shorts(after)


def test_credit_is_sampled_again_after_the_connection_was_lost(telling: PrivateRedis) -> None:
    metas = chain(6)
    with watched(telling) as it, client_of(telling) as client:
        it.until_it_hears()
        it.store(metas)
        ours = [c["id"] for c in client.client_list() if c["id"] != str(client.client_id())]
        with client.pipeline() as pipe:  # in one transaction: what is dropped in it is never heard of
            for one in ours:
                pipe.client_kill_filter(_id=one)
            pipe.delete(*(key(meta.hash) for meta in metas[3:]))
            pipe.execute()
        it.until(lambda: set(it.removed()) == shorts(metas[3:]))
        it.settle()
        assert it.credit() == shorts(metas[:3])


def test_a_killed_and_restarted_server_holds_nothing_and_is_watched_again(telling: PrivateRedis) -> None:
    metas = chain(3)
    with watched(telling) as it:
        it.until_it_hears()
        it.store(metas)
        telling.kill()
        it.until(lambda: it.watch.hearing is None and bool(it.watch.problem))
        assert "start the server" in it.watch.problem
        telling.restart()
        it.until(lambda: it.credit() == set() and any(isinstance(e, AllBlocksCleared) for e in it.hear()))
        it.until(lambda: it.watch.problem == "" and it.watch.hearing is not None)
        it.store(metas)
        it.settle()
        assert it.credit() == shorts(metas)


def test_a_stalled_server_is_noticed_and_what_it_does_afterwards_is_heard(server: PrivateRedis) -> None:
    metas = chain(3)
    with watched(server, ask_every_s=0.05, patience_s=0.2) as it, client_of(server) as client:
        it.until_it_hears()
        it.store(metas)
        server.pause()
        it.until(lambda: "does not answer in time" in it.watch.problem)
        assert it.credit() == shorts(metas)  # silence is no removal
        server.resume()
        it.until(lambda: it.watch.problem == "")
        client.delete(key(metas[2].hash))
        it.until(lambda: it.credit() == shorts(metas[:2]))


def test_without_any_message_asking_in_turn_finds_what_is_gone(server: PrivateRedis) -> None:
    metas = [block for token in range(300) for block in chain(4, first_token=token)]
    with client_of(server) as client:
        client.execute_command("ACL", "SETUSER", "deaf", "on", ">pw", "~*", "+hello", "+ping", "+exists", "+select")
        with watched(_as_user(server, "deaf"), ask_every_s=0.01) as it:
            it.until_it_hears(Hearing.NONE)
            it.server = server
            it.store(metas)
            gone = metas[::3]
            for meta in gone:
                client.delete(key(meta.hash))
            it.until(lambda: it.credit() == shorts(metas) - shorts(gone))
            client.flushall()
            it.until(lambda: it.credit() == set())
            assert set(it.removed().values()) == {RemovalCause.ABSENT}


@pytest.mark.parametrize("server", ["system"], indirect=True)
@pytest.mark.parametrize(
    ("rules", "hearing", "remedies"),
    [
        ("+@all", Hearing.HINTS, ["CONFIG SET notify-keyspace-events"]),
        ("+@all -config", Hearing.HINTS, ["CONFIG GET", "+config|get"]),
        ("+@all resetchannels", Hearing.HINTS, ["SUBSCRIBE", "+subscribe &__keyevent@*"]),
        ("+@all -client|tracking -subscribe", Hearing.NONE, ["CLIENT TRACKING", "+client|tracking", "+subscribe"]),
    ],
)
def test_what_the_server_refuses_is_named_with_the_rule_that_grants_it(
    server: PrivateRedis, rules: str, hearing: Hearing, remedies: list[str]
) -> None:
    with client_of(server) as client:
        client.execute_command("ACL", "SETUSER", "some", "on", ">pw", "~*", "&*", *rules.split())
    with watched(_as_user(server, "some")) as it:
        it.until_it_hears(hearing)
        assert it.watch.problem == ""
        for remedy in remedies:
            assert remedy in it.watch.advice


@pytest.mark.parametrize("server", ["system"], indirect=True)
def test_without_leave_to_ask_it_is_a_problem_with_the_rule_that_grants_it(server: PrivateRedis) -> None:
    metas = chain(1)
    with client_of(server) as client:
        client.execute_command("ACL", "SETUSER", "mute", "on", ">pw", "~*", "&*", "+@all", "-exists")
        with watched(_as_user(server, "mute")) as it:
            it.until_it_hears()
            it.books.stored(metas, written=1, nbytes=1)
            client.set(key(metas[0].hash), "x")
            it.until(lambda: "+exists" in it.watch.problem)
            assert "ACL SETUSER name" in it.watch.problem
            assert it.credit() == shorts(metas)


@pytest.mark.parametrize("server", ["system"], indirect=True)
def test_the_rule_in_the_advice_is_enough(server: PrivateRedis) -> None:
    with client_of(server) as client:
        client.config_set("notify-keyspace-events", "EA")
        client.execute_command("ACL", "SETUSER", "poor", "on", ">pw", "~warmkv:*", "resetchannels", "+hello", "+exists")
        metas = chain(2)
        with watched(_as_user(server, "poor")) as it:
            it.until_it_hears(Hearing.NONE)
            rule = it.watch.advice.rpartition("ACL SETUSER name ")[2]
        client.execute_command("ACL", "SETUSER", "poor", *rule.split())
        with watched(_as_user(server, "poor")) as it:
            it.until_it_hears(Hearing.EVENTS)
            assert it.watch.advice == ""
            it.server = server
            it.store(metas)
            client.flushall()
            it.until(lambda: any(isinstance(event, AllBlocksCleared) for event in it.hear()))


def test_only_with_leave_are_the_servers_settings_changed(server: PrivateRedis) -> None:
    with client_of(server) as client:
        client.config_set("notify-keyspace-events", "Kx")
        with watched(server) as it:
            it.until_it_hears(Hearing.HINTS)
            assert set(client.config_get("notify-keyspace-events")["notify-keyspace-events"]) == set("Kx")
        with watched(server, may_configure=True) as it:
            it.until_it_hears(Hearing.EVENTS)
            assert set("KEgxe") <= set(client.config_get("notify-keyspace-events")["notify-keyspace-events"])
            assert it.watch.advice == ""


def test_another_database_is_heard(server: PrivateRedis) -> None:
    metas = chain(2)
    url = server.url + "?db=3" if server.url.startswith("unix") else server.url[:-1] + "3"
    with redis.Redis.from_url(url) as client:
        client.config_set("notify-keyspace-events", "EA")
        with watched(_At(server, url)) as it:
            it.until_it_hears(Hearing.EVENTS)
            for meta in metas:
                client.set(key(meta.hash), b"block")
            it.books.stored(metas, written=2, nbytes=1)
            with client_of(server) as other:
                other.set(key(metas[1].hash), b"block")
                other.delete(key(metas[1].hash))  # database 0: not ours
            client.delete(key(metas[0].hash))
            it.until(lambda: set(it.removed()) == shorts(metas[:1]))
            assert it.credit() == shorts(metas[1:])


def test_a_wrong_password_is_a_problem_with_a_remedy_and_without_the_password(server: PrivateRedis) -> None:
    with client_of(server) as client:
        client.config_set("requirepass", "right")
        with watched(_At(server, server.url.replace("://", "://:wrong-secret@"))) as it:
            it.until(lambda: bool(it.watch.problem))
            assert "password" in it.watch.problem
            assert "wrong-secret" not in it.watch.problem


def test_a_server_that_is_down_at_the_start_is_watched_once_it_is_up(server: PrivateRedis) -> None:
    server.kill()
    with watched(server) as it:
        it.until(lambda: "start the server" in it.watch.problem)
        server.restart()
        it.until_it_hears()
        assert it.watch.problem == ""


def test_close_ends_it_while_the_server_is_stalled(server: PrivateRedis) -> None:
    with watched(server) as it:
        it.until_it_hears()
        server.pause()
    server.resume()


def test_an_unusable_url_is_refused() -> None:
    with pytest.raises(TierError, match=r"no Redis URL that can be used; write redis://"):
        RedisWatch("http://x", prefix=b"p", books=RedisBooks())


@pytest.mark.parametrize("server", ["system"], indirect=True)
def test_more_suspects_than_it_keeps_are_asked_for_another_way(
    telling: PrivateRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.redis.watch.MAX_SUSPECTS", 10)
    metas = [block for token in range(100) for block in chain(4, first_token=token)]
    with watched(telling) as it, client_of(telling) as client:
        it.until_it_hears()
        it.store(metas)
        client.delete(*(key(meta.hash) for meta in metas[::2]))
        it.until(lambda: it.credit() == shorts(metas[1::2]))


def test_routers_count_on_what_the_server_holds_once_everybody_is_quiet(telling: PrivateRedis) -> None:
    """Writers, droppers and the server's own expiry at once; the naive model is the server itself."""
    everything = [chain(1, first_token=token)[0] for token in range(64)]
    with watched(telling) as it:
        it.until_it_hears()

        def disturb(seed: int) -> None:
            choose = random.Random(seed)
            with client_of(telling) as client:
                for _ in range(400):
                    meta = choose.choice(everything)
                    match choose.randrange(4):
                        case 0:
                            client.delete(key(meta.hash))
                        case 1:
                            client.set(key(meta.hash), b"block", px=choose.randrange(1, 5))
                            it.books.stored([meta], written=1, nbytes=1)
                        case _:
                            client.set(key(meta.hash), b"block")
                            it.books.stored([meta], written=1, nbytes=1)

        threads = [threading.Thread(target=disturb, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with client_of(telling) as client:
            it.until(lambda: all(client.pttl(key(meta.hash)) < 0 for meta in everything))
            held = {short(meta.hash) for meta in everything if client.exists(key(meta.hash))}
            it.until(lambda: it.credit() == held)


def test_a_tier_tells_of_what_its_server_dropped(telling: PrivateRedis) -> None:
    metas = chain(4)
    tier = make_tier(telling.url, watching=Watching.LISTEN)
    assert tier._server.watch is not None
    until = Watched.until
    until(_Tier(tier), lambda: tier._server.watch.hearing is not None)  # type: ignore[union-attr]
    assert tier.write(metas, payloads(metas)) == 4
    assert tier.stats().problem == ""
    tier.drain_events()
    told: list[KvEvent] = []
    with client_of(telling) as client:
        client.delete(key(metas[3].hash))
    until(_Tier(tier), lambda: bool(told.extend(tier.drain_events()) or told))
    assert [event.hashes for event in told if isinstance(event, BlockRemoved)] == [(short(metas[3].hash),)]
    assert tier.find(metas[3].hash) is None
    assert tier.match([meta.hash for meta in metas]) == 3
    watch = tier._server.watch
    tier.close()
    assert not watch._thread.is_alive()


@pytest.mark.parametrize("server", ["system"], indirect=True)
def test_a_tier_says_how_its_server_could_tell_sooner(server: PrivateRedis) -> None:
    tier = make_tier(server.url, watching=Watching.LISTEN)
    Watched.until(_Tier(tier), lambda: "CONFIG SET notify-keyspace-events" in tier.advice)
    assert tier.stats().problem == ""
    tier.close()
    tier = make_tier(server.url, watching=Watching.CONFIGURE)
    Watched.until(_Tier(tier), lambda: tier._server.watch is not None and tier._server.watch.hearing is Hearing.EVENTS)
    assert "notify" not in tier.advice
    tier.close()


def test_advice_that_was_followed_is_no_longer_given(server: PrivateRedis) -> None:
    with client_of(server) as client:
        client.config_set("notify-keyspace-events", "")
        with watched(server, listen_again_s=0.05) as it:
            it.until_it_hears(Hearing.HINTS)
            assert "notify-keyspace-events Egxe" in it.watch.advice
            client.config_set("notify-keyspace-events", "Egxe")
            it.until(lambda: it.watch.hearing is Hearing.EVENTS)
            assert it.watch.advice == ""
        client.config_set("notify-keyspace-events", "")


class _Tier(Watched):
    """For waiting only."""

    def __init__(self, tier: RedisTier) -> None:
        assert tier._server.watch is not None
        self.watch = tier._server.watch
        self.told = []


class _At(PrivateRedis):
    """The same server under another URL. Owns nothing."""

    def __init__(self, server: PrivateRedis, url: str) -> None:
        self._other = url

    @property
    def url(self) -> str:
        return self._other


def _as_user(server: PrivateRedis, user: str) -> PrivateRedis:
    return _At(server, server.url.replace("://", f"://{user}:pw@"))
