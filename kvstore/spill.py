"""Write-behind to a slow tier: a bounded queue and one thread.

The engine's thread only puts entries in; a full queue drops the new entry, never blocks. Queued bytes are views of host
slots where there is a host tier, else copies. The thread also touches what `refresh` says is due, and reports what the
tier lost, which the store writes again; and it removes what turned out to be wrong, until the tier has done so.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvstore.blocks import BlockHash
from kvstore.errors import InvariantError
from kvstore.events import RemovalCause, TierName
from kvstore.host.tier import BlockView
from kvstore.tier import BlockMeta, TierStats

BATCH_BLOCKS = 32  # what one write or refresh asks of the server at once
MAX_UNWANTED = 1 << 16  # wrong blocks that wait for a tier that is down; beyond it the oldest are let be
IDLE_S = 1.0  # how often a tier that is not written to is given the thread for its own work
SWEEP_PAUSE_S = 0.005  # between parts of a long sweep: a lock that is taken again at once would let nobody else in

logger = logging.getLogger(__name__)


class Writable(Protocol):
    """What write-behind asks of a tier; as in `kvstore.tier`."""

    @property
    def name(self) -> TierName:
        """Its name."""
        ...

    def write(self, metas: Sequence[BlockMeta], payloads: Sequence[memoryview]) -> int:
        """As `Tier.write`."""
        ...

    def remove(self, hashes: Sequence[BlockHash], cause: RemovalCause) -> int:
        """As `Tier.remove`."""
        ...

    def refresh(self, metas: Sequence[BlockMeta]) -> list[BlockHash] | None:
        """As `SharedTier.refresh`."""
        ...

    def sweep(self) -> float | None:
        """As `Tier.sweep`."""
        ...

    def stats(self) -> TierStats:
        """As `Tier.stats`."""
        ...


@dataclass(slots=True, eq=False)
class QueuedWrite:
    """A block on its way to a slow tier.

    Attributes:
        payload: its bytes; valid until the view ends, or a copy of its own. view: None: a copy.
        cancelled: it was cleared while it was being written: remove it again.
    """

    meta: BlockMeta
    payload: memoryview
    view: BlockView | None = None
    cancelled: bool = False


@dataclass(frozen=True, slots=True)
class Refreshed:
    """What became of a refresh: the blocks asked for, and which of them the tier lacks; None: it gave no answer."""

    metas: list[BlockMeta]
    missing: list[BlockHash] | None


class WriteBehind:
    """Bounded queue and thread in front of a slow tier.

    All methods are for the engine's thread; only `flush`, `settle_cancelled` and `close` wait for I/O.
    """

    def __init__(self, tier: Writable, *, max_blocks: int, end_view: Callable[[BlockView], None]) -> None:
        """Start the thread. At most `max_blocks` are queued or being written; views end by `end_view`."""
        self._tier = tier
        self._max_blocks = max_blocks
        self._end_view = end_view
        self._changed = threading.Condition()
        self._queue: OrderedDict[BlockHash, QueuedWrite] = OrderedDict()
        self._writing: list[QueuedWrite] = []
        self._stale: dict[BlockHash, BlockMeta] = {}
        self._refreshing = 0
        self._refreshed: deque[Refreshed] = deque()
        self._unwritten: deque[BlockHash] = deque()
        self._unwanted: dict[BlockHash, None] = {}
        self._removing = False
        self._remove_at = 0.0  # on `time.monotonic`: not before, as the tier did not answer the last time
        self._removed: deque[BlockHash] = deque()
        self._queue_full = 0
        self._closed = False
        self._next_sweep = 0.0
        self._thread = threading.Thread(target=self._run, name=f"kvstore-write-{tier.name}", daemon=True)
        self._thread.start()

    @property
    def queue_full(self) -> int:
        """Blocks that were dropped because the queue was full."""
        return self._queue_full

    @property
    def is_full(self) -> bool:
        """Whether `put` would drop a new block."""
        with self._changed:
            return self._has_no_room()

    def await_room(self, timeout_s: float) -> None:
        """Wait until `put` would take a new block, or the time is up."""
        with self._changed:
            self._changed.wait_for(lambda: not self._has_no_room(), timeout_s)

    def is_coming(self, name: BlockHash) -> bool:
        """Whether a block is queued or being written."""
        with self._changed:
            return name in self._queue or any(w.meta.hash == name and not w.cancelled for w in self._writing)

    def put(self, write: QueuedWrite) -> bool:
        """Queue a block; False: the queue is full, it was dropped and counted. A queued name is not queued again."""
        with self._changed:
            known = write.meta.hash in self._queue
            if not known and not self._has_no_room():
                self._queue[write.meta.hash] = write
                self._changed.notify_all()
                return True
            self._queue_full += not known
        self._end([write])
        return known

    def refresh(self, metas: Sequence[BlockMeta]) -> None:
        """Touch these, in chain order, in the background, and give them at least these TTLs."""
        with self._changed:
            self._stale.update((meta.hash, meta) for meta in metas)
            self._changed.notify_all()

    def take_refreshed(self) -> list[Refreshed]:
        """What refreshes found since the last call."""
        found = []
        while self._refreshed:
            found.append(self._refreshed.popleft())
        return found

    def take_unwritten(self) -> list[BlockHash]:
        """Blocks of writes that came short since the last call: the tier may hold them or not."""
        names = []
        while self._unwritten:
            names.append(self._unwritten.popleft())
        return names

    def remove(self, names: Sequence[BlockHash]) -> None:
        """Take blocks back in the background, before anything that is queued later: again until the tier answers."""
        self.drop(set(names))
        with self._changed:
            self._unwanted.update(dict.fromkeys(names))
            for name in list(self._unwanted)[: max(0, len(self._unwanted) - MAX_UNWANTED)]:
                del self._unwanted[name]
                self._removed.append(name)
            self._changed.notify_all()

    def take_removed(self) -> list[BlockHash]:
        """Blocks that were taken back since the last call, or given up."""
        names = []
        while self._removed:
            names.append(self._removed.popleft())
        return names

    def metas(self) -> list[BlockMeta]:
        """Blocks that are queued or being written."""
        with self._changed:
            return [write.meta for write in (*self._queue.values(), *self._writing)]

    def drop(self, names: set[BlockHash]) -> None:
        """Take blocks out of the queue; those being written are removed right after."""
        with self._changed:
            dropped = [self._queue.pop(name) for name in list(self._queue) if name in names]
            for name in [name for name in self._stale if name in names]:
                del self._stale[name]
            for write in self._writing:
                write.cancelled |= write.meta.hash in names
        self._end(dropped)

    def settle_cancelled(self, timeout_s: float) -> bool:
        """Wait until no cancelled write is running any more; False: the time was up (it is removed later then)."""
        with self._changed:
            return self._changed.wait_for(lambda: not any(write.cancelled for write in self._writing), timeout_s)

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that is queued has been tried; False: the time was up."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not (self._queue or self._writing or self._stale or self._refreshing or self._must_remove()),
                timeout_s,
            )

    def close(self, timeout_s: float) -> None:
        """Drop what is queued and end the thread; wait at most so long for the write that it is in."""
        with self._changed:
            self._closed = True
            dropped = list(self._queue.values())
            self._queue.clear()
            self._stale.clear()
            self._unwanted.clear()
            self._changed.notify_all()
        self._end(dropped)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("a write was left running at close", extra={"tier": self._tier.name})

    def check(self) -> None:
        """Audit the queue.

        Raises:
            InvariantError: a block is queued under another name, or there are more than may be.
        """
        with self._changed:
            if len(self._queue) + len(self._writing) > self._max_blocks:
                raise InvariantError("more blocks wait for a slow tier than may")
            if any(name != write.meta.hash for name, write in self._queue.items()):
                raise InvariantError("a block is queued under another name")

    def _run(self) -> None:
        while True:
            with self._changed:
                pause_s = min(IDLE_S, max(SWEEP_PAUSE_S, self._next_sweep - time.monotonic()))
                self._changed.wait_for(
                    lambda: self._queue or self._stale or self._must_remove() or self._closed, pause_s
                )
                if self._closed:
                    return
                unwanted = self._take_unwanted()
                batch = [self._queue.popitem(last=False)[1] for _ in range(min(BATCH_BLOCKS, len(self._queue)))]
                stale = list(self._stale.values())[:BATCH_BLOCKS]
                for meta in stale:
                    del self._stale[meta.hash]
                self._writing, self._refreshing = batch, len(stale)
            if unwanted:
                self._remove(unwanted)
            if batch:
                self._write(batch)
            if stale:
                self._refresh(stale)
            self._sweep()

    def _write(self, batch: list[QueuedWrite]) -> None:
        count = 0
        try:
            count = self._tier.write([write.meta for write in batch], [write.payload for write in batch])
        except Exception:
            # Tiers promise not to raise; if one does, the thread must live on to serve the rest.
            logger.exception("write-behind failed", extra={"tier": self._tier.name})
        if count < len(batch):
            self._unwritten.extend(write.meta.hash for write in batch)
        self._end(batch)
        self._undo_cancelled(batch)

    def _undo_cancelled(self, batch: list[QueuedWrite]) -> None:
        """The batch is written: take back what was cancelled. Whoever clears from now on finds it in the tier."""
        with self._changed:
            self._writing = cancelled = [write for write in batch if write.cancelled]
            self._changed.notify_all()
        if not cancelled:
            return
        try:
            self._tier.remove([write.meta.hash for write in cancelled], RemovalCause.CLEARED)
        except Exception:
            logger.exception("a cleared block was not removed", extra={"tier": self._tier.name})  # as in `_write`
        with self._changed:
            self._writing = []
            self._changed.notify_all()

    def _refresh(self, stale: list[BlockMeta]) -> None:
        missing = None
        try:
            missing = self._tier.refresh(stale)
        except Exception:
            logger.exception("refresh failed", extra={"tier": self._tier.name})  # as in `_write`
        self._refreshed.append(Refreshed(stale, missing))
        with self._changed:
            self._refreshing = 0
            self._changed.notify_all()

    def _remove(self, unwanted: list[BlockHash]) -> None:
        """Whether the tier did it shows in its health alone: that it drops nothing may mean that nothing was there."""
        is_done = False
        try:
            self._tier.remove(unwanted, RemovalCause.INVALID)
            is_done = self._tier.stats().healthy
        except Exception:
            logger.exception("wrong blocks were not removed", extra={"tier": self._tier.name})  # as in `_write`
        with self._changed:
            self._removing = False
            self._remove_at = 0.0 if is_done else time.monotonic() + IDLE_S
            if is_done:  # what is unwanted again meanwhile is told when that has been removed
                self._removed.extend(name for name in unwanted if name not in self._unwanted)
            else:
                self._unwanted = dict.fromkeys(unwanted) | self._unwanted
            self._changed.notify_all()

    def _take_unwanted(self) -> list[BlockHash]:
        if not self._must_remove():
            return []
        names, self._unwanted = list(self._unwanted), {}
        self._removing = bool(names)
        return names

    def _must_remove(self) -> bool:
        return self._removing or bool(self._unwanted and time.monotonic() >= self._remove_at)

    def _has_no_room(self) -> bool:
        return len(self._queue) + len(self._writing) >= self._max_blocks

    def _sweep(self) -> None:
        """Let the tier drop what has expired, next in IDLE_S or, if there is more, soon. It may be I/O, and no engine's
        work."""
        now = time.monotonic()
        if now < self._next_sweep:
            return
        self._next_sweep = now + IDLE_S
        try:
            if self._tier.sweep() == 0.0:
                self._next_sweep = now
        except Exception:
            logger.exception("sweep failed", extra={"tier": self._tier.name})  # as in `_write`

    def _end(self, writes: Sequence[QueuedWrite]) -> None:
        for write in writes:
            if write.view is not None:
                self._end_view(write.view)
