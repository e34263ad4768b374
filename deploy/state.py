"""The record of the Ray that `warmkv up` started on this machine: what `down` ends, and nothing else.

Covers: where the record lies, its form, whether its process still lives. A process is named by its id and the moment
of its start, so that a number that the kernel has given to somebody else is never ours.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

_FILE = "cluster.json"
_VERSION = 2  # 1 held the fleet secret as well
_SAME_START_S = 5.0  # the clock may be stepped between two looks


class StateProblem(Exception):
    """The state folder cannot be used. The message ends with what to do."""


@dataclass(frozen=True, slots=True)
class ClusterRecord:
    """An own Ray.

    Attributes:
        address: of its GCS. pid: its first process, which leads its session. started_at: of that process, seconds
        since 1970. temp_dir: its folder, removed with it. token: for Ray.
    """

    address: str
    pid: int
    started_at: float
    temp_dir: str
    token: str


def default_state_dir(environ: Mapping[str, str] | None = None) -> Path:
    """$WARMKV_STATE_DIR, else warmkv in $XDG_STATE_HOME, else ~/.local/state/warmkv."""
    environ = os.environ if environ is None else environ
    if chosen := environ.get("WARMKV_STATE_DIR"):
        return Path(chosen)
    home = environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "warmkv"


def read_record(state_dir: Path) -> ClusterRecord | None:
    """The record; None: there is none.

    Raises:
        StateProblem: it cannot be read.
    """
    path = state_dir / _FILE
    try:
        fields = json.loads(path.read_text())
        if fields.pop("version") != _VERSION:
            raise StateProblem(f"{path} was written by another version of warmkv; end its Ray with that version's down")
        return ClusterRecord(**fields)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise StateProblem(f"{path} cannot be read ({error}); if no warmkv runs here, remove it") from error


def write_record(state_dir: Path, record: ClusterRecord) -> None:
    """Replace the record; only this user may read it, since it holds Ray's token.

    Raises:
        StateProblem: the folder cannot be written.
    """
    write_private(state_dir / _FILE, json.dumps({"version": _VERSION, **asdict(record)}, indent=1))


def write_private(path: Path, text: str) -> None:
    """Replace a file of a state folder, whole or not at all, readable by this user only.

    Raises:
        StateProblem: the folder cannot be written.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(path)
    except OSError as error:
        raise StateProblem(f"{path} cannot be written ({error.strerror}); give another --state-dir") from error


def remove_record(state_dir: Path) -> None:
    """Forget it. Not there: no-op."""
    (state_dir / _FILE).unlink(missing_ok=True)


def lives(record: ClusterRecord) -> bool:
    """Whether its first process still runs."""
    try:
        return _started(record) and psutil.Process(record.pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def may_lead(record: ClusterRecord) -> bool:
    """Whether the session of that number can still be ours: its leader is, or is gone.

    The kernel gives no number away while a session bears it, so a leader that started at another time means that
    nothing of ours is left.
    """
    try:
        return _started(record)
    except psutil.NoSuchProcess:
        return True


@contextmanager
def locked(state_dir: Path) -> Iterator[None]:
    """Only one at a time may start or end a Ray here.

    Raises:
        StateProblem: the folder cannot be written.
    """
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        stream = (state_dir / "lock").open("w")
    except OSError as error:
        raise StateProblem(f"{state_dir} cannot be written ({error.strerror}); give another --state-dir") from error
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _started(record: ClusterRecord) -> bool:
    return abs(psutil.Process(record.pid).create_time() - record.started_at) < _SAME_START_S
