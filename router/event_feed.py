"""What the stream of one worker says of its blocks, on its way into the index: numbered, whole or not, late or not.

Covers: gaps in the numbers, which events count (those after the first piece of a snapshot), how far behind they are.
Does not cover: asking for a snapshot (`link`), what blocks mean (`index`), what a doubtful worker is worth (`credit`).
"""

from __future__ import annotations

from collections.abc import Sequence

from router import kv_wire
from router.index import PrefixIndex
from warmkv.v1 import kv_events_pb2, worker_pb2


class EventFeed:
    """Of one worker; made once, `begin` with each stream.

    Attributes:
        synced: whether a snapshot was complete since `begin`. snapshots: complete ones, ever. behind_s: age of the
        oldest event that has not come.
    """

    def __init__(self, worker: str, index: PrefixIndex) -> None:
        self.synced = False
        self.snapshots = 0
        self.behind_s = 0.0
        self._worker, self._index = worker, index
        self._incarnation = 0
        self._seq = 0
        self._skipping = False
        self._reading_snapshot = False

    @property
    def whole(self) -> bool:
        """Whether what the index has of it is a whole snapshot and all events since."""
        return self.synced and not self._skipping and not self._reading_snapshot

    def begin(self, incarnation: int, seq: int) -> None:
        """A stream starts with this number; events count from its first snapshot on."""
        self._incarnation, self._seq = incarnation, seq
        self.synced, self._skipping, self._reading_snapshot = False, True, False

    def end(self) -> None:
        """The stream is over: what the worker holds counts nothing any more."""
        self.synced, self.behind_s = False, 0.0
        self._index.drop(self._worker)

    def note_number(self, seq: int) -> int:
        """How many messages are missing before this one; if some are, events are skipped until a snapshot begins.

        What was believed before is still there: `credit` discounts it.
        """
        gap = seq - self._seq - 1
        self._seq = seq
        if gap:
            self._skipping = True
        return gap

    def distrust(self) -> None:
        """Believe nothing of it until a new snapshot is complete."""
        self._index.distrust(self._worker)
        self._skipping = True

    def events(self, events: Sequence[kv_events_pb2.KvEvent]) -> None:
        """Of one step."""
        if events and not self._skipping:
            self._index.apply(self._worker, self._incarnation, kv_wire.events(events))

    def snapshot(self, piece: worker_pb2.Snapshot) -> bool:
        """Take in a piece; whether the snapshot is complete with it."""
        worker, incarnation = self._worker, self._incarnation
        if piece.first:
            self._index.begin_snapshot(worker, incarnation)
            self._skipping, self._reading_snapshot = False, True
        if self._skipping:
            return False
        self._index.snapshot(worker, incarnation, kv_wire.stored(piece.blocks))
        if piece.last:
            self._index.end_snapshot(worker, incarnation)
            self.synced, self._reading_snapshot, self.behind_s = True, False, 0.0
            self.snapshots += 1
        return piece.last
