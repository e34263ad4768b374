"""Faults of another worker that serves its blocks, one function each: what breaks it, what mends it.

`PeerTier` is asked itself: it only reads, so there is nothing to fill, and what does not come would be computed.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from bench.fault_blocks import HARMED, NAMESPACE, Shape, chain, payload, worker
from bench.fault_proxy import HangUpError, Way, proxy
from bench.fault_rig import Outcome, Tally, run
from kvstore.codec import HEADER_NBYTES, BlockCodec
from kvstore.peer.tier import DEFAULT_TIMEOUT_S, PeerTier
from kvstore.tier import BlockMeta

log = logging.getLogger(__name__)

SECRET, OTHER_SECRET = "the fleet's", "another fleet's"
PATIENT_S = 10.0  # where a fault states how many blocks must come
SERVER = "from bench.fault_blocks import serve; serve({chains}, {port}, {secret!r})"


class Peer:
    """Another worker, in a process of its own."""

    def __init__(self, shape: Shape) -> None:
        """Starts it."""
        self._shape = shape
        self._port = 0
        self.start(SECRET)

    @property
    def address(self) -> str:
        """`host:port`; the same after it was started again."""
        return f"127.0.0.1:{self._port}"

    def start(self, secret: str) -> None:
        """A new process, which has all blocks and that secret."""
        code = SERVER.format(chains=self._shape.chains, port=self._port, secret=secret)
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        address = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not address:
            raise RuntimeError("the worker ended before it served; see what it wrote above")
        self._port = int(address.rpartition(":")[2])

    def signal(self, number: signal.Signals) -> None:
        """Send its process one."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """End its process without a word."""
        self._process.kill()
        self._process.communicate()


class NearPeer:
    """Another worker in this process, where its end need not be a hard one."""

    def __init__(self, shape: Shape) -> None:
        """Starts it."""
        self._shape = shape
        self._server = worker(shape, 0, SECRET)
        self.address = self._server.address

    def start(self, secret: str) -> None:
        """As `Peer.start`."""
        self._server = worker(self._shape, int(self.address.rpartition(":")[2]), secret)

    def signal(self, number: signal.Signals) -> None:
        """It has no process of its own.

        Raises:
            TypeError: always.
        """
        raise TypeError("signals are for processes; name the case in PROCESSES")

    def kill(self) -> None:
        """End it."""
        self._server.close()


class PeerRig:
    """Requests that read prefixes from a peer; see `fault_rig.Asked`."""

    def __init__(self, shape: Shape, tier: PeerTier) -> None:
        self.shape = shape
        self.tally = Tally()
        self.chains = [chain(shape, number) for number in range(shape.chains)]
        self._tier = tier

    def request(self, metas: Sequence[BlockMeta]) -> int:
        """Read a prefix and check what comes."""
        into = [memoryview(bytearray(self.shape.layout.block_nbytes)) for _ in metas]
        started, count = time.perf_counter(), 0
        try:
            count = self._tier.read([meta.hash for meta in metas], into).count
        except Exception:  # whatever it is: a request would have failed, and that is what is counted
            log.exception("a request failed")
            self.tally.failed += 1
        self.tally.added_ms.append(1e3 * (time.perf_counter() - started))
        for meta, found in zip(metas[:count], into, strict=False):
            self.tally.wrong_blocks += found != payload(meta.hash, self.shape.layout)
        self.tally.blocks.append(count)
        return count

    def between(self) -> None:
        """Nothing is kept."""

    def forget(self) -> None:
        """Nothing is kept."""


@dataclass(frozen=True, slots=True)
class World:
    """A worker, the way to it, and who asks it."""

    peer: Peer | NearPeer
    way: Way
    rig: PeerRig


def dies(world: World) -> None:
    world.peer.kill()


def comes_back(world: World) -> None:
    world.peer.start(SECRET)


def stalls(world: World) -> None:
    world.peer.signal(signal.SIGSTOP)


def goes_on(world: World) -> None:
    world.peer.signal(signal.SIGCONT)


def has_another_secret(world: World) -> None:
    world.peer.kill()
    world.peer.start(OTHER_SECRET)


def has_our_secret(world: World) -> None:
    world.peer.kill()
    world.peer.start(SECRET)


def flipped_bytes(world: World) -> None:
    """In the middle of one block of every answer."""
    world.way.say(_Flipping(world.rig.shape))


def hangs_up(world: World) -> None:
    """In the middle of one block of every answer."""
    world.way.say(_Flipping(world.rig.shape, hangs_up=True))


def is_slow(world: World) -> None:
    """Every answer comes in small pieces."""
    world.way.say(_slowly)


def is_honest(world: World) -> None:
    world.way.say_as_it_is()


def _slowly(data: bytes) -> bytes:
    time.sleep(0.01)
    return data


class _Flipping:
    """Changes one byte of the block HARMED of each answer to a read, for connections that are open already."""

    def __init__(self, shape: Shape, *, hangs_up: bool = False) -> None:
        value = HEADER_NBYTES + shape.layout.block_nbytes
        self._at = HARMED * value + value // 2
        self._end = shape.blocks * value + HEADER_NBYTES
        self._said = 0
        self._hangs_up = hangs_up

    def __call__(self, data: bytes) -> bytes:
        place, self._said = self._at - self._said, self._said + len(data)
        if not 0 <= place < len(data):
            return data
        self._said = 0
        if self._hangs_up:
            raise HangUpError(data[:place])
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


Deed = Callable[[World], None]

FAULTS: dict[str, tuple[Deed, Deed, int | None]] = {  # what breaks it, what mends it, how many blocks must come
    "dies_under_load": (dies, comes_back, None),
    "down_at_start": (dies, comes_back, None),
    "stalls": (stalls, goes_on, None),
    "slow": (is_slow, is_honest, None),
    "wrong_secret": (has_another_secret, has_our_secret, 0),
    "flipped_bytes": (flipped_bytes, is_honest, HARMED),
    "hangs_up": (hangs_up, is_honest, HARMED),
}
NAMES = tuple(FAULTS)
UNDER_LOAD = ("dies_under_load",)
PROCESSES = ("dies_under_load", "down_at_start", "stalls")


def fault(name: str, shape: Shape) -> Outcome:
    """Run one of FAULTS."""
    inject, recover, due = FAULTS[name]
    peer = Peer(shape) if name in PROCESSES else NearPeer(shape)
    with _world(peer, shape, PATIENT_S if due else DEFAULT_TIMEOUT_S) as world:
        for metas in world.rig.chains if name != "down_at_start" else ():
            world.rig.request(metas)
        first = None if due is None else [due, *(None for _ in world.rig.chains[1:])]
        is_loaded = name in UNDER_LOAD
        return run(
            world.rig, lambda: inject(world), lambda: recover(world), due=first, lasts=False, under_load=is_loaded
        )


@contextmanager
def _world(peer: Peer | NearPeer, shape: Shape, timeout_s: float) -> Iterator[World]:
    try:
        with proxy(peer.address) as way:
            tier = PeerTier(way.address, codec=BlockCodec(shape.layout, NAMESPACE), secret=SECRET, timeout_s=timeout_s)
            try:
                yield World(peer, way, PeerRig(shape, tier))
            finally:
                tier.close()
    finally:
        peer.kill()
