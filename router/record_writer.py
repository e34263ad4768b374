"""Fleet records to the disk without holding up requests: one write at a time on a thread, the newest record last.

Covers: when a record is written. Does not cover: how, and what is said of a disk that fails (`record_file`). A record
that is replaced while another is being written is never written itself. Owned by the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from router.fleet_record import FleetRecord

log = logging.getLogger(__name__)


class RecordWriter:
    """`keep`: writes one record; it blocks."""

    def __init__(self, keep: Callable[[FleetRecord], None]) -> None:
        self._keep = keep
        self._newest: FleetRecord | None = None
        self._task: asyncio.Task[None] | None = None

    def write(self, record: FleetRecord) -> None:
        """Begin to write it, or do so after the write that is under way."""
        self._newest = record
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._write(), name="record-writer")

    async def written(self) -> None:
        """Returns when the last record is on the disk, or the disk has refused it."""
        if self._task is not None:
            await asyncio.wait({self._task})

    async def _write(self) -> None:
        while (record := self._newest) is not None:
            self._newest = None
            try:
                await asyncio.to_thread(self._keep, record)
            except Exception:
                log.exception("the policy could not be kept by a defect; report this")
