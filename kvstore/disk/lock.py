"""One owner of a folder: an advisory lock that the kernel drops with its owner, and a record of who that is.

Covers: taking, refusing, taking over from a dead owner, whether that one had closed the folder. Does not cover: what
lies in the folder.

`flock` belongs to the open file: it goes with the process however that ends, so nothing is left to clean up after a
`kill -9`, and two tiers of one process exclude one another as well. The record only serves the message, and tells after
a crash whether the machine has been down since. Where the file system has no locks, the record decides
alone; then an owner on another host (a container has a name of its own) counts as alive until its record is deleted:
to take a folder from a living owner would cost blocks, so a person must say that it has ended.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path

import msgpack

from kvstore.errors import FolderTakenError, TierError

LOCK_NAME = "owner.lock"

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS})
_RECORD_NBYTES = 4096
_NOBODY_KNOWS = "this file system has no locks, which would tell; a local disk has"


@dataclass(frozen=True, slots=True)
class Owner:
    """Who holds a folder, or held it last.

    Attributes:
        pid, host, boot: the process, its machine, and which start of that machine.
        closed: it gave the folder back, with everything on the device.
    """

    pid: int
    host: str
    boot: str
    closed: bool = False

    @property
    def is_alive(self) -> bool:
        """Whether it may still run; of another machine's nobody knows."""
        if self.host != socket.gethostname():
            return True
        return self.boot == _boot_id() and _runs(self.pid)


class FolderLock:
    """The lock of a folder, held until `release`.

    Attributes:
        before: who held the folder before; None: nobody, or its record cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        """Take it.

        Raises:
            FolderTakenError: a living process holds it. TierError: the file cannot be opened.
        """
        self._path = folder / LOCK_NAME
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise TierError(f"cannot open {self._path}: {error.strerror}; make the folder writable for us") from error
        try:
            self._take()
            self.before = self._read()
            self._write(closed=False)
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def after_a_power_cut(self) -> bool:
        """Whether the last owner did not close the folder and its machine was started again since."""
        return self.before is not None and not self.before.closed and self.before.boot != _boot_id()

    def release(self, *, closed: bool) -> None:
        """Give it back; `closed`: everything is on the device."""
        with suppress(OSError):  # the record is for messages, and a full disk is no reason to keep the lock
            self._write(closed=closed)
        os.close(self._fd)

    def _take(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise self._refusal(self._read()) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise TierError(
                    f"cannot lock {self._path}: {error.strerror}; put the folder on a local disk"
                ) from error
            owner = self._read()
            if owner is not None and not owner.closed and owner.is_alive:
                raise self._refusal(owner, f", or delete {self._path} if it has ended: {_NOBODY_KNOWS}") from error

    def _refusal(self, owner: Owner | None, remedy: str = "") -> FolderTakenError:
        who = "another process" if owner is None else f"process {owner.pid} on {owner.host}"
        return FolderTakenError(
            f"the disk tier's folder {self._path.parent} is in use by {who}; give each worker a folder of its own, or "
            f"end that process first{remedy}"
        )

    def _read(self) -> Owner | None:
        try:
            fields = msgpack.unpackb(os.pread(self._fd, _RECORD_NBYTES, 0))
        except (OSError, ValueError, msgpack.UnpackException):
            return None
        types = [type(field) for field in fields] if isinstance(fields, list) else []
        return Owner(*fields) if types == [int, str, str, bool] else None

    def _write(self, *, closed: bool) -> None:
        record = msgpack.packb(astuple(Owner(os.getpid(), socket.gethostname(), _boot_id(), closed)))
        with suppress(OSError):  # without a record the lock still holds
            os.pwrite(self._fd, record, 0)
            os.ftruncate(self._fd, len(record))


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
