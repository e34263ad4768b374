"""A disk tier's folder while it is open: its slab, its log and their books, in step with one another.

Covers: opening and restoring, handing changes to the log, erasing, audits, closing. Does not cover: blocks' bytes on
their way in and out (`transfer`), what a tier promises (`disk`).

Lock order: that of `stamps`, those of `index`, then `lock`, which guards the books and is never held while a file is
used.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from kvstore.blocks import BlockHash
from kvstore.codec import BlockCodec
from kvstore.disk.books import DiskBooks
from kvstore.disk.entries import Entry
from kvstore.disk.files import Files
from kvstore.disk.folder import LOG_SUFFIX, lock_folder, room_beside_others, slab_path
from kvstore.disk.health import DiskHealth
from kvstore.disk.index import DiskIndex
from kvstore.disk.recovery import recover
from kvstore.disk.room import may_take, slots_that_fit
from kvstore.disk.slab import Slab, slot_nbytes
from kvstore.disk.stamps import Stamps
from kvstore.errors import CodecError, InvariantError, TierError
from kvstore.events import RemovalCause
from kvstore.eviction.tail import SpareBlocks
from kvstore.tier import Clock

log = logging.getLogger(__name__)

LOADED_BY_STARTER = 2048  # restored blocks; more of them are loaded in the background while the tier serves
AUDITED_SLOTS = 256  # headers that one audit reads, a third of a millisecond each; the next one goes on there
MAX_WIPED = 8  # headers that are wiped one by one, each a write; of more, all other slots are written down


class DiskSpace:
    """An open folder.

    Attributes:
        lock: of the books. books, slab, index, stamps, health: the parts.
    """

    def __init__(
        self,
        path: Path,
        capacity_bytes: int,
        *,
        codec: BlockCodec,
        clock: Clock,
        wall_clock: Clock,
        eviction: str,
        shares: Mapping[BlockHash, int] | None,
        spare_blocks: SpareBlocks,
        direct: bool,
        files: Files,
    ) -> None:
        """As `DiskTier`.

        Raises:
            TierError: somebody else owns the folder, it cannot be used, or the capacity is less than a block.
            ValueError: there is no such eviction policy, or the shares are more than the capacity.
        """
        self._codec = codec
        self._clock, self._wall_clock = clock, wall_clock
        self._loader: threading.Thread | None = None
        self.lock = threading.Lock()
        self.health = DiskHealth(str(path), clock)
        self._audited = 0  # slots whose headers were looked at in this round
        self.folder = lock_folder(path)
        try:
            self._open(path, capacity_bytes, eviction, shares, spare_blocks, files, direct=direct)
        except OSError as error:
            self.folder.release(closed=False)
            raise TierError(
                f"the disk tier's files in {path} cannot be used: {error}; see that we may write there"
            ) from error
        except BaseException:
            self.folder.release(closed=False)
            raise

    @property
    def problem(self) -> str:
        """What is wrong with the files and what to do; empty when nothing is."""
        return "; ".join(filter(None, (self.health.problem, self._shortage(), self.slab.problem)))

    def write_down(self, *, rewrites: bool = True) -> None:
        """Hand what has changed to the log, unless that has just failed.

        `rewrites`: also if the whole log must be written anew for it, which waits for the device.
        """
        was_incomplete = self.index.is_incomplete
        if was_incomplete and not (rewrites and self.health.may_write()):
            return
        try:
            self.index.flush()
            self.stamps.begin_when_due()
        except OSError as error:
            self.health.failed_to_write(error)
            return
        if was_incomplete:
            self.health.wrote()
        self.index.rewrite_when_long()

    def erase(self, gone: Sequence[Entry], cause: RemovalCause) -> None:
        """Write removals down and let the slots go. What was cleared, or is wrong, does not come back without a log.

        Raises:
            TierError: blocks were cleared, and the disk takes neither that nor a new epoch.
        """
        is_many = cause is RemovalCause.CLEARED or (cause is RemovalCause.INVALID and len(gone) > MAX_WIPED)
        try:
            if is_many:
                self.stamps.due()
            elif cause is RemovalCause.INVALID:
                self._wipe(gone)
            self.write_down()
            if cause is RemovalCause.CLEARED and self.index.is_incomplete and not self.stamps.begin_epoch():
                raise self._not_cleared(len(gone))
        finally:
            with self.lock:
                self.books.unpin(gone)

    def erase_all(self, gone: Sequence[Entry]) -> None:
        """Everything was cleared: let no slot count any more that was filled before, and let the slots go.

        Raises:
            TierError: the disk takes neither that nor the removals.
        """
        try:
            is_signed = self.stamps.begin_epoch()
            self.write_down()
            if not is_signed and self.index.is_incomplete:
                raise self._not_cleared(len(gone))
        finally:
            with self.lock:
                self.books.unpin(gone)

    def flush(self) -> None:
        """Let all of it outlive a power cut. Waits for the device.

        Raises:
            OSError: the disk refuses.
        """
        self.index.flush()
        self.slab.sync()
        self.index.sync()

    def check(self) -> None:
        """As `DiskTier.check`."""
        self.index.load()
        with self.lock:
            self.books.check()
            entries = self.books.look(self._audited, AUDITED_SLOTS)
            self._audited = self._audited + AUDITED_SLOTS if len(entries) == AUDITED_SLOTS else 0
        try:
            for entry in entries:
                self._check_slot(entry)
        finally:
            with self.lock:
                self.books.look_away(entries)
        with suppress(OSError):  # a disk that refuses is no error of the books
            self.index.check()

    def close(self) -> None:
        """Put everything on the device and let the folder go."""
        self.index.end_loading()
        if self._loader is not None:
            self._loader.join()
        clean = True
        try:
            self.flush()
        except OSError as error:
            clean = False
            log.warning("the disk tier was closed without its last records", extra={"reason": str(error)})
        self.index.close()
        self.slab.close()
        self.folder.release(closed=clean)

    def _open(
        self,
        path: Path,
        capacity_bytes: int,
        eviction: str,
        shares: Mapping[BlockHash, int] | None,
        spare_blocks: SpareBlocks,
        files: Files,
        *,
        direct: bool,
    ) -> None:
        path = slab_path(path, self._codec.namespace, self._codec.value_nbytes)
        nbytes = self._codec.layout.block_nbytes
        room = room_beside_others(path, capacity_bytes, files=files, wall_clock=self._wall_clock)
        slots = (room - slot_nbytes(0)) // slot_nbytes(nbytes)
        if slots < 1:
            raise TierError(
                f"the disk tier's {capacity_bytes} bytes hold no block of {nbytes}; give it more bytes, or zero "
                "for no disk tier"
            )
        self._wanted_slots = slots
        slots = slots_that_fit(path, slots, slot_nbytes(nbytes), files)
        if slots < self._wanted_slots:
            log.warning("the disk tier takes what its disk has room for", extra={"blocks": slots})
        self._files, self._path = files, path
        self.books = DiskBooks(
            slots,
            clock=self._clock,
            wall_clock=self._wall_clock,
            eviction=eviction,
            shares=None if shares is None else {r: slots * size // capacity_bytes for r, size in shares.items()},
            spare_blocks=spare_blocks,
        )
        self.slab = Slab(path, slots, nbytes, files=files, direct=direct)
        try:
            self.index = DiskIndex(path.with_suffix(LOG_SUFFIX), self.slab, files=files)
        except BaseException:
            self.slab.close()
            raise
        self.stamps = Stamps(self.slab, self.index, self.books, self.lock, self.health)
        try:
            self._restore()
        except BaseException:
            self.index.close()
            self.slab.close()
            raise

    def _shortage(self) -> str:
        """Whether there was no room for all slots when the folder was opened; a full tier evicts, so it goes on."""
        slots, wanted = self.slab.num_slots, self._wanted_slots
        if slots == wanted:
            return ""
        missing = (wanted - slots) * self.slab.slot_nbytes
        try:
            is_over = may_take(self._path.parent, wanted, self._files) >= missing
        except OSError:
            is_over = False
        remedy = "there is room now: restart the worker to use it" if is_over else f"free {missing} bytes and restart"
        return (
            f"the disk has no room for the disk tier's {wanted} blocks, so it keeps {slots}, and leaves the rest of "
            f"the disk to others; {remedy}, or give the tier fewer bytes"
        )

    def _restore(self) -> None:
        with _no_collection():
            recovered = recover(self.slab, self.index.read(), self._codec, self._wall_clock())
            self.books.restore(recovered.found)
        self.index.attach(self.books, self.lock)
        self._is_exact = not self.folder.after_a_power_cut
        if recovered.found and not recovered.log_is_whole:
            log.warning("the disk tier's log was lost; its slots were asked", extra={"blocks": len(recovered.found)})
        # Times in the future would be in the future of the next start as well: write them down as they are taken now.
        self.index.is_incomplete |= recovered.log_is_stale or not recovered.log_is_whole
        if len(recovered.found) <= LOADED_BY_STARTER or self.index.is_incomplete:
            self.index.load()
            while self.books.expire() == 0.0:
                pass
            self.books.events.clear()  # nobody has been told of what is gone
        else:
            self._loader = threading.Thread(target=self.index.load_gently, name="kvstore-disk-load", daemon=True)
            self._loader.start()
        self.write_down()

    def _wipe(self, gone: Sequence[Entry]) -> None:
        try:
            for entry in gone:
                self.slab.wipe(entry.index)
        except OSError as error:
            self.health.failed_to_write(error)

    def _not_cleared(self, count: int) -> TierError:
        return TierError(
            f"{count} blocks of the disk tier were dropped, but that could not be written down, so they come back "
            f"should the worker end now; {self.health.problem}; then clear again"
        )

    def _check_slot(self, entry: Entry) -> None:
        try:
            page = self.slab.page(entry.index)
            found = None if page is None else (page.sequence, self._codec.parse(page.header).hash)
        except (OSError, CodecError):
            return
        if found not in (None, (entry.sequence, entry.meta.hash)) and self._is_exact and not entry.removed:
            raise InvariantError(f"slot {entry.index} holds another block than the books say")


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from looking at every object of a large log again and again while it is read."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
