"""Blocks on their way into slots of a disk and out of them, several at a time.

Covers: threads, two-phase writes, verified reads. Does not cover: which blocks (`disk`), slots' formats (`slab`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from typing import TypeVar

from kvstore.codec import BlockCodec
from kvstore.daemon_pool import DaemonPool
from kvstore.disk.entries import Entry
from kvstore.disk.space import DiskSpace
from kvstore.errors import CodecError, MissReason
from kvstore.tier import Clock

log = logging.getLogger(__name__)

CLOSE_WAIT_S = 2.0
IO_THREADS = 2  # of a read, and of a write: a checksum is computed while another block is on its way

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


class DiskTransfer:
    """Thread-safe, on slots that the caller has pinned or reserved."""

    def __init__(self, space: DiskSpace, codec: BlockCodec, wall_clock: Clock) -> None:
        """Threads start when they are needed."""
        self._space = space
        self._codec = codec
        self._wall_clock = wall_clock
        self._readers = DaemonPool(IO_THREADS, "kvstore-disk-read")
        self._writers = DaemonPool(IO_THREADS, "kvstore-disk-write")

    def fetch(
        self, entries: Sequence[Entry], into: Sequence[memoryview], ends_at: float | None
    ) -> list[MissReason | None]:
        """Read blocks and verify them: of each why it has not arrived, None if it has.

        `ends_at`: when to stop, on `time.monotonic`; it is looked at between blocks.
        """
        return _each(self._readers, lambda n: self._fetch(entries[n], into[n], ends_at), range(len(entries)))

    def store(self, fresh: Sequence[tuple[int, Entry]], payloads: Sequence[memoryview], stamp: int) -> list[Entry]:
        """Fill reserved slots and tell the log; the leading ones for which both succeeded."""
        if not fresh:
            return []
        try:
            self._space.index.flush()  # of what is removed before its slot is filled again
            created = self._wall_clock()
            failed: list[OSError] = []  # one is enough: a full disk stays full

            def fill(item: tuple[int, Entry]) -> OSError | None:
                fault = failed[0] if failed else self._fill(item[1], payloads[item[0]], stamp, created)
                if fault is not None:
                    failed.append(fault)
                return fault

            faults = _each(self._writers, fill, fresh)
            done = [entry for _, entry in fresh][: next((n for n, fault in enumerate(faults) if fault), len(fresh))]
            with self._space.lock:
                self._space.books.announce(done)
            self._space.index.flush()
        except OSError as error:
            faults, done = [error], []
            with self._space.lock:
                self._space.books.withdraw([entry for _, entry in fresh])
        if fault := next(filter(None, faults), None):
            reason = self._space.health.failed_to_write(fault)
            with self._space.lock:
                self._space.books.failures[reason] += len(fresh) - len(done)
        return done

    def close(self) -> None:
        """Wait for what is under way, and end the threads; one that the device does not let go is left behind."""
        if not (self._readers.close(CLOSE_WAIT_S) and self._writers.close(CLOSE_WAIT_S)):
            log.warning("the disk does not answer; a read or write was left running at close")

    def _fetch(self, entry: Entry, into: memoryview, ends_at: float | None) -> MissReason | None:
        """Read a block and verify it; None: it has arrived."""
        if ends_at is not None and time.monotonic() >= ends_at:
            return MissReason.DEADLINE
        if not self._space.health.may_read():
            return MissReason.BREAKER
        buffer = into.cast("B")
        try:
            header, nbytes = self._space.slab.read(entry.index, buffer)
        except OSError as error:
            self._space.health.failed_to_read(error)
            return MissReason.UNREADABLE
        self._space.health.read()
        try:
            self._codec.decode(header, buffer[:nbytes], expect=entry.meta.hash)
        except CodecError as error:
            return error.reason
        return None

    def _fill(self, entry: Entry, payload: memoryview, stamp: int, created: float) -> OSError | None:
        header, stored = self._codec.encode(entry.meta, payload, created)
        try:
            self._space.slab.write(entry.index, header, stored, stamp=stamp, sequence=entry.sequence)
        except OSError as error:
            return error
        return None


def _each(pool: DaemonPool, function: Callable[[Item], Outcome], items: Sequence[Item]) -> list[Outcome]:
    """The function of each item, by this thread and by those of the pool that are free.

    Returns or raises when none of them runs any more.
    """
    outcomes: dict[int, Outcome] = {}
    todo, lock = iter(range(len(items))), threading.Lock()

    def work() -> None:
        while True:
            with lock:
                number = next(todo, None)
            if number is None:
                return
            outcomes[number] = function(items[number])

    helpers = [pool.submit(work) for _ in range(min(IO_THREADS, len(items)) - 1)]
    try:
        work()
    finally:
        wait([helper for helper in helpers if not helper.cancel()])
    for helper in helpers:
        if not helper.cancelled():
            helper.result()
    return [outcomes[number] for number in range(len(items))]
