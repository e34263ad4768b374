"""Writes a trace of live traffic, one line a request: what `warmkv record` does with what routers tell it.

Covers: numbering blocks, tenants and sessions so that nothing in the file can be linked to content, the file, and the
summary. Does not cover: the connection (`deploy.recording`), or reading (`traces`).

Requests come in the order in which they end; their times are those of their arrivals, so readers sort. The file is
whole after every `flush`, whatever happens to the process then: a reader leaves out a cut-off last line.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from replay.trace_lines import runs_of
from warmkv.v1 import admin_pb2, common_pb2

NAME_BYTES = 8
REMEMBERED_BLOCKS = 20_000_000  # at about 150 bytes each
REMEMBERED_SESSIONS = 1_000_000  # at about 200 bytes each
_FATES = ("computed", "device", "host", "disk", "redis", "peer")
_FINISHED = {common_pb2.FINISH_REASON_STOP: "stop", common_pb2.FINISH_REASON_LENGTH: "length"}


class BlockSizeChanged(ValueError):
    """The requests of one file would have blocks of different sizes."""


class Numbering:
    """Numbers for names, dense, in order of first use.

    Holds two generations: when the young one is full it becomes the old one, and what was not met since is forgotten.
    So between `most / 2` and `most` names are known, the latest used among them. A name that comes again after it was
    forgotten gets another number.

    Attributes:
        given: numbers given out. forgotten: names that are not known any more.
    """

    def __init__(self, most: int = REMEMBERED_BLOCKS) -> None:
        self.given = 0
        self.forgotten = 0
        self._half = max(1, most // 2)
        self._young: dict[bytes, int] = {}
        self._old: dict[bytes, int] = {}

    def __contains__(self, name: bytes) -> bool:
        return name in self._young or name in self._old

    def number(self, name: bytes) -> int:
        """That of the name; a new one if it is not known."""
        found = self._young.get(name)
        if found is not None:
            return found
        found = self._old.pop(name, None)
        if found is None:
            found = self.given
            self.given += 1
        if len(self._young) >= self._half:
            self.forgotten += len(self._old)
            self._old, self._young = self._young, {}
        self._young[name] = found
        return found


class TraceFile:
    """A file of lines that appears with the first of them; compressed when its name ends in .gz.

    With `private` only its owner may read it.
    """

    def __init__(self, path: Path, *, private: bool = False) -> None:
        """Raises FileExistsError, or another OSError when it cannot be made."""
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
        self._raw: IO[bytes] = os.fdopen(number, "wb")
        self._file: Any = gzip.GzipFile(path.name, "wb", fileobj=self._raw) if path.suffix == ".gz" else self._raw
        self.path = path

    def write(self, fields: dict[str, object]) -> None:
        """Add a line."""
        self._file.write(json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode() + b"\n")

    def flush(self) -> None:
        """Hand what was written to the operating system, so that the end of this process loses none of it."""
        if self._file is not self._raw:
            self._file.flush(zlib.Z_SYNC_FLUSH)
        self._raw.flush()

    def close(self) -> None:
        """End the file."""
        if self._file is not self._raw:
            self._file.close()
        self._raw.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


@dataclass(slots=True)
class Recorded:
    """What a recording came to.

    Attributes:
        cached_tokens: of `settled_tokens`, the prompts of those that a worker ran.
        shared_tokens: prompt tokens in blocks that an earlier request of this recording had, too.
        missed: requests that routers had no room for. forgotten_blocks: see `Numbering`.
    """

    requests: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    settled_tokens: int = 0
    cached_tokens: int = 0
    shared_tokens: int = 0
    blocks: int = 0
    forgotten_blocks: int = 0
    tenants: int = 0
    sessions: int = 0
    missed: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class _Session:
    """A conversation so far. `ended_us`: when its latest answer had ended."""

    turns: int = 0
    ended_us: int = 0


@dataclass(slots=True)
class Recorder:
    """Turns what one or several routers tell into lines.

    Attributes:
        began_us: start of the recording, microseconds since the epoch; times count from it.
        most_sessions: of which the latest turn is known; one that was silent for longest is forgotten first, and when
            it comes back its think time is not known.
    """

    file: TraceFile
    began_us: int
    most_sessions: int = REMEMBERED_SESSIONS
    done: Recorded = field(default_factory=Recorded)
    _blocks: Numbering = field(default_factory=Numbering)
    _tenants: Numbering = field(default_factory=lambda: Numbering(1_000_000))
    _names: Numbering = field(default_factory=lambda: Numbering(4_000_000))
    _sessions: dict[int, _Session] = field(default_factory=dict)
    _missed: dict[str, int] = field(default_factory=dict)
    _block_size: int = 0

    def take(self, router: str, message: admin_pb2.WatchRequestsResponse, *, most: int | None = None) -> bool:
        """Write the requests of a message; whether `most` requests are written now, after which it takes no more.

        Raises:
            BlockSizeChanged: the fleet was started again with another one.
        """
        self._check_size(message)
        self._missed[router] = message.missed
        self.done.missed = sum(self._missed.values())
        self.done.seconds = max(self.done.seconds, (message.time_us - self.began_us) / 1e6)
        for record in message.requests:
            if most is not None and self.done.requests >= most:
                break
            self.file.write(self._line(record, message.block_size))
        self.file.flush()
        return most is not None and self.done.requests >= most

    def _check_size(self, message: admin_pb2.WatchRequestsResponse) -> None:
        if message.requests and message.block_size != (self._block_size or message.block_size):
            raise BlockSizeChanged(
                f"the fleet's blocks have {message.block_size} tokens now, and had {self._block_size}; a trace has one "
                "size, so record to another file"
            )
        self._block_size = self._block_size or message.block_size

    def _line(self, record: admin_pb2.RequestRecord, block_size: int) -> dict[str, object]:
        self._count(record)
        ids = self._ids(record.block_names, block_size)
        line: dict[str, object] = {
            "timestamp_ms": round(max(0, record.arrived_us - self.began_us) / 1e3, 1),
            "input_length": record.prompt_tokens,
            "output_length": record.generated_tokens,
            "block_size": block_size,
            "hash_runs": [list(run) for run in runs_of(ids)],
            "tenant": self._tenants.number(record.tenant),
        }
        if self.done.requests == 1:
            line["started_unix_ms"] = self.began_us // 1000
        line |= self._session(record) | _asked(record) | _happened(record)
        self.done.tenants, self.done.sessions = self._tenants.given, self._names.given
        return line

    def _ids(self, names: bytes, block_size: int) -> list[int]:
        cut = [names[at : at + NAME_BYTES] for at in range(0, len(names), NAME_BYTES)]
        known = sum(name in self._blocks for name in cut)
        ids = [self._blocks.number(name) for name in cut]
        self.done.shared_tokens += known * block_size
        self.done.blocks, self.done.forgotten_blocks = self._blocks.given, self._blocks.forgotten
        return ids

    def _session(self, record: admin_pb2.RequestRecord) -> dict[str, object]:
        """Session, turn, and how long the client took since the answer before, if it had waited for that."""
        if not record.session:
            return {"turn": record.turn} if record.turn else {}
        number = self._names.number(record.session)
        session = self._sessions.pop(number) if number in self._sessions else _Session()
        self._sessions[number] = session  # the last one is the latest
        if len(self._sessions) > self.most_sessions:
            del self._sessions[next(iter(self._sessions))]
        session.turns += 1
        line: dict[str, object] = {"session_id": f"s{number}", "turn": record.turn or session.turns}
        if session.ended_us and record.arrived_us >= session.ended_us:
            line["think_ms"] = round((record.arrived_us - session.ended_us) / 1e3, 1)
        session.ended_us = max(session.ended_us, record.arrived_us + round(record.duration_ms * 1e3))
        return line

    def _count(self, record: admin_pb2.RequestRecord) -> None:
        done = self.done
        done.requests += 1
        done.failed += record.code != "OK"
        done.prompt_tokens += record.prompt_tokens
        done.generated_tokens += record.generated_tokens
        if record.HasField("fates"):
            done.settled_tokens += record.prompt_tokens
            done.cached_tokens += record.prompt_tokens - record.fates.computed


def _asked(record: admin_pb2.RequestRecord) -> dict[str, object]:
    asked: dict[str, object] = {}
    if record.priority:
        asked["priority"] = record.priority
    if record.HasField("ttl_seconds"):
        asked["ttl_s"] = record.ttl_seconds
    if record.text:
        asked["text"] = record.text
    return asked


def _happened(record: admin_pb2.RequestRecord) -> dict[str, object]:
    """What the fleet made of it, to compare a replay with."""
    line: dict[str, object] = {"duration_ms": round(record.duration_ms, 2), "worker": record.worker}
    if record.HasField("ttft_ms"):
        line["ttft_ms"] = round(record.ttft_ms, 3)
    if record.HasField("fates"):
        line["fates"] = {fate: count for fate in _FATES if (count := getattr(record.fates, fate))}
    if record.finish_reason in _FINISHED:
        line["finish"] = _FINISHED[record.finish_reason]
    if record.code != "OK":
        line["code"] = record.code
    return line


def shares(done: Recorded) -> tuple[float, float]:
    """(hit rate of what the fleet did, share of prompt tokens that an earlier request had): nothing counts as 0."""
    hit = done.cached_tokens / done.settled_tokens if done.settled_tokens else 0.0
    return hit, done.shared_tokens / done.prompt_tokens if done.prompt_tokens else 0.0
