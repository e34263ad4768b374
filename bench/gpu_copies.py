"""Blocks to page-locked host memory and back, as the engine moves them: in the batches that steps and prompts bring."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from bench.gpu_rig import GpuRig
from kvstore.blocks import BlockHash
from kvstore.copier import Copy
from kvstore.events import RemovalCause
from kvstore.store import ReadTiers
from workers.sequence import Acquisition

HOST_ONLY = ReadTiers(device=True, host=True, disk=False, shared=False, peer=False)
AHEAD = 3  # batches that are kept on their way beside a decode: the bus has the next one before it ends the last
FLUSH_S = 30.0


@dataclass(slots=True)
class Watched:
    """Copies that were begun while somebody looked: blocks of each, and its end."""

    copies: list[tuple[int, Copy]]
    block_nbytes: int
    _ended: int = 0
    _ended_blocks: int = 0
    _marks: list[tuple[float, int]] = field(default_factory=list)

    def mark(self) -> None:
        """Note how much has been copied by now."""
        while self._ended < len(self.copies) and self.copies[self._ended][1].is_done():
            self._ended_blocks += self.copies[self._ended][0]
            self._ended += 1
        self._marks.append((time.perf_counter(), self._ended_blocks))

    def gb_s(self) -> float:
        """Bytes that arrived between the first mark and the last one, by the time between them."""
        (begun, before), (ended, after) = self._marks[0], self._marks[-1]
        return (after - before) * self.block_nbytes / (ended - begun) / 1e9

    def bus_gb_s(self) -> float | None:
        """Bytes by the time that the copies themselves took, one after the other; None: nobody measured it."""
        times = [each.took_ms() for _, each in self.copies]
        known = [took for took in times if took is not None]
        if len(known) < len(times) or not sum(known):
            return None
        return sum(count for count, _ in self.copies) * self.block_nbytes / sum(known) / 1e6


@contextmanager
def watched(rig: GpuRig, verb: str) -> Iterator[Watched]:
    """Look at what the rig's copier is asked for: `copy_out` or `copy_in`."""
    copier = rig.device.copier
    seen = Watched([], rig.device.block_nbytes)
    real: Callable[..., Copy] = getattr(copier, verb)

    def noted(first: Sequence[object], second: Sequence[object]) -> Copy:
        copy = real(first, second)
        seen.copies.append((len(first), copy))
        return copy

    setattr(copier, verb, noted)
    try:
        yield seen
    finally:
        setattr(copier, verb, real)


@dataclass(frozen=True, slots=True)
class Moved:
    """One measurement: of the whole, of the copies alone, and of the engine's thread per block."""

    gb_s: float
    bus_gb_s: float | None
    host_us: float


def allocated(rig: GpuRig, count: int) -> list[int]:
    """So many blocks of the pool.

    Raises:
        RuntimeError: it has no room.
    """
    block_ids = rig.store.allocate(count)
    if block_ids is None:
        raise RuntimeError(f"the pool has no room for {count} blocks; give it more")
    return block_ids


def batch_blocks(rig: GpuRig) -> int:
    """Blocks that a full step of prefill commits."""
    return max(1, min(rig.scale.moved, rig.scale.max_batch_tokens // rig.device.layout.block_size))


def spill(rig: GpuRig) -> Moved:
    """`moved` blocks go to host, a step's worth at a time: while one is copied, the next one is named."""
    size, count = batch_blocks(rig), rig.scale.moved
    batches = [(allocated(rig, size), rig.fresh_metas(size)) for _ in range(count // size)]
    with watched(rig, "copy_out") as seen:
        started, host_s = time.perf_counter(), 0.0
        for block_ids, metas in batches:
            begun = time.perf_counter()
            rig.store.commit(block_ids, metas)
            host_s += time.perf_counter() - begun
        rig.store.flush(FLUSH_S)
        took_s = time.perf_counter() - started
    for block_ids, _ in batches:
        rig.store.release(block_ids)
    return _moved(rig, seen, took_s, host_s)


def chains_in_host(rig: GpuRig) -> list[list[BlockHash]]:
    """`moved` blocks that host holds and the device does not, in chains as long as a long prompt."""
    length = min(rig.scale.moved, rig.scale.prompt // rig.device.layout.block_size)
    chains = []
    for _ in range(rig.scale.moved // length):
        metas = rig.fresh_metas(length)
        chain = [metas[0]]
        for meta in metas[1:]:
            chain.append(replace(meta, parent=chain[-1].hash))
        block_ids = allocated(rig, length)
        rig.store.commit(block_ids, chain)
        rig.store.flush(FLUSH_S)
        rig.store.release(block_ids)
        chains.append([meta.hash for meta in chain])
    forget(rig, [name for chain in chains for name in chain])
    return chains


def forget(rig: GpuRig, names: Sequence[BlockHash]) -> None:
    """The device loses these; host keeps them."""
    rig.device.remove(names, RemovalCause.CLEARED)


def promote(rig: GpuRig, chains: Sequence[Sequence[BlockHash]]) -> Moved:
    """All chains come back at once, as for as many prompts that arrive together; the device then forgets them."""
    with watched(rig, "copy_in") as seen:
        started = time.perf_counter()
        coming = [acquire(rig, chain) for chain in chains]
        host_s = time.perf_counter() - started
        while not all(each.done for each in coming):
            rig.store.wait(1.0)
            rig.store.pump()
        took_s = time.perf_counter() - started
    for chain, acquisition in zip(chains, coming, strict=True):
        _given_back(rig, chain, acquisition)
    return _moved(rig, seen, took_s, host_s)


def acquire(rig: GpuRig, chain: Sequence[BlockHash]) -> Acquisition:
    """Ask for a chain, at any price."""
    return rig.store.acquire(chain, reads=HOST_ONLY, compute_ms=lambda first, count: 1e9)


def _given_back(rig: GpuRig, chain: Sequence[BlockHash], acquisition: Acquisition) -> None:
    found = len(acquisition.block_ids)
    rig.store.release(acquisition.block_ids)
    forget(rig, chain)
    if found < len(chain):
        raise RuntimeError(f"{found} of {len(chain)} blocks came from host; give it more memory")


def _moved(rig: GpuRig, seen: Watched, took_s: float, host_s: float) -> Moved:
    blocks = sum(count for count, _ in seen.copies)
    return Moved(blocks * rig.device.block_nbytes / took_s / 1e9, seen.bus_gb_s(), host_s / max(1, blocks) * 1e6)


class SpillAlways:
    """Keeps the bus to host busy: called before every step."""

    verb = "copy_out"

    def __init__(self, rig: GpuRig) -> None:
        self._rig = rig

    def __call__(self) -> None:
        """Commit what fills the gap."""
        rig, size = self._rig, batch_blocks(self._rig)
        for _ in range(AHEAD - rig.store.copies):
            block_ids = allocated(rig, size)
            rig.store.commit(block_ids, rig.fresh_metas(size))
            rig.store.release(block_ids)

    def end(self) -> None:
        """Nothing is kept."""


class PromoteAlways:
    """Keeps the bus from host busy: called before every step."""

    verb = "copy_in"

    def __init__(self, rig: GpuRig) -> None:
        self._rig = rig
        self._idle = deque(chains_in_host(rig))
        self._coming: deque[tuple[list[BlockHash], Acquisition]] = deque()

    def __call__(self) -> None:
        """Give back what has come, and ask for it again."""
        while self._coming and self._coming[0][1].done:
            self._give_back()
        while self._idle and len(self._coming) < AHEAD:
            chain = self._idle.popleft()
            self._coming.append((chain, acquire(self._rig, chain)))

    def end(self) -> None:
        """Wait for what is on its way, and give it back."""
        while self._coming:
            while not self._coming[0][1].done:
                self._rig.store.wait(1.0)
                self._rig.store.pump()
            self._give_back()

    def _give_back(self) -> None:
        chain, acquisition = self._coming.popleft()
        _given_back(self._rig, chain, acquisition)
        self._idle.append(chain)
