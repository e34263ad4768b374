"""Faults of a Redis server, one function each: what breaks it, what mends it."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import redis

from bench.fault_blocks import HARMED, NAMESPACE, VERSION_AT, Shape
from bench.fault_proxy import proxy
from bench.fault_rig import COMPUTE_MS, PATIENT_MS, Outcome, Rig, closing, run
from deploy.redis_server import PrivateRedis
from kvstore.blocks import BlockHash
from kvstore.codec import BlockCodec
from kvstore.redis.tier import RedisTier

TIMEOUT_S = 0.05
PATIENT_S = 10.0  # where a fault states how many blocks must come
DAY_S = 86400.0
ALL = 1 << 30  # blocks: however many there are


@dataclass(slots=True)
class World:
    """A server, a store in front of it and a client that does harm.

    Attributes:
        ahead_s: how far the wall clock is off.
    """

    server: PrivateRedis
    rig: Rig
    client: redis.Redis
    tier: RedisTier
    ahead_s: float = 0.0

    def tamper(self, harm: Callable[[bytes, BlockHash], object]) -> None:
        """Do it to one block of every chain."""
        for metas in self.rig.chains:
            name = metas[HARMED].hash
            harm(f"warmkv:{NAMESPACE[:8].hex()}:{name.hex()}".encode(), name)


def _nothing(world: World) -> None:
    """It mends itself: what was harmed is found out, dropped, computed and written again."""


def stalls(world: World) -> None:
    world.server.pause()


def goes_on(world: World) -> None:
    world.server.resume()


def dies(world: World) -> None:
    world.server.kill()


def comes_back_empty(world: World) -> None:
    world.server.restart()


def is_full(world: World) -> None:
    world.client.config_set("maxmemory-policy", "noeviction")
    world.client.config_set("maxmemory", "1mb")
    world.tamper(lambda key, name: world.client.delete(key))


def has_room(world: World) -> None:
    world.client.config_set("maxmemory", "0")


def truncated(world: World) -> None:
    world.tamper(lambda key, name: world.client.hset(key, "d", _field(world, key, b"d")[:-100]))


def over_long(world: World) -> None:
    world.tamper(lambda key, name: world.client.hset(key, "d", _field(world, key, b"d") + b"x" * 100))


def flipped_bit(world: World) -> None:
    def flip(key: bytes, name: BlockHash) -> None:
        value = bytearray(_field(world, key, b"d"))
        value[len(value) // 2] ^= 1
        world.client.hset(key, "d", bytes(value))

    world.tamper(flip)


def wrong_type(world: World) -> None:
    def replace(key: bytes, name: BlockHash) -> None:
        world.client.delete(key)
        world.client.lpush(key, "no block")

    world.tamper(replace)


def foreign_version(world: World) -> None:
    def change(key: bytes, name: BlockHash) -> None:
        head = bytearray(_field(world, key, b"h"))
        head[VERSION_AT] ^= 0x40
        world.client.hset(key, "h", bytes(head))

    world.tamper(change)


def anothers_bytes(world: World) -> None:
    """The whole value of another block under this name."""
    other = f"warmkv:{NAMESPACE[:8].hex()}:{world.rig.chains[0][0].hash.hex()}"
    world.tamper(lambda key, name: world.client.copy(other, key.decode(), replace=True))


def evicted_behind_our_back(world: World) -> None:
    world.tamper(lambda key, name: world.client.delete(key))


def half_written(world: World) -> None:
    """A writer that died in the middle of a command."""

    def cut(key: bytes, name: BlockHash) -> None:
        head = _field(world, key, b"h")
        world.client.delete(key)
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(world.server.url).removeprefix("unix://"))
            peer.sendall(
                b"*4\r\n$4\r\nHSET\r\n$%d\r\n%b\r\n$1\r\nh\r\n$%d\r\n%b" % (len(key), key, len(head), head[:99])
            )

    world.tamper(cut)


def clock_goes_back(world: World) -> None:
    world.ahead_s = -DAY_S


def clock_goes_forward(world: World) -> None:
    world.ahead_s = DAY_S


def clock_is_right(world: World) -> None:
    world.ahead_s = 0.0


def wrong_password(world: World) -> None:
    world.client.config_set("requirepass", "changed")
    world.client.auth("changed")
    world.client.client_kill_filter(_type="normal", skipme=True)


def right_password(world: World) -> None:
    world.client.config_set("requirepass", "")


def flushed(world: World) -> None:
    world.client.flushall()


Deed = Callable[[World], None]

FAULTS: dict[str, tuple[Deed, Deed, int | None]] = {  # what breaks it, what mends it, how many blocks must come
    "dies_under_load": (dies, comes_back_empty, None),
    "stalls": (stalls, goes_on, None),
    "full": (is_full, has_room, HARMED),
    "truncated_value": (truncated, _nothing, HARMED),
    "over_long_value": (over_long, _nothing, HARMED),
    "flipped_bit": (flipped_bit, _nothing, HARMED),
    "wrong_type": (wrong_type, _nothing, HARMED),
    "foreign_version": (foreign_version, _nothing, HARMED),
    "anothers_bytes": (anothers_bytes, _nothing, HARMED),
    "evicted_behind_our_back": (evicted_behind_our_back, _nothing, HARMED),
    "half_written": (half_written, _nothing, HARMED),
    "clock_goes_back": (clock_goes_back, clock_is_right, ALL),
    "clock_goes_forward": (clock_goes_forward, clock_is_right, ALL),
    "wrong_password": (wrong_password, right_password, None),
    "flushed": (flushed, _nothing, 0),
}
UNDER_LOAD = ("dies_under_load",)


def fault(name: str, shape: Shape) -> Outcome:
    """Run one of FAULTS, `down_at_start` or `slow`."""
    if name == "down_at_start":
        return _down_at_start(shape)
    if name == "slow":
        return _slow(shape)
    inject, recover, due = FAULTS[name]
    counts = None if due is None else [min(due, shape.blocks)] * shape.chains
    with PrivateRedis() as server, _world(server, server.url, shape, patient=due is not None) as world:
        world.rig.fill()
        is_loaded = name in UNDER_LOAD
        outcome = run(world.rig, lambda: inject(world), lambda: recover(world), due=counts, under_load=is_loaded)
        return replace(outcome, misses=world.tier.stats().misses)


NAMES = (*FAULTS, "down_at_start", "slow")


def _down_at_start(shape: Shape) -> Outcome:
    with PrivateRedis() as server:
        server.kill()
        with _world(server, server.url, shape) as world:
            return run(world.rig, lambda: None, server.restart)


def _slow(shape: Shape) -> Outcome:
    """Every answer comes in small pieces, a tenth of what a block's deadline wants."""
    with (
        PrivateRedis(port=0) as server,
        proxy(server.url.removeprefix("redis://").removesuffix("/0")) as way,
        _world(server, f"redis://{way.address}/0", shape) as world,
    ):
        world.rig.fill()
        return run(world.rig, lambda: way.say(_slowly), way.say_as_it_is)


def _slowly(data: bytes) -> bytes:
    time.sleep(0.01)
    return data


@contextmanager
def _world(server: PrivateRedis, url: str, shape: Shape, *, patient: bool = False) -> Iterator[World]:
    worlds: list[World] = []
    tier = RedisTier(
        url,
        codec=BlockCodec(shape.layout, NAMESPACE),
        timeout_s=PATIENT_S if patient else TIMEOUT_S,
        wall_clock=lambda: time.time() + sum(world.ahead_s for world in worlds),
    )
    rig = Rig(shape, shared=tier, block_ms=PATIENT_MS if patient else COMPUTE_MS)
    with closing(rig), redis.Redis.from_url(server.url) as client:
        worlds.append(World(server, rig, client, tier))
        yield worlds[0]


def _field(world: World, key: bytes, field: bytes) -> bytes:
    value = world.client.hget(key, field)
    if not isinstance(value, bytes):
        raise RuntimeError(f"{key!r} has no field {field!r}: the tier was not filled")
    return value
