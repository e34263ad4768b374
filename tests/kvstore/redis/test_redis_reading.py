"""How a read talks to its server: everything in one conversation, TTLs that begin again included."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from deploy.redis_server import PrivateRedis
from kvstore.blocks import BlockHash
from kvstore.codec import BlockCodec
from kvstore.errors import LayoutError, MissReason
from kvstore.redis.commands import WINDOW, BlockCommands
from kvstore.redis.reading import BlockReading
from kvstore.redis.resp import Wire
from kvstore.redis.tier import RedisTier, key_prefix
from kvstore.tier import BlockMeta, Delivery
from tests.kvstore import blocks_for_tests
from tests.kvstore.blocks_for_tests import chain, names
from tests.kvstore.redis import redis_for_tests
from tests.kvstore.redis.redis_for_tests import NAMESPACE, SERVERS, binary, client_of, fields_of, key
from tests.kvstore.redis.redis_for_tests import WIDE as LAYOUT

make_tier = partial(redis_for_tests.make_tier, layout=LAYOUT)
payload = partial(blocks_for_tests.payload, layout=LAYOUT)
payloads = partial(blocks_for_tests.payloads, layout=LAYOUT)
buffers = partial(blocks_for_tests.buffers, layout=LAYOUT)

CODEC = BlockCodec(LAYOUT, NAMESPACE)
COMMANDS = BlockCommands(key_prefix(NAMESPACE), CODEC)
DAY_S = 86400.0


class Flights:
    """A server at the other end of a slow line, in place of a socket.

    What has been sent before the reader runs dry arrives there together, and so do the answers: one flight.

    Attributes:
        flights: how many there were. asked: the commands, in order. most: values that were ever under way.
    """

    def __init__(self, held: Sequence[BlockMeta], answer_renewal: Callable[[list[bytes]], bytes] | None = None) -> None:
        self.flights = self.most = 0
        self.asked: list[list[bytes]] = []
        self._values = {key(meta.hash).encode(): fields_of(meta) for meta in held}
        self._answer_renewal = answer_renewal or (lambda words: b":1\r\n")
        self._waiting: list[list[bytes]] = []
        self._values_sent = self._values_taken = 0
        self._answers = b""

    def send(self, parts: Sequence[bytes | memoryview]) -> None:
        words = iter(b"".join(bytes(part) for part in parts).split(b"\r\n"))
        while head := next(words, b""):
            command = [word for _, word in ((next(words), next(words)) for _ in range(int(head[1:])))]
            self._waiting.append(command)

    def receive(self, target: memoryview, *, whole: bool = False) -> int:
        if not self._answers:
            assert self._waiting, "the reader waits for what it has not asked for"
            self.flights += 1
            self.most = max(self.most, sum(command[0] == b"HMGET" for command in self._waiting))
            self.asked += self._waiting
            self._answers = b"".join(map(self._answer, self._waiting))
            self._waiting.clear()
        count = min(len(target), len(self._answers))
        target[:count] = self._answers[:count]
        self._answers = self._answers[count:]
        return count

    def is_quiet(self) -> bool:
        return not self._answers and not self._waiting

    def _answer(self, words: list[bytes]) -> bytes:
        if words[0] != b"HMGET":
            return self._answer_renewal(words)
        value = self._values.get(words[1])
        if value is None:
            return b"*2\r\n$-1\r\n$-1\r\n"
        return b"*2\r\n" + b"".join(b"$%d\r\n%b\r\n" % (len(value[f]), value[f]) for f in (b"h", b"d"))


def converse(
    flights: Flights, metas: Sequence[BlockMeta], known: Sequence[BlockMeta] = (), *, by_script: bool = False
) -> tuple[list[BlockMeta], redis.ResponseError | None]:
    """What a whole read returns; nothing may be left over."""
    wire = Wire(time.monotonic)
    wire._transport = flights
    into = buffers(len(metas))
    talk = BlockReading(
        wire, COMMANDS, names(metas), into, known={meta.hash: meta for meta in known}, by_script=by_script
    )
    arrived = list(talk.blocks())
    refusal = talk.settle()
    assert [bytes(b) for b in into[: len(arrived)]] == [bytes(payload(meta.hash)) for meta in arrived]
    assert wire.is_quiet()
    return arrived, refusal


def flights_of(count: int) -> int:
    """Values alone: a window of them at a time."""
    return -(-count // WINDOW)


@pytest.mark.parametrize("count", [1, 3, WINDOW, WINDOW + 1, 12, 31])
def test_a_read_of_known_blocks_waits_for_its_values_and_for_nothing_else(count: int) -> None:
    metas = chain(count, ttl_s=DAY_S)
    flights = Flights(metas)
    assert converse(flights, metas, known=metas) == (metas, None)
    assert flights.flights == flights_of(count)
    pairs = [command[:2] for command in flights.asked]
    assert pairs == [[verb, key(meta.hash).encode()] for meta in metas for verb in (b"HMGET", b"PEXPIRE")]


@pytest.mark.parametrize("count", [1, 3, WINDOW, WINDOW + 1, 12, 31])
def test_a_read_of_blocks_that_only_their_headers_know_waits_once_more_at_its_end(count: int) -> None:
    metas = chain(count, ttl_s=DAY_S)
    flights = Flights(metas)
    assert converse(flights, metas) == (metas, None)
    assert flights.flights == flights_of(count) + 1
    renewed = [command for command in flights.asked if command[0] == b"PEXPIRE"]
    assert renewed == [[b"PEXPIRE", key(meta.hash).encode(), b"86400000", b"GT"] for meta in metas]
    behind = flights.asked[flights.asked.index(pack_words("HMGET", metas[-1])) :]
    assert sum(command[0] == b"PEXPIRE" for command in behind) <= WINDOW + 1  # the others went along


def pack_words(verb: str, meta: BlockMeta) -> list[bytes]:
    return [verb.encode(), key(meta.hash).encode(), b"h", b"d"]


def test_blocks_without_a_ttl_cost_no_command() -> None:
    metas = chain(9)
    flights = Flights(metas)
    assert converse(flights, metas, known=metas[:4]) == (metas, None)
    assert {command[0] for command in flights.asked} == {b"HMGET"}
    assert flights.flights == flights_of(9)


@given(
    known=st.lists(st.sampled_from([None, 100.0, DAY_S, 9 * DAY_S, "unknown"]), min_size=1, max_size=14),
    own=st.lists(st.sampled_from([None, 100.0, DAY_S]), min_size=14, max_size=14),
    held=st.integers(0, 14),
    by_script=st.booleans(),
)
def test_each_block_that_arrives_is_given_the_longer_ttl_whoever_knows_it(
    known: list[float | str | None], own: list[float | None], held: int, by_script: bool
) -> None:
    metas = [replace(meta, ttl_s=ttl) for meta, ttl in zip(chain(len(known)), own, strict=False)]
    believed = [replace(m, ttl_s=t) for m, t in zip(metas, known, strict=True) if not isinstance(t, str)]
    limits: dict[bytes, float] = {}

    def renew(words: list[bytes]) -> bytes:
        at, limit = (3, words[-1]) if words[0] == b"EVALSHA" else (1, words[2] if words[0] == b"PEXPIRE" else b"inf")
        limits[words[at]] = max(limits.get(words[at], 0.0), float(limit) / 1000)
        return b":1\r\n"

    flights = Flights(metas[:held], renew)
    arrived, refusal = converse(flights, metas, believed, by_script=by_script)
    assert refusal is None
    assert flights.most <= WINDOW
    assert names(arrived) == names(metas[:held])
    for meta, believes in zip(arrived, known, strict=False):
        ttls = [own[names(metas).index(meta.hash)], *([] if isinstance(believes, str) else [believes])]
        longest = max(float("inf") if ttl is None else ttl for ttl in ttls)
        assert (meta.ttl_s if meta.ttl_s is not None else float("inf")) == longest
        if ttls[0] is not None:  # else the server holds it without one, and nothing can be longer
            assert limits[key(meta.hash).encode()] == longest


def test_a_refusal_to_renew_ends_no_read() -> None:
    metas = chain(7, ttl_s=DAY_S)
    for believed in ([], metas[:3], metas):
        flights = Flights(metas, lambda words: b"-NOPERM no permission\r\n")
        arrived, refusal = converse(flights, metas, believed)
        assert arrived == metas
        assert isinstance(refusal, redis.exceptions.NoPermissionError)


def test_a_script_that_the_server_forgot_is_sent_once_for_all() -> None:
    metas = chain(7, ttl_s=DAY_S)
    answers = {b"EVALSHA": b"-NOSCRIPT none\r\n", b"EVAL": b":0\r\n"}
    flights = Flights(metas, lambda words: answers[words[0]])
    assert converse(flights, metas, by_script=True) == (metas, None)
    last = flights.asked[-1]
    assert (last[0], last[2]) == (b"EVAL", b"7")
    assert last[3:] == [key(meta.hash).encode() for meta in metas] + [b"86400000"] * 7


@pytest.mark.parametrize("said", [b"+OK\r\n", b"$1\r\n1\r\n", b"*0\r\n", b"*2\r\n$-1\r\n$-1\r\n", b":x\r\n"])
def test_anything_but_a_number_behind_a_value_ends_the_conversation(said: bytes) -> None:
    metas = chain(7, ttl_s=DAY_S)
    with pytest.raises(redis.InvalidResponse):
        converse(Flights(metas, lambda words: said), metas, metas)


def test_a_wrong_value_behind_a_gap_is_not_what_ends_a_read(server: PrivateRedis) -> None:
    """The gap is a miss of its own kind; and nothing is dropped for what lies behind it."""
    metas = chain(3)
    with closing(make_tier(server.url)) as tier, client_of(server) as client:
        tier.write(metas, payloads(metas))
        client.delete(*(key(meta.hash) for meta in metas[1:]))
        client.set(key(metas[2].hash), b"no block")
        assert tier.read(names(metas), buffers(3)) == Delivery(1, MissReason.ABSENT)
        assert tier.stats().misses == {"absent": 1}
        assert tier.stats().removals == {"absent": 1}
        assert client.exists(key(metas[2].hash))


def test_buffers_of_another_size_are_refused_before_anything_is_asked() -> None:
    flights = Flights([])
    wire = Wire(time.monotonic)
    wire._transport = flights
    short = [memoryview(bytearray(LAYOUT.block_nbytes - 1))]
    with pytest.raises(LayoutError, match="give it buffers of that size"):
        BlockReading(wire, COMMANDS, names(chain(1)), short, known={}, by_script=False)


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[PrivateRedis]:
    with PrivateRedis(binary=binary(request.param), maxmemory_bytes=64 << 20, port=0) as running:
        yield running


def read(tier: RedisTier, metas: Sequence[BlockMeta]) -> int:
    into = buffers(len(metas))
    count = tier.read(names(metas), into).count
    assert [bytes(b) for b in into[:count]] == [bytes(payload(name)) for name in names(metas)[:count]]
    return count


def ttl_s(client: redis.Redis, name: BlockHash) -> float:
    return float(client.pttl(key(name))) / 1000


def test_a_real_server_hears_all_of_a_read_over_one_connection(server: PrivateRedis) -> None:
    metas = chain(11, ttl_s=DAY_S)
    writer, reader = make_tier(server.url), make_tier(server.url)
    writer.write(metas, payloads(metas))
    writer.touch(names(metas))  # a server before 7.0 has the script now
    with client_of(server) as client, client_of(server) as other, client.monitor() as monitor:
        other.ping()
        for tier in (writer, reader):
            assert read(tier, metas) == 11
            other.echo("end of read")
            heard = itertools.takewhile(lambda line: "end of read" not in line["command"], monitor.listen())
            # Commands of a script are heard, too, as coming from it; and so are those that open a connection.
            asked = [line for line in heard if line["client_type"] != "lua" and key(b"")[:-1] in line["command"]]
            assert len({line["client_port"] for line in asked}) == 1
            verbs = [line["command"].split()[0] for line in asked]
            renewing = "PEXPIRE" if server.binary.origin == "system" else "EVALSHA"
            if tier is writer:
                assert verbs == ["HMGET", renewing] * 11
            else:
                assert sorted(verbs) == sorted(["HMGET", renewing] * 11)
    writer.close()
    reader.close()


def test_a_read_lets_the_longer_ttl_of_header_and_reader_begin_again(server: PrivateRedis) -> None:
    metas = chain(6, ttl_s=100.0)
    tier, stranger = make_tier(server.url), make_tier(server.url)
    tier.write(metas, payloads(metas))
    assert tier.refresh([replace(meta, ttl_s=DAY_S) for meta in metas[:2]]) == []
    assert tier.refresh([replace(meta, ttl_s=None) for meta in metas[2:4]]) == []
    with client_of(server) as client:
        for meta in metas:
            client.pexpire(key(meta.hash), 50_000)
        assert read(stranger, metas) == 6
        assert all(90 < ttl_s(client, name) <= 100 for name in names(metas))
        assert read(tier, metas) == 6
        assert all(0.9 * DAY_S < ttl_s(client, name) <= DAY_S for name in names(metas[:2]))
        assert [client.pttl(key(name)) for name in names(metas[2:4])] == [-1, -1]
        assert all(90 < ttl_s(client, name) <= 100 for name in names(metas[4:]))
        for meta in metas[:2]:
            client.pexpire(key(meta.hash), 50_000)
        assert read(tier, metas) == 6  # the reader has not forgotten
        assert all(0.9 * DAY_S < ttl_s(client, name) <= DAY_S for name in names(metas[:2]))
    assert tier.stats().problem == ""
    for one in (tier, stranger):
        one.check()
        one.close()


def test_blocks_before_a_gap_or_a_wrong_value_are_renewed(server: PrivateRedis) -> None:
    metas = chain(9, ttl_s=DAY_S)
    for stranger in (False, True):
        for damage in ("delete", "damage"):
            tier = make_tier(server.url)
            tier.write(metas, payloads(metas))
            reader = make_tier(server.url) if stranger else tier
            with client_of(server) as client:
                for meta in metas:
                    client.pexpire(key(meta.hash), 50_000)
                if damage == "delete":
                    client.delete(key(metas[6].hash))
                else:
                    client.hset(key(metas[6].hash), "d", b"x" * 10)
                assert read(reader, metas) == 6
                assert all(ttl_s(client, name) > 0.9 * DAY_S for name in names(metas[:6]))
            assert reader.stats().misses == {"absent" if damage == "delete" else "truncated": 1}
            assert reader.stats().problem == ""
            for one in {tier, reader}:
                one.close()


def test_who_may_not_renew_reads_all_the_same_and_is_told_the_grant(server: PrivateRedis) -> None:
    metas = chain(5, ttl_s=DAY_S)
    owner = make_tier(server.url)
    owner.write(metas, payloads(metas))
    with client_of(server) as client:
        client.execute_command("ACL", "SETUSER", "w", "on", ">p", "~*", "+@all", "-pexpire", "-evalsha", "-eval")
        tier = make_tier(server.url.replace("://", "://w:p@"))
        assert read(tier, metas) == 5
        stats = tier.stats()
        assert (stats.hits, stats.misses, stats.healthy) == (5, {}, True)
        assert "grant it with ACL SETUSER" in stats.problem
        client.execute_command("ACL", "SETUSER", "w", "+pexpire", "+evalsha", "+eval")
        assert read(tier, metas) == 5
        assert tier.stats().problem == ""
    tier.close()
    owner.close()
