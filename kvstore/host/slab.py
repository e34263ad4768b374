"""The bytes of the host tier: fixed slots in arenas of at most 1 GiB, reserved at once, made ready in the background.

Reserving costs microseconds whatever the size, as the system gives pages only when they are touched. A thread then
touches them slot by slot, in the order of their numbers, and new slots are handed out in the same order: so a slot that
is touched goes first, and one that is not may be used all the same and costs only its own page faults. The thread never
writes into a slot that is in use: it takes a few free ones, touches them and gives them back. Where there is a GPU, an
arena whose slots are all touched is then page-locked.

Invariant: every slot is in use, free and known (`_free`), being touched, or not yet handed out (from `_fresh` on).
All operations are O(1). The generation of a slot counts how often it was given back: bytes that were found under one
generation are still there as long as it has not changed.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import threading
from array import array
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from kvstore.errors import InvariantError, TierError

ARENA_BYTES = 1 << 30
STEP_BYTES = 2 << 20  # touched at once: about a millisecond
AT_ONCE_BYTES = 16 << 20  # a slab of at most so many is made ready by the one who makes it
CLOSE_WAIT_S = 30.0  # for the thread, which may be page-locking an arena
_TOUCH_STRIDE = 1024

logger = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]


class Pinner(Protocol):
    """Page-locks memory, so that a GPU copies from and to it at the speed of the bus."""

    def pin(self, arena: Bytes) -> None:
        """Lock the pages of an arena.

        Raises:
            TierError: the system or the driver refuses.
        """
        ...

    def unpin(self, arena: Bytes) -> None:
        """Undo `pin`.

        Raises:
            TierError: the driver refuses.
        """
        ...


class CudaPinner:
    """Registers arenas with CUDA; PyTorch then takes them for pinned memory."""

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self._device = torch.device(device)

    def pin(self, arena: Bytes) -> None:
        """As `Pinner.pin`, by `cudaHostRegister`."""
        self._call("cudaHostRegister", arena.ctypes.data, arena.nbytes, 0)

    def unpin(self, arena: Bytes) -> None:
        """As `Pinner.unpin`, by `cudaHostUnregister`."""
        self._call("cudaHostUnregister", arena.ctypes.data)

    def _call(self, function: str, *arguments: int) -> None:
        cuda: Any = torch.cuda
        try:
            call = getattr(cuda.cudart(), function)
            with cuda.device(self._device):  # a thread of its own would use the first GPU
                cuda.check_error(call(*arguments))
        except (RuntimeError, AssertionError) as error:  # what torch raises without a usable driver
            raise TierError(
                f"{function} failed: {error}; raise the limit of locked memory (ulimit -l) or give the host tier fewer "
                "bytes"
            ) from error


class Slab:
    """`num_slots` slots of `nbytes` bytes each. Thread-safe."""

    def __init__(
        self, num_slots: int, nbytes: int, *, pinner: Pinner | None = None, arena_bytes: int = ARENA_BYTES
    ) -> None:
        """Reserve the slots and begin to make them ready.

        Args:
            num_slots, nbytes: how many, and bytes of each.
            pinner: page-locks arenas; None: they are only touched.
            arena_bytes: most bytes of one arena; a larger slot is an arena of its own.

        Raises:
            TierError: the system does not give so much address space.
        """
        self.num_slots = num_slots
        self.nbytes = nbytes
        self.generations = array("Q", bytes(8 * num_slots))
        self._per_arena = max(1, arena_bytes // nbytes)
        self._arenas = _reserve(num_slots, self._per_arena, nbytes)
        self._read_only = [arena.reshape(-1).data.toreadonly() for arena in self._arenas]
        self._pinner = pinner
        self._lock = threading.Lock()
        self._touched = threading.Condition(self._lock)
        self._free: list[int] = []
        self._fresh = self._used = 0
        self._touching = range(0)
        self._pinned: list[Bytes] = []
        self._problem = ""
        self._closed = False
        self._thread: threading.Thread | None = None
        if num_slots * nbytes <= AT_ONCE_BYTES:
            self._make_ready()
        else:
            self._thread = threading.Thread(target=self._make_ready, name="kvstore-host-slab", daemon=True)
            self._thread.start()

    @property
    def used(self) -> int:
        """Slots that are taken."""
        return self._used

    @property
    def fresh(self) -> int:
        """Slots that nobody has touched or taken yet."""
        return self.num_slots - self._fresh

    @property
    def pinned_bytes(self) -> int:
        """Bytes that are page-locked."""
        return sum(arena.nbytes for arena in self._pinned)

    @property
    def problem(self) -> str:
        """What went wrong while the slots were made ready, and what to do; empty when nothing did."""
        return self._problem

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until all slots are touched and, if they shall be, page-locked; False: the time was up."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    def take(self) -> int | None:
        """A free slot, a touched one if there is one; None: all are in use."""
        with self._lock:
            if not self._free and self._fresh == self.num_slots:
                self._touched.wait_for(lambda: self._free or not self._touching)
            if self._free:
                self._used += 1
                return self._free.pop()
            if self._fresh == self.num_slots:
                return None
            self._used += 1
            self._fresh += 1
            return self._fresh - 1

    def give_back(self, index: int) -> None:
        """Free a slot that was taken. Its bytes may change from now on."""
        with self._lock:
            self.generations[index] += 1
            self._used -= 1
            self._free.append(index)

    def row(self, index: int) -> Bytes:
        """The bytes of a slot, shape (nbytes,)."""
        arena, place = divmod(index, self._per_arena)
        row: Bytes = self._arenas[arena][place]
        return row

    def read_only(self, index: int) -> memoryview:
        """The bytes of a slot, for reading."""
        arena, place = divmod(index, self._per_arena)
        start = place * self.nbytes
        return self._read_only[arena][start : start + self.nbytes]

    def check(self, used: Sequence[int]) -> None:
        """Audit against the slots that the owner says are taken. O(slots).

        Raises:
            InvariantError: a slot is used twice, or lost.
        """
        with self._lock:
            known = sorted([*used, *self._free, *self._touching])
            if known != list(range(self._fresh)) or len(used) != self._used:
                raise InvariantError("a slot is used twice, or lost")

    def close(self) -> None:
        """End the thread and unlock the pages. The memory goes when the last view of it does."""
        with self._lock:
            self._closed = True
        if not self.wait_ready(CLOSE_WAIT_S):
            logger.warning("host memory was still being made ready at close")
            return
        self._unpin()
        self._arenas, self._read_only = [], []

    def _make_ready(self) -> None:
        while (claim := self._claim()) is not None:
            arena, start = divmod(claim.start, self._per_arena)
            try:
                _touch(self._arenas[arena][start : start + len(claim)])
            finally:  # whoever waits for a slot must not wait for ever
                self._unclaim(claim)
            self._pin_until(claim.stop // self._per_arena)
        if not self._closed:
            self._pin_until(len(self._arenas))

    def _claim(self) -> range | None:
        """Some slots of one arena that nobody has touched or taken; None: there are none, or the slab is closed."""
        with self._lock:
            start = self._fresh
            if self._closed or start == self.num_slots:
                return None
            count = max(1, STEP_BYTES // self.nbytes)
            left_in_arena = self._per_arena - start % self._per_arena
            self._fresh = start + min(count, left_in_arena, self.num_slots - start)
            self._touching = range(start, self._fresh)
            return self._touching

    def _unclaim(self, claim: range) -> None:
        with self._lock:
            self._free.extend(reversed(claim))  # the next one to go is the lowest: readers like neighbours
            self._touching = range(0)
            self._touched.notify_all()

    def _pin_until(self, arena: int) -> None:
        """Page-lock the arenas up to that one; after a refusal no more are tried: copies are slower then, not wrong."""
        while self._pinner is not None and not self._problem and len(self._pinned) < arena:
            chosen = self._arenas[len(self._pinned)]
            try:
                self._pinner.pin(chosen)
            except TierError as error:
                self._problem = f"host memory is not page-locked, so that copies to the GPU are slower: {error}"
                logger.warning("host memory is not page-locked", extra={"reason": str(error)})
            else:
                self._pinned.append(chosen)

    def _unpin(self) -> None:
        while self._pinner is not None and self._pinned:
            try:
                self._pinner.unpin(self._pinned.pop())
            except TierError as error:  # the driver goes with the process: nothing is left to do
                logger.warning("host memory was not unlocked", extra={"reason": str(error)})


def _reserve(num_slots: int, per_arena: int, nbytes: int) -> list[Bytes]:
    """Address space for the slots, arena by arena, each of shape (slots, nbytes).

    Private mappings: shared ones, Python's default, would lie in a file system of limited size.
    """
    arenas = []
    try:
        for start in range(0, num_slots, per_arena):
            slots = min(per_arena, num_slots - start)
            mapping = mmap.mmap(-1, slots * nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            _ask_for_huge_pages(mapping)
            arenas.append(np.frombuffer(mapping, np.uint8).reshape(slots, nbytes))
    except (OSError, ValueError, OverflowError) as error:
        raise TierError(
            f"no room for {num_slots * nbytes} bytes of host RAM; give the host tier fewer bytes"
        ) from error
    return arenas


def _ask_for_huge_pages(mapping: mmap.mmap) -> None:
    """They are touched twice as fast, and copies miss the TLB less: measured, 5 % at 2 MiB. A wish, not a need."""
    with contextlib.suppress(OSError, AttributeError):  # a kernel or a system without them
        mapping.madvise(mmap.MADV_HUGEPAGE)


def _touch(rows: Bytes) -> None:
    """Write into every page of free slots. The stride is below a page's, as NumPy keeps the GIL for short loops."""
    rows.reshape(-1)[::_TOUCH_STRIDE] = 0
