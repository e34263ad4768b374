"""Faults of a disk, one function each: what breaks it, what mends it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from bench.fault_blocks import HARMED, NAMESPACE, VERSION_AT, Shape, payload, shape_of
from bench.fault_rig import COMPUTE_MS, PATIENT_MS, Outcome, Rig, closing, run
from kvstore.blocks import BlockHash
from kvstore.codec import HEADER_NBYTES, BlockCodec
from kvstore.disk.files import PAGE_NBYTES, Files
from kvstore.disk.folder import slab_path
from kvstore.disk.slab import slot_nbytes
from kvstore.disk.tier import DiskTier
from kvstore.errors import CodecError
from kvstore.events import RemovalCause

DAY_S = 86400.0
STALL_S = 0.5
SLOW_S = 0.02  # a read; ten times what a block takes from a disk of 100 MB/s

WRITER = "from bench.fault_disk import write_for_ever; write_for_ever({folder!r}, {chains})"


class TroubledFiles(Files):
    """The system, slow or failing as long as it is told to.

    Attributes:
        write_error, read_error: what every call fails with; 0: nothing. delay_s: that every read takes longer.
        goes_on: while it is not set, no read ends.
    """

    def __init__(self) -> None:
        self.write_error = self.read_error = 0
        self.delay_s = 0.0
        self.goes_on = threading.Event()
        self.goes_on.set()

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """As `Files.pwritev`."""
        if self.write_error:
            raise OSError(self.write_error, os.strerror(self.write_error))
        return super().pwritev(fd, buffers, offset)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """As `Files.preadv`."""
        time.sleep(self.delay_s)
        self.goes_on.wait()
        if self.read_error:
            raise OSError(self.read_error, os.strerror(self.read_error))
        return super().preadv(fd, buffers, offset)


@dataclass(slots=True)
class World:
    """A folder, a store over it and the system below.

    Attributes:
        ahead_s: how far the wall clock is off.
    """

    folder: Path
    files: TroubledFiles
    rig: Rig
    tier: DiskTier
    ahead_s: float = 0.0

    @property
    def slab(self) -> Path:
        """The file of slots."""
        return slab_path(self.folder, NAMESPACE, BlockCodec(self.rig.shape.layout, NAMESPACE).value_nbytes)

    @property
    def starts(self) -> dict[BlockHash, int]:
        """Where in the file of slots each block of the chains lies."""
        codec, found = BlockCodec(self.rig.shape.layout, NAMESPACE), {}
        data, step = self.slab.read_bytes(), slot_nbytes(self.rig.shape.layout.block_nbytes)
        for start in range(PAGE_NBYTES, len(data), step):
            with suppress(CodecError):  # a slot that was never used
                found[codec.parse(data[start : start + HEADER_NBYTES]).hash] = start
        return found

    def harm(self, at: int, change: Callable[[bytes], bytes], length: int = 1) -> None:
        """Change bytes `at` a distance from the start of one block of every chain."""
        starts = self.starts
        with self.slab.open("r+b") as file:
            for metas in self.rig.chains:
                start = starts[metas[HARMED].hash] + at
                file.seek(start)
                old = file.read(length)
                file.seek(start)
                file.write(change(old))


def _nothing(world: World) -> None:
    """It mends itself: what was harmed is found out, dropped, computed and written again."""


def stalls(world: World) -> None:
    world.files.delay_s = STALL_S


def is_slow(world: World) -> None:
    world.files.delay_s = SLOW_S


def is_fast(world: World) -> None:
    world.files.delay_s = 0.0


def hangs(world: World) -> None:
    world.files.goes_on.clear()


def ends(world: World) -> None:
    world.files.goes_on.set()


def reads_fail(world: World) -> None:
    world.files.read_error = errno.EIO


def reads_work(world: World) -> None:
    world.files.read_error = 0


def is_full(world: World) -> None:
    world.files.write_error = errno.ENOSPC
    world.tier.remove([metas[-1].hash for metas in world.rig.chains], RemovalCause.EVICTED)


def has_room(world: World) -> None:
    world.files.write_error = 0


def truncated(world: World) -> None:
    """In the middle of a block of the second chain: what lies behind it is gone, of all chains."""
    os.truncate(world.slab, _cut_at(world))


def _cut_at(world: World) -> int:
    return world.starts[world.rig.chains[1][HARMED].hash] + PAGE_NBYTES + world.rig.shape.layout.block_nbytes // 2


def flipped_bit(world: World) -> None:
    world.harm(PAGE_NBYTES + 100, lambda old: bytes([old[0] ^ 1]))


def foreign_version(world: World) -> None:
    world.harm(VERSION_AT, lambda old: bytes([old[0] ^ 0x40]))


def not_a_block(world: World) -> None:
    world.harm(0, lambda old: b"\0" * len(old), PAGE_NBYTES)


def evicted_behind_our_back(world: World) -> None:
    world.tier.remove([metas[HARMED].hash for metas in world.rig.chains], RemovalCause.EVICTED)


def deleted(world: World) -> None:
    world.slab.unlink()


def clock_goes_back(world: World) -> None:
    world.ahead_s = -DAY_S


def clock_goes_forward(world: World) -> None:
    world.ahead_s = DAY_S


def clock_is_right(world: World) -> None:
    world.ahead_s = 0.0


def _none(world: World) -> Sequence[int]:
    return [0 for _ in world.rig.chains]


def _up_to_the_harm(world: World) -> Sequence[int]:
    return [HARMED for _ in world.rig.chains]


def _all_but_the_last(world: World) -> Sequence[int]:
    return [len(metas) - 1 for metas in world.rig.chains]


def _all(world: World) -> Sequence[int]:
    return [len(metas) for metas in world.rig.chains]


def _up_to_the_cut(world: World) -> Sequence[int]:
    """Of each chain the blocks before the first one that does not end before the cut."""
    cut, starts = _cut_at(world), world.starts
    step = slot_nbytes(world.rig.shape.layout.block_nbytes)
    lost = [[starts[meta.hash] + step > cut for meta in metas] for metas in world.rig.chains]
    return [(*chain, True).index(True) for chain in lost]


Deed = Callable[[World], None]
Due = Callable[[World], Sequence[int]]

FAULTS: dict[str, tuple[Deed, Deed, Due | None]] = {
    "stalls": (stalls, is_fast, None),
    "slow": (is_slow, is_fast, None),
    "read_never_ends": (hangs, ends, None),
    "reads_fail": (reads_fail, reads_work, _none),
    "full": (is_full, has_room, _all_but_the_last),
    "dies_under_load": (reads_fail, reads_work, None),
    "truncated_file": (truncated, _nothing, _up_to_the_cut),
    "flipped_bit": (flipped_bit, _nothing, _up_to_the_harm),
    "foreign_version": (foreign_version, _nothing, _up_to_the_harm),
    "not_a_block": (not_a_block, _nothing, _up_to_the_harm),
    "evicted_behind_our_back": (evicted_behind_our_back, _nothing, _up_to_the_harm),
    "deleted_while_open": (deleted, _nothing, _all),
    "clock_goes_back": (clock_goes_back, clock_is_right, _all),
    "clock_goes_forward": (clock_goes_forward, clock_is_right, _all),
}


def fault(name: str, shape: Shape) -> Outcome:
    """Run one of FAULTS, or `killed_while_writing`."""
    with tempfile.TemporaryDirectory() as folder:
        if name == "killed_while_writing":
            return _killed(Path(folder), shape)
        inject, recover, due = FAULTS[name]
        with _world(Path(folder), shape, COMPUTE_MS if due is None else PATIENT_MS) as world:
            world.rig.fill()
            counts = None if due is None else due(world)
            is_loaded = name in UNDER_LOAD
            outcome = run(world.rig, lambda: inject(world), lambda: recover(world), due=counts, under_load=is_loaded)
            return replace(outcome, misses=world.tier.stats().misses)


UNDER_LOAD = ("dies_under_load",)
NAMES = (*FAULTS, "killed_while_writing")


def _killed(folder: Path, shape: Shape) -> Outcome:
    """A process that writes and removes chains all the time is killed; another one takes the folder over."""
    code = WRITER.format(folder=str(folder), chains=shape.chains)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as writer:
        if writer.stdout is None or not writer.stdout.readline():
            raise RuntimeError("the writer ended before it wrote")
        time.sleep(0.05)
        writer.send_signal(signal.SIGKILL)
    with _world(folder, shape, PATIENT_MS) as world:
        due = [shape.blocks, *(None for _ in world.rig.chains[1:])]
        return run(world.rig, lambda: None, lambda: None, due=due)


def write_for_ever(folder: str, chains: int) -> None:
    """The process that is killed. Says a word when the first chain is written, and lets that one be."""
    shape = shape_of(chains)
    with _world(Path(folder), shape) as world:
        first, *others = world.rig.chains
        world.tier.write(first, [payload(meta.hash, shape.layout) for meta in first])
        print("written", flush=True)
        while True:
            for metas in others:
                world.tier.write(metas, [payload(meta.hash, shape.layout) for meta in metas])
                world.tier.remove([meta.hash for meta in metas], RemovalCause.EVICTED)


@contextmanager
def _world(folder: Path, shape: Shape, block_ms: float = COMPUTE_MS) -> Iterator[World]:
    worlds: list[World] = []
    files = TroubledFiles()
    tier = DiskTier(
        folder,
        4 * shape.chains * shape.blocks * shape.layout.block_nbytes,
        codec=BlockCodec(shape.layout, NAMESPACE),
        clock=time.monotonic,
        wall_clock=lambda: time.time() + sum(world.ahead_s for world in worlds),
        files=files,
    )
    with closing(Rig(shape, disk=tier, block_ms=block_ms)) as rig:
        worlds.append(World(folder, files, rig, tier))
        try:
            yield worlds[0]
        finally:
            files.goes_on.set()
