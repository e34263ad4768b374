"""Books and log together: every change of the books reaches the log, in order, and the log stays short.

Covers: writing records down, rewriting a long or incomplete log while others go on. Does not cover: what the records
say (`books`, `recovery`).

Three locks, always taken in this order: `_rewriting` (one rewrite at a time), `_appending` (the log's file), and the
tier's own (the books; held for microseconds, never while a file is written). Nobody waits for the device holding the
latter two. Whoever appends takes the books' records
first, both under `_appending`, so records lie in the log in the order of the changes.

A rewrite copies the list of slots, writes them to a new file while others append to the old one, adds what they have
appended since, and puts the new file in the old one's place. Nobody waits for it but another rewrite.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from kvstore.blocks import BlockHash
from kvstore.disk.books import DiskBooks
from kvstore.disk.entries import Entry
from kvstore.disk.files import Files
from kvstore.disk.log import (
    HASH,
    RECORD_NBYTES,
    SEQUENCE,
    SPARE_LOG_BYTES,
    Condition,
    Contents,
    IndexLog,
    Record,
    batches,
    parse,
)
from kvstore.disk.recovery import replay
from kvstore.disk.slab import Slab
from kvstore.errors import InvariantError

log = logging.getLogger(__name__)

RECORDS_A_FRAME = 1024
LOADED_AT_ONCE = 64  # a millisecond or two under the books' lock
LOAD_PAUSE_S = 0.0005  # a lock that is taken again at once would let nobody else in
LONG_LOAD_PAUSE_S = 0.005


class DiskIndex:
    """The log of one slab. Thread-safe.

    Attributes:
        is_incomplete: the log lacks records, because one could not be written; the next `flush` rewrites it.
    """

    def __init__(self, path: Path, slab: Slab, *, files: Files) -> None:
        """Open the log's file.

        Raises:
            OSError: it cannot be opened.
        """
        self._slab = slab
        self.is_incomplete = False
        self._log = IndexLog(path, files=files)
        self._rewriting = threading.Lock()
        self._appending = threading.Lock()
        self._ending = threading.Event()
        self._tail: list[Record] | None = None  # records since a rewrite began; None: none runs
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None  # the last rewrite's; at most one is alive
        self._is_closed = False

    def read(self) -> Contents:
        """As `IndexLog.read`."""
        contents = self._log.read(self._slab.epoch)
        self.is_incomplete = self._log.is_damaged
        return contents

    def attach(self, books: DiskBooks, lock: threading.Lock) -> None:
        """Write down these books' changes from now on; `lock` guards them."""
        self._books = books
        self._lock = lock

    def load(self) -> None:
        """Let eviction know all restored blocks; others go on meanwhile, in the pauses."""
        while self._load_some():
            time.sleep(LOAD_PAUSE_S)

    def load_gently(self) -> None:
        """As `load`, without haste: a thread that computes all the time slows all others of a Python process down.

        Until `end_loading`.
        """
        while not self._ending.wait(LONG_LOAD_PAUSE_S) and self._load_some():
            pass

    def end_loading(self) -> None:
        """Nobody needs eviction any more."""
        self._ending.set()

    def flush(self) -> None:
        """Hand all records to the system.

        Raises:
            OSError: it does not take them.
        """
        with self._appending:
            if not self.is_incomplete:
                with self._lock:
                    records = self._books.journal.take()
                self._append(records)
                return
        self.rewrite()

    def rewrite(self) -> None:
        """Write the log anew, as short as it can be.

        Raises:
            OSError: the system refused; the old log stays.
        """
        self.load()
        with self._rewriting:
            try:
                slots = self._begin()
                for batch in batches(self._books.journal.all(slots), RECORDS_A_FRAME):
                    self._log.add(batch)
                self._log.sync_new()
                self._switch()
                self._log.sync_folder()
            except OSError:
                self.is_incomplete = True
                raise
            finally:
                with self._appending:
                    self._tail = None
                    self._log.abandon()

    def forsake(self, sign: Callable[[], None]) -> None:
        """Let the log that lies there count no more, by signing the slab for a new epoch; the next `flush` rewrites it.

        Whatever was flushed before `sign` is called has reached the books. Waits for a rewrite that runs.

        Raises:
            OSError: from `sign`; the log still counts, or none does.
        """
        with self._rewriting, self._appending:
            self.is_incomplete = True
            sign()

    def rewrite_when_long(self) -> None:
        """Rewrite in a thread of its own if the log has grown much."""
        if self._log.nbytes <= 2 * RECORD_NBYTES * self._books.blocks + SPARE_LOG_BYTES:
            return
        if not self._starting.acquire(blocking=False):
            return  # somebody else starts it, or closes
        try:
            if not self._is_closed and (self._thread is None or not self._thread.is_alive()):
                thread = threading.Thread(target=self._rewrite_quietly, name="kvstore-disk-log", daemon=True)
                thread.start()
                self._thread = thread
        except RuntimeError as error:  # the system gives no thread; whoever comes next tries again
            log.warning("the disk tier's log was not rewritten", extra={"reason": str(error)})
        finally:
            self._starting.release()

    def check(self) -> None:
        """Audit the log against the books. O(blocks and records); others do not wait for the comparison.

        Raises:
            InvariantError: they disagree.
            OSError: the log cannot be read or written.
        """
        self.flush()
        with self._appending:
            with self._lock:
                if self.is_incomplete:
                    return
                records = self._books.journal.take()
                held = {entry.index: (entry.sequence, entry.meta.hash) for entry in self._books.logged()}
            self._append(records)
            data, epoch = self._log.data(), self._slab.epoch
        _compare(parse(data, epoch), held)

    def sync(self) -> None:
        """Wait until all that was flushed is on the device.

        Raises:
            OSError: it is not, and may never be.
        """
        with self._rewriting:  # nobody else closes the file; and who appends need not wait
            self._log.sync()

    def close(self) -> None:
        """Wait for a rewrite that runs, and give the file back. Does not flush; none is started from now on."""
        with self._starting:
            self._is_closed = True
        if self._thread is not None:
            self._thread.join()
        self._log.close()

    def _load_some(self) -> bool:
        with self._lock:
            return self._books.load(LOADED_AT_ONCE)

    def _append(self, records: list[Record]) -> None:
        """Append, holding `_appending`."""
        if not records:
            return
        if self._tail is not None:
            self._tail += records
        try:
            self._log.append(records)
        except OSError:
            self.is_incomplete = True
            raise

    def _begin(self) -> list[Entry]:
        """Start a new log; the slots that it must tell of."""
        with self._appending:
            with self._lock:
                records = self._books.journal.take()
                slots = self._books.logged()
            if not self.is_incomplete:
                self._append(records)  # the slots say so too, but until the switch the old log counts
            self._tail = []
            self._log.begin(self._slab.epoch)
        return slots

    def _switch(self) -> None:
        """Let the new log count, with all that was appended to the old one meanwhile. Does not wait for the device."""
        with self._appending:
            self._log.add(self._tail or [])
            self._log.replace()
            self._tail = None
            self.is_incomplete = False

    def _rewrite_quietly(self) -> None:
        try:
            self.rewrite()
        except OSError as error:  # the next flush tries again, and tells whoever writes
            log.warning("the disk tier's log was not rewritten", extra={"reason": str(error)})


def _compare(said: Contents, held: dict[int, tuple[int, BlockHash]]) -> None:
    if said.condition is not Condition.WHOLE:
        raise InvariantError(f"the disk tier's log is {said.condition}")
    found = replay(said.records)
    if {index: (one[SEQUENCE], one[HASH]) for index, one in found.items()} != held:
        raise InvariantError("the disk tier's log tells of other blocks than its books")
