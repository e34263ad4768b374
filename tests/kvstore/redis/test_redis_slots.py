"""Which node of a cluster serves which key, as its nodes tell it."""

from __future__ import annotations

import pytest
import redis

from kvstore.errors import TierError
from kvstore.redis.address import at_node, is_cluster, parse_seeds
from kvstore.redis.slots import Primary, SlotMap, parse_slots, slots_under
from tests.kvstore.blocks_for_tests import chain

A, B = Primary("10.0.0.1", 7000, "a"), Primary("::1", 7001, "b")


def test_slots_belong_to_their_primaries_and_replicas_are_not_asked() -> None:
    reply = [
        [0, 99, [b"10.0.0.1", 7000, b"a", []], [b"10.0.0.9", 7009, b"replica", []]],
        [200, 16383, [b"::1", 7001, b"b", [b"hostname", b"x"]]],
        [150, 150, [b"10.0.0.1", 7000, b"a"]],
    ]
    slots = parse_slots(reply, asked="seed")
    assert slots.primaries == (A, B)
    assert slots.unserved == 99
    assert slots.split([0, 99, 100, 149, 150, 151, 199, 200, 16383]) == {A: [0, 1, 4], None: [2, 3, 5, 6], B: [7, 8]}


def test_the_slot_of_a_block_is_that_of_its_key() -> None:
    slot = slots_under(b"warmkv:0001020304050607:")
    for meta in chain(200):
        assert slot(meta.hash) == redis.crc.key_slot(b"warmkv:0001020304050607:" + meta.hash.hex().encode())


@pytest.mark.parametrize("host", [None, b""])
def test_a_node_that_does_not_know_its_address_means_the_one_that_was_asked(host: bytes | None) -> None:
    assert parse_slots([[0, 16383, [host, 7000, b"a"]]], asked="seed").primaries == (Primary("seed", 7000, "a"),)


def test_an_empty_map_serves_nothing() -> None:
    for slots in (SlotMap(), parse_slots([], asked="seed")):
        assert slots.split([7, 9]) == {None: [0, 1]}
        assert slots.unserved == 16384


@pytest.mark.parametrize(
    "reply",
    [
        None,
        5,
        b"x",
        [5],
        [[0]],
        [[0, 5]],
        [[0, 5, [b"h"]]],
        [[0, 5, [b"h", b"p"]]],
        [[0, 20_000, [b"h", 1]]],
        [[9, 1, 1]],
    ],
)
def test_an_odd_answer_is_refused(reply: object) -> None:
    with pytest.raises(redis.InvalidResponse):
        parse_slots(reply, asked="seed")


def test_the_servers_refusal_is_passed_on() -> None:
    with pytest.raises(redis.exceptions.NoPermissionError):
        parse_slots(redis.exceptions.NoPermissionError("no"), asked="seed")


def test_seeds_of_a_url() -> None:
    url = "rediss+cluster://user:p%40ss@one:7000,two,[::1]:7002/?ssl_cert_reqs=none"
    options = "?ssl_cert_reqs=none"
    assert is_cluster(url)
    assert parse_seeds(url) == [
        f"rediss://user:p%40ss@one:7000{options}",
        f"rediss://user:p%40ss@two:6379{options}",
        f"rediss://user:p%40ss@[::1]:7002{options}",
    ]
    assert at_node(parse_seeds(url)[0], "::2", 5) == f"rediss://user:p%40ss@[::2]:5{options}"
    assert not is_cluster("redis://one")


@pytest.mark.parametrize(
    "url", ["redis+cluster://", "redis+cluster://a,,b", "redis+cluster://a/3", "redis+cluster://u:s3cret@a:b"]
)
def test_an_unusable_url_of_a_cluster_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(TierError, match=r"redis\+cluster://\[user:password@\]node") as caught:
        parse_seeds(url)
    assert "s3cret" not in str(caught.value)
