"""When the disk tier may write and read, and what it tells of a disk that refuses.

Covers: a read-only state after a write that failed, the same for reads, probes, the words for people. Does not cover:
what is kept or dropped because of it (`disk`).

One failed write is enough: a full disk stays full, and each try may take long. While it lasts nothing is written but
one probe at a time, which is an ordinary write: after a second, later every few seconds, on the tier's clock. The first
that succeeds ends it. Reads go on meanwhile; they have a breaker of their own, which opens after three failures.
"""

from __future__ import annotations

import errno
import logging
import os

from kvstore.breaker import Breaker
from kvstore.disk.files import NO_ROOM
from kvstore.tier import Clock

log = logging.getLogger(__name__)

_REMEDIES = {
    errno.EROFS: "mount it read-write (it may have been remounted after an I/O error: see `dmesg`)",
    errno.EIO: "look for the device's errors in `dmesg`, and put the tier on another disk",
    errno.EACCES: "let us write to it",
    errno.EPERM: "let us write to it",
}
_MAKE_ROOM = "free room on it, or give the disk tier fewer bytes"
_LOOK = "look for the device's errors in `dmesg`"


class DiskHealth:
    """Thread-safe.

    Attributes:
        reads: how many succeeded, about.
    """

    def __init__(self, place: str, clock: Clock) -> None:
        """Healthy; `place` names the folder in messages."""
        self._place = place
        self._writes = Breaker(clock, failures=1)
        self._reads = Breaker(clock)
        self._write_problem = self._read_problem = ""
        self._reason = "error"
        self.reads = 0

    @property
    def can_read(self) -> bool:
        """False while reads are refused."""
        return self._reads.is_closed

    @property
    def problem(self) -> str:
        """What is wrong and what to do; empty when nothing is."""
        return "; ".join(filter(None, (self._write_problem, self._read_problem)))

    @property
    def reason(self) -> str:
        """Under which word of `store_failures` writes are refused now."""
        return self._reason

    def may_write(self) -> bool:
        """Whether this caller may write, and must tell how it went."""
        return self._writes.admit()

    def may_read(self) -> bool:
        """Whether this caller may read, and must tell how it went."""
        return self._reads.admit()

    def wrote(self) -> None:
        """A write succeeded."""
        if self._write_problem:
            log.warning("the disk tier takes new blocks again", extra={"folder": self._place})
        self._write_problem = ""
        self._writes.succeeded()

    def failed_to_write(self, error: OSError) -> str:
        """A write failed; the word of `store_failures` for it."""
        self._reason = "full" if error.errno in NO_ROOM else "error"
        problem = (
            f"the disk tier at {self._place} is read-only, because a write failed ({_words(error)}): blocks there can "
            f"be read, new ones are not kept; {_remedy(error)}; it tries again by itself"
        )
        if problem != self._write_problem:
            log.error("the disk tier is read-only", extra={"folder": self._place, "reason": _words(error)})
        self._write_problem = problem
        self._writes.failed()
        return self._reason

    def read(self) -> None:
        """A read succeeded."""
        self._read_problem = ""
        self.reads += 1
        self._reads.succeeded()

    def failed_to_read(self, error: OSError) -> None:
        """A read failed."""
        self._read_problem = f"a read from the disk tier at {self._place} failed ({_words(error)}); {_remedy(error)}"
        self._reads.failed()


def _words(error: OSError) -> str:
    return error.strerror or (os.strerror(error.errno) if error.errno else str(error))


def _remedy(error: OSError) -> str:
    return _MAKE_ROOM if error.errno in NO_ROOM else _REMEDIES.get(error.errno or 0, _LOOK)
